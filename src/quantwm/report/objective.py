"""The planner's objective beside the success it is meant to bring."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantwm.diagnostics.alignment import ObjectiveAlignment, objective_alignment
from quantwm.report.arms import Arm
from quantwm.report.arms import number as finite
from quantwm.report.document import Part, Section
from quantwm.report.filters import filter_data
from quantwm.report.layouts import LABEL_KEYS, label_cells, shown_iterations
from quantwm.report.load import TaskReport
from quantwm.report.published import claim
from quantwm.report.series import (
    REFERENCE,
    Point,
    Series,
    Style,
    curve_plot,
    scatter_plot,
    styles_of,
)
from quantwm.report.tables import Cell, Column, Line, Table, number, words
from quantwm.report.text import decimal, escape
from quantwm.study.findings import Finding

MOST_COMPARED = 6


@dataclass(frozen=True)
class Objective:
    """What an arm's planner believed.

    Attributes:
        arm: whose.
        by_iteration: lowest predicted cost of plan 1, 2, ..., the median over the episodes still
            running; NaN where there is none.
        last: lowest predicted cost of each episode's last plan, in the median; None without one.
        alignment: whether a lower cost means success, and how the cost falls in optimisation.
    """

    arm: Arm
    by_iteration: tuple[float, ...]
    last: float | None
    alignment: ObjectiveAlignment


def objective_of(arm: Arm) -> Objective:
    """The objective of an arm, from its rows."""
    costs = [[finite(cost) for cost in row["cost_by_iteration"]] for row in arm.rows]
    count = max((len(one) for one in costs), default=0)
    medians = [_median([one[k] for one in costs if k < len(one)]) for k in range(count)]
    return Objective(
        arm,
        tuple(math.nan if value is None else value for value in medians),
        _median([one[-1] for one in costs if one]),
        objective_alignment(arm.rows),
    )


def objective(
    task: TaskReport, styles: Mapping[str, Style], findings: Sequence[Finding]
) -> Section:
    """Does a lower predicted cost mean success? Empty without a float arm.

    Args:
        task: the task.
        styles: of the methods.
        findings: of the whole study.
    """
    found = [objective_of(arm) for arm in task.arms if arm.role != "bound"]
    base = next((one.last for one in found if one.arm.role == "float"), None)
    name, title = f"{task.key}-objective", "Planning loss against success"
    if not base:
        return Section(name, title, task=task.key)
    compared = _compared(found)
    figures = _curves(compared, base, name)
    parts: list[Part] = [
        claim("objective", findings, task.results.task),
        _HINT + _scatter(found, base, styles, name),
        f'<div class="plots">{"".join(figures)}</div>',
        _iteration_table(compared, base, name),
        "<details><summary>Every arm as a table</summary>",
        _table(found, base, name),
        "</details>",
    ]
    return Section(name, title, parts, task=task.key)


_HINT = (
    '<p class="hint">The predicted cost is what the planner lowers: the lowest cost of its '
    "candidates under the arm's own model, here the median over episodes, divided by that of the "
    "float model's last plans. An arm at float's cost with less success than float has an "
    "objective that no longer means success. AUC: the chance that, of two episodes planned in the "
    "same MPC iteration, the one that then succeeded had the lower cost; 0.5 is a coin. By "
    "iteration only episodes still running count, which are the harder ones.</p>"
)


def _scatter(
    found: Sequence[Objective], base: float, styles: Mapping[str, Style], name: str
) -> str:
    points = [
        Point(
            one.last / base,
            one.arm.success,
            one.arm.name if one.arm.role == "float" else "",
            styles.get(one.arm.labels.method, REFERENCE),
            filter_data(one.arm),
        )
        for one in found
        if one.last
    ]
    methods = dict.fromkeys(one.arm.labels.method for one in found)
    legend = {method: styles[method] for method in methods if method in styles}
    figure = scatter_plot(
        points,
        f"{name}-scatter",
        "Predicted cost of the last plan, relative to float, against success; a point an arm.",
        labels=("predicted cost of the last plan, float = 1", "success rate"),
        legend={"float": REFERENCE} | legend,
        log_x=True,
    )
    return f'<figure class="large"><h4>Every arm</h4>{figure}</figure>'


def _curves(compared: Sequence[Objective], base: float, name: str) -> Iterator[str]:
    """Plots of float and some arms: cost and success by iteration, AUC, cost within a plan."""
    if len(compared) < 2:
        return
    looks = styles_of([one.arm.name for one in compared if one.arm.role != "float"])
    names = ", ".join(one.arm.name for one in compared)

    def plot(
        title: str, key: str, values: Mapping[int, Sequence[float]], **options: object
    ) -> Iterator[str]:
        shown = [
            Series(
                one.arm.name,
                values[index],
                looks.get(one.arm.name, REFERENCE),
                filter_data(one.arm),
            )
            for index, one in enumerate(compared)
            if any(map(math.isfinite, values[index]))
        ]
        if len(shown) > 1:
            figure = curve_plot(shown, f"{name}-{key}", f"{title}: {names}.", **options)  # type: ignore[arg-type]
            yield f"<figure data-group><h4>{title}</h4>{figure}</figure>"

    indexed = list(enumerate(compared))
    yield from plot(
        "Predicted cost by MPC iteration",
        "cost",
        {i: [value / base for value in one.by_iteration] for i, one in indexed},
        first=1,
        rate=False,
    )
    yield from plot(
        "Success of the same arms", "success", {i: o.arm.curve[1:] for i, o in indexed}, first=1
    )
    areas = {i: [_or_nan(one.auc) for one in o.alignment.iterations] for i, o in indexed}
    yield from plot("AUC by MPC iteration", "auc", areas, first=1)
    yield from plot(
        "Predicted cost within a plan, first step = 1",
        "steps",
        {i: one.alignment.fall.by_step for i, one in indexed},
        first=1,
        rate=False,
        x_label="optimisation step",
    )


def _compared(found: Sequence[Objective]) -> list[Objective]:
    """Float, and at most `MOST_COMPARED` plain arms, the best and the worst among them."""
    plain = [one for one in found if one.arm.labels.method == "rtn" and not one.arm.labels.budget]
    whole = [one for one in plain if one.arm.labels.part == "all"] or plain
    ordered = sorted(whole, key=lambda one: -one.arm.success)
    step = max(1.0, (len(ordered) - 1) / (MOST_COMPARED - 1))
    places = range(min(len(ordered), MOST_COMPARED))
    reference = [one for one in found if one.arm.role == "float"]
    return [*reference, *(ordered[round(step * place)] for place in places)]


def _iteration_table(compared: Sequence[Objective], base: float, name: str) -> Table:
    """Predicted cost, AUC and success by MPC iteration, three rows an arm."""
    shown = [k for k in shown_iterations({len(one.by_iteration) for one in compared}) if k]
    lines = []
    for one in compared:
        areas = [each.auc for each in one.alignment.iterations]
        for what, values, rate in (
            ("predicted cost", [value / base for value in one.by_iteration], False),
            ("AUC", areas, False),
            ("success", one.arm.curve[1:], True),
        ):
            cells = {"what": words(what), "arm": Cell(value=one.arm.name)}
            for k in shown:
                value = finite(values[k - 1]) if k <= len(values) else None
                cells[f"iteration_{k}"] = number(
                    value, decimal(value), share=value if rate else None
                )
            group = f'<span class="arm">{escape(one.arm.name)}</span>'
            lines.append(Line(cells, group, filter_data(one.arm)))
    columns = [
        Column("arm"),
        Column("what", "MPC iteration", "pin"),
        *[Column(f"iteration_{k}", str(k), "number") for k in shown],
    ]
    label = "Planning loss and success by MPC iteration"
    return Table(f"{name}-iterations", label, columns, lines, kind="")


def _table(found: Sequence[Objective], base: float, name: str) -> Table:
    most = max(len(one.alignment.iterations) for one in found)
    lines = []
    for one in found:
        aligned, fall = one.alignment, one.alignment.fall.median
        cells = {
            "arm": words(one.arm.name),
            "cost_first_plan": _relative(one.by_iteration[0] if one.by_iteration else None, base),
            "cost_last_plan": _relative(one.last, base),
            "fall_within_plan": number(fall, decimal(fall)),
            "auc": number(aligned.auc, decimal(aligned.auc)),
            "success": number(one.arm.success, decimal(one.arm.success), share=one.arm.success),
            "episodes": Cell(str(one.arm.episodes), one.arm.episodes),
        }
        for k, each in enumerate(aligned.iterations, 1):
            cells |= {
                f"auc_{k}": Cell(value=each.auc),
                f"auc_{k}_low": Cell(value=each.low),
                f"auc_{k}_high": Cell(value=each.high),
            }
        lines.append(Line(cells | label_cells(one.arm.labels), data=filter_data(one.arm)))
    with_steps = any(one.alignment.fall.median is not None for one in found)
    columns = [
        Column("arm", "Arm", "pin"),
        *[Column(key) for key in LABEL_KEYS],
        Column("cost_first_plan", "Cost of the<br>first plan", "number"),
        Column("cost_last_plan", "Cost of the<br>last plan", "number"),
        *([Column("fall_within_plan", _FALL, "number")] if with_steps else []),
        Column("auc", "AUC", "number"),
        *[Column(f"auc_{k}{end}") for k in range(1, most + 1) for end in ("", "_low", "_high")],
        Column("success", "Success", "number"),
        Column("episodes", "Episodes", "number"),
    ]
    return Table(name, "Predicted cost and success", columns, lines)


_FALL = "Last over first<br>step of a plan"


def _relative(value: float | None, base: float) -> Cell:
    shown = None if value is None or not math.isfinite(value) else value / base
    return number(shown, decimal(shown))


def _median(values: Sequence[float | None]) -> float | None:
    usable = [value for value in values if value is not None]
    return statistics.median(usable) if usable else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
