"""Sections on why arms fail: layer sensitivity and fidelity of costs, from the diagnoses' files."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from quantwm.report.arms import number as finite
from quantwm.report.document import Part, Section
from quantwm.report.filters import filter_data
from quantwm.report.heatmap import sensitivity_map
from quantwm.report.load import TaskReport
from quantwm.report.series import Point, Style, agreement_plot, scatter_plot
from quantwm.report.tables import Cell, Column, Line, Table, data_attributes, number, words
from quantwm.report.text import decimal, escape

_MOST_PANELS = 12
_MOST_POINTS = 200


def sensitivity(task: TaskReport) -> Section:
    """Heat maps of how much each layer alone disturbs the imagined future."""
    parts: list[Part] = []
    for index, one in enumerate(task.diagnosed("sensitivity")):
        layers: Sequence[Mapping[str, Any]] = one["layers"]
        errors = [value for layer in layers if (value := finite(layer["error"])) and value > 0]
        if not errors:
            continue
        name = f"{task.key}-sensitivity-{index}"
        scheme = f"{escape(str(one['scheme']).upper())}, {escape(str(one['method']))}"
        figures = "".join(
            _map(layers, part, (min(errors), max(errors)), f"{name}-{part}")
            for part in dict.fromkeys(str(layer["part"]) for layer in layers)
        )
        worst = max(layers, key=lambda layer: _sortable(layer["error"]))
        parts += [
            f'<p class="hint">{scheme}, each layer quantized alone with the rest in float: '
            "relative L2 error of the last imagined latent; shades are logarithmic and the same "
            f'for all parts. Largest: <span class="arm">{escape(str(worst["layer"]))}</span>.</p>'
            f'<div class="maps">{figures}</div>',
            "<details><summary>Every layer as a table</summary>",
            _layer_table(layers, name),
            "</details>",
        ]
    return Section(f"{task.key}-sensitivity", "Layer sensitivity", parts, task=task.key)


def fidelity(task: TaskReport, styles: Mapping[str, Style]) -> Section:
    """Do quantized models rank candidates as the float model does?

    Args:
        task: the task.
        styles: of the methods.
    """
    name, title = f"{task.key}-fidelity", "Cost fidelity"
    found, failed = task.diagnosed("fidelity"), [o for o in task.diagnoses if "error" in o]
    notes = "".join(
        f'<p class="hint"><b class="arm">{escape(str(one.get("arm", "?")))}</b>: '
        f"{escape(str(one['error']))}</p>"
        for one in failed
    )
    if not found:
        return Section(name, title, [notes], task=task.key)
    order = [arm.name for arm in task.arms]
    found.sort(key=lambda one: order.index(one["arm"]) if one["arm"] in order else len(order))
    shown = _spread_out(found)
    hint = (
        "The planner needs no true costs, only the right order. Each point of the small plots is "
        "a candidate plan: its cost under the float model and under the quantized one, both "
        "divided by the float median of the episode; on the dashed line they agree."
    )
    if len(shown) < len(found):
        hint += (
            f" {len(shown)} of {len(found)} arms, from the lowest rank correlation to the highest."
        )
    figures = "".join(_agreement(one, task, f"{name}-{index}") for index, one in enumerate(shown))
    parts: list[Part] = [
        f'<p class="hint">{hint}</p>',
        _against_success(found, task, styles),
        f'<div class="panels wider">{figures}</div>' if figures else "",
        '<p class="hint">Medians over episodes.</p>',
        _fidelity_table(found, task),
        notes,
    ]
    return Section(name, title, parts, task=task.key)


def _spread_out(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All of a few diagnoses; of many, some evenly from the lowest to the highest rank."""
    if len(found) <= _MOST_PANELS:
        return list(found)
    ranked = sorted(found, key=lambda one: _median(one["rank_correlation"]) or 0.0)
    step = (len(ranked) - 1) / (_MOST_PANELS - 1)
    return [ranked[round(step * index)] for index in range(_MOST_PANELS)]


def _against_success(
    found: Sequence[Mapping[str, Any]], task: TaskReport, styles: Mapping[str, Style]
) -> str:
    """Rank correlation against success, a point an arm."""
    arms = {arm.name: arm for arm in task.arms}
    points = []
    for one in found:
        arm, rank = arms.get(one["arm"]), _median(one["rank_correlation"])
        if arm is not None and rank is not None and arm.labels.method in styles:
            style = styles[arm.labels.method]
            points.append(Point(rank, arm.success, "", style, filter_data(arm)))
    if len(points) < 3:
        return ""
    methods = dict.fromkeys(point.data.get("method", "") for point in points)
    figure = scatter_plot(
        points,
        f"{task.key}-fidelity-success",
        "Rank correlation of candidates' costs with the float model's against success; "
        "a point an arm.",
        labels=("rank correlation with the float model's costs", "success rate"),
        legend={method: styles[method] for method in methods if method in styles},
    )
    return f'<figure class="large"><h4>Fidelity against success</h4>{figure}</figure>'


