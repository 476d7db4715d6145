"""A worker: computes those cells of a study that nobody else has, until none is left."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from quantwm.compute import NUMERICS_VERSION, cpu_threads, package_version, source_commit
from quantwm.errors import MismatchError
from quantwm.protocols import Planner, Task, WorldModel
from quantwm.study.claims import HEARTBEAT, STALE, Claims
from quantwm.study.diagnose import Diagnoses, Diagnosis
from quantwm.study.gate import gate_of
from quantwm.study.prepare import Prepared, prepare
from quantwm.study.same_study import check_folder, settle_arithmetic
from quantwm.study.spec import RECORD, StudySpec
from quantwm.study.store import ResultsFolder
from quantwm.study.work import CellWork, StudyProgress

logger = logging.getLogger(__name__)

Stage: TypeAlias = Literal["cells", "diagnoses", "all"]
POLL = 1.0
"""Seconds between two looks at what other workers have finished."""


def this_version() -> dict[str, Any]:
    """What a worker must share with those that it works with."""
    return {
        "quantwm": package_version(),
        "commit": source_commit(),
        "numerics": NUMERICS_VERSION,
    }


@dataclass(frozen=True)
class Job:
    """What a worker does; it can be sent to another process or machine.

    Attributes:
        spec: the study, resolved.
        folder: its results folder, on a drive that all workers share.
        stage: "cells", "diagnoses", or "all": diagnoses once every cell is finished.
        arms: whose cells to compute; None for all.
        world_model, task, planner: in place of those that the study names.
        gated: as in `run_study`.
        version: of the quantwm that wrote the job.
        heartbeat, stale, poll: seconds, as in `claims` and `POLL`.
    """

    spec: StudySpec
    folder: Path
    stage: Stage = "cells"
    arms: tuple[str, ...] | None = None
    world_model: WorldModel | None = None
    task: Task | None = None
    planner: Planner | None = None
    gated: bool = True
    version: dict[str, Any] = field(default_factory=this_version)
    heartbeat: float = HEARTBEAT
    stale: float = STALE
    poll: float = POLL

    def prepared(self) -> Prepared:
        """The study, ready to run."""
        return prepare(
            self.spec,
            world_model=self.world_model,
            task=self.task,
            planner=self.planner,
            gated=self.gated,
        )


def job_of(folder: str | Path) -> Job:
    """The job that a results folder asks for: all of its study, diagnoses included.

    Raises:
        MismatchError: it holds no study.
    """
    path = Path(folder)
    config = ResultsFolder(path).read_config()
    record = (config or {}).get(RECORD)
    if config is None or not isinstance(record, dict):
        raise MismatchError(
            f"{path} holds no study to join (no config.yaml with a record): start one there with "
            "'quantwm study'"
        )
    version = record.get("version") or {}
    gated = bool(record.get("gated", True))
    return Job(StudySpec.from_dict(config), path, "all", gated=gated, version=dict(version))


def work(
    job: Job,
    *,
    prepared: Prepared | None = None,
    progress: StudyProgress | None = None,
    on_cell: Callable[[], object] | None = None,
) -> None:
    """Compute what is left of a job, sharing it with all other workers of its folder.

    Returns when all of it is finished or has failed, by this worker or another one. Where a cell
    has failed, there are no diagnoses.

    Args:
        job: what to do.
        prepared: the job's study, if it is at hand.
        progress: shows how far it is.
        on_cell: called after each cell or diagnosis that this worker is through with.

    Raises:
        MismatchError: this is not the quantwm that wrote the job, or the folder holds the results
            of another configuration, such as of another kind of device or processor.
        GateError: the float arm fails, so that the others would be compared with nothing.
        QuantWMError: the folder cannot be written.
    """
    check_version(job)
    prepared = prepared or job.prepared()
    folder = ResultsFolder(job.folder)
    check_folder(prepared, folder)
    settle_arithmetic(prepared, folder)
    claims = Claims(folder.claims, heartbeat=job.heartbeat, stale=job.stale)
    worker = CellWork(prepared, folder, claims, progress)
    with cpu_threads(prepared.spec.threads):
        if job.stage != "diagnoses":
            names = [name for name in prepared.order if job.arms is None or name in job.arms]
            _until_none_is_left(
                names, lambda left: _first_possible(left, prepared, folder, worker), job, on_cell
            )
        failed = any(folder.load_failure(cell.id) for cell in prepared.cells.values())
        if job.stage != "cells" and not failed:
            diagnoses = Diagnoses(prepared, folder, worker, claims, progress)
            _until_none_is_left(
                diagnoses.left(), lambda left: _first_made(left, diagnoses), job, on_cell
            )


Item = TypeVar("Item")


def _until_none_is_left(
    items: Sequence[Item],
    first_done: Callable[[Sequence[Item]], Item | None],
    job: Job,
    on_done: Callable[[], object] | None,
) -> None:
    """Do items, in any order that other workers leave, until all are done by anyone."""
    left = list(items)
    while left:
        done = first_done(left)
        if done is None:
            time.sleep(job.poll)
            continue
        left.remove(done)
        if on_done is not None:
            on_done()


def _first_made(left: Sequence[Diagnosis], diagnoses: Diagnoses) -> Diagnosis | None:
    """The first diagnosis that is there, or could be made now."""
    for diagnosis in left:
        if diagnoses.is_made(diagnosis) or diagnoses.attempt(diagnosis):
            return diagnosis
    return None


def check_version(job: Job) -> None:
    """Refuse a job that another version of quantwm wrote.

    Raises:
        MismatchError: says which differ; rows of both in one study would not compare.
    """
    own = this_version()
    differing = [key for key in own if job.version.get(key) != own[key]]
    if differing:
        listed = ", ".join(
            f"{key} {job.version.get(key)} there, {own[key]} here" for key in differing
        )
        raise MismatchError(
            f"the study in {job.folder} is run by another quantwm ({listed}): install the same one "
            "here, or run the study's own command again with this one"
        )


def _first_possible(
    left: Sequence[str], prepared: Prepared, folder: ResultsFolder, worker: CellWork
) -> str | None:
    """The first arm whose cell is there, has failed, or could be computed now."""
    gate_open: bool | None = None
    for name in left:
        cell = prepared.cells[name]
        if folder.cell_path(cell.id).exists() and folder.load_cell(cell.id) is not None:
            return name
        if folder.load_failure(cell.id) is not None:
            return name
        if cell.quantized:
            if gate_open is None:
                gate_open = gate_of(prepared, folder)
            if not gate_open:
                continue
        if worker.attempt(name):
            return name
    return None
