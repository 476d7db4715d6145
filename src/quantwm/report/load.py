"""What the report reads: the files of a results folder, and what diagnoses of it lie there."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantwm.errors import CorruptFileError, MismatchError, UsageError
from quantwm.evaluation import Row
from quantwm.protocols import Task
from quantwm.report.arms import Arm, arms_of
from quantwm.study.prepare import build_task
from quantwm.study.results import TaskResults, results_of
from quantwm.study.rows import read_parquet
from quantwm.study.spec import RECORD, StudySpec, load_preset
from quantwm.study.store import CONFIG, EPISODES, SUMMARY, ResultsFolder
from quantwm.study.summary import COLUMNS, arm_summary

DIAGNOSTICS = "diagnostics"
"""Folder of the diagnoses within a results folder, one JSON file each."""

_TITLES = {"pusht": "PushT", "point_maze": "PointMaze"}


@dataclass(frozen=True)
class TaskReport:
    """One task's part of the report.

    Attributes:
        key: names it in the page's ids, filter and CSV files.
        title: heads its section.
        results: rows and labels of its arms.
        arms: its arms with their summary, in the order shown.
        planned: names of the arms that the study asked for.
        config: the study, all resolved, as a mapping.
        environment: versions, CPU, commit and the like.
        task: draws frames.
        diagnoses: contents of the diagnoses' files.
    """

    key: str
    title: str
    results: TaskResults
    arms: Sequence[Arm] = field(repr=False)
    planned: Sequence[str]
    config: Mapping[str, Any] = field(repr=False)
    environment: Mapping[str, Any] = field(repr=False)
    task: Task = field(repr=False)
    diagnoses: Sequence[Mapping[str, Any]] = field(repr=False, default=())

    @property
    def rows(self) -> list[Row]:
        """Rows of all arms."""
        return [row for arm in self.arms for row in arm.rows]

    @property
    def reference(self) -> Arm | None:
        """The float arm that others are compared with."""
        return next((arm for arm in self.arms if arm.role == "float"), None)

    def diagnosed(self, kind: str) -> list[Mapping[str, Any]]:
        """The diagnoses of one kind."""
        return [one for one in self.diagnoses if one.get("kind") == kind]


def read_task(
    folder: Path,
    *,
    environment: Mapping[str, Any] | None = None,
    task: Task | None = None,
) -> TaskReport:
    """A task's part of the report, from its results folder.

    Raises:
        QuantWMError: a file is missing, damaged or does not belong to the others.
    """
    config = ResultsFolder(folder).read_config()
    missing = [name for name in (CONFIG, EPISODES, SUMMARY) if not (folder / name).is_file()]
    if config is None or missing:
        raise MismatchError(
            f"{folder} lacks {', '.join(missing)}, so there is nothing to report; "
            "give the folder of a finished study"
        )
    record = config.pop(RECORD, None) or {}
    return task_report(
        read_parquet(folder / EPISODES),
        _read_summary(folder / SUMMARY),
        config,
        _recorded(record) if environment is None else environment,
        build_task(_spec_of(config).task) if task is None else task,
        diagnoses=list(_read_diagnoses(folder / DIAGNOSTICS, record)),
    )


def read_rows(path: Path, preset: str, *, task: Task | None = None) -> TaskReport:
    """A task's part of the report, from a file of rows without the folder that they come from.

    What is in a results folder only is left out: stored bytes, environment and diagnoses. An
    arm's seconds are those of planning.

    Args:
        path: `episodes.parquet` of a study, or rows packed from several.
        preset: the shipped study whose arms they are.
        task: draws frames; default: the preset's.

    Raises:
        UsageError: no such preset, the file has no rows, or some of an arm that the preset lacks.
        QuantWMError: the file is damaged.
    """
    rows = read_parquet(path)
    if not rows:
        raise UsageError(f"{path} has no rows")
    spec = load_preset(preset, rows[0]["task"])
    spec = spec.with_overrides([f"episodes={len({row['episode'] for row in rows})}"])
    foreign = {row["arm"] for row in rows} - {arm.name for arm in spec.arms}
    if foreign:
        raise UsageError(
            f"{path} has rows of arm {min(foreign)!r}, which the preset {preset!r} lacks; name "
            "the preset that they were computed with"
        )
    results = results_of(spec, rows)
    summary = [
        arm_summary(
            name,
            own,
            results.float_rows(name),
            bytes=None,
            seconds=sum(row["plan_seconds"] for row in own),
        )
        for name, own in results.rows.items()
    ]
    drawn = build_task(spec.task) if task is None else task
    return task_report(rows, summary, spec.to_dict(), {}, drawn)


def task_report(
    rows: Sequence[Row],
    summary: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    task: Task,
    *,
    diagnoses: Sequence[Mapping[str, Any]] = (),
) -> TaskReport:
    """A task's part of the report.

    Args:
        rows: one an episode, the columns of `episodes.parquet`.
        summary: one an arm, the columns of `summary.csv`; absent values None, NaN or "".
        config: the study, without its record of where it ran.
        environment: versions, CPU, commit and the like, shown as they are.
        task: draws frames.
        diagnoses: contents of the diagnoses' files.

    Raises:
        UsageError: the configuration is no study, or the summary has no arm.
        MismatchError: summary and rows do not belong together.
    """
    spec = _spec_of(config)
    known = {arm.name for arm in spec.arms}
    foreign = next((row["arm"] for row in rows if row["arm"] not in known), None)
    if foreign is not None:
        raise MismatchError(
            f"there are episodes of arm {foreign!r}, which the study's configuration lacks; "
            "run the study again to rewrite its tables"
        )
    results = results_of(spec, rows)
    return TaskReport(
        key=slug(task.name),
        title=title_of(task.name),
        results=results,
        arms=arms_of(results, summary),
        planned=[arm.name for arm in spec.arms],
        config=config,
        environment=environment,
        task=task,
        diagnoses=diagnoses,
    )


def distinct(tasks: Sequence[TaskReport]) -> list[TaskReport]:
    """The same tasks with keys and titles that differ: by the study's name, else by a number."""
    result: list[TaskReport] = []
    for task in tasks:
        one, count = task, 2
        if sum(other.key == task.key for other in tasks) > 1:
            study = str(task.config.get("name", "study"))
            one = replace(task, key=f"{task.key}-{slug(study)}", title=f"{task.title}, {study}")
        base = one
        while any(other.key == one.key for other in result):
            one = replace(base, key=f"{base.key}-{count}", title=f"{base.title} ({count})")
            count += 1
        result.append(one)
    return result


