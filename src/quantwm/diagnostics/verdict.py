"""Verdict by intervention: which part of a quantized model makes planning fail.

One part of a failing arm is put right at a time, on the same episodes with the same noise:

- E, the float encoder put back (only the predictor is quantized);
- P, the float predictor put back (only the encoder is quantized);
- T, the true dynamics put in (the simulator's frames, encoded by the quantized encoder).

E and P *restore* success if they keep that of float (the paired difference's lower bound is above
-0.10), and do *not* if they fall short of it (the upper bound is below -0.10); otherwise it is
open. T is compared in the same way with `oracle-latent`, which has the float encoder and is
otherwise the same.

First, float must plan. Where its success rate is certainly below the study's gate, there is
nothing that quantization could have broken, and the oracles tell what fails in the float model:

| oracle-state        | oracle-latent       | verdict     |
| ------------------- | ------------------- | ----------- |
| fails               | any                 | planner     |
| succeeds            | fails               | objective   |
| succeeds            | succeeds            | dynamics    |

An oracle fails if its Wilson interval lies below the gate and succeeds if it lies above.
Otherwise, for an arm that falls short of float (one that keeps float's success is "healthy"):

| E            | P            | verdict        | because                                        |
| ------------ | ------------ | -------------- | ---------------------------------------------- |
| restores     | does not     | representation | the encoder's quantization alone breaks it     |
| does not     | restores     | dynamics       | the predictor's alone does                     |
| does not     | does not     | both           | each alone does                                |
| restores     | restores     | either         | only the two together do                       |
| open, either | or missing   | undecided      |                                                |

T says how an encoder breaks planning (verdicts "representation" and "both"): if T fails too, its
latents no longer tell how far the goal is; if T succeeds they do, and it is the predictor, trained
on float latents, that cannot roll them out. Where `oracle-latent` itself falls short of float, T
says nothing. T never changes the verdict: it says what to mend, E and P where.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from quantwm.errors import unknown_name
from quantwm.statistics import wilson_interval
from quantwm.study.evidence import (
    Arms,
    Clause,
    Evidence,
    Rule,
    Verdict,
    absent,
    falls_short,
    keeps,
    needed_by,
    short_form,
)
from quantwm.study.labels import ArmLabels
from quantwm.study.results import TaskResults

Cause: TypeAlias = Literal[
    "healthy",
    "representation",
    "dynamics",
    "both",
    "either",
    "objective",
    "planner",
    "undecided",
]

_CAUSES: dict[tuple[Verdict, Verdict], Cause] = {
    ("supported", "contradicted"): "representation",
    ("contradicted", "supported"): "dynamics",
    ("contradicted", "contradicted"): "both",
    ("supported", "supported"): "either",
}
_REASONS: dict[Cause, str] = {
    "representation": "the float encoder put back restores success, the float predictor does not",
    "dynamics": "the float predictor put back restores success, the float encoder does not",
    "both": "neither the float encoder nor the float predictor put back restores success",
    "either": "each of the two put back in float restores success: only both together fail",
}
_SIDES = ("encoder", "predictor")
_ENCODER_BREAKS: tuple[Cause, ...] = ("representation", "both")


@dataclass(frozen=True)
class InterventionVerdict:
    """Why an arm fails.

    Attributes:
        arm: its name.
        verdict: see the table of this module.
        reason: a sentence.
        evidence: the comparisons it rests on. A clause says "keeps the success of float", so that
            "supported" reads "restores" and "contradicted" reads "does not".
        missing: arms that would decide it and that the results lack, in their short form.
        episodes_needed: if undecided, episodes that would decide it; None if that cannot be told.
    """

    arm: str
    verdict: Cause
    reason: str
    evidence: tuple[Evidence, ...] = ()
    missing: tuple[str, ...] = ()
    episodes_needed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with `"kind": "verdict"`."""
        values = asdict(self)
        values["evidence"], values["missing"] = list(values["evidence"]), list(self.missing)
        return {"kind": "verdict", **values}


def verdict_by_intervention(results: TaskResults, arm: str) -> InterventionVerdict:
    """Which part of an arm makes planning fail; see the table of this module.

    Interventions are found by what arms are (part, scheme, method with its options, and budget),
    not by their names.

    Args:
        results: the rows of a study in one task.
        arm: the name of a quantized arm, or of a float one, which is judged by the oracles.

    Raises:
        UsageError: the results have no such arm.
    """
    if arm not in results.arms:
        raise unknown_name("arm", arm, results.arms)
    arms, labels, gate = Arms(results), results.arms[arm], results.gate
    float_works = against_gate(arms, labels_at("float", labels), gate)
    if float_works.missing:
        return _undecided(arm, "there is no float arm", [float_works], [float_works])
    if float_works.verdict == "contradicted":
        return _by_oracles(arms, arm, labels, float_works, gate)
    if labels.kind == "float":
        cause: Cause = "healthy" if float_works.verdict == "supported" else "undecided"
        reason = f"its success is {'above' if cause == 'healthy' else 'not surely below'} the gate"
        return InterventionVerdict(arm, cause, reason, (float_works.evidence,))
    if labels.kind != "quantized" or labels.part != "all":
        reason = "only an arm with encoder and predictor quantized alike can be judged by its parts"
        return InterventionVerdict(arm, "undecided", reason)
    return _by_parts(arms, arm, labels, float_works)


