"""The diagnoses that a study asks for, each a JSON file of its results folder.

    diagnostics/fidelity-<cell>.json     one quantized arm against float
    diagnostics/sensitivity-<scheme>.json

A file carries the identity of what it is about; one of another identity is made anew.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantwm.diagnostics.fidelity import diagnose_fidelity
from quantwm.diagnostics.sensitivity import diagnose_sensitivity
from quantwm.errors import NonFiniteError
from quantwm.evaluation import Progress
from quantwm.files import write_json
from quantwm.planning.population import PopulationPlanner
from quantwm.protocols import WorldModel
from quantwm.study.cells import short_hash
from quantwm.study.prepare import Prepared
from quantwm.study.store import ResultsFolder
from quantwm.study.work import CellWork, StudyProgress

logger = logging.getLogger(__name__)

VERSION = 1
"""Raised when what a diagnosis means changes."""
_TOGETHER = 6
"""Quantized models held in memory at a time; they share the float model's planning and rollouts."""


def diagnose_study(
    prepared: Prepared,
    folder: ResultsFolder,
    work: CellWork,
    progress: StudyProgress | None = None,
) -> None:
    """Make what is missing of the diagnoses that a study asks for.

    An arm whose costs are not finite gets a file that says so. A planner without a population has
    no candidates to rank, so that there is nothing to diagnose.
    """
    settings = prepared.spec.diagnostics
    if not isinstance(prepared.planner, PopulationPlanner):
        if settings.fidelity or settings.sensitivity:
            logger.warning("no diagnoses: the planner has no population of candidates")
        return
    diagnoses = _Diagnoses(prepared, folder, work, progress)
    if settings.fidelity:
        diagnoses.fidelity()
    for scheme in settings.sensitivity:
        diagnoses.sensitivity(scheme)


class _Diagnoses:
    def __init__(
        self,
        prepared: Prepared,
        folder: ResultsFolder,
        work: CellWork,
        progress: StudyProgress | None,
    ) -> None:
        self._prepared, self._work, self._progress = prepared, work, progress
        self._folder = folder.path / "diagnostics"
        self._common: dict[str, Any] = {
            "episodes": prepared.spec.diagnostics.episodes,
            "planner": prepared.planner,
            "device": prepared.device,
            "dtype": prepared.spec.dtype,
        }

    def fidelity(self) -> None:
        """Every quantized arm of the study's own budget against float."""
        left = [
            name
            for name, cell in self._prepared.cells.items()
            if cell.kind == "quantized"
            and not self._prepared.arm(name).budget()
            and not self._is_made(self._path("fidelity", cell.id), cell.id)
        ]
        for begin in range(0, len(left), _TOGETHER):
            self._fidelity(left[begin : begin + _TOGETHER])

    def _fidelity(self, names: Sequence[str]) -> None:
        models: dict[str, WorldModel] = {name: self._work.model(name) for name in names}
        try:
            found = self._staged(
                f"fidelity of {', '.join(names)}",
                lambda update: diagnose_fidelity(
                    self._prepared.world_model,
                    models,
                    self._prepared.task,
                    progress=update,
                    **self._common,
                ),
            )
        except NonFiniteError as error:
            if len(names) > 1:
                for name in names:
                    self._fidelity([name])
                return
            self._write_fidelity(names[0], {"kind": "failed", "error": str(error), "arm": names[0]})
            return
        for name in names:
            self._write_fidelity(name, found[name].to_dict())

    def _write_fidelity(self, name: str, content: dict[str, Any]) -> None:
        id = self._prepared.cells[name].id
        self._write(self._path("fidelity", id), id, content)

    def sensitivity(self, scheme: str) -> None:
        """Every layer alone at a scheme."""
        path = self._path("sensitivity", scheme)
        if self._is_made(path, scheme):
            return
        found = self._staged(
            f"sensitivity to {scheme}",
            lambda update: diagnose_sensitivity(
                self._prepared.world_model,
                self._prepared.task,
                scheme,
                calibration=self._work.calibration_for(scheme),
                progress=update,
                **self._common,
            ),
        )
        self._write(path, scheme, found.to_dict())

    def _path(self, kind: str, what: str) -> Path:
        return self._folder / f"{kind}-{what}.json"

    def _id(self, what: str) -> str:
        """Identity of a diagnosis: what it is about, in which study, and of how many episodes."""
        return short_hash(
            {
                "version": VERSION,
                "of": what,
                "episodes": self._prepared.spec.diagnostics.episodes,
                "calibration": self._prepared.calibration,
                "study": {k: str(v) for k, v in self._prepared.definition().items()},
            }
        )

    def _is_made(self, path: Path, what: str) -> bool:
        try:
            return bool(json.loads(path.read_text())["id"] == self._id(what))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _write(self, path: Path, what: str, content: dict[str, Any]) -> None:
        write_json(path, {"id": self._id(what), **content})

    def _staged(self, label: str, run: Callable[[Progress], Any]) -> Any:
        if self._progress is None:
            return run(lambda _done, _total: None)
        self._progress.start(label, 0, 0)
        try:
            return run(self._progress.update)
        finally:
            self._progress.finish()
