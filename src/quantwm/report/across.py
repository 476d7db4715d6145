"""All tasks beside one another."""

from collections.abc import Sequence

from quantwm.report.arms import Arm
from quantwm.report.document import Section
from quantwm.report.filters import filter_data
from quantwm.report.layouts import GROUPS, LABEL_KEYS, group_of, label_cells, panels_of
from quantwm.report.load import TaskReport
from quantwm.report.tables import Cell, Column, Line, Table, number, words
from quantwm.report.text import decimal, escape, signed


def across(tasks: Sequence[TaskReport]) -> Section:
    """Success of every arm in every task; empty for a single task."""
    title = "Tasks side by side"
    if len(tasks) < 2:
        return Section("tasks", title)
    by_task = {task.key: {arm.name: arm for arm in task.arms} for task in tasks}
    lines = []
    for arm in _ordered(tasks):
        cells = {"arm": words(arm.name)} | label_cells(arm.labels)
        for key, arms in by_task.items():
            if arm.name in arms:
                cells |= _cells(key, arms[arm.name])
        group = GROUPS.get(group_of(arm), "")
        lines.append(Line(cells, escape(group), filter_data(arm)))
    columns = [Column("arm", "Arm", "pin"), *[Column(key) for key in LABEL_KEYS]]
    for task in tasks:
        name = escape(task.title)
        columns += [
            Column(f"{task.key}_success", name, "number"),
            *[Column(f"{task.key}_{end}") for end in ("low", "high")],
            Column(f"{task.key}_difference", f"{name},<br>against float", "number"),
            Column(f"{task.key}_verdict"),
        ]
    hint = (
        "Success at the end of every arm, and its paired difference against float in the same "
        "task; coloured and bold where it is separable from zero. Success rates of different "
        "tasks are not comparable with one another."
    )
    table = Table("tasks", title, columns, lines, kind="")
    return Section("tasks", title, [f'<p class="hint">{hint}</p>', table], folded=len(lines) > 12)


def _ordered(tasks: Sequence[TaskReport]) -> list[Arm]:
    """Every arm once, as the groups' tables order them, float first."""
    found: dict[str, Arm] = {}
    for task in tasks:
        for arm in task.arms:
            found.setdefault(arm.name, arm)
    arms = list(found.values())
    ordered = [arm for arm in arms if group_of(arm) == ""]
    for group in GROUPS:
        members = [arm for panel in panels_of(group, arms) for _, arm in panel.members]
        ordered += [arm for arm in members if group_of(arm) == group]
    return list({arm.name: arm for arm in ordered}.values())


def _cells(key: str, arm: Arm) -> dict[str, Cell]:
    cells = {
        f"{key}_success": number(arm.success, decimal(arm.success), share=arm.success),
        f"{key}_low": Cell(value=arm.low),
        f"{key}_high": Cell(value=arm.high),
        f"{key}_verdict": Cell(value=arm.verdict),
    }
    if one := arm.difference:
        kind = arm.verdict if arm.verdict in ("lower", "higher") else "separable-no"
        cells[f"{key}_difference"] = Cell(signed(one.difference), one.difference, kind)
    return cells
