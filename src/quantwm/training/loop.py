"""The loop that trains a predictor or a decoder: checks, validation, checkpoints, resuming."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantwm.errors import NonFiniteError
from quantwm.training.state import TrainingState

logger = logging.getLogger(__name__)

Report = Callable[[int, int, dict[str, float]], None]
"""(step, of how many, figures)"""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: optimiser steps in all.
        learning_rate: of a step, from 0 on.
        clip: largest gradient norm.
        validate_every, checkpoint_every: steps; the last one does both.
    """

    steps: int
    learning_rate: Callable[[int], float]
    clip: float
    validate_every: int
    checkpoint_every: int


def optimize(
    state: TrainingState,
    schedule: Schedule,
    loss: Callable[[], Tensor],
    validate: Callable[[], dict[str, float]],
    folder: Path,
    identity: dict[str, Any],
    *,
    name: str,
    report: Report | None = None,
) -> None:
    """Train from the state's step to the schedule's last, and leave the averaged parameters.

    Args:
        loss: of the next batch, a scalar with its graph.
        validate: figures for the curve, measured with the averaged parameters.
        folder: receives `checkpoint.pt` and `curve.jsonl`.
        identity: what a resumed run must share.
        name: of what is trained, in messages.
        report: progress.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    while state.step < schedule.steps:
        value = loss()
        figures = {"loss": value.item()}
        if not math.isfinite(figures["loss"]):
            raise NonFiniteError(
                f"the {name}'s loss is {figures['loss']} at step {state.step}; lower the "
                "learning rate"
            )
        state.optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        state.apply_gradients(schedule.learning_rate(state.step), schedule.clip)
        last = state.step == schedule.steps
        if last or state.step % schedule.validate_every == 0:
            state.swap()
            figures |= validate()
            state.swap()
            with (folder / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps({"step": state.step, **figures}) + "\n")
            logger.info("%s, step %d: %s", name, state.step, figures)
        if last or state.step % schedule.checkpoint_every == 0:
            state.save(folder, identity)
        if report is not None:
            report(state.step, schedule.steps, figures)
    state.swap()
