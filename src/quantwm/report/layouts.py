"""Tables laid out as in the published study: method by width, success after MPC iterations.

An arm belongs to one group, by what is quantized and what it plans with; a group is a section
with a table and its curves. Where a group compares with arms of another one (a side with both
sides, a longer search with the study's own), its table repeats them.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantwm.report.arms import Arm
from quantwm.report.filters import row_data, width_order
from quantwm.report.tables import Cell, Column, Line, Table, number, words
from quantwm.report.text import decimal, escape, interval, megabytes, signed, signed_interval
from quantwm.study.labels import ArmLabels

GROUPS = {
    "weights": "Weight-only quantization",
    "activations": "Weights and activations",
    "sides": "Encoder only against predictor only",
    "blocks": "One part of the model at a time",
    "budgets": "More planning",
    "others": "Mixed plans and saved models",
    "bounds": "Oracles and random plans",
}
"""A group's key and title, in the order shown."""

_MOST_COLUMNS = 9
_SHARED = {"channel": "one scale an output channel", "tensor": "one scale a weight tensor"}
_INPUTS = {"tensor": "per tensor", "frame": "per frame", "token": "per token"}
_PARTS = {"all": "both", "encoder": "encoder only", "predictor": "predictor only"}
_PART_ORDER = ("all", "encoder", "predictor")


@dataclass(frozen=True)
class Panel:
    """Arms that belong together: the rows under one heading of a table, the lines of one plot.

    Attributes:
        title: plain text.
        members: (what tells the arm from its neighbours, the arm).
    """

    title: str
    members: Sequence[tuple[str, Arm]]


def group_of(arm: Arm) -> str:
    """The group of an arm, "" for the float arm."""
    labels = arm.labels
    if arm.role == "float":
        return ""
    if arm.role == "bound":
        return "bounds"
    if labels.budget:
        return "budgets"
    if labels.part == "all":
        return "weights" if labels.activation_bits is None else "activations"
    if labels.part in ("encoder", "predictor"):
        return "sides"
    return "others" if labels.part in ("", "mixed", "saved") else "blocks"


def panels_of(group: str, arms: Sequence[Arm]) -> list[Panel]:
    """The arms of a group, put together.

    Args:
        group: a key of `GROUPS`.
        arms: all of the task.

    Returns:
        panels whose members differ in what tells them apart: their names where nothing else does.
    """
    return [_told_apart(panel) for panel in _panels(group, arms)]


def _panels(group: str, arms: Sequence[Arm]) -> Iterable[Panel]:
    members = [arm for arm in arms if group_of(arm) == group]
    if group not in ("bounds", "others"):
        members.sort(key=_order)
    if group == "sides":
        both = [arm for arm in arms if group_of(arm) in ("weights", "activations")]
        return _beside(members, both)
    if group == "budgets":
        return _budgets(members, [arm for arm in arms if not arm.labels.budget])
    if group in ("weights", "activations"):
        named = ((_width_title(arm.labels), arm.labels.method, arm) for arm in members)
        return _together(named)
    if group == "blocks":
        named = ((_recipe(arm.labels), arm.labels.part.removesuffix(".*"), arm) for arm in members)
        return _together(named)
    return [Panel("", [(arm.name, arm) for arm in members])] if members else []


def iteration_table(task: str, group: str, panels: Sequence[Panel], reference: Arm | None) -> Table:
    """Rows as in the published tables, float first; columns are success after MPC iterations.

    Args:
        task: its key.
        group: key of `GROUPS`.
        panels: what the rows are.
        reference: the float arm, or None.
    """
    shown = [arm for panel in panels for _, arm in panel.members]
    everyone = [*shown, *([reference] if reference else [])]
    iterations = shown_iterations({len(arm.curve) - 1 for arm in everyone})
    lines = []
    if reference:
        cells = {"what": words("float")} | _cells(reference, iterations)
        lines.append(Line(cells, data=row_data(task, reference)))
    for panel in panels:
        lines += [
            Line(
                {"what": words(what)} | _cells(arm, iterations),
                group=escape(panel.title),
                data=row_data(task, arm),
            )
            for what, arm in panel.members
            if arm is not reference
        ]
    heads = [
        Column(f"after_{k}", f"after<br>{k}" if k == 0 else str(k), "number") for k in iterations
    ]
    stored = [Column(key) for key in ("arm", *LABEL_KEYS, "low", "high")]
    differences = [Column(key) for key in ("difference", "difference_low", "difference_high")]
    columns = [
        Column("what", "", "pin", stored=False),
        *stored,
        *heads,
        Column("interval", "95% interval<br>at the end", "interval", stored=False),
        *differences,
        Column("against", "Against float,<br>95% interval", "against", stored=False),
        Column("verdict", "Separable<br>from float"),
        Column("bytes", "Stored" if any(arm.bytes for arm in shown) else None, "number"),
        Column("episodes", "Episodes", "number"),
    ]
    return Table(f"{task}-{group}", GROUPS[group], columns, lines)


LABEL_KEYS = (
    "method",
    "part",
    "weight_bits",
    "weights",
    "activation_bits",
    "activations",
    "variant",
    "budget",
)
"""Columns of a CSV that say what an arm is."""


