"""What computes one cell of a study: quantize, plan in closed loop, store."""

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch

from quantwm.calibration import Calibration, calibrate, calibration_origin
from quantwm.compute import resolve_dtype
from quantwm.errors import CorruptFileError, QuantWMError
from quantwm.evaluation import REFERENCES, Outcome, Progress, Row, evaluate, evaluate_reference
from quantwm.loading import load
from quantwm.methods import quantize, resolve_plan
from quantwm.protocols import WorldModel
from quantwm.quant import QuantPlan
from quantwm.quant.artifact import stored_bytes
from quantwm.study.arms import Arm
from quantwm.study.cells import Cell, plain
from quantwm.study.claims import Claims
from quantwm.study.prepare import Prepared, needs_calibration
from quantwm.study.store import FinishedCell, ResultsFolder, set_aside

logger = logging.getLogger(__name__)


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


PART = 10
"""Episodes of a cell that are planned together on a CPU, and lost together if a worker dies; as
many as there are threads where these are more."""


class _Parts:
    """The episodes of a cell that are finished while others are not.

    On a CPU a cell may take hours; on a GPU, where it takes a minute, it is one part.
    """

    def __init__(self, cell: Cell, folder: ResultsFolder, device: torch.device) -> None:
        self._cell, self._folder = cell, folder
        together = max(PART, torch.get_num_threads())
        self.size = together if device.type == "cpu" else cell.episodes
        self._kept = folder.load_parts(cell.id)
        self._before = sum(part.seconds for part in self._kept)
        self._began = self._last = perf_counter()

    @property
    def seconds(self) -> float:
        """Time that the cell has taken, of interrupted workers only what became of use."""
        return self._before + perf_counter() - self._began

    @property
    def finished(self) -> int:
        """Episodes that are finished."""
        return sum(len(part.rows) for part in self._kept)

    def rows(self, arm: str) -> list[Row]:
        """Rows of the episodes that are finished."""
        return [row for part in self._kept for row in part.labelled(arm)]

    def keep(self, rows: list[Row]) -> None:
        """Store the rows of finished episodes, unless the cell is finished with them."""
        now = perf_counter()
        taken, self._last = now - self._last, now
        part = FinishedCell.from_rows(
            self._cell.id, self._cell.to_dict(), rows, bytes=None, seconds=taken
        )
        self._kept.append(part)
        if self.finished == self._cell.episodes:
            return
        try:
            self._folder.save_part(part)
        except QuantWMError as error:  # The cell itself can still be stored, or say so.
            logger.warning("%s; a worker that dies loses these episodes", error)


