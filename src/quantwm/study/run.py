"""Running a study: every cell once, each stored as soon as it is finished."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from quantwm.compute import NUMERICS_VERSION
from quantwm.errors import CellsFailedError, QuantWMError
from quantwm.evaluation import Row
from quantwm.protocols import Planner, Task, WorldModel
from quantwm.study.claims import Claims
from quantwm.study.diagnose import Diagnoses, diagnoses_of, files_of
from quantwm.study.environment import environment
from quantwm.study.executors import Executor, InProcess, shared_threads
from quantwm.study.gate import gate_of
from quantwm.study.prepare import Prepared, prepare
from quantwm.study.same_study import check_arithmetic, check_folder
from quantwm.study.spec import RECORD, StudySpec
from quantwm.study.store import ResultsFolder
from quantwm.study.tables import Summary, Tables
from quantwm.study.work import CellWork, StudyProgress
from quantwm.study.worker import Job, this_version

logger = logging.getLogger(__name__)

OnArm: TypeAlias = Callable[[Summary], None]


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C during a study; the message says what is kept and how to go on."""


@dataclass(frozen=True)
class StudyResult:
    """A finished study.

    Attributes:
        spec: with nothing left to choose.
        folder: where everything lies.
        rows: one an episode, arm by arm in the study's order (`episodes.parquet`).
        summary: one an arm (`summary.csv`).
    """

    spec: StudySpec
    folder: Path
    rows: list[Row] = field(repr=False)
    summary: list[Summary]


def run_study(
    spec: StudySpec,
    out: str | Path,
    *,
    world_model: WorldModel | None = None,
    task: Task | None = None,
    planner: Planner | None = None,
    executor: Executor | None = None,
    gated: bool = True,
    progress: StudyProgress | None = None,
    on_arm: OnArm | None = None,
) -> StudyResult:
    """Run what is missing of a study and write its tables.

    The same call on the same folder continues where it was stopped, and ends with the same rows.
    Several calls, and workers that join them (`quantwm.study.worker`), may share a folder.

    Args:
        spec: the study.
        out: the results folder.
        world_model, task, planner: used in place of the ones that the study names, to study
            one's own.
        executor: where cells are computed; default: one worker, in this process.
        gated: whether a float arm below the study's gate stops the run. The study's results are
            read against its gate either way.
        progress: shows how far it is.
        on_arm: called with an arm's summary row as soon as it is known.

    Raises:
        UsageError: something in the study is wrong; nothing was computed.
        MismatchError: the folder holds another study.
        GateError: the float arm fails; its cell and the oracles' are kept.
        CellsFailedError: some cells could not be computed; all others are finished and kept.
        QuantWMError: the folder cannot be written; what it holds is kept.
        StudyInterrupted: Ctrl-C.
    """
    executor = executor or InProcess()
    spec = shared_threads(spec, executor)
    prepared = prepare(
        spec,
        world_model=world_model,
        task=task,
        planner=planner,
        elsewhere=executor.elsewhere,
        gated=gated,
    )
    folder = ResultsFolder(Path(out))
    check_folder(prepared, folder)
    if not executor.elsewhere:
        check_arithmetic(prepared, folder)
    folder.check_writable()
    run = _Run(prepared, folder, on_arm or (lambda _: None), here=not executor.elsewhere)
    run.write_config()
    run.forget_failures()
    job = Job(
        prepared.spec,
        folder.path,
        world_model=world_model,
        task=task,
        planner=planner,
        gated=gated,
    )
    try:
        run.look()
        if run.left():
            executor.run(job, prepared, run.look, progress)
            run.look()
    except KeyboardInterrupt as error:
        ids = run.ids
        done = [id for id in ids if folder.cell_path(id).exists()]
        kept = sum(folder.kept_episodes(id) for id in ids.difference(done))
        besides = f", and {kept} episodes of others" if kept else ""
        raise StudyInterrupted(
            f"interrupted; {len(done)} of {len(ids)} cells are finished and kept in {out}"
            f"{besides}: the same command goes on from there"
        ) from error
    run.check_complete()
    for id in run.ids:
        folder.clear_parts(id)
    rows, summary = run.tables.write()
    try:
        _diagnose(replace(job, stage="diagnoses"), prepared, executor, progress)
    except KeyboardInterrupt as error:
        raise StudyInterrupted(
            f"interrupted; all {len(run.ids)} cells are finished, diagnoses are not: the same "
            "command goes on from there"
        ) from error
    return StudyResult(prepared.spec, folder.path, rows, summary)


