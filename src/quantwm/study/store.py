"""The results folder of a study: one file a finished cell, and the tables made from them.

    cells/<id>.json           one finished cell; its own SHA-256 inside
    parts/<id>/<n>.json       the same of some of its episodes, the first the n-th, until it is
    failed/<id>.json          why a cell could not be computed, until it is tried again
    claims/<id>.claim         a cell that a worker is computing
    arithmetic                of the processors that compute it, as the first worker said
    config.yaml               the study, all resolved, and where it ran; itself a study file
    calibration.safetensors   what calibrated arms were calibrated on
    episodes.parquet          one row an episode
    summary.csv               one row an arm
    diagnostics/*.json        the diagnoses that the study asked for
    report.html               written by the command line from the files above
    report-tables/*.csv       its tables

Every file appears whole or not at all. A cell's file that is cut off or edited is set aside as
`<id>.json.corrupt-N` and its cell counts as missing.
"""

import csv
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import yaml

from quantwm.errors import CorruptFileError, MismatchError, QuantWMError
from quantwm.evaluation import Row
from quantwm.files import atomic_path, write_json, write_new
from quantwm.study.cells import canonical_json
from quantwm.study.rows import decode_row, encode_row, write_parquet

logger = logging.getLogger(__name__)

CELL_FORMAT = 1
ARITHMETIC = "arithmetic"
CONFIG = "config.yaml"
EPISODES = "episodes.parquet"
SUMMARY = "summary.csv"
CALIBRATION = "calibration.safetensors"
REPORT = "report.html"
_CELL_KEYS = {"sha256", "format", "id", "cell", "bytes", "seconds", "rows"}
OUTPUTS = (CONFIG, EPISODES, SUMMARY, CALIBRATION, REPORT, "report-tables")


@dataclass(frozen=True)
class FinishedCell:
    """The result of a cell, as its file holds it.

    Attributes:
        id: the cell's id.
        cell: the cell as JSON values.
        rows: one an episode, as `encode_row` makes them, without cell and arm.
        bytes: stored bytes of the arm's model; None for the oracles.
        seconds: wall-clock time of the evaluation (a measurement).
    """

    id: str
    cell: Mapping[str, Any]
    rows: Sequence[Row] = field(repr=False)
    bytes: int | None
    seconds: float

    @classmethod
    def from_rows(
        cls,
        id: str,
        cell: Mapping[str, Any],
        rows: Sequence[Row],
        *,
        bytes: int | None,
        seconds: float,
    ) -> "FinishedCell":
        """A cell's result from the rows of an evaluation."""
        return cls(id, cell, [encode_row(row) for row in rows], bytes, seconds)

    def labelled(self, arm: str) -> list[Row]:
        """The rows of the current schema, under an arm's name."""
        return [decode_row(row, cell=self.id, arm=arm) for row in self.rows]


