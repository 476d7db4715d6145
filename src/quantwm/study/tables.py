"""A study's rows and summary, put together from those of its cells that are finished."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from quantwm.errors import UsageError
from quantwm.evaluation import Row
from quantwm.study.arms import Arm, reference_arm
from quantwm.study.spec import RECORD, StudySpec
from quantwm.study.store import FinishedCell, ResultsFolder
from quantwm.study.summary import COLUMNS, arm_summary

Summary: TypeAlias = dict[str, Any]
"""One row of the study's table, with the keys `summary.COLUMNS`."""


class Tables:
    """What a results folder's finished cells say of a study's arms.

    Args:
        arms: of the study, in its order.
        cells: arm's name → id of its cell; arms that are the same share one.
        folder: where cells are, and tables go.
    """

    def __init__(
        self, arms: Sequence[Arm], cells: Mapping[str, str], folder: ResultsFolder
    ) -> None:
        self._arms, self._cells, self._folder = arms, cells, folder
        self._finished: dict[str, FinishedCell] = {}

    @classmethod
    def of_folder(cls, path: str | Path) -> "Tables":
        """Those of the study that a results folder says it holds; no model is loaded.

        Raises:
            UsageError: it holds none.
        """
        folder = ResultsFolder(Path(path))
        config, cells = recorded_study(folder)
        return cls(StudySpec.from_dict(config).arms, cells, folder)

    @property
    def names(self) -> list[str]:
        """Arms whose cell is finished, as far as was looked, in the study's order."""
        return [name for name, id in self._cells.items() if id in self._finished]

    def look(self) -> None:
        """Take in the cells that have been finished since."""
        for id in self._cells.values():
            if id not in self._finished and self._folder.cell_path(id).exists():
                stored = self._folder.load_cell(id)
                if stored is not None:
                    self._finished[id] = stored

    def rows(self, name: str) -> list[Row]:
        """One an episode of a finished arm."""
        return self._finished[self._cells[name]].labelled(name)

    def summary(self, name: str) -> Summary:
        """The arm in one row, against its float arm if that is finished."""
        finished = self._finished[self._cells[name]]
        owner = next(other for other, id in self._cells.items() if id == finished.id)
        arm = next(arm for arm in self._arms if arm.name == name)
        reference = reference_arm(self._arms, arm)
        known = reference is not None and reference.name in self.names
        return arm_summary(
            name,
            self.rows(name),
            self.rows(reference.name) if known and reference is not None else None,
            bytes=finished.bytes,
            seconds=finished.seconds,
            same_as=owner if owner != name else None,
        )

    def write(self) -> tuple[list[Row], list[Summary]]:
        """Write `episodes.parquet` and `summary.csv` of all finished arms, and return them."""
        rows = [row for name in self.names for row in self.rows(name)]
        summary = [self.summary(name) for name in self.names]
        self._folder.write_episodes(rows)
        self._folder.write_summary(summary, COLUMNS)
        return rows, summary


def recorded_study(folder: ResultsFolder) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration that a results folder holds, and its cells' ids by arm.

    Raises:
        UsageError: it holds no study.
        CorruptFileError: its configuration is damaged.
    """
    config = folder.read_config()
    cells = ((config or {}).get(RECORD) or {}).get("cells")
    if config is None or not isinstance(cells, dict):
        raise UsageError(
            f"{folder.path} holds no study: it has no config.yaml with a record of cells"
        )
    return config, {name: str(id) for name, id in cells.items()}
