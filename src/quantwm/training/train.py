"""Training the predictor: resumable, bit-reproducible from its step number."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantwm.compute import fast_products
from quantwm.errors import UsageError
from quantwm.models.dino_wm import DINOWM
from quantwm.training.batches import Windows
from quantwm.training.initialization import trainable
from quantwm.training.loop import Report, Schedule, optimize
from quantwm.training.loss import validate, window_loss
from quantwm.training.state import TrainingState


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        steps: optimiser steps in all.
        batch_size: windows a step.
        learning_rate: peak of AdamW's rate, after `warmup` steps; cosine decay to zero.
        weight_decay: AdamW's, on matrices only.
        unroll: losses a window: DINO-WM's own, and of each further frame imagined from the first
            one on; 1 is DINO-WM's alone.
        ramp: share of the steps over which the losses a window grow evenly from 1 to `unroll`; 0
            takes all of them from the beginning. The first steps are cheaper, and predictions are
            fed back once they resemble frames.
        proprio_weight: of proprioception in the loss, see `window_loss`; None as DINO-WM.
        ema: decay of the averaged weights that are kept.
        clip: largest gradient norm.
        checkpoint_every, validate_every: steps.
        seed: of initialisation and shuffling.
    """

    steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.01
    unroll: int = 2
    ramp: float = 0.0
    proprio_weight: float | None = None
    ema: float = 0.998
    clip: float = 1.0
    checkpoint_every: int = 500
    validate_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.unroll < 1:
            raise UsageError("steps, batch_size and unroll must be at least 1")
        if not 0 <= self.ramp <= 1:
            raise UsageError(f"ramp must be a share of the steps, 0 to 1, got {self.ramp}")
        if self.proprio_weight is not None and not self.proprio_weight >= 0:
            raise UsageError(f"proprio_weight must not be negative, got {self.proprio_weight}")


def train(
    world_model: DINOWM,
    windows: Windows,
    validation: Windows,
    folder: Path,
    settings: TrainingSettings,
    *,
    encoder: str | None = None,
    init: str | None = None,
    report: Report | None = None,
) -> DINOWM:
    """Train predictor and embeddings; the encoder is left alone.

    Checkpoints and a validation curve (`curve.jsonl`) go to `folder`; started again with the same
    settings, training continues from the last checkpoint and ends with the same weights.

    Args:
        encoder: checksum of an encoder that is not the package's; a run goes on only with the
            encoder that it began with.
        init: hash of the model that the run goes on from, if it does.
        report: progress.

    Returns:
        the model with the averaged weights, in evaluation mode.

    Raises:
        MismatchError: the folder holds a run of other settings or another model.
        NonFiniteError: the loss became NaN or infinite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = world_model.config.to_dict()
    # A decoder is trained afterwards, and may be asked for once the rest is finished.
    model.pop("decoder", None)
    identity: dict[str, Any] = {"settings": asdict(settings), "model": model}
    if encoder is not None:
        identity["encoder"] = encoder
    if init is not None:
        identity["init"] = init
    state = TrainingState(
        trainable(world_model),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        decay=settings.ema,
    )
    state.resume(folder, identity)
    world_model.train()
    batches = windows.shuffled(settings.batch_size, settings.seed, state.step)

    def loss() -> Tensor:
        batch = next(batches)
        with fast_products(world_model.device):
            unroll = unroll_at(state.step, settings)
            return window_loss(world_model, batch, unroll, settings.proprio_weight)

    optimize(
        state,
        Schedule(
            settings.steps,
            lambda step: _learning_rate(step, settings),
            settings.clip,
            settings.validate_every,
            settings.checkpoint_every,
        ),
        loss,
        lambda: validate(world_model, validation),
        folder,
        identity,
        name="predictor",
        report=report,
    )
    return world_model.eval()


def unroll_at(step: int, settings: TrainingSettings) -> int:
    """Losses a window at a step."""
    ramped = settings.ramp * settings.steps
    if step >= ramped:
        return settings.unroll
    return 1 + int(settings.unroll * step / ramped)


def _learning_rate(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
