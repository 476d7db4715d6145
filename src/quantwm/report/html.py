"""The report: one HTML file in which nothing is loaded from elsewhere, and its tables as CSV."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantwm.errors import UsageError
from quantwm.files import atomic_path
from quantwm.protocols import Task
from quantwm.report.across import across
from quantwm.report.document import Section, contents, page
from quantwm.report.filters import filter_form
from quantwm.report.headline import study_lead
from quantwm.report.load import TaskReport, distinct, read_rows, read_task
from quantwm.report.tables import FOLDER
from quantwm.report.task import is_large, method_styles, task_sections
from quantwm.report.text import escape
from quantwm.report.verdicts import verdicts
from quantwm.study.findings import Finding, findings_of
from quantwm.study.store import CONFIG, REPORT

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
be called separable by chance. <b>p, Holm</b>, where a table has it, is p corrected for all
comparisons of that table: if only values below 0.05 are taken for differences, the chance that
any of them is wrong is at most 0.05.</p>
<p><b>Success</b> is read after each MPC iteration (a plan, then its execution) and is kept once
reached; such an episode ends. The median counts the episodes that succeeded.
<b>Oracle arms</b> plan with the simulator instead of the model's predictions: they show what
planner and objective can reach, and have no stored model. <b>Random plans</b> are samples of the
planner's noise that nothing chose: what chance reaches. <b>Seconds</b> are the time that the
arm's episodes took; planning alone is given as the mean over episodes, of which those planned
together share the time evenly.</p>
"""


@dataclass(frozen=True)
class Report:
    """A page, and the tables that lie beside it.

    Attributes:
        html: the page.
        tables: CSV files as text, by the path that the page links to.
    """

    html: str
    tables: Mapping[str, str]


def write_report(
    sources: Path | Sequence[Path],
    *,
    out: Path | None = None,
    preset: str = "findings",
    brief: bool = False,
    command: str | None = None,
    environment: Mapping[str, Any] | None = None,
    task: Task | None = None,
) -> Path:
    """Write `report.html` of studies, and `report-tables/` beside it.

    Args:
        sources: results folders of one study or several, usually one a task, each with
            `config.yaml`, `episodes.parquet`, `summary.csv` and, if there are diagnoses,
            `diagnostics/*.json`; or files of rows alone (`read_rows`).
        out: folder to write to, or an HTML file; by default the folder of a single study.
        preset: whose arms the files of rows hold.
        brief: the page alone, with verdicts, tables by width, plots where they compare arms, and
            two small filmstrips a task: without what is told episode by episode, objectives, all
            arms in one table, and where it ran.
        command: what reproduces the study; default: the command that runs `config.yaml` again.
        environment: shown as it is; default: what each study recorded in its configuration.
        task: draws the filmstrips' frames; default: the one that each configuration names.

    Returns:
        path of the page.

    Raises:
        UsageError: no source, or several or a file without `out`.
        QuantWMError: a file is missing, damaged or does not belong to the others, or the report
            cannot be written.
    """
    chosen = [sources] if isinstance(sources, Path) else list(sources)
    if not chosen:
        raise UsageError("a report needs at least one results folder, got none")
    if out is None and len(chosen) > 1:
        raise UsageError(
            f"a report of {len(chosen)} results folders belongs to none of them; "
            "give the folder to write it to as out"
        )
    if out is None and chosen[0].is_file():
        raise UsageError(f"{chosen[0]} is a file of rows; give the folder for its report as out")
    target = chosen[0] if out is None else out
    file = target if target.suffix == ".html" else target / REPORT
    tasks = [
        read_rows(path, preset, task=task)
        if path.is_file()
        else read_task(path, environment=environment, task=task)
        for path in chosen
    ]
    if command is None and any(path.is_file() for path in chosen):
        command = _of_rows(chosen, preset)
    findings = findings_of([task.results for task in tasks])
    report = render(tasks, findings, command=command, brief=brief)
    texts = {file: report.html} | {file.parent / name: t for name, t in report.tables.items()}
    for path, text in texts.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return file


def _of_rows(sources: Sequence[Path], preset: str) -> str:
    """The command that makes a report of files of rows."""
    chosen = [] if preset == "findings" else ["--preset", preset]
    return shlex.join(["quantwm", "report", *map(str, sources), *chosen, "--out", "report"])


def render(
    tasks: Sequence[TaskReport],
    findings: Sequence[Finding] = (),
    *,
    command: str | None = None,
    brief: bool = False,
) -> Report:
    """The report of one task or several; the same arguments give the same text.

    Args:
        tasks: at least one.
        findings: verdicts that the page opens with.
        command: what reproduces the study.
        brief: as in `write_report`.

    Raises:
        UsageError: no task.
    """
    if not tasks:
        raise UsageError("a report needs at least one task, got none")
    tasks = distinct(tasks)
    titles: dict[str, list[tuple[str, str]]] = {}
    for task in tasks:
        titles.setdefault(task.results.task, []).append((task.key, task.title))
    opening = verdicts(findings, titles, table=not brief)
    single = len(tasks) == 1
    arms = [arm for task in tasks for arm in task.arms]
    styles = method_styles(arms)
    parts: list[Section] = []
    for task in tasks:
        inner = task_sections(task, styles, findings, brief=brief)
        whole = Section(f"task-{task.key}", task.title, children=inner, task=task.key)
        parts += inner if single else [whole]
    again = f"<pre><code>{escape(command or f'quantwm study {CONFIG}')}</code></pre>"
    sections = [
        opening,
        across(tasks),
        *parts,
        Section("reading", "How to read this", [_READING]),
        Section("reproduction", "How to make this again", [again]),
    ]
    choice = ""
    if not single or is_large(tasks[0]):
        choice = filter_form({task.key: task.title for task in tasks}, arms)
    title = f"{tasks[0].title}: planning" if single else "Planning"
    title += " with a quantized world model" if single else " with quantized world models"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{study_lead(tasks)}</p>']
    if not single or is_large(tasks[0]):
        body += [contents(sections), choice]
    body += [section.html(linked=not brief) for section in sections]
    tables = [] if brief else [table for section in sections for table in section.tables()]
    return Report(
        page(title, "\n".join(part for part in body if part), filtered=bool(choice)),
        {f"{FOLDER}/{table.name}.csv": table.csv() for table in tables},
    )
