"""The report's page: everything inside one HTML file, nothing loaded from elsewhere."""

import csv
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from quantwm.errors import CorruptFileError, MismatchError
from quantwm.files import atomic_path
from quantwm.protocols import Task
from quantwm.report import sections
from quantwm.report.arms import Arm, Row, arms_of, choose_episode, worst_arm
from quantwm.report.filmstrip import strips
from quantwm.report.headline import findings, lead
from quantwm.report.text import escape
from quantwm.study.prepare import build_task
from quantwm.study.rows import read_parquet
from quantwm.study.spec import RECORD
from quantwm.study.store import CONFIG, EPISODES, REPORT, SUMMARY, ResultsFolder
from quantwm.study.summary import COLUMNS

_READING = """
<p><b>Success intervals</b> are Wilson 95% intervals: rates inside them are compatible with the
episodes seen. They describe one arm; whether two of them overlap says little about the
difference.</p>
<p><b>Differences</b> are paired. Every arm meets the same starts, goals and planner noise, so
that an arm is compared with float episode by episode, and luck in the draw of goals cancels. An
arm is called separable from float only if the 95% interval of the difference excludes zero and
the exact McNemar test has p &lt; 0.05. Otherwise the episodes leave it open, and more of them
would narrow the interval. Won and lost count the episodes that only the arm, or only float,
solved.</p>
<p>Each interval stands for one comparison. Of twenty arms that equal float, up to about one would
be called separable by chance.</p>
<p><b>Success</b> is read after each MPC iteration (a plan, then its execution) and is kept once
reached; such an episode ends. The median counts the episodes that succeeded.
<b>Oracle arms</b> plan with the simulator instead of the model's predictions: they show what
planner and objective can reach, and have no stored model. <b>Seconds</b> are the time that the
arm's episodes took.</p>
"""


def write_report(
    folder: Path,
    *,
    environment: Mapping[str, Any] | None = None,
    command: str | None = None,
    task: Task | None = None,
) -> Path:
    """Write `report.html` from the files of a results folder; returns its path.

    Args:
        folder: with `config.yaml`, `episodes.parquet` and `summary.csv` of a study.
        environment: shown as it is; default: what the study recorded in its configuration.
        command: what reproduces the study; default: the command that runs `config.yaml` again.
        task: draws the filmstrip's frames; default: the one that the configuration names.

    Raises:
        QuantWMError: a file is missing, damaged or does not belong to the others, or the report
            cannot be written.
    """
    results = ResultsFolder(folder)
    config = results.read_config()
    missing = [name for name in (CONFIG, EPISODES, SUMMARY) if not (folder / name).is_file()]
    if config is None or missing:
        raise MismatchError(
            f"{folder} lacks {', '.join(missing)}, so there is nothing to report; "
            "give the folder of a finished study"
        )
    record = config.pop(RECORD, None) or {}
    text = render(
        read_parquet(folder / EPISODES),
        _read_summary(folder / SUMMARY),
        config,
        _recorded(record) if environment is None else environment,
        build_task(config["task"]) if task is None else task,
        command=command or f"quantwm study {CONFIG}",
    )
    with atomic_path(folder / REPORT) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / REPORT


def _recorded(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a study noted of where it ran, without the cells, which the summary has."""
    rest = {key: value for key, value in record.items() if key not in ("environment", "cells")}
    return dict(record.get("environment") or {}) | rest


def _read_summary(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorruptFileError(_unreadable(path, str(error))) from error
    absent = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if absent:
        raise CorruptFileError(_unreadable(path, f"it lacks {', '.join(absent)}"))
    return lines


def _unreadable(path: Path, reason: str) -> str:
    return f"cannot read {path}: {reason}; run the study's command again to write it anew"


def render(
    rows: Sequence[Row],
    summary: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    task: Task,
    *,
    command: str = f"quantwm study {CONFIG}",
) -> str:
    """The report as one HTML document; the same arguments give the same text.

    Args:
        rows: one an episode, the columns of `episodes.parquet`.
        summary: one an arm, the columns of `summary.csv`; absent values None, NaN or "".
        config: the resolved study, without its record of where it ran.
        environment: versions, CPU, commit and the like, shown as they are.
        task: draws the filmstrip's frames.
        command: what reproduces the study.

    Raises:
        UsageError: the summary has no arm.
        MismatchError: summary and rows do not belong together.
    """
    arms = arms_of(rows, summary, config)
    name = task.name.replace("_", " ")
    title = f"{name[:1].upper()}{name[1:]}: planning with a quantized world model"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{lead(arms, name)}</p>',
        f"<ul>{''.join(f'<li>{sentence}</li>' for sentence in findings(arms, config))}</ul>",
        sections.arms_table(arms),
        _section("Success and size by arm", sections.comparison(arms)),
        _section("Success by MPC iteration", sections.iterations(arms)),
        _section("Episode by episode", sections.episode_grid(arms)),
        _section("One episode in frames", _filmstrip(arms, task)),
        _section("Failures by reason", sections.failures(arms)),
        _section("How to read this", _READING),
        _section(
            "Configuration and environment",
            sections.reproduction(rows, config, environment, command),
        ),
    ]
    return _page(title, "\n".join(part for part in body if part))


def _filmstrip(arms: Sequence[Arm], task: Task) -> str:
    reference = next((arm for arm in arms if arm.role == "float" and arm.rows), None)
    shown = [arm for arm in (reference, worst_arm(arms)) if arm]
    choice = choose_episode(shown)
    if choice is None:
        return ""
    return sections.filmstrip(strips(shown, choice, task), choice, task.name)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _page(title: str, body: str) -> str:
    style = resources.files("quantwm.report").joinpath("style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