def _agreement(one: Mapping[str, Any], task: TaskReport, name: str) -> str:
    """Costs of the same candidates by the float model and by one arm; "" without any."""
    pairs = _pairs(one)
    if len(pairs) < 2:
        return ""
    data = next((filter_data(arm) for arm in task.arms if arm.name == one["arm"]), {})
    text = f"rank correlation {decimal(_median(one['rank_correlation']))}"
    figure = agreement_plot(
        [x for x, _ in pairs],
        [y for _, y in pairs],
        name,
        f"Costs of the same candidates by the float model and by {one['arm']}: {text}.",
        ("cost, float model", "cost, this arm"),
    )
    return (
        f'<figure{data_attributes(data)}><h4 class="arm">{escape(one["arm"])}</h4>'
        f'<p class="hint">{text}</p>{figure}</figure>'
    )


def _map(
    layers: Sequence[Mapping[str, Any]], part: str, bounds: tuple[float, float], name: str
) -> str:
    own = [layer for layer in layers if layer["part"] == part]
    own = [{**layer, "error": _sortable(layer["error"])} for layer in own]
    told = "; ".join(f"{layer['layer']} {layer['error']:.2g}" for layer in own)
    figure = sensitivity_map(own, bounds, name, f"Sensitivity of the {part}'s layers. {told}.")
    return (
        f'<figure><h4>{escape(part)}</h4><div class="scroll" role="region" tabindex="0" '
        f'aria-label="Heat map of the {escape(part)}">{figure}</div></figure>'
    )


def _layer_table(layers: Sequence[Mapping[str, Any]], name: str) -> Table:
    lines = [
        Line(
            {
                "layer": words(str(layer["layer"])),
                "part": words(str(layer["part"])),
                "block": words(str(layer["block"])),
                "error": _plain(layer["error"], 4),
                "rank_correlation": _plain(layer["rank_correlation"], 3),
            }
        )
        for layer in sorted(layers, key=lambda layer: -_sortable(layer["error"]))
    ]
    columns = [
        Column("layer", "Layer", "pin"),
        Column("part", "Part"),
        Column("block", "Block"),
        Column("error", "Relative error of the<br>imagined latent", "number"),
        Column("rank_correlation", "Rank correlation<br>of costs", "number"),
    ]
    return Table(name, "Sensitivity of every layer", columns, lines, kind="")


def _fidelity_table(found: Sequence[Mapping[str, Any]], task: TaskReport) -> Table:
    arms = {arm.name: arm for arm in task.arms}
    parts = list(dict.fromkeys(part for one in found for part in one["drift"]))
    lines = []
    for one in found:
        arm = arms.get(one["arm"])
        success = number(arm.success, decimal(arm.success)) if arm else Cell()
        cells = {
            "arm": words(str(one["arm"])),
            "success": success,
            "rank_correlation": _plain(_median(one["rank_correlation"]), 2),
            "top_k_overlap": _plain(_median(one["top_k_overlap"]), 2),
            "regret": _plain(_median(one["regret"]), 3),
            "k": Cell(value=one["k"]),
            "episodes": Cell(str(one["episodes"]), one["episodes"]),
        }
        for part in parts:
            drift = one["drift"].get(part, {})
            for kind in _DRIFTS:
                steps = drift.get(kind) or [None]
                cells[f"{kind}_{part}"] = _plain(steps[-1], 3)
        lines.append(Line(cells, data=filter_data(arm) if arm else {}))
    columns = [
        Column("arm", "Arm", "pin"),
        Column("success", "Success", "number"),
        Column("rank_correlation", "Rank<br>correlation", "number"),
        Column("top_k_overlap", "Top-k<br>overlap", "number"),
        Column("regret", "Regret", "number"),
        Column("k"),
        *[
            Column(f"{kind}_{part}", f"{head}<br>{escape(part)}", "number")
            for part in parts
            for kind, head in _DRIFTS.items()
        ],
        Column("episodes", "Episodes", "number"),
    ]
    return Table(f"{task.key}-fidelity", "Cost fidelity by arm", columns, lines)


_DRIFTS = {
    "against_float": "Drift from float,",
    "against_truth": "Drift from truth,",
    "float_against_truth": "Float from truth,",
}


def _pairs(one: Mapping[str, Any]) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` pairs of positive costs, evenly taken."""
    both = zip(one["costs"]["float"], one["costs"]["arm"], strict=True)
    pairs = [(finite(x), finite(y)) for x, y in both]
    usable = [(x, y) for x, y in pairs if x is not None and y is not None and x > 0 and y > 0]
    return usable[:: max(1, math.ceil(len(usable) / _MOST_POINTS))]


def _median(values: Sequence[Any]) -> float | None:
    usable = [value for one in values if (value := finite(one)) is not None]
    return statistics.median(usable) if usable else None


def _plain(value: Any, digits: int) -> Cell:
    shown = finite(value)
    return number(shown, decimal(shown, digits))


def _sortable(value: Any) -> float:
    """A number; infinite where it is none."""
    shown = finite(value)
    return math.inf if shown is None else shown
