"""The diagnoses that a study asks for, each a JSON file of its results folder.

    diagnostics/fidelity-<cell>.json     one quantized arm against float
    diagnostics/sensitivity-<scheme>.json

A file carries the identity of what it is about; one of another identity is made anew.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from quantwm.study.claims import Claims
from quantwm.study.prepare import Prepared
from quantwm.study.store import ResultsFolder
from quantwm.study.work import CellWork, StudyProgress

logger = logging.getLogger(__name__)

VERSION = 1
"""Raised when what a diagnosis means changes."""
_TOGETHER = 6
"""Quantized models held in memory at a time; they share the float model's planning and rollouts."""


@dataclass(frozen=True)
class Diagnosis:
    """What is made at a time: the fidelity of a few arms, or the sensitivity to a scheme.

    Attributes:
        claim: name of its claim, so that two workers do not make the same.
        arms: to compare with float.
        scheme: that every layer gets alone; None for a fidelity.
    """

    claim: str
    arms: tuple[str, ...] = ()
    scheme: str | None = None


class Diagnoses:
    """The diagnoses of a study, made by any number of workers.

    An arm or scheme whose costs are not finite gets a file that says so. A planner without a
    population has no candidates to rank, so that there is nothing to diagnose.

    Args:
        prepared: the study; its cells are finished.
        folder: its results.
        work: gives the models that arms plan with.
        claims: keep two workers from making the same thing.
        progress: shows how far it is.
    """

    def __init__(
        self,
        prepared: Prepared,
        folder: ResultsFolder,
        work: CellWork,
        claims: Claims,
        progress: StudyProgress | None = None,
    ) -> None:
        self._prepared, self._work, self._progress = prepared, work, progress
        self._claims = claims
        self._folder = folder.path / "diagnostics"
        self._study = {k: str(v) for k, v in prepared.definition().items()}
        self._common: dict[str, Any] = {
            "episodes": prepared.spec.diagnostics.episodes,
            "planner": prepared.planner,
            "device": prepared.device,
            "dtype": prepared.spec.dtype,
        }

    def all(self) -> list[Diagnosis]:
        """What the study asks for: its quantized arms of the study's own budget, its schemes."""
        settings = self._prepared.spec.diagnostics
        if not isinstance(self._prepared.planner, PopulationPlanner):
            if settings.fidelity or settings.sensitivity:
                logger.warning("no diagnoses: the planner has no population of candidates")
            return []
        found = []
        if settings.fidelity:
            arms = [
                name
                for name, cell in self._prepared.cells.items()
                if cell.kind == "quantized" and not self._prepared.arm(name).budget()
            ]
            for begin in range(0, len(arms), _TOGETHER):
                together = tuple(arms[begin : begin + _TOGETHER])
                first = self._prepared.cells[together[0]].id
                found.append(Diagnosis(f"fidelity-{first}", together))
        for scheme in settings.sensitivity:
            found.append(Diagnosis(f"sensitivity-{scheme}", scheme=scheme))
        return found

    def left(self) -> list[Diagnosis]:
        """Those that are not made yet."""
        return [one for one in self.all() if not self.is_made(one)]

    def is_made(self, diagnosis: Diagnosis) -> bool:
        """Whether all files of it are there, of this study as it is."""
        return not self._missing(diagnosis)

    def attempt(self, diagnosis: Diagnosis) -> bool:
        """Make a diagnosis.

        Returns:
            False if another worker makes it.
        """
        with self._claims.held(diagnosis.claim) as free:
            if not free:
                return False
            missing = self._missing(diagnosis)
            if diagnosis.scheme is not None and missing:
                self._sensitivity(diagnosis.scheme)
            elif missing:
                self._fidelity(missing)
        return True

    def _missing(self, diagnosis: Diagnosis) -> list[str]:
        """Arms, or the scheme, whose file is not there."""
        if diagnosis.scheme is not None:
            path = self._path("sensitivity", diagnosis.scheme)
            return [] if self._is_made(path, diagnosis.scheme) else [diagnosis.scheme]
        ids = {name: self._prepared.cells[name].id for name in diagnosis.arms}
        return [n for n, id in ids.items() if not self._is_made(self._path("fidelity", id), id)]

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

    def _sensitivity(self, scheme: str) -> None:
        """Every layer alone at a scheme."""
        label = f"sensitivity to {scheme}"
        try:
            found = self._staged(
                label,
                lambda update: diagnose_sensitivity(
                    self._prepared.world_model,
                    self._prepared.task,
                    scheme,
                    calibration=self._work.calibration_for(scheme),
                    progress=update,
                    **self._common,
                ),
            ).to_dict()
        except NonFiniteError as error:
            found = {"kind": "failed", "error": str(error), "arm": label}
        self._write(self._path("sensitivity", scheme), scheme, found)

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
                "study": self._study,
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
