"""Reading the results of studies back: rows by arm, and what each arm is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from quantwm.errors import UsageError
from quantwm.evaluation import Row
from quantwm.study.arms import float_arm, reference_arm
from quantwm.study.labels import ArmLabels, labels_of
from quantwm.study.rows import read_parquet
from quantwm.study.spec import GATE, StudySpec
from quantwm.study.store import CONFIG, EPISODES

Origin: TypeAlias = tuple[str, ...]
"""What rows must share to be compared, see `origin_of`."""
_ORIGIN = ("device", "arithmetic", "dtype", "numerics")
_WITHOUT_MODEL = ("oracle-state", "random")
"""Kinds of arms that compute nothing which depends on the processor's arithmetic."""


@dataclass(frozen=True)
class TaskResults:
    """The rows of a study in one task.

    Attributes:
        task: its name.
        arms: arm's name → what it is, in the study's order; only arms that have rows.
        rows: arm's name → its rows, in the order of episodes; those of the first origin that has
            the arm.
        origins: arm's name → origin → its rows there: the same study on another device, or with
            other numerics, is another sample, and only rows of one origin are compared.
        reference: name of the study's float arm, or None.
        compared: arm's name → name of the float arm that it is compared with: that of the same
            budget where there is one; arms that are compared with none are left out.
        gate: the study's; a float model below it is no reference.
    """

    task: str
    arms: Mapping[str, ArmLabels]
    rows: Mapping[str, Sequence[Row]] = field(repr=False)
    reference: str | None = None
    compared: Mapping[str, str] = field(default_factory=dict)
    gate: float = GATE
    origins: Mapping[str, Mapping[Origin, Sequence[Row]]] = field(default_factory=dict, repr=False)

    def together(self, *names: str) -> tuple[Sequence[Row], ...] | None:
        """The rows of some arms at the first origin that all of them have; None without one."""
        sets = [self.origins.get(name) or {(): self.rows[name]} for name in names]
        free = [self.arms[name].kind in _WITHOUT_MODEL for name in names]
        for origin in dict.fromkeys(origin for own in sets for origin in own):
            found = [
                next(iter(own.values())) if anywhere else own.get(origin)
                for own, anywhere in zip(sets, free, strict=True)
            ]
            if all(rows is not None for rows in found):
                return tuple(rows for rows in found if rows is not None)
        return None

    def float_rows(self, name: str) -> Sequence[Row] | None:
        """The rows of the float arm that an arm's own `rows` are compared with; None without."""
        reference = self.compared.get(name)
        if reference is None:
            return None
        here = self.origins.get(name) or {}
        own = next((origin for origin in here if here[origin] is self.rows[name]), None)
        if own is None or self.arms[name].kind in _WITHOUT_MODEL or reference not in self.origins:
            return self.rows[reference]
        return self.origins[reference].get(own)


def origin_of(row: Row) -> Origin:
    """Where a row was computed, as far as its numbers depend on it."""
    try:
        said = json.loads(row["provenance"])
        # Threads order a CPU's sums.
        keys = (*_ORIGIN, "threads") if said["device"] == "cpu" else _ORIGIN
        return tuple(str(said.get(key)) for key in keys)
    except (KeyError, ValueError, AttributeError):
        return ()


def read_results(folder: str | Path) -> TaskResults:
    """What a results folder holds so far.

    Raises:
        UsageError: it is no results folder, or no arm is finished.
        CorruptFileError: a file in it is damaged.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path} is no results folder: it has no {CONFIG}")
    if not (path / EPISODES).is_file():
        raise UsageError(f"{path} has no rows yet: no arm is finished")
    spec = StudySpec.from_yaml(path / CONFIG)
    return results_of(spec, read_parquet(path / EPISODES))


def results_of(spec: StudySpec, rows: Sequence[Row]) -> TaskResults:
    """A study and its rows, put together."""
    by_arm: dict[str, dict[Origin, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: int(row["episode"])):
        by_arm.setdefault(row["arm"], {}).setdefault(origin_of(row), []).append(row)
    known = [arm for arm in spec.arms if arm.name in by_arm]
    first = origin_of(rows[0]) if rows else ()
    return TaskResults(
        task=str(spec.task["name"]),
        arms={arm.name: labels_of(arm) for arm in known},
        rows={
            arm.name: by_arm[arm.name].get(first) or next(iter(by_arm[arm.name].values()))
            for arm in known
        },
        origins={arm.name: by_arm[arm.name] for arm in known},
        gate=spec.gate,
        reference=own.name if (own := float_arm(known)) is not None else None,
        compared={
            arm.name: reference.name
            for arm in known
            if (reference := reference_arm(known, arm)) is not None
        },
    )
