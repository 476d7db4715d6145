"""What a study will cost: a dry run's estimate, good to a factor of two or three."""

from collections.abc import Iterable, Mapping
from typing import Any

from quantwm.errors import UsageError
from quantwm.planning.defaults import default_planner
from quantwm.planning.planners import planner_from_settings
from quantwm.study.cells import ArmKind, Cell

SECONDS_PER_FRAME: dict[ArmKind, float] = {
    "oracle-state": 3e-6,
    "oracle-latent": 6e-4,
    "float": 3e-4,
    "quantized": 3e-4,
}
"""Seconds to predict (or simulate, or render and encode) one candidate's frame, by kind of arm.

Measured with the bundled compact model on two AMX cores in bfloat16 (the quick study's W2 arm,
whose episodes run to the end). Oracle-latent encodes one image a candidate, which is spread over
the frames of its plan.
"""
ACTIVATION_FACTOR = 2.0
"""How much slower the simulated quantization of layers' inputs makes a prediction."""


def estimated_seconds(cell: Cell) -> float:
    """Estimated wall-clock time of a cell, as if no episode succeeded before its last iteration.

    A planner that is none of quantwm's counts as the compact default.
    """
    frames = _frames(cell.planner)
    inputs = any("a" in str(scheme).partition("-")[0] for scheme in cell.plan.values())
    factor = ACTIVATION_FACTOR if inputs else 1.0
    return cell.episodes * cell.mpc_iterations * frames * SECONDS_PER_FRAME[cell.kind] * factor


def calibrated_seconds(cell: Cell, finished: Iterable[tuple[Cell, float]]) -> float:
    """The estimate, scaled by what the study's finished cells took against theirs.

    Args:
        cell: to be estimated.
        finished: cells of the same study with their seconds; only the same oracle, or
            other runs of the model, say something about it.
    """
    same = [(one, seconds) for one, seconds in finished if _pool(one) == _pool(cell)]
    expected = sum(estimated_seconds(one) for one, _ in same)
    took = sum(seconds for _, seconds in same)
    return estimated_seconds(cell) * (took / expected if expected and took else 1.0)


def _frames(settings: Mapping[str, Any]) -> int:
    """Frames that one plan predicts."""
    try:
        planner = planner_from_settings(settings)
    except UsageError:
        planner = default_planner("")
    return planner.rollouts * planner.horizon


def _pool(cell: Cell) -> str:
    return cell.kind if cell.kind.startswith("oracle") else "model"
