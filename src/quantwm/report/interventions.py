"""Which part of an arm makes planning fail: the verdicts by intervention."""

from collections.abc import Sequence

from quantwm.diagnostics.verdict import InterventionVerdict, verdict_by_intervention, verdicts
from quantwm.report.document import Section
from quantwm.report.filters import filter_data
from quantwm.report.load import TaskReport
from quantwm.report.tables import Cell, Column, Line, Table, number, words
from quantwm.report.text import decimal, escape, listed
from quantwm.report.verdicts import clauses

_SILENT = ("healthy", "undecided")
_MEANINGS = {
    "representation": "the encoder's bits break it",
    "dynamics": "the predictor's bits break it",
    "both": "the bits of each side alone break it",
    "either": "only both sides together break it",
    "healthy": "keeps float's success",
    "objective": "the float model's objective fails",
    "planner": "the planner fails with true dynamics too",
    "undecided": "undecided",
}


def judged(task: TaskReport) -> list[InterventionVerdict]:
    """The verdicts on a task's arms, after that on the float model where it fails itself."""
    found = verdicts(task.results)
    if task.results.reference is not None:
        own = verdict_by_intervention(task.results, task.results.reference)
        if own.verdict not in _SILENT:
            found.insert(0, own)
    return found


def causes(found: Sequence[InterventionVerdict]) -> dict[str, str]:
    """Arm → what breaks it, of those of which that is known."""
    return {one.arm: _MEANINGS[one.verdict] for one in found if one.verdict not in _SILENT}


def interventions(task: TaskReport, found: Sequence[InterventionVerdict]) -> Section:
    """What putting a float part back, or the true dynamics in, does to each arm."""
    name, title = f"{task.key}-interventions", "What breaks an arm"
    if not found:
        return Section(name, title, task=task.key)
    arms = {arm.name: arm for arm in task.arms}
    lines = [
        Line(
            {
                "arm": words(one.arm),
                "success": number(arms[one.arm].success, decimal(arms[one.arm].success)),
                "verdict": Cell(escape(_MEANINGS[one.verdict]), one.verdict),
                "reason": Cell(_reason(one), one.reason),
                "episodes_needed": number(one.episodes_needed, str(one.episodes_needed)),
                "missing": Cell(value=", ".join(one.missing) or None),
            },
            data=filter_data(arms[one.arm]),
        )
        for one in found
    ]
    columns = [
        Column("arm", "Arm", "pin"),
        Column("success", "Success", "number"),
        Column("verdict", "Verdict"),
        Column("reason", "Why", "wrap"),
        Column("episodes_needed", "Episodes that<br>would decide", "number"),
        Column("missing"),
    ]
    hint = (
        "One part is put right at a time, on the same episodes: the float encoder back, the float "
        "predictor back, the true dynamics in. What restores success was the part that failed."
    )
    table = Table(name, "Verdicts by intervention", columns, lines)
    return Section(name, title, [f'<p class="hint">{hint}</p>', table], task=task.key)


def _reason(one: InterventionVerdict) -> str:
    text = escape(one.reason)
    if one.missing:
        names = listed([f'<span class="arm">{escape(name)}</span>' for name in one.missing])
        text += f"; would also read {names}"
    if one.evidence:
        text += f"<details><summary>Evidence</summary>{clauses(one.evidence)}</details>"
    return text
