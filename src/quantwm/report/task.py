"""The sections of one task: a small study in one table, a large one group by group."""

from collections.abc import Mapping, Sequence

from quantwm.report import sections
from quantwm.report.arms import Arm
from quantwm.report.diagnosis import fidelity, sensitivity
from quantwm.report.document import Part, Section
from quantwm.report.filmstrip import SIDE, SMALL_SIDE, choose_scenes, strips
from quantwm.report.filters import filter_data
from quantwm.report.headline import headline
from quantwm.report.interventions import causes, interventions, judged
from quantwm.report.layouts import GROUPS, Panel, group_of, iteration_table, panels_of
from quantwm.report.load import TaskReport, slug
from quantwm.report.objective import objective
from quantwm.report.published import claim
from quantwm.report.series import (
    BOUND,
    MOST_SERIES,
    REFERENCE,
    Point,
    Series,
    Style,
    curve_plot,
    scatter_plot,
    styles_of,
)
from quantwm.report.tables import data_attributes
from quantwm.report.text import decimal, escape
from quantwm.study.findings import Finding

MOST_IN_ONE_TABLE = 12
"""Arms up to which a task is shown as one table, with a plot each."""


def is_large(task: TaskReport) -> bool:
    """Whether a task has too many arms for one table and a plot each."""
    return len(task.arms) > MOST_IN_ONE_TABLE


def task_sections(
    task: TaskReport,
    styles: Mapping[str, Style],
    findings: Sequence[Finding],
    *,
    brief: bool = False,
) -> list[Section]:
    """Everything that the report shows of a task.

    Args:
        task: the task.
        styles: of the methods of all tasks.
        findings: of the whole study.
        brief: as in `write_report`.
    """
    verdicts = judged(task)
    name, key = task.key, task.key
    large = is_large(task)
    middle = (_large if large else _small)(task, styles, findings, brief=brief)
    frames = _frames(task, causes(verdicts), brief=brief)
    shown = [
        *middle,
        interventions(task, verdicts),
        fidelity(task, styles),
        sensitivity(task),
        Section(f"{name}-frames", "Episodes in frames", [frames], task=key),
    ]
    if brief:
        return shown
    grid = sections.episode_grid(task.arms, name)
    failed = any(arm.failures for arm in task.arms)
    fails: list[Part] = [claim("failures", findings, task.results.task) if failed else ""]
    fails += sections.failures(task.arms, name)
    setup = sections.reproduction(task.rows, task.config, task.environment)
    return [
        *shown,
        Section(f"{name}-episodes", "Episode by episode", grid, task=key, folded=large),
        Section(f"{name}-failures", "Failures by reason", fails, task=key, folded=large),
        Section(f"{name}-setup", "Configuration and environment", [setup], task=key, folded=large),
    ]


def method_styles(arms: Sequence[Arm]) -> dict[str, Style]:
    """A style for each method, round-to-nearest first."""
    methods = [arm.labels.method for arm in arms if arm.labels.method]
    return styles_of(sorted(methods, key=lambda method: method != "rtn"))


def _small(
    task: TaskReport, styles: Mapping[str, Style], findings: Sequence[Finding], *, brief: bool
) -> list[Section]:
    name, key = task.key, task.key
    groups = {group_of(arm) for arm in task.arms}
    claims = [claim(group, findings, task.results.task) for group in GROUPS if group in groups]
    told: list[Part] = [headline(task), *claims, *sections.arms_table(task.arms, name)]
    plots, curves = sections.comparison(task.arms, name), sections.iterations(task.arms, name)
    return [
        Section(f"{name}-arms", "Arms", told, task=key),
        Section(f"{name}-comparison", "Success and size by arm", [plots], task=key),
        Section(f"{name}-iterations", "Success by MPC iteration", [curves], task=key),
        *([] if brief else [objective(task, styles, findings)]),
    ]


def _large(
    task: TaskReport, styles: Mapping[str, Style], findings: Sequence[Finding], *, brief: bool
) -> list[Section]:
    name, key = task.key, task.key
    overview = Section(
        f"{name}-overview", "In short", [headline(task), _sizes(task, styles)], task=key
    )
    groups = [_group(group, task, styles, findings, least=2 if brief else 1) for group in GROUPS]
    if brief:
        return [overview, *groups]
    everything = Section(
        f"{name}-arms",
        "Every arm in one table",
        sections.arms_table(task.arms, name),
        task=key,
        folded=True,
    )
    return [overview, *groups, objective(task, styles, findings), everything]


