"""The rules of the statements about one task: which arms each reads, and what decides it.

`quantwm.study.findings` says each in a sentence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from quantwm.diagnostics.alignment import objective_fall
from quantwm.statistics import (
    SIGNIFICANCE,
    PairedDifference,
    holm,
    paired_difference,
    separable,
    wilson_interval,
)
from quantwm.study.arms import Arm
from quantwm.study.evidence import (
    MARGIN,
    Arms,
    Clause,
    Decide,
    Evidence,
    Verdict,
    absent,
    falls_short,
    is_higher,
    is_lower,
    keeps,
    noted_if_it_works,
    together,
)
from quantwm.study.labels import ArmLabels, labels_of

PER_TOKEN = ("w8a8", "w6a6", "w4a8", "w4a4")
"""Bit widths at which statement 3 compares activation granularities."""
SIDE_WIDTHS = ("w4", "w3", "w2")
"""Bit widths at which statement 4 compares encoder and predictor."""
LOW_WIDTHS = ("w3", "w2")
"""Arms of statement 5: the first that falls short of float and has both larger budgets."""
BUDGETS = (("steps", 20), ("mpc_iterations", 24))
"""Larger budgets that are asked for; any that is larger than the study's own counts."""
FALLING = 0.8
"""Share of episodes in which "the objective still falls"."""


@dataclass(frozen=True)
class FindingRule:
    """A statement about one task and how it is judged.

    Attributes:
        number: 1 to 5.
        statement: what is claimed.
        reads: the arms it reads, in their short form.
        least_episodes: fewer leave it undecided, whatever they show: about where a clause could
            not be supported even if no episode spoke against it.
        judge: its clauses.
        decide: its verdict from theirs.
    """

    number: int
    statement: str
    reads: tuple[str, ...]
    least_episodes: int
    judge: Callable[[Arms], list[Clause]]
    decide: Decide = together


def _eight_bits(arms: Arms) -> list[Clause]:
    return [arms.difference(arm, "float", keeps()) for arm in ("w8", "w8a8")]


def _groups(arms: Arms) -> list[Clause]:
    return [
        arms.difference("w4", "float", is_lower(), about="4 bits per channel are unstable"),
        arms.difference("w4g128", "float", keeps(), about="groups keep the success of float"),
        arms.difference("w4g128", "w4", is_higher(), about="groups gain on channels"),
        arms.difference("w3g128", "float", falls_short(), about="groups do not rescue 3 bits"),
    ]


def _granularity(arms: Arms) -> list[Clause]:
    # A wrong verdict takes one wrong clause of k, all on one side of their intervals: the chance
    # of one is at most 0.05 if each side misses with a chance of 0.05 / k.
    confidence = 1 - 2 * SIGNIFICANCE / len(PER_TOKEN)
    clauses = [
        arms.difference(f"{width}-token", width, _gains, confidence=confidence).noted(
            f"{100 * confidence:.1f}% interval"
        )
        for width in PER_TOKEN
    ]
    adjusted = holm([_p_value(arms, width) for width in PER_TOKEN])
    for number, (clause, p) in enumerate(zip(clauses, adjusted, strict=True)):
        if clause.verdict == "undecided" and (clause.evidence.low or 0.0) > 0:
            verdict: Verdict = "supported" if p < SIGNIFICANCE else "undecided"
            clauses[number] = clause.noted(f"p = {p:.2g} after Holm", verdict)
    return clauses


def _gains(seen: PairedDifference) -> Verdict:
    """A gain whatever the other widths show; Holm's correction may find one sooner."""
    verdict = is_higher()(seen)
    certain = seen.p_value < SIGNIFICANCE / len(PER_TOKEN)
    return "undecided" if verdict == "supported" and not certain else verdict


def _inconsistently(verdicts: Sequence[Verdict]) -> Verdict:
    if {"supported", "contradicted"} <= set(verdicts):
        return "supported"
    return "undecided" if "undecided" in verdicts else "contradicted"


def _p_value(arms: Arms, width: str) -> float:
    token, tensor = arms.find(f"{width}-token"), arms.find(width)
    if token is None or tensor is None:
        return 1.0
    treatment, reference = arms.pairs([(token, tensor)])[0]
    return paired_difference(treatment, reference).p_value if len(treatment) else 1.0


def _sides(arms: Arms) -> list[Clause]:
    pairs = [(f"encoder:{width}", f"predictor:{width}") for width in SIDE_WIDTHS]
    alone = [arms.difference(*pair, is_lower()) for pair in pairs]
    all_equal = all(_within_margin(clause.evidence) for clause in alone)

    def rule(seen: PairedDifference) -> Verdict:
        if all_equal or (separable(seen) and seen.low > 0):
            return "contradicted"
        return "supported" if separable(seen) else "undecided"

    pooled = arms.pooled(pairs, rule, about="mean over widths", margin=None)
    return [pooled, *alone]


