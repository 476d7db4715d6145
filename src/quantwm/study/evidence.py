"""What findings and verdicts are made of: arms compared on their common episodes, and rules.

A rule turns a paired difference and its interval into "supported", "contradicted" or "undecided".
With a margin m, a difference that matters (0.10 unless said otherwise), and a difference counted
as treatment minus reference:

| rule          | supported                         | contradicted | says                       |
| ------------- | --------------------------------- | ------------ | -------------------------- |
| `keeps`       | low > −m                          | high < −m    | no loss that matters       |
| `falls_short` | high < −m                         | low > −m     | a loss that matters        |
| `is_lower`    | separable, below 0, not low > −m  | low > −m     | a loss, be it small        |
| `is_higher`   | separable, above 0, not high < m  | high < m     | a gain, be it small        |

Separable means that the interval excludes 0 and the exact test has p < 0.05
(`quantwm.statistics.separable`). A loss that is certain and certainly smaller than m contradicts
`is_lower`: it is not one that a planner's owner would act on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from quantwm.errors import UsageError
from quantwm.evaluation import Row
from quantwm.statistics import PairedDifference, Successes, pooled_difference, separable
from quantwm.study.arms import Arm
from quantwm.study.labels import ArmLabels, labels_of
from quantwm.study.power import episodes_needed
from quantwm.study.results import TaskResults

MARGIN = 0.10
"""The smallest loss of success rate that matters: the non-inferiority margin of "keeps"."""

_SUFFIXES = {"token": "-token", "frame": "-dynamic"}

Verdict: TypeAlias = Literal["supported", "contradicted", "undecided"]
Rule: TypeAlias = Callable[[PairedDifference], Verdict]
Decide: TypeAlias = Callable[[Sequence[Verdict]], Verdict]
"""A statement's verdict from those of its clauses, in their order."""
Pair: TypeAlias = tuple[Successes, Successes]


@dataclass(frozen=True)
class Evidence:
    """One clause of a finding or a verdict.

    Attributes:
        text: what was compared, such as "w8a8 minus float".
        estimate, low, high: the value and its interval, as success rates unless the text says
            otherwise; None where nothing could be compared.
        margin: the difference that matters to the clause's rule; None where there is none.
        n: episodes.
        verdict: of this clause alone.
        note: such as why it is undecided.
    """

    text: str
    estimate: float | None
    low: float | None
    high: float | None
    margin: float | None
    n: int
    verdict: Verdict
    note: str = ""

    def noted(self, note: str, verdict: Verdict | None = None) -> "Evidence":
        """The evidence with a remark added, and another verdict where one is given."""
        notes = "; ".join(part for part in (self.note, note) if part)
        return replace(self, note=notes, verdict=verdict or self.verdict)


@dataclass(frozen=True)
class Clause:
    """Evidence, and what would decide it.

    Attributes:
        evidence: its comparison.
        episodes_needed: after how many episodes, if what was seen goes on; None where it is
            decided or that cannot be told.
        missing: arms that were not there to compare, in their short form.
        expected: the verdict after so many episodes.
    """

    evidence: Evidence
    episodes_needed: int | None = None
    missing: tuple[str, ...] = ()
    expected: Verdict = "undecided"

    @property
    def verdict(self) -> Verdict:
        """The verdict of the evidence."""
        return self.evidence.verdict

    def after(self, episodes: int) -> Verdict:
        """The verdict after a number of episodes, if what was seen goes on."""
        needed = self.episodes_needed
        return self.verdict if needed is None or needed > episodes else self.expected

    def noted(self, note: str, verdict: Verdict | None = None) -> "Clause":
        """The clause with a remark added, and another verdict where one is given."""
        return replace(self, evidence=self.evidence.noted(note, verdict))


def keeps(margin: float = MARGIN) -> Rule:
    """No loss that matters (non-inferiority)."""
    return lambda seen: _verdict(seen.low > -margin, seen.high < -margin)


def falls_short(margin: float = MARGIN) -> Rule:
    """A loss that matters."""
    return lambda seen: _verdict(seen.high < -margin, seen.low > -margin)


