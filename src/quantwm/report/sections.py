"""The report's sections of one task, as HTML and tables. Everything from outside is escaped."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from quantwm.evaluation import Row
from quantwm.report import plots
from quantwm.report.arms import Arm
from quantwm.report.arms import number as finite
from quantwm.report.document import Part
from quantwm.report.filmstrip import Still, Strip
from quantwm.report.filters import filter_data, row_data
from quantwm.report.layouts import LABEL_KEYS, label_cells, verdict_cell
from quantwm.report.tables import Cell, Column, Line, Table, data_attributes, number, words
from quantwm.report.text import (
    decimal,
    escape,
    interval,
    megabytes,
    plural,
    probability,
    signed,
    signed_interval,
)
from quantwm.statistics import holm

_MOST_GRID_COLUMNS = 100
_BOUNDS = "Oracles, which know more than a planner may, and random plans: no competitors"


def arms_table(arms: Sequence[Arm], name: str) -> list[Part]:
    """Every arm's numbers, bounds in a group of their own, and the notes below.

    Args:
        arms: of one task.
        name: the task's key.
    """
    p_values = {arm.name: finite(arm.difference.p_value) for arm in arms if arm.difference}
    known = {arm: p_value for arm, p_value in p_values.items() if p_value is not None}
    adjusted = dict(zip(known, holm(list(known.values())), strict=True))
    columns = [
        Column("arm", "Arm", "pin"),
        *[Column(key) for key in LABEL_KEYS],
        Column("success", "Success", "number"),
        *[Column(key) for key in ("low", "high")],
        Column("interval", "95% interval", "interval", stored=False),
        Column("difference", "Against<br>float", "number"),
        *[Column(key) for key in ("difference_low", "difference_high")],
        Column("difference_interval", "95% interval", "interval", stored=False),
        Column("won_lost", "Won / lost<br>episodes", "number", stored=False),
        *[Column(key) for key in ("won", "lost")],
        Column("p_value", "p", "number"),
        Column("p_holm", "p, Holm", "number"),
        Column("verdict", "Separable<br>from float"),
        Column("first_success_median", "Median MPC iterations<br>to success", "number"),
        Column("bytes", "Stored", "number"),
        Column("seconds", "Seconds", "number"),
        Column("plan_seconds", "Planning,<br>s an episode", "number"),
        Column("episodes", "Episodes", "number"),
        Column("note"),
    ]
    lines = [_arm_line(arm, name, adjusted.get(arm.name)) for arm in arms]
    table = Table(f"{name}-arms", "Table of arms", columns, lines)
    notes = "".join(
        f'<p class="hint"><b>{escape(arm.name)}</b>: {escape(arm.note)}.</p>'
        for arm in arms
        if arm.note
    )
    return [table, notes]


def _arm_line(arm: Arm, task: str, p_holm: float | None) -> Line:
    cells = {
        "arm": words(arm.name),
        **label_cells(arm.labels),
        "success": number(arm.success, decimal(arm.success)),
        "low": Cell(value=arm.low),
        "high": Cell(value=arm.high),
        "interval": Cell(interval(arm.low, arm.high)),
        "verdict": verdict_cell(arm),
        "first_success_median": number(
            arm.first_success_median, decimal(arm.first_success_median, 1)
        ),
        "bytes": number(arm.bytes, megabytes(arm.bytes)),
        "seconds": number(arm.seconds, decimal(arm.seconds, 0)),
        "plan_seconds": number(arm.plan_seconds, decimal(arm.plan_seconds, 1)),
        "episodes": number(arm.episodes, str(arm.episodes)),
        "note": Cell(value=arm.note or None),
    }
    if one := arm.difference:
        p_value = finite(one.p_value)
        cells |= {
            "difference": number(one.difference, signed(one.difference)),
            "difference_low": Cell(value=one.low),
            "difference_high": Cell(value=one.high),
            "difference_interval": Cell(signed_interval(one.low, one.high)),
            "won_lost": Cell(f"{one.wins} / {one.losses}" if one.n else ""),
            "won": Cell(value=one.wins),
            "lost": Cell(value=one.losses),
            "p_value": number(p_value, probability(p_value)),
            "p_holm": number(p_holm, probability(p_holm)),
        }
    group = _BOUNDS if arm.role == "bound" else ""
    return Line(cells, group, row_data(task, arm))


def comparison(arms: Sequence[Arm], name: str) -> str:
    """Success, difference and bytes by arm, on lines of the same order."""
    figures = [plots.success_plot(arms, name)]
    titles = ["Success"]
    if any(arm.difference for arm in arms):
        figures.append(plots.difference_plot(arms, name))
        titles.append("Difference against float")
    if any(arm.bytes for arm in arms):
        figures.append(plots.bytes_plot(arms, name))
        titles.append("Stored bytes")
    parts = [
        f"<figure><h4>{title}</h4>{figure}</figure>"
        for title, figure in zip(titles, figures, strict=True)
    ]
    hint = (
        "Squares: float. Circles: quantized, filled where the paired difference is separable "
        "from zero. Diamonds with dashed lines: oracles and random plans."
    )
    return f'<p class="hint">{hint}</p><div class="plots">{"".join(parts)}</div>'


def iterations(arms: Sequence[Arm], name: str) -> str:
    """Success against MPC iteration, a panel an arm."""
    reference = next((arm for arm in arms if arm.role == "float"), None)
    panels = [
        f'<figure><h4 class="arm">{escape(arm.name)}</h4>'
        f"{plots.iteration_plot(arm, reference, index, name)}</figure>"
        for index, arm in enumerate(arms)
    ]
    dotted = "; dotted: float" if reference else ""
    hint = (
        "Share of episodes that have succeeded after each MPC iteration (0: at the start). "
        f"Success is kept once reached. Shaded: 95% interval{dotted}."
    )
    return f'<p class="hint">{hint}</p><div class="panels">{"".join(panels)}</div>'


def episode_grid(arms: Sequence[Arm], name: str) -> list[Part]:
    """Which episode each arm solved, and after how many MPC iterations."""
    numbers = sorted({int(row["episode"]) for arm in arms for row in arm.rows})
    if not numbers or len(numbers) > _MOST_GRID_COLUMNS:
        return []
    columns = [Column("arm", "Episode", "pin")]
    columns += [Column(str(episode), str(episode)) for episode in numbers]
    lines = []
    for arm in arms:
        cells = {str(int(row["episode"])): _grid_cell(row) for row in arm.rows}
        absent = {str(episode): Cell(" ") for episode in numbers}
        lines.append(Line(absent | cells | {"arm": words(arm.name)}, data=filter_data(arm)))
    hint = (
        "MPC iterations until success of every episode; a dash where it failed. A column is one "
        "start and goal, which every arm meets."
    )
    table = Table(f"{name}-episodes", "Episode by episode", columns, lines, kind="grid")
    return [f'<p class="hint">{hint}</p>', table]


def _grid_cell(row: Row) -> Cell:
    if not row["success"]:
        return Cell("–", None, "no")
    return Cell(str(row["first_success"]), row["first_success"], "yes")


def filmstrips(shown: Sequence[Strip], choice: str, task: str) -> str:
    """Frames of episodes, a strip a scene, the goal first."""
    parts = [
        f'<p class="hint">{escape(choice)} The frames are what the model saw at each replan, and '
        "the last state; distances are in the task's units.</p>"
    ]
    for strip in shown:
        row = strip.scene.row
        outcome = "reached the goal" if row["success"] else "did not reach the goal"
        count = plural(int(row["iterations"]), "MPC iteration")
        name = escape(strip.scene.arm.name)
        stills = "".join(_still(still, name, escape(task)) for still in strip.stills)
        goal = _still(strip.goal, name, escape(task))
        remark = escape(strip.scene.remark)
        told = f'<p class="hint">{remark}</p>' if remark else ""
        parts.append(
            f"<div{data_attributes(filter_data(strip.scene.arm))}>"
            f'<h4><span class="arm">{name}</span>: {outcome} in {count}</h4>'
            f'{told}<ol class="strip" tabindex="0" aria-label="Frames of {name}">'
            f"{goal}{stills}</ol></div>"
        )
    return "".join(parts)


def _still(still: Still, arm: str, task: str) -> str:
    goal = still.iteration is None
    if goal:
        alt, title, state = f"{task}: the goal", "Goal", ""
    else:
        distance = f"distance {decimal(still.distance, 1)}"
        alt = f"{task}, {arm}, after {plural(still.iteration or 0, 'MPC iteration')}: {distance}"
        title = "Start" if still.iteration == 0 else f"Iteration {still.iteration}"
        state = distance + ('<span class="state">reached</span>' if still.reached else "")
    picture = (
        f'<img src="{still.image}" alt="{alt}" width="104" height="104">'
        if still.image
        else f'<div class="blank" role="img" aria-label="{alt}, state not finite"></div>'
    )
    kind = "goal" if goal else ("reached" if still.reached else "")
    return (
        f'<li class="{kind}"><figure>{picture}<figcaption><b>{title}</b>{state}</figcaption>'
        "</figure></li>"
    )


def failures(arms: Sequence[Arm], name: str) -> list[Part]:
    """Failed episodes by arm and reason."""
    lines = []
    for arm in arms:
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in arm.failures:
            groups[str(row["failure"])].append(row)
        for reason, rows in sorted(groups.items()):
            distances = [finite(row["final_distance"]) for row in rows]
            usable = [distance for distance in distances if distance is not None]
            median = statistics.median(usable) if usable else None
            cells = {
                "arm": words(arm.name),
                "reason": words(_REASONS.get(reason, reason)),
                "failed": number(len(rows), f"{len(rows)} of {arm.episodes}"),
                "of": Cell(value=arm.episodes),
                "median_final_distance": number(median, decimal(median, 1)),
                "episodes": words(", ".join(str(row["episode"]) for row in rows)),
            }
            lines.append(Line(cells, data=filter_data(arm)))
    if not lines:
        return ["<p>No episode failed.</p>"]
    columns = [
        Column("arm", "Arm", "pin"),
        Column("reason", "Reason", "wrap"),
        Column("failed", "Failed", "number"),
        Column("of"),
        Column("median_final_distance", "Median final<br>distance", "number"),
        Column("episodes", "Episodes", "wrap"),
    ]
    return [Table(f"{name}-failures", "Failures by reason", columns, lines, kind="")]


_REASONS = {"not_reached": "goal not reached"}


def reproduction(
    rows: Sequence[Row], config: Mapping[str, Any], environment: Mapping[str, Any]
) -> str:
    """The configuration and what the numbers were computed with."""
    settings = [pair for pair in flattened(config) if not pair[0].startswith("arms")]
    recorded = _recorded(rows)
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)
    known = {key for key, _ in settings}
    around = [*flattened(environment), *recorded]
    facts = [pair for pair in dict.fromkeys(around) if pair not in settings or pair[0] not in known]
    return (
        f'<div class="columns"><div><h4>Settings</h4>{_facts(settings)}</div>'
        f"<div><h4>Environment</h4>{_facts(facts)}</div></div>"
        f"<details><summary>The whole configuration</summary><pre><code>{escape(text)}</code></pre>"
        "</details>"
    )


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted key, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs += flattened(value, f"{name}.")
        else:
            pairs.append((name, _text(value)))
    return pairs


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _recorded(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Every value that the rows' provenance, seed blocks and seeds take."""
    seen: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        seen["seed block"][str(row["block"])] = None
        seen["seed"][str(row["seed"])] = None
        for key, value in flattened(json.loads(row["provenance"])):
            seen[key][value] = None
    return [(key, ", ".join(values)) for key, values in seen.items()]


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in pairs)
    return f'<dl class="facts">{lines}</dl>' if lines else "<p>None.</p>"
