"""OmniQuant (Shao et al., arXiv 2308.13137): ranges and transforms learned block by block."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantwm.checks import is_integer, is_number
from quantwm.errors import UsageError, unknown_name
from quantwm.methods.learned_block import (
    Example,
    LearnedBlock,
    block_output,
    can_scale,
    holds,
)
from quantwm.methods.registry import register
from quantwm.methods.work import Work
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.block_inputs import BlockCall, block_calls, held_out_rows
from quantwm.quant.observers import RangeObserver
from quantwm.quant.sampling import named_generator
from quantwm.quant.scheme import LayerScheme

logger = logging.getLogger(__name__)

FLOAT_PATH, SAME_INPUTS = "float_path", "same_inputs"


@register
@dataclass(frozen=True)
class OmniQuant:
    """OmniQuant: learnable weight clipping and learnable equivalent transformation.

    Blocks are trained in forward order, on the inputs that they get once all blocks before them
    are quantized. Of the paper's two targets, a block that only encodes observations gets the
    first: what it gives in the float model for the same observations, so that it also makes up
    for errors made before it. A block that rollouts run gets the second: what the float block
    gives for the same inputs. For a rollout reads its own predictions, so after a few steps the
    float path holds other states, and its outputs ask for what the inputs do not say.

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
        target: "float_path" as above, or "same_inputs": all blocks get the second target.

    Raises:
        UsageError: an option out of range.
    """

    name: ClassVar[str] = "omniquant"
    scales_channels: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True

    epochs: int = 20
    batch_rows: int = 4
    lr_clip: float = 0.1
    lr_transform: float = 0.02
    patience: int = 5
    tokens: int = 8192
    target: str = FLOAT_PATH

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_rows", "patience", "tokens"):
            value = getattr(self, name)
            if not is_integer(value, 1):
                raise UsageError(f"omniquant: {name} is an integer of at least 1, got {value!r}")
        for name in ("lr_clip", "lr_transform"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < 1:
                raise UsageError(f"omniquant: {name} is a number between 0 and 1, got {value!r}")
        if self.target not in (FLOAT_PATH, SAME_INPUTS):
            raise unknown_name("omniquant target", str(self.target), (FLOAT_PATH, SAME_INPUTS))

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

        They are relative L2 errors of the block's output against its target.

        Raises:
            NonFiniteError: an input of the block holds NaN or infinite values.
            UsageError: too few calibration samples, or a block that cannot be repeated.
        """
        # Gradients are needed, whatever the caller has turned off.
        with torch.inference_mode(False), torch.enable_grad():
            if self.name not in work.memory:
                work.memory[self.name] = self._float_path(work)
            calls = block_calls(work.replay, [block], self.tokens)[block]
            learned = LearnedBlock(work, block, calls, make_observer)
            if learned.parameters():
                targets = work.memory[self.name].pop(block, None) or learned.float_outputs()
                report = self._train(learned, *_examples(calls, targets, block))
                work.report.setdefault(self.name, {})[block] = report
            learned.quantize()

    def _float_path(self, work: Work) -> dict[str, list[Tensor]]:
        """What each block that only encodes makes of its calls in the float model."""
        if self.target == SAME_INPUTS:
            return {}
        calls = block_calls(work.replay, list(work.blocks), self.tokens)
        return {
            block: [block_output(work.world_model.get_submodule(block), call) for call in several]
            for block, several in calls.items()
            if not work.replay.rolls_out(block)
        }

    def _train(
        self, learned: LearnedBlock, fitted: Sequence[Example], unseen: Sequence[Example]
    ) -> dict[str, float]:
        """Train a block and leave it in its best state.

        Args:
            learned: the block.
            fitted: to train with.
            unseen: held out.

        Returns:
            relative output errors before and after, on either part, and epochs run and kept.
        """
        before = {
            "held_out_before": learned.error(unseen),
            "training_before": learned.error(fitted),
        }
        generator = named_generator("training of", learned.name)
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


def _examples(
    calls: Sequence[BlockCall], targets: Sequence[Tensor], block: str
) -> tuple[list[Example], list[Example]]:
    """Examples to train with, and those held out."""
    masks = held_out_rows(calls, block)
    both = [Example(call, target) for call, target in zip(calls, targets, strict=True)]
    fitted = [one.rows(~mask) for one, mask in zip(both, masks, strict=True) if not mask.all()]
    unseen = [one.rows(mask) for one, mask in zip(both, masks, strict=True) if mask.any()]
    return fitted, unseen


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