def _group(
    group: str,
    task: TaskReport,
    styles: Mapping[str, Style],
    findings: Sequence[Finding],
    least: int,
) -> Section:
    """A group's table, and a plot of each panel that has at least so many arms."""
    name, title = f"{task.key}-{group}", GROUPS[group]
    panels = panels_of(group, task.arms)
    if not panels:
        return Section(name, title, task=task.key)
    said = claim(group, findings, task.results.task)
    table = iteration_table(task.key, group, panels, task.reference)
    plots = "".join(
        _curves(f"{name}-{slug(panel.title)}-{index}", panel, task, styles, group)
        for index, panel in enumerate(_split(panels))
        if len(panel.members) >= least
    )
    hint = '<p class="hint">Success rate after MPC iteration 0 (the start), 1, and so on.</p>'
    return Section(
        name, title, [said, hint, table, f'<div class="plots">{plots}</div>'], task=task.key
    )


def _split(panels: Sequence[Panel]) -> list[Panel]:
    """The panels, those of too many lines for one plot cut into even parts."""
    result = []
    for panel in panels:
        count = -(-len(panel.members) // MOST_SERIES)
        size = -(-len(panel.members) // count)
        for start in range(0, len(panel.members), size):
            result.append(Panel(panel.title, panel.members[start : start + size]))
    return result


def _curves(
    name: str, panel: Panel, task: TaskReport, styles: Mapping[str, Style], group: str
) -> str:
    reference = task.reference
    own = styles_of([what for what, _ in panel.members])

    def style(what: str, arm: Arm) -> Style:
        if arm.role == "bound":
            return BOUND if len(panel.members) == 1 else own[what]
        return styles[what] if what == arm.labels.method else own[what]

    series = [
        Series(what, arm.curve, style(what, arm), filter_data(arm))
        for what, arm in panel.members
        if arm is not reference
    ]
    if reference:
        series.insert(0, Series("float", reference.curve, REFERENCE))
    told = "; ".join(
        f"{one.label} {', '.join(decimal(value) for value in one.values)}" for one in series
    )
    title = panel.title or GROUPS[group]
    figure = curve_plot(series, name, f"Success by MPC iteration, {title}: {told}.")
    widths = {arm.labels.width for _, arm in panel.members if filter_data(arm)}
    data = data_attributes({"width": widths.pop()}) if len(widths) == 1 else ""
    return f"<figure{data} data-group><h4>{escape(title)}</h4>{figure}</figure>"


def _sizes(task: TaskReport, styles: Mapping[str, Style]) -> str:
    """Stored size against success: which recipe keeps success in how many bytes."""
    sized = [arm for arm in task.arms if arm.bytes and not arm.labels.budget]
    if len(sized) < 2:
        return ""
    front = _front([arm for arm in sized if arm.role == "quantized"])
    points = [
        Point(
            (arm.bytes or 0) / 1e6,
            arm.success,
            arm.name if arm in front or arm.role == "float" else "",
            styles.get(arm.labels.method, REFERENCE),
            filter_data(arm),
        )
        for arm in sized
    ]
    methods = dict.fromkeys(arm.labels.method for arm in sized if arm.labels.method)
    legend = {"float": REFERENCE} | {method: styles[method] for method in methods}
    named = "; ".join(f"{arm.name} {(arm.bytes or 0) / 1e6:.1f} MB" for arm in front)
    figure = scatter_plot(
        points,
        f"{task.key}-sizes",
        f"Stored size against success, a point an arm. No arm is smaller and succeeds more than "
        f"these: {named}.",
        labels=("stored model, MB", "success rate"),
        legend=legend,
        log_x=True,
    )
    hint = (
        "A point is an arm. Named are float and the arms that no other one beats in both size and "
        "success; intervals are in the tables."
    )
    return (
        f'<figure class="large"><h4>Stored size against success</h4>'
        f'<p class="hint">{hint}</p>{figure}</figure>'
    )


def _frames(task: TaskReport, known: Mapping[str, str], *, brief: bool) -> str:
    scenes, choice = choose_scenes(task.arms, known)
    side, most = (SMALL_SIDE, 2) if brief else (SIDE, len(scenes))
    shown = strips(scenes[:most], task.task, side=side)
    return sections.filmstrips(shown, choice, task.task.name) if shown else ""


def _front(arms: Sequence[Arm]) -> list[Arm]:
    """Arms than which none is both smaller and more successful; one of several equals."""
    front: list[Arm] = []
    for arm in sorted(arms, key=lambda arm: (arm.bytes or 0, -arm.success)):
        if not front or arm.success > front[-1].success:
            front.append(arm)
    return front
