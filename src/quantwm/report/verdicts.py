"""The verdicts of the findings: what the report opens with."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TypeAlias

from quantwm.report.document import Part, Section
from quantwm.report.tables import Cell, Column, Line, Table, data_attributes, number, words
from quantwm.report.text import decimal, escape, listed, plural, signed, signed_interval
from quantwm.study.findings import Evidence, Finding

_SIGNS = {"supported": "✓", "contradicted": "✗", "undecided": "?"}
_MOST_MISSING = 6


Titles: TypeAlias = Mapping[str, Sequence[tuple[str, str]]]
"""Task's name → (key, title) of its sections."""


def verdicts(findings: Sequence[Finding], titles: Titles, *, table: bool = True) -> Section:
    """One block a finding with its verdict in every task and the evidence folded behind it.

    Findings of which the study lacks most of the evidence share one line.

    Args:
        findings: of all tasks, in any order.
        titles: task's name → (key, title) of its sections.
        table: whether all evidence follows as a table.
    """
    ordered = sorted(findings, key=lambda one: one.number)
    tested = [one for one in ordered if is_tested(one)]
    parts: list[Part] = []
    for key, group in groupby(tested, key=lambda one: (one.number, one.statement)):
        blocks = "".join(_verdict(one, titles) for one in group)
        parts.append(
            f'<div class="finding" id="finding-{key[0]}"><h3>{key[0]}. {escape(key[1])}</h3>'
            f"{blocks}</div>"
        )
    if tested and table:
        parts += [
            "<details><summary>All evidence as a table</summary>",
            _table(tested, titles),
            "</details>",
        ]
    if untested := _untested([one for one in ordered if one not in tested]):
        parts.append(untested)
    if tested:
        parts.insert(0, _HINT)
    return Section("findings", "Findings", parts)


_HINT = (
    '<p class="hint">Statements of the published study, judged on these episodes alone: supported '
    "or contradicted only where the interval lies on one side of the margin, undecided "
    "otherwise.</p>"
)


def _verdict(finding: Finding, titles: Titles) -> str:
    places = titles.get(finding.task or "", ())
    where = places[0][1] if places else (finding.task or "All tasks")
    data = data_attributes(_data(finding, titles))
    needed = finding.episodes_needed
    open_still = finding.verdict == "undecided" and needed is not None
    more = f"; {plural(needed or 0, 'episode')} an arm would decide it" if open_still else ""
    lacking = _lacking(finding.missing)
    return (
        f'<details class="verdict"{data}><summary>{_chip(finding.verdict)} '
        f"<b>{escape(where)}</b>: {_telling(finding)}{more}</summary>"
        f"{clauses(finding.evidence)}{lacking}</details>"
    )


def _data(finding: Finding, titles: Titles) -> dict[str, str]:
    """What the page's filter goes by: the finding's task, if it is that of one section."""
    places = titles.get(finding.task or "", ())
    return {"task": places[0][0]} if len(places) == 1 else {}


def _chip(verdict: str) -> str:
    sign = f'<i aria-hidden="true">{_SIGNS.get(verdict, "?")}</i>'
    return f'<span class="chip {escape(verdict)}">{sign} {escape(verdict)}</span>'


def is_tested(finding: Finding) -> bool:
    """Whether there are episodes for at least half of what a finding compares."""
    known = sum(clause.n > 0 for clause in finding.evidence)
    return known > 0 and 2 * known >= len(finding.evidence)


def _telling(finding: Finding) -> str:
    """The first comparison that has the finding's verdict, and how many more there are."""
    known = [clause for clause in finding.evidence if clause.n] or list(finding.evidence)
    first = next((clause for clause in known if clause.verdict == finding.verdict), known[0])
    more = len(finding.evidence) - 1
    others = f", and {plural(more, 'more comparison')}" if more else ""
    return _value(first) + others


def clauses(evidence: Sequence[Evidence]) -> str:
    """Every clause with its verdict, as a list."""
    items = "".join(f"<li>{_chip(one.verdict)} {_told(one)}</li>" for one in evidence)
    return f'<ul class="evidence">{items}</ul>'


def _value(clause: Evidence) -> str:
    shown = escape(clause.text)
    if clause.estimate is not None:
        shown += f" {signed(clause.estimate)}"
    if clause.low is not None and clause.high is not None:
        shown += f' <span class="interval">{signed_interval(clause.low, clause.high)}</span>'
    return shown


def _told(clause: Evidence) -> str:
    facts = [] if clause.margin is None else [f"margin {decimal(clause.margin)}"]
    facts += [f"n = {clause.n}"] if clause.n else []
    facts += [escape(clause.note)] if clause.note else []
    return _value(clause) + (f' <span class="hint">({"; ".join(facts)})</span>' if facts else "")


def _lacking(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    return f'<p class="hint">Would also read {_some(missing)}, which the study lacks.</p>'


def _some(arms: Sequence[str]) -> str:
    names = [f'<span class="arm">{escape(name)}</span>' for name in dict.fromkeys(arms)]
    if len(names) > _MOST_MISSING:
        names = [*names[:_MOST_MISSING], f"{len(names) - _MOST_MISSING} more"]
    return listed(names)


def _untested(findings: Sequence[Finding]) -> str:
    """One line on the findings whose arms are not there, and behind it which arms those are."""
    if not findings:
        return ""
    items, numbers = [], []
    for number_, group in groupby(findings, key=lambda one: one.number):
        members = list(group)
        missing = [name for one in members for name in one.missing]
        reads = f": reads {_some(missing)}" if missing else ""
        items.append(f"<li>{number_}. {escape(members[0].statement.rstrip('.'))}{reads}</li>")
        numbers.append(str(number_))
    word = "finding" if len(numbers) == 1 else "findings"
    summary = f"Not tested by these arms: {word} {listed(numbers)}"
    return (
        f'<details><summary>{summary}</summary><ul class="evidence hint">{"".join(items)}</ul>'
        "</details>"
    )


def _table(findings: Sequence[Finding], titles: Titles) -> Table:
    lines = [
        Line(
            {
                "comparison": words(clause.text),
                "finding": Cell(str(finding.number), finding.number),
                "statement": Cell(value=finding.statement),
                "task": words(finding.task or "all"),
                "estimate": number(clause.estimate, signed(clause.estimate or 0.0)),
                "low": number(clause.low, signed(clause.low or 0.0)),
                "high": number(clause.high, signed(clause.high or 0.0)),
                "margin": number(clause.margin, decimal(clause.margin)),
                "episodes": Cell(str(clause.n), clause.n),
                "verdict": words(clause.verdict),
                "of_finding": words(finding.verdict),
                "episodes_needed": number(finding.episodes_needed, f"{finding.episodes_needed:,}")
                if finding.episodes_needed is not None
                else Cell(),
                "note": words(clause.note) if clause.note else Cell(),
            },
            data=_data(finding, titles),
        )
        for finding in findings
        for clause in finding.evidence
    ]
    columns = [
        Column("comparison", "Comparison", "pin"),
        Column("finding", "Finding", "number"),
        Column("statement"),
        Column("task", "Task"),
        Column("estimate", "Estimate", "number"),
        Column("low", "Low", "number"),
        Column("high", "High", "number"),
        Column("margin", "Margin", "number"),
        Column("episodes", "n", "number"),
        Column("verdict", "Verdict"),
        Column("of_finding", "Verdict of<br>the finding"),
        Column("episodes_needed", "Episodes<br>needed", "number"),
        Column("note", "Note", "wrap"),
    ]
    return Table("findings", "Evidence of the findings", columns, lines)
