"""The report's sections, each a fragment of HTML. Everything from outside is escaped."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from quantwm.report import plots
from quantwm.report.arms import Arm, EpisodeChoice, Row, number
from quantwm.report.filmstrip import Still, Strip
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

_MOST_GRID_COLUMNS = 100
_GROUPS = {
    "float": "",
    "quantized": "",
    "oracle": "Oracle arms: references with privileged knowledge, not competitors",
}


def arms_table(arms: Sequence[Arm]) -> str:
    """Every arm's numbers; oracles in a group of their own."""
    heads = [
        ("Arm", "pin"),
        ("Success", "number"),
        ("95% interval", ""),
        ("Against<br>float", "number"),
        ("95% interval", ""),
        ("Won / lost<br>episodes", "number"),
        ("p", "number"),
        ("Separable<br>from float", ""),
        ("Median MPC iterations<br>to success", "number"),
        ("Stored", "number"),
        ("Seconds", "number"),
        ("Episodes", "number"),
    ]
    bodies = []
    for roles in (("float", "quantized"), ("oracle",)):
        members = [arm for arm in arms if arm.role in roles]
        if not members:
            continue
        title = _GROUPS[roles[0]]
        group = f'<tr><th class="group" scope="rowgroup" colspan="{len(heads)}">{title}</th></tr>'
        lines = "".join(_arm_line(arm) for arm in members)
        bodies.append(f"<tbody>{group if title else ''}{lines}</tbody>")
    table = f'<table class="wide">{_head(heads)}{"".join(bodies)}</table>'
    notes = "".join(
        f'<p class="hint"><b>{escape(arm.name)}</b>: {escape(arm.note)}.</p>'
        for arm in arms
        if arm.note
    )
    return _scroll("Table of arms", table) + notes


