"""Reading the results of studies back: rows by arm, and what each arm is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantwm.errors import UsageError
from quantwm.evaluation import Row
from quantwm.study.arms import float_arm, reference_arm
from quantwm.study.labels import ArmLabels, labels_of
from quantwm.study.rows import read_parquet
from quantwm.study.spec import GATE, StudySpec
from quantwm.study.store import CONFIG, EPISODES


@dataclass(frozen=True)
class TaskResults:
    """The rows of a study in one task.

    Attributes:
        task: its name.
        arms: arm's name → what it is, in the study's order; only arms that have rows.
        rows: arm's name → its rows, in the order of episodes.
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
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    known = [arm for arm in spec.arms if arm.name in by_arm]
    return TaskResults(
        task=str(spec.task["name"]),
        arms={arm.name: labels_of(arm) for arm in known},
        rows={
            arm.name: sorted(by_arm[arm.name], key=lambda row: int(row["episode"])) for arm in known
        },
        gate=spec.gate,
        reference=own.name if (own := float_arm(known)) is not None else None,
        compared={
            arm.name: reference.name
            for arm in known
            if (reference := reference_arm(known, arm)) is not None
        },
    )
