"""What a study would compute, and about how long that takes."""

from dataclasses import dataclass
from pathlib import Path

from quantwm.protocols import Planner, Task, WorldModel
from quantwm.study.diagnose import diagnoses_of, files_of
from quantwm.study.estimate import (
    SECONDS_PER_FRAME,
    calibrated_seconds,
    diagnosis_seconds,
    measured_pace,
)
from quantwm.study.prepare import prepare
from quantwm.study.same_study import check_arithmetic, check_folder
from quantwm.study.spec import StudySpec
from quantwm.study.store import ResultsFolder


@dataclass(frozen=True)
class CellPlan:
    """What a dry run says of one arm, or of one diagnosis.

    Attributes:
        arm: its name; of a diagnosis, what it is of.
        cell: id of its cell; "" for a diagnosis.
        done: whether the results folder has the cell.
        seconds: estimated time of what is not kept yet; 0 for a finished cell and for one that an
            arm above shares.
        shares: the arm above with the same cell, if there is one.
    """

    arm: str
    cell: str
    done: bool
    seconds: float
    shares: str | None = None


def plan_study(
    spec: StudySpec,
    out: str | Path,
    *,
    world_model: WorldModel | None = None,
    task: Task | None = None,
    planner: Planner | None = None,
    elsewhere: bool = False,
) -> list[CellPlan]:
    """What `run_study` would do: each arm's cell, then the diagnoses, and how long they may take.

    Checks all that `run_study` checks, times a few rollouts, and writes nothing. Where other
    machines compute (`elsewhere`), it goes by the pace of two AMX cores.

    Raises:
        UsageError, MismatchError: as `run_study`.
    """
    prepared = prepare(
        spec, world_model=world_model, task=task, planner=planner, elsewhere=elsewhere
    )
    folder = ResultsFolder(Path(out))
    check_folder(prepared, folder)
    if not elsewhere:
        check_arithmetic(prepared, folder)
    stored = {
        id: found.seconds
        for id in {cell.id for cell in prepared.cells.values()}
        if (found := folder.peek_cell(id)) is not None
    }
    finished = [(c, stored[c.id]) for c in prepared.cells.values() if c.id in stored]
    pace = SECONDS_PER_FRAME if elsewhere else measured_pace(prepared)
    owners: dict[str, str] = {}
    plans = []
    for arm, cell in prepared.cells.items():
        owner = owners.setdefault(cell.id, arm)
        free = cell.id in stored or owner != arm
        kept = 0 if free else folder.kept_episodes(cell.id)
        left = 1 - kept / cell.episodes
        seconds = 0.0 if free else left * calibrated_seconds(cell, finished, pace)
        shares = owner if owner != arm else None
        plans.append(CellPlan(arm, cell.id, cell.id in stored, seconds, shares))
    for diagnosis in diagnoses_of(prepared):
        files = files_of(prepared, diagnosis)
        done = all(folder.has_diagnosis(file.name, file.id) for file in files)
        seconds = 0.0 if done else diagnosis_seconds(diagnosis, prepared, pace)
        plans.append(CellPlan(diagnosis.label, "", done, seconds))
    return plans
