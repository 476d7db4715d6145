"""Running a study: every cell once, each stored as soon as it is finished."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TypeAlias

from quantwm.calibration import Calibration, calibrate
from quantwm.compute import NUMERICS_VERSION, cpu_threads
from quantwm.errors import CorruptFileError, GateError
from quantwm.evaluation import ORACLES, Outcome, Progress, Row, evaluate, evaluate_oracle
from quantwm.loading import load
from quantwm.methods import quantize
from quantwm.protocols import Planner, Task, WorldModel
from quantwm.quant.artifact import stored_bytes
from quantwm.study.cells import Cell
from quantwm.study.environment import environment
from quantwm.study.gate import check_gate
from quantwm.study.prepare import Prepared, check_folder, prepare
from quantwm.study.spec import RECORD, StudySpec
from quantwm.study.store import FinishedCell, ResultsFolder, set_aside
from quantwm.study.summary import COLUMNS, arm_summary

logger = logging.getLogger(__name__)

Summary: TypeAlias = dict[str, Any]
"""One row of the study's table, with the keys `summary.COLUMNS`."""
OnArm: TypeAlias = Callable[[Summary], None]
FIRST = ("float", "oracle-state", "oracle-latent")
"""Kinds of arms that run before the gate, in this order, so that each difference against float
is known as soon as its arm is finished."""


class StudyProgress(Protocol):
    """What shows how far a study is. Calls come in order, from one thread."""

    def start(self, label: str, index: int, count: int) -> None:
        """A stage begins: an arm, the `index`-th of `count` from 1, or "calibration" with 0."""
        ...

    def update(self, done: int, total: int) -> None:
        """The stage's work; `total` may shrink."""
        ...

    def finish(self) -> None:
        """The stage is over, finished or not."""
        ...


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
    progress: StudyProgress | None = None,
    on_arm: OnArm | None = None,
) -> StudyResult:
    """Run what is missing of a study and write its tables.

    The same call on the same folder continues where it was stopped, and ends with the same rows.

    Args:
        spec: the study.
        out: the results folder.
        world_model, task, planner: used in place of the ones that the study names, to study
            one's own.
        progress: shows how far it is.
        on_arm: called with an arm's summary row as soon as it is known.

    Raises:
        UsageError: something in the study is wrong; nothing was computed.
        MismatchError: the folder holds another study.
        GateError: the float arm fails; its cell and the oracles' are kept.
        QuantWMError: the folder cannot be written; what it holds is kept.
        StudyInterrupted: Ctrl-C.
    """
    prepared = prepare(spec, world_model=world_model, task=task, planner=planner)
    folder = ResultsFolder(Path(out))
    run = _Run(prepared, folder, progress, on_arm or (lambda _: None))
    try:
        with cpu_threads(prepared.spec.threads):
            return run()
    except KeyboardInterrupt as error:
        kept = sum(folder.cell_path(id).exists() for id in run.ids)
        raise StudyInterrupted(
            f"interrupted; {kept} of {len(run.ids)} cells are finished and kept in {out}: "
            "the same command goes on from there"
        ) from error


