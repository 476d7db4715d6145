"""Cells: the unit of work of a study, identified by everything that fixes its rows."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from quantwm.evaluation import REFERENCES, Reference

ArmKind: TypeAlias = Reference | Literal["float", "quantized"]
WITHOUT_PLAN: tuple[ArmKind, ...] = (*REFERENCES, "float")
"""The arms that need no plan of quantization, by their names."""


@dataclass(frozen=True)
class Cell:
    """Everything that fixes the rows of one arm, measurements apart.

    An arm's name is no part of it: two arms of the same content share a cell, and both list its
    rows under their own names. The plan counts as what it resolves to, layer by layer, so that
    two spellings of one plan are one cell, and a plan that leaves every layer in float is the
    float cell.

    Attributes:
        kind: a reference, the float model or a quantized one.
        model: hash of the float model.
        task: the task's name, version, layout and other settings.
        plan: quantized layer → its scheme; empty for a float model and the references.
        method: how the plan is carried out; None where nothing is quantized.
        options: the method's own settings.
        calibration: `calibration_id` if the arm is calibrated, else None.
        planner: the planner's settings.
        mpc_iterations: replans an episode at most.
        episodes, block, seed: which episodes.
        dtype: compute type, such as "bfloat16".
        device: kind of device, such as "cpu".
        threads: CPU threads of torch, which can change a sum's order.
        numerics: version of the evaluation's arithmetic.
    """

    kind: ArmKind
    model: str
    task: Mapping[str, Any]
    plan: Mapping[str, Any]
    method: str | None
    options: Mapping[str, Any]
    calibration: str | None
    planner: Mapping[str, Any]
    mpc_iterations: int
    episodes: int
    block: str
    seed: int
    dtype: str
    device: str
    threads: int
    numerics: int

    @property
    def id(self) -> str:
        """16 hex digits of the SHA-256 of the cell's canonical JSON."""
        return short_hash(self.to_dict())

    @property
    def quantized(self) -> bool:
        """Whether its model is, an oracle's too, so that the float gate is asked first."""
        return self.kind == "quantized" or bool(self.plan)

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON values."""
        return plain(asdict(self))


def calibration_id(settings: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """Hash of what fixes a calibration: its settings and what it shares with a cell.

    A calibration is a function of the float model, the task, the planner, the compute type and
    the device, so its id is known before it is made, and a dry run can tell which cells are done.
    """
    shared = (
        "model",
        "task",
        "planner",
        "mpc_iterations",
        "dtype",
        "device",
        "threads",
        "numerics",
    )
    return short_hash({"settings": dict(settings)} | {key: cell[key] for key in shared})


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same text for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: tuples become lists."""
    values: dict[str, Any] = json.loads(canonical_json(dict(settings)))
    return values


def short_hash(value: Any) -> str:
    """16 hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]