def label_cells(labels: ArmLabels) -> dict[str, Cell]:
    """Cells of `LABEL_KEYS`."""
    values: dict[str, Any] = {key: getattr(labels, key) for key in LABEL_KEYS}
    values["budget"] = budget_text(labels)
    return {key: Cell(value=None if value == "" else value) for key, value in values.items()}


def verdict_cell(arm: Arm) -> Cell:
    """Whether the arm is separable from float."""
    shown, kind = {
        "reference": ("reference", "separable-no"),
        "lower": ("yes, lower", "lower"),
        "higher": ("yes, higher", "higher"),
        "not separable": ("no", "separable-no"),
        "not compared": ("–", "separable-no"),
    }[arm.verdict]
    return Cell(shown, arm.verdict, kind)


def budget_text(labels: ArmLabels) -> str:
    """What an arm plans with, where it differs from its study: "steps 20, samples 300"."""
    named = [(key.replace("mpc", "MPC").replace("_", " "), value) for key, value in labels.budget]
    return ", ".join(f"{key} {value}" for key, value in named)


def shown_iterations(ends: Collection[int]) -> list[int]:
    """Which MPC iterations are columns: all, or every 2nd, 5th, 10th, ..., and every arm's last."""
    last = max(ends)
    step = next(step for step in (1, 2, 5, 10, 20, 50, last + 1) if last / step < _MOST_COLUMNS)
    return sorted({*range(0, last + 1, step), *ends} - {-1})


def _cells(arm: Arm | None, iterations: Sequence[int]) -> dict[str, Cell]:
    if arm is None:
        return {}
    cells = {"arm": Cell(value=arm.name)} | label_cells(arm.labels)
    for k in iterations:
        if k < len(arm.curve):
            cells[f"after_{k}"] = number(arm.curve[k], decimal(arm.curve[k]), share=arm.curve[k])
    cells |= {
        "low": Cell(value=arm.low),
        "high": Cell(value=arm.high),
        "interval": Cell(interval(arm.low, arm.high)),
        "verdict": verdict_cell(arm),
        "bytes": number(arm.bytes, megabytes(arm.bytes)),
        "episodes": number(arm.episodes, str(arm.episodes)),
    }
    if one := arm.difference:
        bounds = f'<span class="interval">{signed_interval(one.low, one.high)}</span>'
        cells |= {
            "difference": Cell(value=one.difference),
            "difference_low": Cell(value=one.low),
            "difference_high": Cell(value=one.high),
            "against": Cell(f"{signed(one.difference)} {bounds}"),
        }
    return cells


def _order(arm: Arm) -> tuple[Any, ...]:
    """By width, granularity of weights and of inputs, with round-to-nearest first."""
    labels = arm.labels
    size = labels.weights.removeprefix("g")
    return (
        width_order(labels.width),
        ("channel", "tensor").index(labels.weights) if not size.isdigit() and size else 2,
        -int(size) if size.isdigit() else 0,
        list(_INPUTS).index(labels.activations) if labels.activations else -1,
        labels.method != "rtn",
    )


def _together(named: Iterable[tuple[str, str, Arm]]) -> Iterator[Panel]:
    panels: dict[str, list[tuple[str, Arm]]] = {}
    for title, what, arm in named:
        panels.setdefault(title, []).append((what, arm))
    for title, members in panels.items():
        yield Panel(title, members)


def _told_apart(panel: Panel) -> Panel:
    if len({what for what, _ in panel.members}) == len(panel.members):
        return panel
    return Panel(panel.title, [(arm.name, arm) for _, arm in panel.members])


def _beside(members: Sequence[Arm], both: Sequence[Arm]) -> Iterator[Panel]:
    """Each recipe on the encoder, on the predictor and, if the study has it, on both."""
    for panel in _together((_recipe(arm.labels), arm.labels.part, arm) for arm in members):
        whole = [replace(arm.labels, part="all") for _, arm in panel.members]
        found = [*[("all", arm) for arm in both if arm.labels in whole], *panel.members]
        found.sort(key=lambda pair: _PART_ORDER.index(pair[0]))
        yield Panel(panel.title, [(_PARTS[part], arm) for part, arm in found])


def _budgets(members: Sequence[Arm], plain: Sequence[Arm]) -> Iterator[Panel]:
    """Each arm at its other budgets, after the same arm at the study's own."""
    named = ((_recipe(arm.labels, part=True), budget_text(arm.labels), arm) for arm in members)
    for panel in _together(named):
        labels = replace(panel.members[0][1].labels, budget=())
        own = [("the study's own", arm) for arm in plain if arm.labels == labels]
        yield Panel(panel.title, [*own[:1], *panel.members])


def _width_title(labels: ArmLabels) -> str:
    parts = [labels.width]
    if labels.weights not in ("", "channel"):
        parts.append(_weights(labels))
    if labels.activations:
        parts.append(f"inputs {_INPUTS[labels.activations]}")
    return ", ".join(parts)


def _weights(labels: ArmLabels) -> str:
    return _SHARED.get(labels.weights) or f"groups of {labels.weights.removeprefix('g')}"


def _recipe(labels: ArmLabels, *, part: bool = False) -> str:
    if not labels.method:
        return "float"
    where = f", {_PARTS.get(labels.part, labels.part)}" if part and labels.part != "all" else ""
    return f"{_width_title(labels)}, {labels.method}{where}"