class _Run:
    """One pass over a study's cells."""

    def __init__(
        self,
        prepared: Prepared,
        folder: ResultsFolder,
        progress: StudyProgress | None,
        on_arm: OnArm,
    ) -> None:
        self._prepared, self._folder = prepared, folder
        self._progress, self._on_arm = progress, on_arm
        self._finished: dict[str, FinishedCell] = {}
        self._calibration: Calibration | None = None
        ranks = {kind: rank for rank, kind in enumerate(FIRST)}
        self._order = sorted(
            prepared.cells, key=lambda name: ranks.get(prepared.cells[name].kind, len(FIRST))
        )
        self.ids = {cell.id for cell in prepared.cells.values()}

    def __call__(self) -> StudyResult:
        spec = self._prepared.spec
        check_folder(self._prepared, self._folder)
        self._folder.check_writable()
        self._write_config()
        first = [name for name in self._order if self._prepared.cells[name].kind in FIRST]
        self._arms(first)
        self._check_gate()
        self._arms(self._order[len(first) :])
        rows, summary = self._write_tables()
        return StudyResult(spec, self._folder.path, rows, summary)

    def _arms(self, names: Sequence[str]) -> None:
        for name in names:
            cell = self._prepared.cells[name]
            if cell.id not in self._finished:
                stored = self._folder.load_cell(cell.id)
                self._finished[cell.id] = stored or self._computed(name, cell)
                if stored is None:
                    self._write_tables()
            self._on_arm(self._summary(name))

    def _computed(self, name: str, cell: Cell) -> FinishedCell:
        """Evaluate a cell and store it."""
        calibration = self._calibrated() if cell.calibration is not None else None
        with self._stage(name, self._order.index(name) + 1) as update:
            began = perf_counter()
            outcome, size = self._evaluate(name, cell, calibration, update)
            finished = FinishedCell.from_rows(
                cell.id,
                cell.to_dict(),
                outcome.rows,
                bytes=size,
                seconds=perf_counter() - began,
            )
        self._folder.save_cell(finished)
        logger.info("finished cell %s of arm %s", cell.id, name)
        return finished

    def _evaluate(
        self, name: str, cell: Cell, calibration: Calibration | None, update: Progress
    ) -> tuple[Outcome, int | None]:
        """The outcome of one arm, and the bytes of its model."""
        spec, model = self._prepared.spec, self._prepared.world_model
        settings: dict[str, Any] = {
            "task": self._prepared.task,
            "episodes": spec.episodes,
            "seed": spec.seed,
            "block": spec.block,
            "planner": self._prepared.planner,
            "mpc_iterations": spec.mpc_iterations,
            "device": self._prepared.device,
            "dtype": spec.dtype,
            "memory_budget": spec.memory_budget,
            "arm": name,
            "progress": update,
        }
        for oracle in ORACLES:
            if cell.kind == oracle:
                return evaluate_oracle(oracle, world_model=model, **settings), None
        arm = self._prepared.arm(name)
        if arm.folder is not None:
            model = load(Path(arm.folder))
        elif cell.kind == "quantized" and arm.plan is not None:
            model = quantize(model, arm.plan, calibration)
        return evaluate(model, **settings), stored_bytes(model)

    def _calibrated(self) -> Calibration:
        """The calibration that the study's arms share, from the folder if it is there."""
        if self._calibration is None:
            self._calibration = self._stored_calibration() or self._new_calibration()
        return self._calibration

    def _stored_calibration(self) -> Calibration | None:
        path = self._folder.calibration
        if not path.exists():
            return None
        try:
            stored = Calibration.load(path)
        except CorruptFileError as error:
            logger.warning("%s; set aside as %s, made anew", error, set_aside(path).name)
            return None
        if self._recorded_calibration() == {"id": self._prepared.calibration, "hash": stored.hash}:
            return stored
        logger.warning(
            "%s is not what this study recorded; set aside as %s, made anew",
            path,
            set_aside(path).name,
        )
        return None

    def _new_calibration(self) -> Calibration:
        spec = self._prepared.spec
        with self._stage("calibration", 0) as update:
            made = calibrate(
                self._prepared.world_model,
                self._prepared.task,
                episodes=spec.calibration.episodes,
                seed=spec.calibration.seed,
                samples=spec.calibration.samples,
                planner=self._prepared.planner,
                mpc_iterations=spec.mpc_iterations,
                device=self._prepared.device,
                dtype=spec.dtype,
                memory_budget=spec.memory_budget,
                progress=update,
            )
        made.save(self._folder.calibration)
        self._write_config({"id": self._prepared.calibration, "hash": made.hash})
        return made

    def _check_gate(self) -> None:
        """Stop before the quantized arms if the float arm is no reference for them."""
        cells, name = self._prepared.cells, self._prepared.float_arm
        if name is None or all(cell.kind != "quantized" for cell in cells.values()):
            return
        oracles: dict[str, list[bool]] = {
            cell.kind: [row["success"] for row in self._rows(arm)]
            for arm, cell in cells.items()
            if cell.kind in ORACLES
        }
        successes = [row["success"] for row in self._rows(name)]
        try:
            check_gate(name, successes, oracles, self._prepared.spec.gate)
        except GateError as error:
            self._write_tables()
            raise GateError(f"{error} Finished cells are kept in {self._folder.path}.") from None

    def _write_tables(self) -> tuple[list[Row], list[Summary]]:
        """Write rows and summary of all arms that are finished."""
        names = [n for n, cell in self._prepared.cells.items() if cell.id in self._finished]
        rows = [row for name in names for row in self._rows(name)]
        summary = [self._summary(name) for name in names]
        self._folder.write_episodes(rows)
        self._folder.write_summary(summary, COLUMNS)
        return rows, summary

    def _rows(self, name: str) -> list[Row]:
        return self._finished[self._prepared.cells[name].id].labelled(name)

    def _summary(self, name: str) -> Summary:
        cells, reference = self._prepared.cells, self._prepared.float_arm
        finished = self._finished[cells[name].id]
        owner = next(other for other, cell in cells.items() if cell.id == finished.id)
        compared = reference is not None and name != reference
        known = compared and cells[reference or ""].id in self._finished
        return arm_summary(
            name,
            self._rows(name),
            self._rows(reference) if known and reference is not None else None,
            bytes=finished.bytes,
            seconds=finished.seconds,
            same_as=owner if owner != name else None,
        )

    def _recorded_calibration(self) -> Mapping[str, Any] | None:
        config = self._folder.read_config() or {}
        recorded: Mapping[str, Any] | None = (config.get(RECORD) or {}).get("calibration")
        return recorded

    def _write_config(self, calibration: Mapping[str, Any] | None = None) -> None:
        """Write the resolved study and where it runs, keeping a recorded calibration."""
        calibration = calibration or self._recorded_calibration()
        record = {
            "model_hash": self._prepared.model_hash,
            "numerics": NUMERICS_VERSION,
            "cells": {name: cell.id for name, cell in self._prepared.cells.items()},
            "calibration": dict(calibration) if calibration else None,
            "environment": environment(self._prepared.device.type),
        }
        self._folder.write_config(self._prepared.spec.to_dict() | {RECORD: record})

    @contextmanager
    def _stage(self, label: str, index: int) -> Iterator[Progress]:
        if self._progress is None:
            yield lambda _done, _total: None
            return
        self._progress.start(label, index, len(self._prepared.cells))
        try:
            yield self._progress.update
        finally:
            self._progress.finish()
