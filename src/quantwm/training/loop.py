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
from quantwm.files import atomic_path, writing
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
        NonFiniteError: the loss or a figure became NaN or infinite.
        QuantWMError: the folder cannot be written, or the disk is full.
    """
    curve = folder / "curve.jsonl"
    _forget_after(state.step, curve)
    while state.step < schedule.steps:
        value = loss()
        figures = {"loss": value.item()}
        _check_finite(figures, name, state.step)
        state.optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        state.apply_gradients(schedule.learning_rate(state.step), schedule.clip)
        last = state.step == schedule.steps
        if last or state.step % schedule.validate_every == 0:
            state.swap()
            figures |= validate()
            state.swap()
            # Here too: nobody asks for a loss after the last step.
            _check_finite(figures, name, state.step)
            with writing(curve), curve.open("a") as file:
                file.write(json.dumps({"step": state.step, **figures}) + "\n")
            logger.info("%s, step %d: %s", name, state.step, figures)
        if last or state.step % schedule.checkpoint_every == 0:
            state.save(folder, identity)
        if report is not None:
            report(state.step, schedule.steps, figures)
    state.swap()


def _check_finite(figures: dict[str, float], name: str, step: int) -> None:
    for figure, value in figures.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {name}'s {figure} is {value} at step {step}; lower the learning rate"
            )


def _forget_after(step: int, curve: Path) -> None:
    """Drop a curve's points after the checkpoint that a run goes on from: they come again."""
    if not curve.is_file():
        return
    with writing(curve):
        lines = curve.read_text().splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        with atomic_path(curve) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a curve's point; infinite where an interruption left half of one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