def title_of(name: str) -> str:
    """What a task is called in headings."""
    spaced = name.replace("_", " ")
    return _TITLES.get(name, spaced[:1].upper() + spaced[1:])


def slug(text: str) -> str:
    """A text as part of an id or a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def _spec_of(config: Mapping[str, Any]) -> StudySpec:
    """The study of what has run, be it with a task or planner of one's own."""
    return StudySpec.from_dict({**config, RECORD: {}})


def _recorded(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a study noted of where it ran, without the lists of its files."""
    hidden = ("environment", "cells", "diagnoses")
    rest = {key: value for key, value in record.items() if key not in hidden}
    return dict(record.get("environment") or {}) | rest


def _read_summary(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorruptFileError(_unreadable(path, str(error))) from error
    known = {*(reader.fieldnames or ()), "plan_seconds"}  # which the rows give as well
    absent = [column for column in COLUMNS if column not in known]
    if absent:
        raise CorruptFileError(_unreadable(path, f"it lacks {', '.join(absent)}"))
    return lines


def _read_diagnoses(folder: Path, record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The diagnoses that the study asks for now, under the names that its arms have now.

    All that lie there, where an older quantwm did not record which it asks for.
    """
    asked: Mapping[str, str] | None = record.get("diagnoses")
    arms: dict[str, list[str]] = {}
    for name, cell in (record.get("cells") or {}).items():
        arms.setdefault(f"fidelity-{cell}.json", []).append(name)
    for path in sorted(folder.glob("*.json")):
        if asked is not None and path.name not in asked:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CorruptFileError(_unreadable(path, str(error))) from error
        if not isinstance(content, dict):
            raise CorruptFileError(_unreadable(path, "it holds no mapping"))
        if asked is not None and content.get("id") != asked[path.name]:
            continue
        names = arms.get(path.name)
        if names and content.get("arm") not in names:
            content["arm"] = names[0]
        yield content


def _unreadable(path: Path, reason: str) -> str:
    return f"cannot read {path}: {reason}; run the study's command again to write it anew"