class ResultsFolder:
    """Reads and writes a results folder; creates it with the first file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def calibration(self) -> Path:
        """Where the calibration lies."""
        return self.path / CALIBRATION

    def cell_path(self, id: str) -> Path:
        """Where a finished cell lies."""
        return self.path / "cells" / f"{id}.json"

    def _parts(self, id: str) -> Path:
        return self.path / "parts" / id

    def failure_path(self, id: str) -> Path:
        """Where the reason lies why a cell failed."""
        return self.path / "failed" / f"{id}.json"

    @property
    def claims(self) -> Path:
        """Where workers say what they compute."""
        return self.path / "claims"

    def save_cell(self, finished: FinishedCell) -> None:
        """Write a finished cell atomically.

        Raises:
            QuantWMError: the folder cannot be written.
        """
        _write_cell(self.cell_path(finished.id), finished)

    def save_part(self, part: FinishedCell) -> None:
        """Write some episodes of an unfinished cell atomically.

        Raises:
            QuantWMError: the folder cannot be written.
        """
        first = min(int(row["episode"]) for row in part.rows)
        _write_cell(self._parts(part.id) / f"{first}.json", part)

    def load_parts(self, id: str) -> list[FinishedCell]:
        """What is kept of an unfinished cell; no episode twice, damaged files left out."""
        parts: list[FinishedCell] = []
        seen: set[int] = set()
        for path in sorted(self._parts(id).glob("*.json")):
            try:
                part = _read_cell(path, id)
            except CorruptFileError as error:
                logger.warning("%s; its episodes run again", error)
                continue
            episodes = {row["episode"] for row in part.rows} if part else set()
            if part and not episodes & seen:
                parts.append(part)
                seen |= episodes
        return parts

    def kept_episodes(self, id: str) -> int:
        """Episodes that are kept of an unfinished cell."""
        return sum(len(part.rows) for part in self.load_parts(id))

    def count_parts(self) -> int:
        """Parts that are kept of all unfinished cells."""
        return sum(1 for _ in self.path.glob("parts/*/*.json"))

    def clear_parts(self, id: str) -> None:
        """Remove what was kept of a cell that is finished now."""
        rmtree(self._parts(id), ignore_errors=True)
        with suppress(OSError):  # others' are there, or none ever were
            self._parts(id).parent.rmdir()

    def load_cell(self, id: str) -> FinishedCell | None:
        """A finished cell; None if its file is missing, or damaged and now set aside.

        Raises:
            MismatchError: a newer quantwm wrote the file.
        """
        path = self.cell_path(id)
        try:
            return _read_cell(path, id)
        except CorruptFileError as error:
            aside = set_aside(path)
            logger.warning("%s; set aside as %s, the cell runs again", error, aside.name)
            return None

    def save_failure(self, id: str, arm: str, error: BaseException, trace: str) -> None:
        """Write why a cell could not be computed."""
        message = f"{type(error).__name__}: {error}"
        write_json(
            self.failure_path(id), {"id": id, "arm": arm, "error": message, "traceback": trace}
        )

    def load_failure(self, id: str) -> dict[str, Any] | None:
        """Why a cell could not be computed; None if it has not failed."""
        try:
            content = json.loads(self.failure_path(id).read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def clear_failure(self, id: str) -> None:
        """Let a cell that failed be tried again."""
        self.failure_path(id).unlink(missing_ok=True)

    def peek_cell(self, id: str) -> FinishedCell | None:
        """`load_cell` for a dry run: a damaged file counts as missing and stays where it is."""
        try:
            return _read_cell(self.cell_path(id), id)
        except CorruptFileError:
            return None

    def read_config(self) -> dict[str, Any] | None:
        """What `config.yaml` holds; None if there is none.

        Raises:
            CorruptFileError: it is no YAML mapping.
        """
        path = self.path / CONFIG
        try:
            config = yaml.safe_load(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CorruptFileError(_unreadable_config(path, str(error))) from error
        if not isinstance(config, dict):
            raise CorruptFileError(_unreadable_config(path, "not a mapping"))
        return config

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml` atomically."""
        with atomic_path(self.path / CONFIG) as temporary:
            temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False, width=100))

    def write_episodes(self, rows: Sequence[Row]) -> None:
        """Write `episodes.parquet` atomically."""
        write_parquet(self.path / EPISODES, rows)

    def write_summary(self, rows: Sequence[Row], columns: Sequence[str]) -> None:
        """Write `summary.csv` atomically; what is not known is an empty field."""
        with (
            atomic_path(self.path / SUMMARY) as temporary,
            temporary.open("w", newline="") as handle,
        ):
            writer = csv.DictWriter(handle, fieldnames=list(columns))
            writer.writeheader()
            writer.writerows(rows)

    def diagnosis_path(self, name: str) -> Path:
        """Where a diagnosis lies."""
        return self.path / "diagnostics" / name

    def has_diagnosis(self, name: str, id: str) -> bool:
        """Whether a diagnosis is made, and of this identity."""
        try:
            return bool(json.loads(self.diagnosis_path(name).read_text())["id"] == id)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def arithmetic(self) -> str | None:
        """What the folder's workers compute with; None where nothing is computed yet.

        "unknown" where an older quantwm, which did not note it, has computed something.

        Raises:
            QuantWMError: the folder cannot be read.
        """
        path = self.path / ARITHMETIC
        try:
            said = path.read_text().strip() if path.exists() else ""
        except OSError as error:
            raise QuantWMError(f"cannot read {path}: {error.strerror or error}") from error
        computed = any(self.path.glob("cells/*.json")) or any(self.path.glob("parts/*/*.json"))
        return said or ("unknown" if computed else None)

    def settle_arithmetic(self, own: str) -> None:
        """Say what the folder is computed with, unless another worker has."""
        path = self.path / ARITHMETIC
        if not write_new(path, own) and not path.read_text().strip():
            with atomic_path(path) as temporary:  # cut off by a loss of power
                temporary.write_text(own)

    def check_usable(self) -> None:
        """Refuse a folder with files that a study would overwrite but did not write.

        Raises:
            MismatchError: names the files.
        """
        if (self.path / CONFIG).exists() or (self.path / "cells").is_dir():
            return
        foreign = [name for name in OUTPUTS if (self.path / name).exists()]
        if foreign:
            raise MismatchError(
                f"{self.path} is no results folder (no {CONFIG}, no cells) but holds "
                f"{', '.join(foreign)}, which a study would overwrite; give another folder"
            )

    def check_writable(self) -> None:
        """Find out before any compute that nothing could be stored.

        Raises:
            QuantWMError: the folder cannot be created or written.
        """
        with atomic_path(self.path / ".writable") as temporary:
            temporary.write_text("")
        (self.path / ".writable").unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to the first free `<name>.corrupt-N`; returns the new path.

    Raises:
        QuantWMError: the folder cannot be written.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    try:
        path.rename(aside)
    except OSError as error:
        raise QuantWMError(
            f"{path} is damaged and cannot be set aside: {error.strerror or error}; "
            "check that the folder is writable"
        ) from error
    return aside


