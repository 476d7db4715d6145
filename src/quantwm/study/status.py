"""How far a study is, read from its folder without loading anything."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from quantwm.study.claims import Claims
from quantwm.study.spec import RECORD
from quantwm.study.store import ResultsFolder
from quantwm.study.tables import recorded_study

State: TypeAlias = Literal["done", "running", "failed", "waiting"]
STATES: tuple[State, ...] = ("done", "running", "failed", "waiting")


@dataclass(frozen=True)
class ArmStatus:
    """Where an arm stands.

    Attributes:
        arm: its name.
        cell: id of its cell.
        state: "done", "running" (a live worker has it), "failed" or "waiting".
        note: the error of a failed one, the worker of a running one, and how many episodes are
            kept of one that is not finished.
        seconds: what a finished one took, or for how long a running one has been running.
    """

    arm: str
    cell: str
    state: State
    note: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands.

    Attributes:
        folder: its results.
        arms: in its order.
        diagnoses: files of diagnoses that are made, and that it asks for.
    """

    folder: Path
    arms: tuple[ArmStatus, ...]
    diagnoses: tuple[int, int] = (0, 0)

    def count(self, state: State) -> int:
        """Arms in a state."""
        return Counter(arm.state for arm in self.arms)[state]

    def __str__(self) -> str:
        counted = ", ".join(f"{self.count(s)} {s}" for s in STATES if self.count(s))
        made, wanted = self.diagnoses
        besides = f"; diagnoses: {made} of {wanted} files" if wanted else ""
        return f"{self.folder}: {len(self.arms)} arms, {counted}{besides}"


def study_status(folder: str | Path) -> StudyStatus:
    """Where the study in a results folder stands.

    Raises:
        UsageError: the folder holds no study.
        CorruptFileError: its configuration is damaged.
    """
    results = ResultsFolder(Path(folder))
    config, cells = recorded_study(results)
    claims = Claims(results.claims)
    wanted = config[RECORD].get("diagnoses") or {}
    made = sum(results.has_diagnosis(name, id) for name, id in wanted.items())
    return StudyStatus(
        results.path,
        tuple(_arm(name, id, results, claims) for name, id in cells.items()),
        (made, len(wanted)),
    )


def _arm(name: str, id: str, results: ResultsFolder, claims: Claims) -> ArmStatus:
    finished = results.peek_cell(id)
    if finished is not None:
        return ArmStatus(name, id, "done", seconds=finished.seconds)
    kept = results.kept_episodes(id)

    def noted(note: str) -> str:
        return ", ".join(filter(None, [note, f"{kept} episodes kept" if kept else ""]))

    holder = claims.holder(id)
    if holder is not None:
        worker = f"process {holder.get('pid')} on {holder.get('host')}"
        since = time.time() - float(holder["started"])
        return ArmStatus(name, id, "running", noted(worker), since)
    failure = results.load_failure(id)
    if failure is not None:
        return ArmStatus(name, id, "failed", noted(str(failure.get("error", ""))))
    return ArmStatus(name, id, "waiting", noted(""))