def is_lower(margin: float = MARGIN) -> Rule:
    """A loss, unless it is certain to be smaller than what matters."""
    return lambda seen: _verdict(separable(seen) and seen.high < 0, seen.low > -margin)


def is_higher(margin: float = MARGIN) -> Rule:
    """A gain, unless it is certain to be smaller than what matters."""
    return lambda seen: _verdict(separable(seen) and seen.low > 0, seen.high < margin)


def _verdict(supported: bool, contradicted: bool) -> Verdict:
    if contradicted:
        return "contradicted"
    return "supported" if supported else "undecided"


def compare(
    text: str,
    pairs: Sequence[Pair],
    rule: Rule,
    *,
    margin: float | None = MARGIN,
    confidence: float = 0.95,
) -> Clause:
    """A clause on the mean difference of one or more pairs of arms on the same episodes."""
    seen = pooled_difference(pairs, confidence=confidence)
    verdict = expected = rule(seen)
    needed = None

    def decides(later: PairedDifference) -> bool:
        nonlocal expected
        expected = rule(later)
        return expected != "undecided"

    if verdict == "undecided":
        needed = episodes_needed(pairs, decides, confidence=confidence)
    evidence = Evidence(
        text,
        seen.difference,
        seen.low,
        seen.high,
        margin,
        seen.n,
        verdict,
        f"{seen.wins} won, {seen.losses} lost of {seen.n}",
    )
    return Clause(evidence, needed, expected=expected)


def absent(
    text: str, note: str, margin: float | None = MARGIN, missing: tuple[str, ...] = ()
) -> Clause:
    """An undecided clause that nothing could be compared for."""
    evidence = Evidence(text, None, None, None, margin, 0, "undecided", note)
    return Clause(evidence, missing=missing)


def short_form(wanted: str | ArmLabels) -> str:
    """How a study would write an arm that is `wanted`, what only a mapping says in brackets."""
    if isinstance(wanted, str):
        return wanted
    name = "" if wanted.kind == "quantized" else str(wanted.kind)
    if wanted.part:
        scheme = "" if wanted.weight_bits is None else f"w{wanted.weight_bits}"
        scheme += wanted.weights if wanted.weights.startswith("g") else ""
        scheme += "" if wanted.activation_bits is None else f"a{wanted.activation_bits}"
        scheme += _SUFFIXES.get(wanted.activations, "")
        scheme += "-w_tensor" if wanted.weights == "tensor" else ""
        suffixes, bracket, besides = wanted.variant.partition(" (")
        scheme += suffixes
        scheme += f"@{wanted.method}" if wanted.method != "rtn" else ""
        scheme += bracket + besides
        part = "" if wanted.part == "all" else wanted.part
        name = ":".join(text for text in (name, part, scheme) if text)
    return name + "".join(f"/{key}={value}" for key, value in wanted.budget)


