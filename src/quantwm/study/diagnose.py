"""The diagnoses that a study asks for, each a JSON file of its results folder.

    diagnostics/fidelity-<cell>.json     one quantized arm against float
    diagnostics/sensitivity-<scheme>.json

A file carries the identity of what it is about; one of another identity is made anew.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from quantwm.study.same_study import definition_of
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

    @property
    def label(self) -> str:
        """What it is called where progress is shown."""
        if self.scheme is not None:
            return f"sensitivity to {self.scheme}"
        return f"fidelity of {', '.join(self.arms)}"


def diagnoses_of(prepared: Prepared) -> list[Diagnosis]:
    """What a study asks for: its quantized arms of the study's own budget, and its schemes.

    Nothing where the planner has no population, and so no candidates to rank.
    """
    settings = prepared.spec.diagnostics
    if not isinstance(prepared.planner, PopulationPlanner):
        return []
    arms = [
        name
        for name, cell in prepared.cells.items()
        if settings.fidelity and cell.kind == "quantized" and not prepared.arm(name).budget()
    ]
    found = []
    for begin in range(0, len(arms), _TOGETHER):
        together = tuple(arms[begin : begin + _TOGETHER])
        found.append(Diagnosis(f"fidelity-{prepared.cells[together[0]].id}", together))
    schemes = settings.sensitivity
    return found + [Diagnosis(f"sensitivity-{one}", scheme=one) for one in schemes]


@dataclass(frozen=True)
class DiagnosisFile:
    """One file that a diagnosis makes.

    Attributes:
        subject: the arm or the scheme that it is about.
        name: of the file.
        id: identity of what is in it: of what, in which study, and of how many episodes.
    """

    subject: str
    name: str
    id: str


def files_of(prepared: Prepared, diagnosis: Diagnosis) -> list[DiagnosisFile]:
    """The files that a diagnosis makes."""
    scheme = diagnosis.scheme
    if scheme is not None:
        return [DiagnosisFile(scheme, f"sensitivity-{scheme}.json", _identity(prepared, scheme))]
    cells = {name: prepared.cells[name].id for name in diagnosis.arms}
    return [
        DiagnosisFile(name, f"fidelity-{id}.json", _identity(prepared, id))
        for name, id in cells.items()
    ]


def _identity(prepared: Prepared, of: str) -> str:
    return short_hash(
        {
            "version": VERSION,
            "of": of,
            "episodes": prepared.spec.diagnostics.episodes,
            "calibration": prepared.calibration,
            "study": {key: str(value) for key, value in definition_of(prepared).items()},
        }
    )


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
        self._folder = folder
        self._common: dict[str, Any] = {
            "episodes": prepared.spec.diagnostics.episodes,
            "planner": prepared.planner,
            "device": prepared.device,
            "dtype": prepared.spec.dtype,
        }

    def left(self) -> list[Diagnosis]:
        """Those that are not made yet."""
        settings, planner = self._prepared.spec.diagnostics, self._prepared.planner
        asked = settings.fidelity or settings.sensitivity
        if asked and not isinstance(planner, PopulationPlanner):
            logger.warning("no diagnoses: the planner has no population of candidates")
        return [one for one in diagnoses_of(self._prepared) if not self.is_made(one)]

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
                self._sensitivity(missing[0])
            elif missing:
                self._fidelity(missing)
        return True

    def _missing(self, diagnosis: Diagnosis) -> list[DiagnosisFile]:
        """The files of it that are not there."""
        files = files_of(self._prepared, diagnosis)
        return [one for one in files if not self._folder.has_diagnosis(one.name, one.id)]

    def _fidelity(self, files: Sequence[DiagnosisFile]) -> None:
        names = tuple(one.subject for one in files)
        models: dict[str, WorldModel] = {name: self._work.model(name) for name in names}
        try:
            found = self._staged(
                Diagnosis("", names).label,
                lambda update: diagnose_fidelity(
                    self._prepared.world_model,
                    models,
                    self._prepared.task,
                    progress=update,
                    **self._common,
                ),
            )
        except NonFiniteError as error:
            if len(files) > 1:
                for one in files:
                    self._fidelity([one])
                return
            self._write(files[0], {"kind": "failed", "error": str(error), "arm": names[0]})
            return
        for one in files:
            self._write(one, found[one.subject].to_dict())

    def _sensitivity(self, file: DiagnosisFile) -> None:
        """Every layer alone at a scheme."""
        label = Diagnosis("", scheme=file.subject).label
        try:
            found = self._staged(
                label,
                lambda update: diagnose_sensitivity(
                    self._prepared.world_model,
                    self._prepared.task,
                    file.subject,
                    calibration=self._work.calibration_for(file.subject),
                    progress=update,
                    **self._common,
                ),
            ).to_dict()
        except NonFiniteError as error:
            found = {"kind": "failed", "error": str(error), "arm": label}
        self._write(file, found)

    def _write(self, file: DiagnosisFile, content: dict[str, Any]) -> None:
        write_json(self._folder.diagnosis_path(file.name), {"id": file.id, **content})

    def _staged(self, label: str, run: Callable[[Progress], Any]) -> Any:
        if self._progress is None:
            return run(lambda _done, _total: None)
        self._progress.start(label, 0, 0)
        try:
            return run(self._progress.update)
        finally:
            self._progress.finish()
