"""What a study will cost: a dry run's estimate, good to a factor of two or three."""

from collections.abc import Mapping

from quantwm.study.cells import ArmKind, Cell
from quantwm.study.store import ResultsFolder

SECONDS_PER_FRAME: dict[ArmKind, float] = {
    "oracle-state": 2e-6,
    "oracle-latent": 4e-3,
    "float": 6e-4,
    "quantized": 8e-4,
}
"""Seconds to predict (or simulate, or render and encode) one candidate's frame, by kind of arm.

Measured with the bundled compact model on two AMX cores in bfloat16; oracle-latent pays one
encoding a candidate instead of one prediction a frame, expressed in the same unit. Simulated
quantization of activations costs the difference between the last two.
"""
_DEFAULTS = {"samples": 64, "steps": 5, "horizon": 5}


def estimated_seconds(cell: Cell) -> float:
    """Estimated wall-clock time of a cell, as if no episode succeeded before its last iteration.

    A planner with other settings than CEM's counts as the compact default.
    """
    frames = 1.0
    for name, default in _DEFAULTS.items():
        frames *= float(cell.planner.get(name, default))
    return cell.episodes * cell.mpc_iterations * frames * SECONDS_PER_FRAME[cell.kind]


def measured_seconds(folder: ResultsFolder, cells: Mapping[str, Cell]) -> dict[ArmKind, float]:
    """Mean seconds of the study's finished cells, by kind: a better estimate than constants."""
    found: dict[ArmKind, list[float]] = {}
    for cell in {cell.id: cell for cell in cells.values()}.values():
        seconds = folder.peek_seconds(cell.id)
        if seconds is not None:
            found.setdefault(cell.kind, []).append(seconds)
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def estimate(cell: Cell, measured: Mapping[ArmKind, float]) -> float:
    """Seconds of a missing cell: what its kind took here, else the constants."""
    return measured.get(cell.kind, estimated_seconds(cell))


