"""OmniQuant (Shao et al., arXiv 2308.13137): ranges and transforms learned block by block."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from quantwm.errors import UsageError
from quantwm.methods.learned_block import Example, LearnedBlock, can_scale, holds
from quantwm.methods.registry import register
from quantwm.methods.work import Work
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.block_inputs import BlockCall, block_calls, keyed_generator, split_samples
from quantwm.quant.observers import RangeObserver
from quantwm.quant.scheme import LayerScheme

logger = logging.getLogger(__name__)


@register
@dataclass(frozen=True)
class OmniQuant:
    """OmniQuant: learnable weight clipping and learnable equivalent transformation.

    Each block is trained, in forward order, to give what the float block gives for the same
    inputs: those that it gets once all blocks before it are quantized. (The paper's first target
    is the float block's output for the inputs of the float path. In a rollout the model reads its
    own predictions, so after a few steps the two paths hold different states, and that target
    asks for what the inputs do not say; the one used here is the paper's second.)

    Learned are the range of every weight scale, as a share of what the weights span, and, where a
    normalisation within the block feeds linears, a factor and (if the normalisation has a bias) a
    shift for each of its channels. Both are folded into the weights; nothing is left of them at
    run time but a bias where a linear had none.

    Rows of a fifth of the calibration samples are held out. What is kept is the state of the
    epoch that does best on them, or the state before training if none does better. For static
    activations the ranges are measured anew each epoch, from the block's inputs in float.

    Layers without weights to round and without such a normalisation (attention matmuls) have
    nothing to learn: their inputs are rounded in training as they will be afterwards.

    Attributes:
        epochs: passes over the training rows at most.
        batch_rows: images or candidates in a step.
        lr_clip: AdamW's learning rate of the ranges' logits. The paper has 0.005 to 0.01 for
            thousands of steps; these defaults are for a hundred, chosen on calibration data.
        lr_transform: of the logarithms of factors, and of shifts relative to a channel's largest
            magnitude.
        patience: epochs without progress on the held-out rows after which training ends.
        tokens: of a block's input to keep, over all rows; bounds memory and time.

    Raises:
        UsageError: an option out of range.
    """

    name: ClassVar[str] = "omniquant"
    needs_calibration: ClassVar[bool] = True

    epochs: int = 20
    batch_rows: int = 4
    lr_clip: float = 0.1
    lr_transform: float = 0.02
    patience: int = 5
    tokens: int = 8192

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_rows", "patience", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"omniquant: {name} is an integer of at least 1, got {value!r}")
        for name in ("lr_clip", "lr_transform"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise UsageError(f"omniquant: {name} is a number between 0 and 1, got {value!r}")

    def problems(
        self,
        world_model: WorldModel,
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],
    ) -> list[str]:
        """Layers outside their block, and plans that leave nothing to learn."""
        asked = {name: group for group in groups for name in group.layers if name in schemes}
        outside = [name for name, group in asked.items() if not holds(group.block, name)]
        if outside:
            return [
                f"{', '.join(outside)}: not in the block that quantizable_groups() names, whose "
                "output they would be trained on; correct LinearGroup.block"
            ]
        weighted = any(scheme.weight is not None for scheme in schemes.values())
        if weighted or any(can_scale(world_model, group, schemes) for group in groups):
            return []
        return [
            f"nothing to learn for {', '.join(asked)}: no weights are quantized, and no "
            "normalisation in their block feeds them; use rtn"
        ]

    def learn(self, work: Work, block: str, make_observer: Callable[[str], RangeObserver]) -> None:
        """Quantize one block; errors before and after go to `work.report["omniquant"][block]`.

        Raises:
            NonFiniteError: an input of the block holds NaN or infinite values.
            UsageError: too few calibration samples, or a block that cannot be repeated.
        """
        calls = block_calls(work.replay, block, self.tokens)
        # Gradients are needed, whatever the caller has turned off.
        with torch.inference_mode(False), torch.enable_grad():
            learned = LearnedBlock(work, block, calls, make_observer)
            if learned.parameters():
                report = self._train(learned, *split_samples(calls, block))
                work.report.setdefault(self.name, {})[block] = report
            learned.quantize()

    def _train(
        self, learned: LearnedBlock, training: Sequence[BlockCall], held_out: Sequence[BlockCall]
    ) -> dict[str, float]:
        """Train a block and leave it in its best state.

        Returns:
            relative output errors before and after, on either part, and epochs run and kept.
        """
        fitted, unseen = learned.examples(training), learned.examples(held_out)
        before = {
            "held_out_before": learned.error(unseen),
            "training_before": learned.error(fitted),
        }
        generator = keyed_generator("training of", learned.name)
        optimizer, unit = self._optimizer(learned), _mean_square(fitted, before["training_before"])
        best, kept, least, epoch = learned.state(), 0, before["held_out_before"], 0
        for epoch in range(1, self.epochs + 1):
            for batch in _batches(fitted, self.batch_rows, generator):
                optimizer.zero_grad()
                error = batch.call.run(learned.module).float() - batch.target
                (error.square().mean() / unit).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            learned.measure()
            now = learned.error(unseen)
            logger.debug("%s: epoch %d, held-out error %.5f", learned.name, epoch, now)
            if now < least:
                best, kept, least = learned.state(), epoch, now
            elif epoch - kept >= self.patience:
                break
        learned.restore(best)
        report = before | {"held_out_after": least, "training_after": learned.error(fitted)}
        logger.info("%s: %s", learned.name, _summary(report, kept, epoch))
        return report | {"epochs": epoch, "best_epoch": kept}

    def _optimizer(self, learned: LearnedBlock) -> torch.optim.Optimizer:
        clip = learned.parameters("logit")
        transform = learned.parameters("log_scale", "relative_shift")
        rates = ((clip, self.lr_clip), (transform, self.lr_transform))
        groups = [{"params": parameters, "lr": rate} for parameters, rate in rates if parameters]
        return torch.optim.AdamW(groups, weight_decay=0.0)


def _batches(
    examples: Sequence[Example], rows: int, generator: torch.Generator
) -> Iterator[Example]:
    """All examples once, at most `rows` at a time and in random order."""
    parts = [
        (example, index)
        for example in examples
        for index in torch.split(torch.randperm(len(example.call), generator=generator), rows)
    ]
    for position in torch.randperm(len(parts), generator=generator).tolist():
        example, index = parts[position]
        yield example.rows(index)


def _mean_square(examples: Sequence[Example], relative_error: float) -> float:
    """Mean squared error of an output that is off by `relative_error`; the unit of the loss.

    In it gradients are far from the least that Adam tells from zero.
    """
    total = sum(float(example.target.double().square().sum()) for example in examples)
    values = sum(example.target.numel() for example in examples)
    return max(relative_error**2 * total / values, 1e-30)


def _summary(report: Mapping[str, float], kept: int, epochs: int) -> str:
    return (
        "relative output error {held_out_before:.4f} -> {held_out_after:.4f} on held-out rows, "
        "{training_before:.4f} -> {training_after:.4f} on training rows"
    ).format(**report) + f" (epoch {kept} of {epochs})"