def _arm_line(arm: Arm) -> str:
    verdicts = {
        "reference": '<td class="separable-no">reference</td>',
        "lower": '<td class="lower">yes, lower</td>',
        "higher": '<td class="higher">yes, higher</td>',
        "not separable": '<td class="separable-no">no</td>',
        "not compared": '<td class="separable-no">–</td>',
    }
    one = arm.difference
    cells = [
        _arm_head(arm),
        _number(arm.success, decimal(arm.success)),
        f'<td class="interval">{interval(arm.low, arm.high)}</td>',
        _number(one.difference, signed(one.difference)) if one else _absent(),
        f'<td class="interval">{signed_interval(one.low, one.high)}</td>' if one else "<td></td>",
        f'<td class="number">{one.wins} / {one.losses}</td>' if one and one.n else _absent(),
        _number(one.p_value, probability(number(one.p_value))) if one else _absent(),
        verdicts[arm.verdict],
        _number(arm.first_success_median, decimal(arm.first_success_median, 1)),
        _number(arm.bytes, megabytes(arm.bytes)),
        _number(arm.seconds, decimal(arm.seconds, 0)),
        _number(arm.episodes, str(arm.episodes)),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def comparison(arms: Sequence[Arm]) -> str:
    """Success, difference and bytes by arm, on lines of the same order."""
    figures = [plots.success_plot(arms)]
    titles = ["Success"]
    if any(arm.difference for arm in arms):
        figures.append(plots.difference_plot(arms))
        titles.append("Difference against float")
    if any(arm.bytes for arm in arms):
        figures.append(plots.bytes_plot(arms))
        titles.append("Stored bytes")
    parts = [
        f"<figure><h3>{title}</h3>{figure}</figure>"
        for title, figure in zip(titles, figures, strict=True)
    ]
    hint = (
        "Squares: float. Circles: quantized, filled where the paired difference is separable "
        "from zero. Diamonds with dashed lines: oracles."
    )
    return f'<p class="hint">{hint}</p><div class="plots">{"".join(parts)}</div>'


def iterations(arms: Sequence[Arm]) -> str:
    """Success against MPC iteration, a panel an arm."""
    reference = next((arm for arm in arms if arm.role == "float"), None)
    panels = [
        f'<figure><h3 class="arm">{escape(arm.name)}</h3>'
        f"{plots.iteration_plot(arm, reference, index)}</figure>"
        for index, arm in enumerate(arms)
        if arm.curve
    ]
    if not panels:
        return '<p class="hint">There are no episodes yet.</p>'
    dotted = "; dotted: float" if reference and reference.curve else ""
    hint = (
        "Share of episodes that have succeeded after each MPC iteration (0: at the start). "
        f"Success is kept once reached. Shaded: 95% interval{dotted}."
    )
    return f'<p class="hint">{hint}</p><div class="panels">{"".join(panels)}</div>'


def episode_grid(arms: Sequence[Arm]) -> str:
    """Which episode each arm solved, and after how many MPC iterations."""
    numbers = sorted({int(row["episode"]) for arm in arms for row in arm.rows})
    if not numbers or len(numbers) > _MOST_GRID_COLUMNS:
        return ""
    heads = [("Episode", "pin"), *((str(episode), "") for episode in numbers)]
    lines = []
    for arm in arms:
        by_episode = {int(row["episode"]): row for row in arm.rows}
        cells = "".join(_grid_cell(by_episode.get(episode)) for episode in numbers)
        lines.append(f"<tr>{_arm_head(arm)}{cells}</tr>")
    table = f'<table class="grid">{_head(heads)}<tbody>{"".join(lines)}</tbody></table>'
    hint = (
        "MPC iterations until success of every episode; a dash where it failed. A column is one "
        "start and goal, which every arm meets."
    )
    return f'<p class="hint">{hint}</p>{_scroll("Episode by episode", table)}'


def _grid_cell(row: Row | None) -> str:
    if row is None:
        return "<td></td>"
    if not row["success"]:
        return '<td class="no">–</td>'
    return f'<td class="yes">{row["first_success"]}</td>'


def filmstrip(shown: Sequence[Strip], choice: EpisodeChoice, task: str) -> str:
    """Frames of one episode, a strip an arm, the goal first."""
    parts = [
        f'<p class="hint">Episode {choice.episode}: {escape(choice.reason)}. The frames are what '
        "the model saw at each replan, and the last state; distances are in the task's units.</p>"
    ]
    for strip in shown:
        outcome = "reached the goal" if strip.row["success"] else "did not reach the goal"
        count = plural(int(strip.row["iterations"]), "MPC iteration")
        name = escape(strip.arm.name)
        stills = "".join(_still(still, name, escape(task)) for still in strip.stills)
        goal = _still(strip.goal, name, escape(task))
        parts.append(
            f'<h3 class="arm">{name}: {outcome} in {count}</h3>'
            f'<ol class="strip" tabindex="0" aria-label="Frames of {name}">{goal}{stills}</ol>'
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


def failures(arms: Sequence[Arm]) -> str:
    """Failed episodes by arm and reason."""
    lines = []
    for arm in arms:
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in arm.failures:
            groups[str(row["failure"])].append(row)
        for reason, rows in sorted(groups.items()):
            distances = [number(row["final_distance"]) for row in rows]
            finite = [distance for distance in distances if distance is not None]
            median = statistics.median(finite) if finite else None
            episodes = ", ".join(str(row["episode"]) for row in rows)
            lines.append(
                f"<tr>{_arm_head(arm)}"
                f'<td class="wrap">{escape(_REASONS.get(reason, reason))}</td>'
                f"{_number(len(rows), f'{len(rows)} of {arm.episodes}')}"
                f"{_number(median, decimal(median, 1))}"
                f'<td class="wrap">{episodes}</td></tr>'
            )
    if not lines:
        return "<p>No episode failed.</p>"
    heads = [
        ("Arm", "pin"),
        ("Reason", ""),
        ("Failed", "number"),
        ("Median final<br>distance", "number"),
        ("Episodes", ""),
    ]
    return _scroll(
        "Failures by reason", f"<table>{_head(heads)}<tbody>{''.join(lines)}</tbody></table>"
    )


_REASONS = {"not_reached": "goal not reached"}


def reproduction(
    rows: Sequence[Row],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    command: str,
) -> str:
    """The command, the configuration and what the numbers were computed with."""
    settings = [pair for pair in flattened(config) if not pair[0].startswith("arms")]
    recorded = _recorded(rows)
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)
    known = {key for key, _ in settings}
    around = [*flattened(environment), *recorded]
    facts = [pair for pair in dict.fromkeys(around) if pair not in settings or pair[0] not in known]
    return (
        f"<pre><code>{escape(command)}</code></pre>"
        f'<div class="columns"><div><h3>Configuration</h3>{_facts(settings)}</div>'
        f"<div><h3>Environment</h3>{_facts(facts)}</div></div>"
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
    lines = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in pairs
    )
    return f'<table class="facts"><tbody>{lines}</tbody></table>' if lines else "<p>None.</p>"


def _head(heads: Sequence[tuple[str, str]]) -> str:
    cells = "".join(
        f'<th scope="col"{f" class={kind!r}" if kind else ""}>{title}</th>'.replace("'", '"')
        for title, kind in heads
    )
    return f"<thead><tr>{cells}</tr></thead>"


def _arm_head(arm: Arm) -> str:
    name = escape(arm.name)
    return f'<th class="pin" scope="row" title="{name}">{name}</th>'


def _number(value: float | None, text: str) -> str:
    if value is None:
        return _absent()
    return f'<td class="number"><data value="{value!r}">{text}</data></td>'


def _absent() -> str:
    return '<td class="number">–</td>'


def _scroll(label: str, content: str) -> str:
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">{content}</div>'