def verdicts(results: TaskResults) -> list[InterventionVerdict]:
    """The verdict on every arm of which one side alone is an arm too, in the study's order."""
    chosen = [
        name
        for name, labels in results.arms.items()
        if labels.kind == "quantized"
        and labels.part == "all"
        and any(replace(labels, part=part) in results.arms.values() for part in _SIDES)
    ]
    return [verdict_by_intervention(results, name) for name in chosen]


def against_gate(arms: Arms, wanted: ArmLabels, gate: float) -> Clause:
    """Whether Wilson's interval of an arm's success is above a gate (supported) or below it."""
    name = arms.find(wanted)
    if name is None:
        short = short_form(wanted)
        return absent(short, f"no arm {short}", None, (short,))
    successes = [bool(row["success"]) for row in arms.rows(name)]
    n = len(successes)
    low, high = wilson_interval(sum(successes), n)
    verdict: Verdict = "undecided"
    if low > gate or high < gate:
        verdict = "supported" if low > gate else "contradicted"
    note = f"against a gate of {gate:.2f}"
    return Clause(Evidence(name, sum(successes) / n, low, high, None, n, verdict, note))


def labels_at(kind: Literal["float", "oracle-state", "oracle-latent"], arm: ArmLabels) -> ArmLabels:
    """A reference arm with the planning budget of another arm."""
    return ArmLabels(kind, budget=arm.budget)


def true_dynamics(arms: Arms, arm: ArmLabels, rule: Rule) -> Clause:
    """What the true dynamics put in do: `oracle-latent` with an arm's encoder minus itself.

    Undecided where `oracle-latent` falls short of float: then it cannot be told.

    Args:
        arms: of one task.
        arm: the failing one.
        rule: what is claimed of the difference.
    """
    oracle = labels_at("oracle-latent", arm)
    whole = replace(arm, kind="oracle-latent", part="all")
    # The oracle never asks the predictor, so either way of writing it is the same arm.
    encoder = replace(whole, part="encoder")
    wanted = encoder if arms.find(whole) is None and arms.find(encoder) else whole
    clause = arms.difference(wanted, oracle, rule, about="true dynamics put in")
    sound = arms.difference(oracle, labels_at("float", arm), keeps())
    if sound.verdict == "contradicted":
        return replace(
            clause.noted("oracle-latent itself falls short of float", "undecided"),
            episodes_needed=None,
        )
    return clause


def _by_parts(arms: Arms, arm: str, labels: ArmLabels, float_works: Clause) -> InterventionVerdict:
    """Which of an arm's parts, put back in float, restores the success of float."""
    reference = labels_at("float", labels)
    fails = arms.difference(labels, reference, falls_short(), about="it fails", name=arm)
    before = [float_works, fails]
    if fails.verdict == "contradicted":
        reason = "it keeps the success of float: nothing fails"
        return InterventionVerdict(arm, "healthy", reason, _evidence(before))
    if fails.verdict == "undecided":
        return _undecided(arm, "whether it falls short of float is open", before, [fails])
    encoder, predictor = (
        arms.difference(replace(labels, part=kept), reference, keeps(), about=f"float {put} back")
        for kept, put in (("predictor", "encoder"), ("encoder", "predictor"))
    )
    truth = true_dynamics(arms, labels, keeps())
    clauses = [*before, encoder, predictor, truth]
    cause = _CAUSES.get((encoder.verdict, predictor.verdict), "undecided")
    if cause == "undecided":
        return _undecided(arm, "what its parts do alone is open", clauses, [encoder, predictor])
    reason = _REASONS[cause] + (_of_truth(truth.verdict) if cause in _ENCODER_BREAKS else "")
    return InterventionVerdict(arm, cause, reason, _evidence(clauses))


def _by_oracles(
    arms: Arms, arm: str, labels: ArmLabels, float_works: Clause, gate: float
) -> InterventionVerdict:
    """What fails where the float model does."""
    state, latent = (
        against_gate(arms, labels_at(kind, labels), gate)
        for kind in ("oracle-state", "oracle-latent")
    )
    clauses = [float_works, state, latent]
    if state.verdict == "contradicted":
        cause: Cause = "planner"
        reason = "float fails, and so does the planner with the true dynamics and the true distance"
    elif "undecided" in (state.verdict, latent.verdict):
        return _undecided(arm, "float fails, what the oracles do is open", clauses, [state, latent])
    elif latent.verdict == "contradicted":
        cause = "objective"
        reason = "float fails, and true dynamics do not mend it; only the true distance does"
    else:
        cause = "dynamics"
        reason = "float fails, and the true dynamics restore success: its own predictor fails"
    return InterventionVerdict(arm, cause, reason, _evidence(clauses))


def _undecided(
    arm: str, reason: str, clauses: Sequence[Clause], deciding: Sequence[Clause]
) -> InterventionVerdict:
    missing = tuple(dict.fromkeys(short for clause in deciding for short in clause.missing))
    needed = None if missing else needed_by(deciding)
    return InterventionVerdict(arm, "undecided", reason, _evidence(clauses), missing, needed)


def _evidence(clauses: Sequence[Clause]) -> tuple[Evidence, ...]:
    return tuple(clause.evidence for clause in clauses)


def _of_truth(verdict: Verdict) -> str:
    if verdict == "contradicted":
        return "; nor do the true dynamics: its latents no longer tell how far the goal is"
    if verdict == "supported":
        return (
            "; the true dynamics do: its latents still tell how far the goal is, but the "
            "predictor cannot roll them out"
        )
    return ""
