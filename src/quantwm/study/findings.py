"""The study's six statements, each judged from the rows of a few arms.

Every statement is a rule that declares the arms it reads and its least number of episodes; the
rules of comparison are those of `quantwm.study.evidence`, with a margin of 0.10. A statement is
undecided, whatever its clauses say, while an arm is missing or an arm has too few episodes, and
where float succeeds too rarely for the study's gate.

1. Supported if w8 and w8a8 both keep the success of float; contradicted if either falls short.
2. Supported if w4 (per channel) is lower than float, w4g128 keeps float's success and is higher
   than w4, and w3g128 falls short of float; contradicted if one of the four is.
3. At each of four bit widths, per-token activations either gain on per-tensor ones (higher) or do
   not (any gain is certainly below the margin). Supported if at one width they gain and at another
   they do not; contradicted if all gain or none does. As one width decides, the four intervals
   are widened to 97.5% (Bonferroni, one side), and a gain needs p < 0.05 after Holm.
4. Success with only the encoder quantized minus success with only the predictor quantized, as the
   mean over w4, w3 and w2: supported if separably below 0; contradicted if separably above, or if
   at each width the difference is certainly within the margin, whatever its sign.
5. On an arm that falls short of float (w3, or w2): supported if in at least four of five episodes
   its plans end at a lower predicted cost than they began, and both with more optimisation steps
   and with more MPC iterations it still falls short of float, which plans with the study's own
   budget; contradicted if the objective does not fall or one of the two keeps float's success.
6. Supported if the true dynamics put in do not mend w3 in Wall (the quantized encoder falls short
   of the float one under the oracle), and do in PushT, where the float encoder put back does not;
   contradicted if one of the three is. w3 must fall short of float in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantwm.diagnostics.verdict import true_dynamics, verdict_by_intervention
from quantwm.study.arms import Arm
from quantwm.study.evidence import (
    Arms,
    Clause,
    Decide,
    Evidence,
    Verdict,
    falls_short,
    keeps,
    needed_by,
    noted_if_it_works,
    together,
)
from quantwm.study.findings_rules import RULES
from quantwm.study.labels import labels_of
from quantwm.study.results import TaskResults

__all__ = ["Evidence", "Finding", "Verdict", "arms_read", "findings_of"]

BREAKDOWN, OFF_COURSE = "wall", "pusht"
"""The tasks of statement 6."""
FAILING = "w3"
"""The arm of which statement 6 tells why it fails."""
_MODES = (
    "Failure modes differ by task: the representation breaks down in Wall, planning goes off "
    "course in PushT"
)
_MODES_READ = ("float", "oracle-latent", "w3", "predictor:w3", "oracle-latent:w3")
_MODES_LEAST = 36


@dataclass(frozen=True)
class Finding:
    """What the results say of one statement.

    Attributes:
        number: 1 to 6.
        statement: as it is claimed.
        task: None: across tasks.
        verdict: "supported", "contradicted" or "undecided".
        evidence: its clauses.
        episodes_needed: if undecided, episodes an arm that would decide it if what was seen goes
            on; None if that cannot be told.
        missing: arms that it would read and the results lack; across tasks, "task: arm".
    """

    number: int
    statement: str
    task: str | None
    verdict: Verdict
    evidence: tuple[Evidence, ...]
    episodes_needed: int | None
    missing: tuple[str, ...]


def findings_of(results: Sequence[TaskResults]) -> list[Finding]:
    """Statements 1 to 5 in each task, and statement 6 across tasks.

    Args:
        results: one a task; statement 6 reads the first of each of its tasks.
    """
    found = []
    for one in results:
        for rule in RULES:
            finding = _concluded(
                rule.number,
                rule.statement,
                one.task,
                rule.judge(Arms(one)),
                rule.decide,
                rule.least_episodes,
            )
            found.append(_gated(finding, one))
    return [*found, _across(results)]


def arms_read(task: str) -> tuple[str, ...]:
    """Short forms of all arms that the findings read in a task, float first."""
    across = _MODES_READ if task in (BREAKDOWN, OFF_COURSE) else ()
    return tuple(dict.fromkeys([*(arm for rule in RULES for arm in rule.reads), *across]))


def _concluded(
    number: int,
    statement: str,
    task: str | None,
    clauses: Sequence[Clause],
    decide: Decide,
    least: int,
) -> Finding:
    """The finding, undecided where an arm is missing or has fewer than the least episodes."""
    evidence = tuple(clause.evidence for clause in clauses)
    missing = tuple(dict.fromkeys(short for clause in clauses for short in clause.missing))
    verdict = decide([clause.verdict for clause in clauses])
    decided = verdict != "undecided"
    needed = None if decided else needed_by(clauses, decide)
    n = min((one.n for one in evidence if one.n), default=0)
    if missing:
        verdict, needed = "undecided", None
    elif n < least:
        verdict = "undecided"
        needed = max(least, needed or 0) if decided or needed is not None else None
    return Finding(number, statement, task, verdict, evidence, needed, missing)


def _gated(finding: Finding, results: TaskResults) -> Finding:
    """The finding, undecided where float is below the gate of a task that it is about."""
    arms = Arms(results)
    name = arms.find("float")
    if name is None:
        return finding
    successes = [bool(row["success"]) for row in arms.rows(name)]
    rate = sum(successes) / len(successes)
    if rate >= results.gate:
        return finding
    note = (
        f"float reaches {rate:.2f}, below the gate of {results.gate:.2f}: a model that fails in "
        "float says nothing about quantization"
    )
    about = f"{results.task}: " if finding.task is None else ""
    evidence = tuple(
        one.noted(note, "undecided") if one.text.startswith(about) else one
        for one in finding.evidence
    )
    return replace(finding, verdict="undecided", evidence=evidence, episodes_needed=None)


def _across(results: Sequence[TaskResults]) -> Finding:
    first = {one.task: one for one in reversed(results)}
    labels = labels_of(Arm.parse(FAILING))
    clauses: list[Clause] = []
    for task in (BREAKDOWN, OFF_COURSE):
        arms = Arms(first.get(task) or TaskResults(task, {}, {}))
        fails = _with_cause(arms, arms.difference(labels, "float", falls_short()))
        own = [fails, true_dynamics(arms, labels, falls_short() if task == BREAKDOWN else keeps())]
        if task == OFF_COURSE:
            back = replace(labels, part="predictor")
            own.append(
                arms.difference(back, "float", falls_short(), about="float encoder put back")
            )
        own = noted_if_it_works(own, "it does not fail here")
        clauses += [_in_task(task, clause) for clause in own]
    finding = _concluded(6, _MODES, None, clauses, _if_both_fail, _MODES_LEAST)
    for task in (BREAKDOWN, OFF_COURSE):
        finding = _gated(finding, first[task]) if task in first else finding
    return finding


def _if_both_fail(verdicts: Sequence[Verdict]) -> Verdict:
    """Of two clauses in Wall and three in PushT; the first of each says that the arm fails."""
    fail = verdicts[0] == verdicts[2] == "supported"
    return together(verdicts) if fail else "undecided"


def _with_cause(arms: Arms, clause: Clause) -> Clause:
    """The clause that the arm fails, with the verdict by intervention as a note."""
    name = arms.find(FAILING)
    if name is None:
        return clause
    told = verdict_by_intervention(arms.results, name)
    return clause.noted(f"verdict by intervention: {told.verdict} ({told.reason})")


def _in_task(task: str, clause: Clause) -> Clause:
    evidence = replace(clause.evidence, text=f"{task}: {clause.evidence.text}")
    return replace(clause, evidence=evidence, missing=tuple(f"{task}: {s}" for s in clause.missing))