def _diagnose(
    job: Job, prepared: Prepared, executor: Executor, progress: StudyProgress | None
) -> None:
    """Make what is missing of the diagnoses that a study asks for.

    Raises:
        QuantWMError: the workers stopped early.
    """
    folder = ResultsFolder(job.folder)
    claims = Claims(folder.claims)
    diagnoses = Diagnoses(prepared, folder, CellWork(prepared, folder, claims), claims)
    left = diagnoses.left()
    count = len(left)

    def look() -> tuple[int, int]:
        left[:] = [one for one in left if not diagnoses.is_made(one)]
        return count - len(left), count

    if count == 0:
        return
    executor.run(job, prepared, look, progress)
    look()
    if left:
        raise QuantWMError(
            f"the workers stopped before {len(left)} of {count} diagnoses were made; all cells are "
            f"finished and kept in {job.folder}: the same command goes on"
        )


class _Run:
    """What one run of a study knows of its cells."""

    def __init__(
        self, prepared: Prepared, folder: ResultsFolder, on_arm: OnArm, *, here: bool
    ) -> None:
        self._prepared, self._folder, self._on_arm = prepared, folder, on_arm
        self._here = here
        self._told: set[str] = set()
        cells = {name: cell.id for name, cell in prepared.cells.items()}
        self.ids = set(cells.values())
        self.tables = Tables(prepared.spec.arms, cells, folder)

    def left(self) -> list[str]:
        """Arms whose cell is not finished."""
        return [name for name in self._prepared.cells if name not in self.tables.names]

    def look(self) -> tuple[int, int]:
        """Take in the cells that have been finished since, tell of them and renew the tables.

        Returns:
            (cells finished, of how many)
        """
        self.tables.look()
        finished = set(self.tables.names)
        new = [n for n in self._prepared.order if n in finished and n not in self._told]
        if new:
            self.tables.write()
        for name in new:
            self._told.add(name)
            self._on_arm(self.tables.summary(name))
        cells = self._prepared.cells
        return len({cells[name].id for name in finished}), len(self.ids)

    def forget_failures(self) -> None:
        """Let cells that failed in an earlier run be tried again."""
        for id in self.ids:
            self._folder.clear_failure(id)

    def check_complete(self) -> None:
        """Say what is missing, if something is.

        Raises:
            CellsFailedError: cells that could not be computed, each with its error.
            GateError: the float arm keeps quantized ones from running.
            QuantWMError: the workers stopped early.
        """
        left = self.left()
        if not left:
            return
        failed = {
            name: failure["error"]
            for name in left
            if (failure := self._folder.load_failure(self._prepared.cells[name].id)) is not None
        }
        if failed:
            listed = "\n".join(f"  {name}: {error}" for name, error in failed.items())
            raise CellsFailedError(
                f"{len(failed)} of {len(self._prepared.cells)} arms could not be computed; the "
                f"others are kept in {self._folder.path}, and the same command tries these again:\n"
                f"{listed}\nTracebacks are in {self._folder.path / 'failed'}."
            )
        gate_of(self._prepared, self._folder)
        raise QuantWMError(
            f"the workers stopped before {len(left)} of {len(self._prepared.cells)} arms were "
            f"finished; what is done is kept in {self._folder.path}: the same command goes on"
        )

    def write_config(self) -> None:
        """Write the resolved study, where it runs, and what workers that join it must share."""
        record = {
            "model_hash": self._prepared.model_hash,
            "numerics": NUMERICS_VERSION,
            "version": this_version(),
            "gated": self._prepared.gated,
            "cells": {name: cell.id for name, cell in self._prepared.cells.items()},
            "diagnoses": {
                file.name: file.id
                for diagnosis in diagnoses_of(self._prepared)
                for file in files_of(self._prepared, diagnosis)
            },
            "environment": environment(self._prepared.device.type, here=self._here),
        }
        self._folder.write_config(self._prepared.spec.to_dict() | {RECORD: record})