class Arms:
    """The arms of a task's results, found by what they are and not by what they are called."""

    def __init__(self, results: TaskResults) -> None:
        self.results = results

    def find(self, wanted: str | ArmLabels) -> str | None:
        """The name of an arm that is `wanted`, given as a short form or as labels.

        Of several, the one that is called so if there is one.
        """
        labels = labels_of(Arm.parse(wanted)) if isinstance(wanted, str) else wanted
        found = [
            name
            for name, own in self.results.arms.items()
            if own == labels and self.results.rows.get(name)
        ]
        return next((name for name in found if name == wanted), found[0] if found else None)

    def missing(self, wanted: Sequence[str | ArmLabels]) -> tuple[str, ...]:
        """The short forms of those that no arm is."""
        lost = [short_form(one) for one in wanted if self.find(one) is None]
        return tuple(dict.fromkeys(lost))

    def rows(self, name: str) -> Sequence[Row]:
        """The rows of an arm, by its name."""
        return self.results.rows[name]

    def pairs(self, names: Sequence[tuple[str, str]]) -> list[Pair]:
        """Successes of (treatment, reference) arms on the episodes that all of them met.

        A pair's rows are of one origin (`TaskResults.together`); none are left without one.

        Raises:
            UsageError: an arm met an episode twice.
        """
        by_seed = [
            tuple(self._by_seed(name, own) for name, own in zip(pair, rows, strict=True))
            for pair in names
            for rows in (self.results.together(*pair) or ((), ()),)
        ]
        common = sorted(set.intersection(*(set(found) for pair in by_seed for found in pair)))
        columns = [
            [np.array([found[seed] for seed in common], np.bool_) for found in pair]
            for pair in by_seed
        ]
        return [(treatment, reference) for treatment, reference in columns]

    def difference(
        self,
        treatment: str | ArmLabels,
        reference: str | ArmLabels,
        rule: Rule,
        *,
        about: str = "",
        margin: float | None = MARGIN,
        confidence: float = 0.95,
        name: str | None = None,
    ) -> Clause:
        """A clause on two arms; undecided where one is missing or they share no episode.

        Args:
            treatment, reference: as in `find`.
            rule: what is claimed of treatment minus reference.
            about: put after the arms' names in the clause's text.
            margin: of the rule, to show.
            confidence: of the interval.
            name: of the treatment, where it is known already.
        """
        return self._clause([(treatment, reference)], rule, about, margin, confidence, name)

    def pooled(
        self,
        wanted: Sequence[tuple[str | ArmLabels, str | ArmLabels]],
        rule: Rule,
        *,
        about: str = "",
        margin: float | None = MARGIN,
    ) -> Clause:
        """As `difference`, of the mean over several pairs of arms."""
        return self._clause(wanted, rule, about, margin, 0.95, None)

    def _clause(
        self,
        wanted: Sequence[tuple[str | ArmLabels, str | ArmLabels]],
        rule: Rule,
        about: str,
        margin: float | None,
        confidence: float,
        name: str | None,
    ) -> Clause:
        named = [[self.find(one) for one in pair] for pair in wanted]
        named[0][0] = name or named[0][0]
        text = ", ".join(
            " minus ".join(own or short_form(one) for own, one in zip(names, pair, strict=True))
            for names, pair in zip(named, wanted, strict=True)
        )
        text = f"{text}: {about}" if about else text
        missing = self.missing([arm for pair in wanted for arm in pair])
        if missing:
            return absent(text, f"no arm {', '.join(missing)}", margin, missing)
        pairs = self.pairs([(str(first), str(second)) for first, second in named])
        if len(pairs[0][0]) == 0:
            return absent(text, "the arms share no episode that was computed alike", margin)
        return compare(text, pairs, rule, margin=margin, confidence=confidence)

    def _by_seed(self, name: str, rows: Sequence[Row]) -> dict[int, bool]:
        found = {int(row["episode_seed"]): bool(row["success"]) for row in rows}
        if len(found) < len(rows):
            raise UsageError(
                f"arm {name!r} met an episode twice in task {self.results.task!r}: "
                f"{len(rows)} rows, {len(found)} episodes; give the rows of one study"
            )
        return found


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of a statement that says all of its clauses.

    Support keeps the error of each clause. A single clause contradicts, so that of k clauses the
    chance to contradict wrongly is at most k times that of one (0.025).
    """
    if "contradicted" in verdicts:
        return "contradicted"
    return "supported" if set(verdicts) == {"supported"} else "undecided"


def every_one(verdicts: Sequence[Verdict]) -> Verdict:
    """Decided, one way or the other, once each clause is."""
    return "undecided" if "undecided" in verdicts else "supported"


def needed_by(clauses: Sequence[Clause], decide: Decide = every_one) -> int | None:
    """Episodes after which a statement would be decided; None where that can not be told.

    Args:
        clauses: those of the statement.
        decide: its verdict from theirs.
    """
    numbers = {clause.episodes_needed for clause in clauses}
    for number in sorted(known for known in numbers if known is not None):
        if decide([clause.after(number) for clause in clauses]) != "undecided":
            return number
    return None


def noted_if_it_works(clauses: Sequence[Clause], note: str) -> list[Clause]:
    """Clauses of a statement about a failure, of which the first says that there is one.

    Where there is none, that is noted.
    """
    first, *others = clauses
    return [first.noted(note) if first.verdict == "contradicted" else first, *others]
