"""Training the predictor: resumable, bit-reproducible from its step number."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantwm.checks import is_integer, is_number
from quantwm.compute import fast_products
from quantwm.errors import UsageError
from quantwm.files import make_folder
from quantwm.models.dino_wm import DINOWM
from quantwm.seeds import keyed_generator
from quantwm.training.batches import Windows
from quantwm.training.initialization import trainable
from quantwm.training.loop import Report, Schedule, optimize
from quantwm.training.loss import validate, window_loss
from quantwm.training.state import TrainingState

_DROPOUT = 6


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
        seed: of initialisation, shuffling and dropout.

    Raises:
        UsageError: a value out of range.
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
        for name in ("steps", "batch_size", "unroll", "checkpoint_every", "validate_every"):
            if not is_integer(getattr(self, name), 1):
                raise UsageError(
                    f"{name} must be an integer of at least 1, got {getattr(self, name)!r}"
                )
        if not is_integer(self.warmup, 0):
            raise UsageError(f"warmup must be a number of steps, got {self.warmup!r}")
        for name in ("learning_rate", "weight_decay"):
            if not is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)!r}")
        if not is_number(self.clip) or self.clip <= 0:
            raise UsageError(f"clip must be a norm above 0, got {self.clip!r}")
        if not is_number(self.ema) or not 0 <= self.ema < 1:
            raise UsageError(f"ema must be a decay, from 0 to below 1, got {self.ema!r}")
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
    data: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> DINOWM:
    """Train predictor and embeddings; the encoder is left alone.

    Checkpoints and a validation curve (`curve.jsonl`) go to `folder`; started again with the same
    settings, training continues from the last checkpoint and ends with the same weights.

    Args:
        encoder: checksum of an encoder that is not the package's; a run goes on only with the
            encoder that it began with.
        init: hash of the model that the run goes on from, if it does.
        data: says which data these are, JSON values; a run goes on only with these.
        report: progress.

    Returns:
        the model with the averaged weights, in evaluation mode.

    Raises:
        MismatchError: the folder holds a run of other settings, another model or other data.
        NonFiniteError: the loss became NaN or infinite.
    """
    make_folder(folder)
    model = world_model.config.to_dict()
    # A decoder is trained afterwards, and may be asked for once the rest is finished.
    model.pop("decoder", None)
    identity: dict[str, Any] = {"settings": asdict(settings), "model": model}
    if encoder is not None:
        identity["encoder"] = encoder
    if init is not None:
        identity["init"] = init
    if data is not None:
        identity["data"] = dict(data)
    state = TrainingState(
        trainable(world_model),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        decay=settings.ema,
    )
    state.resume(folder, identity)
    world_model.train()
    batches = windows.shuffled(settings.batch_size, settings.seed, state.step)

    device = world_model.device
    drawn = [device] if device.type == "cuda" else []

    def loss() -> Tensor:
        batch = next(batches)
        with torch.random.fork_rng(drawn), fast_products(device):
            # Dropout draws from torch's own generator.
            key = keyed_generator(settings.seed, _DROPOUT, state.step)
            torch.manual_seed(int(key.integers(1 << 62)))
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