def _by_the_first(verdicts: Sequence[Verdict]) -> Verdict:
    return verdicts[0]


def _within_margin(evidence: Evidence) -> bool:
    low, high = evidence.low, evidence.high
    return low is not None and high is not None and low > -MARGIN and high < MARGIN


def _misalignment(arms: Arms) -> list[Clause]:
    judged = [_misaligned(arms, width) for width in LOW_WIDTHS]
    # A width that does not fail, or lacks a budget, tells less than a later one that has all.
    usable = (clauses for clauses in judged if clauses[0].verdict == "supported" and _full(clauses))
    clauses = next(usable, judged[0])
    return noted_if_it_works(clauses, "it does not fail: there is nothing to repair")


def _if_it_fails(verdicts: Sequence[Verdict]) -> Verdict:
    return together(verdicts) if verdicts[0] == "supported" else "undecided"


def _full(clauses: Sequence[Clause]) -> bool:
    return all(not clause.missing for clause in clauses)


def _misaligned(arms: Arms, width: str) -> list[Clause]:
    labels = labels_of(Arm.parse(width))
    name = arms.find(labels)
    more_steps, more_iterations = (
        _larger_budget(arms, labels, key) or replace(labels, budget=((key, value),))
        for key, value in BUDGETS
    )
    return [
        arms.difference(labels, "float", falls_short(), about="success does not follow"),
        absent(f"{width}: the objective falls", f"no arm {width}", None, (width,))
        if name is None
        else _objective_falls(arms, name),
        arms.difference(more_steps, "float", falls_short(), about="more steps do not repair"),
        arms.difference(
            more_iterations, "float", falls_short(), about="more MPC iterations do not repair"
        ),
    ]


def _larger_budget(arms: Arms, labels: ArmLabels, key: str) -> ArmLabels | None:
    """The arm that differs in one budget alone and has the most of it, if that is more."""
    name = arms.find(labels)
    own = 0 if name is None else _own_budget(arms, name, key)
    larger = [
        other
        for other in arms.results.arms.values()
        if replace(other, budget=()) == labels
        and [setting for setting, _ in other.budget] == [key]
        and other.budget[0][1] > own
    ]
    return max(larger, key=lambda other: float(other.budget[0][1]), default=None)


def _own_budget(arms: Arms, name: str, key: str) -> int:
    """What the study itself plans with, read from rows; 0 where they do not tell."""
    rows = arms.rows(name)
    if key == "mpc_iterations":
        return max(len(row["success_by_iteration"]) - 1 for row in rows)
    return max((len(plan) for row in rows for plan in row.get("cost_by_step") or []), default=0)


def _objective_falls(arms: Arms, name: str) -> Clause:
    fall = objective_fall(arms.rows(name))
    text = f"{name}: share of episodes in which the predicted cost falls while planning"
    if fall.median is None:
        return absent(text, "the rows hold no costs by optimisation step", None)
    low, high = wilson_interval(fall.falling, fall.episodes)
    verdict: Verdict = "undecided"
    if low > FALLING or high < FALLING:
        verdict = "supported" if low > FALLING else "contradicted"
    note = f"ends at {fall.median:.2f} of its start in the median, above {FALLING} is asked"
    share = fall.falling / fall.episodes
    return Clause(Evidence(text, share, low, high, None, fall.episodes, verdict, note))


RULES: tuple[FindingRule, ...] = (
    FindingRule(
        1,
        "8 bits (weights alone, and weights and activations) keep the success of float",
        ("float", "w8", "w8a8"),
        36,
        _eight_bits,
    ),
    FindingRule(
        2,
        "4-bit weights are unstable per channel and stable in groups of 128; groups do not rescue "
        "3 bits",
        ("float", "w4", "w4g128", "w3g128"),
        36,
        _groups,
    ),
    FindingRule(
        3,
        "Finer activation granularity (per token against per tensor) helps inconsistently",
        tuple(arm for width in PER_TOKEN for arm in (width, f"{width}-token")),
        40,
        _granularity,
        _inconsistently,
    ),
    FindingRule(
        4,
        "Encoder and predictor are asymmetric: the encoder is the sensitive one",
        tuple(f"{side}:{width}" for width in SIDE_WIDTHS for side in ("encoder", "predictor")),
        16,
        _sides,
        _by_the_first,
    ),
    FindingRule(
        5,
        "At very low bits the objective still falls while success does not follow, and neither "
        "more CEM steps nor more MPC iterations repair it",
        ("float", "w3", *(f"w3/{key}={value}" for key, value in BUDGETS)),
        16,
        _misalignment,
        _if_it_fails,
    ),
)
"""Statements 1 to 5."""