def _digest(content: Mapping[str, Any]) -> str:
    body = {key: value for key, value in content.items() if key != "sha256"}
    try:
        return hashlib.sha256(canonical_json(body).encode()).hexdigest()
    except ValueError:  # A NaN, which no file of ours holds.
        return ""


def _write_cell(path: Path, finished: FinishedCell) -> None:
    content = {
        "format": CELL_FORMAT,
        "id": finished.id,
        "cell": dict(finished.cell),
        "bytes": finished.bytes,
        "seconds": finished.seconds,
        "rows": list(finished.rows),
    }
    write_json(path, {"sha256": _digest(content)} | content)


def _read_cell(path: Path, id: str) -> FinishedCell | None:
    try:
        content = json.loads(path.read_text())
    except (ValueError, IsADirectoryError) as error:
        raise CorruptFileError(f"{path} is cut off or no JSON ({error})") from error
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise QuantWMError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(content, dict) or not content.keys() >= _CELL_KEYS:
        raise CorruptFileError(f"{path} is no cell of a study")
    if content["sha256"] != _digest(content):
        raise CorruptFileError(f"{path} does not match its checksum")
    if content["format"] > CELL_FORMAT:
        raise MismatchError(
            f"{path} has format {content['format']}, this quantwm reads up to {CELL_FORMAT}; "
            "install the newer quantwm that wrote it, or give another folder"
        )
    if content["id"] != id:
        raise CorruptFileError(f"{path} holds the cell {content['id']}")
    return FinishedCell(id, content["cell"], content["rows"], content["bytes"], content["seconds"])


def _unreadable_config(path: Path, reason: str) -> str:
    return (
        f"cannot read {path}: {reason}; delete it to go on (finished cells are kept, because "
        "each carries its own identity), or give another folder"
    )