class CellWork:
    """Computes cells of a prepared study and stores them.

    Args:
        prepared: the study.
        folder: its results.
        claims: keep two workers from making the same thing.
        progress: shows how far it is.
    """

    def __init__(
        self,
        prepared: Prepared,
        folder: ResultsFolder,
        claims: Claims,
        progress: StudyProgress | None = None,
    ) -> None:
        self._prepared, self._folder = prepared, folder
        self._claims, self._progress = claims, progress
        self._calibration: Calibration | None = None

    def attempt(self, name: str) -> bool:
        """Compute and store an arm's cell; an error of the arm's own is stored as its failure.

        Returns:
            False if another worker has the cell, or makes the calibration that it needs.

        Raises:
            QuantWMError: the folder cannot be written.
        """
        cell = self._prepared.cells[name]
        with self._claims.held(cell.id) as free:
            if not free:
                return False
            if self._folder.load_cell(cell.id) is not None:
                self._folder.clear_parts(cell.id)  # its worker may have died before doing so
                return True  # finished between the look and the claim
            try:
                if cell.calibration is not None and not self._has_calibration():
                    return False
                finished = self._computed(name, cell)
            except Exception as error:
                logger.exception("cell %s of arm %s failed", cell.id, name)
                self._folder.save_failure(cell.id, name, error, traceback.format_exc())
                return True
            self._folder.save_cell(finished)
            self._folder.clear_parts(cell.id)
        logger.info("finished cell %s of arm %s", cell.id, name)
        return True

    def _computed(self, name: str, cell: Cell) -> FinishedCell:
        index = self._prepared.order.index(name) + 1
        with self._stage(name, index) as update:
            parts = _Parts(cell, self._folder, self._prepared.device)
            outcome, size = self._evaluate(self._prepared.arm(name), cell, update, parts)
            return FinishedCell.from_rows(
                cell.id, cell.to_dict(), outcome.rows, bytes=size, seconds=parts.seconds
            )

    def _evaluate(
        self, arm: Arm, cell: Cell, update: Progress, parts: "_Parts"
    ) -> tuple[Outcome, int | None]:
        """The outcome of one arm, and the bytes of its model."""
        spec = self._prepared.spec
        settings: dict[str, Any] = {
            "task": self._prepared.task,
            "episodes": spec.episodes,
            "seed": spec.seed,
            "block": spec.block,
            "planner": self._prepared.planners[arm.name],
            "mpc_iterations": cell.mpc_iterations,
            "device": self._prepared.device,
            "dtype": spec.dtype,
            "memory_budget": spec.memory_budget,
            "batch_size": parts.size,
            "arm": arm.name,
            "progress": update,
            "kept": parts.rows(arm.name),
            "on_rows": parts.keep,
        }
        model = self._built(arm, cell)
        for reference in REFERENCES:
            if cell.kind == reference:
                return evaluate_reference(reference, world_model=model, **settings), None
        return evaluate(model, **settings), stored_bytes(model)

    def model(self, name: str) -> WorldModel:
        """The model that an arm plans with.

        Waits for a calibration that another worker makes.
        """
        arm, cell = self._prepared.arm(name), self._prepared.cells[name]
        if cell.calibration is not None:
            self._await_calibration()
        return self._built(arm, cell)

    def calibration_for(self, scheme: str) -> Calibration | None:
        """The study's calibration where round-to-nearest needs one for a scheme, else None."""
        plan = QuantPlan({"*": scheme})
        if not needs_calibration(plan, resolve_plan(plan, self._prepared.world_model)):
            return None
        self._await_calibration()
        return self._calibration

    def _await_calibration(self) -> None:
        while not self._has_calibration():
            time.sleep(1.0)

    def _built(self, arm: Arm, cell: Cell) -> WorldModel:
        if arm.folder is not None:
            return load(Path(arm.folder))
        if cell.plan and arm.plan is not None:
            return quantize(self._prepared.world_model, arm.plan, self._calibration)
        return self._prepared.world_model

    def _has_calibration(self) -> bool:
        """Have the calibration that the study's arms share: read it, or else make it.

        False while another worker makes it.
        """
        if self._calibration is None:
            with self._claims.held(f"calibration-{self._prepared.calibration}") as free:
                if free:
                    self._calibration = self._stored_calibration() or self._new_calibration()
        return self._calibration is not None

    def _stored_calibration(self) -> Calibration | None:
        path = self._folder.calibration
        if not path.exists():
            return None
        try:
            stored = Calibration.load(path)
        except CorruptFileError as error:
            logger.warning("%s; set aside as %s, made anew", error, set_aside(path).name)
            return None
        if (stored.model_hash, plain(stored.origin)) == (
            self._prepared.model_hash,
            plain(self._origin()),
        ):
            return stored
        logger.warning(
            "%s is not this study's calibration; set aside as %s, made anew",
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
        return made

    def _origin(self) -> dict[str, Any]:
        spec = self._prepared.spec
        return calibration_origin(
            self._prepared.task,
            spec.calibration.seed,
            spec.calibration.episodes,
            spec.calibration.samples,
            self._prepared.planner,
            spec.mpc_iterations,
            resolve_dtype(spec.dtype, self._prepared.device),
        )

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
