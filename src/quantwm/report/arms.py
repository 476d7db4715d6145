"""What the report shows of each arm, and which arm and episode the filmstrip follows."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from quantwm.errors import MismatchError, UsageError
from quantwm.evaluation import REFERENCES, Row
from quantwm.statistics import PairedDifference, separable
from quantwm.study.labels import ArmLabels
from quantwm.study.results import TaskResults
from quantwm.study.summary import mean_plan_seconds

Role: TypeAlias = Literal["float", "other float", "quantized", "bound"]
"""Float is the study's reference, other float a further float arm, such as one of another budget.
A bound is an arm that the model's predictions have no part in: an oracle, or random plans."""
Verdict: TypeAlias = Literal["reference", "lower", "higher", "not separable", "not compared"]

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Arm:
    """One line of the summary.

    Attributes:
        labels: what the arm is.
        success, low, high: success rate and its Wilson 95% interval.
        difference: against the float arm of the same budget, else the study's, on the same
            episodes; None for float itself and where the study did not compare.
        first_success_median: MPC iterations; None if no episode succeeded.
        bytes: of the stored model; oracles and random plans have none.
        seconds: that its episodes took.
        plan_seconds: planning time, seconds an episode.
        curve: success rate after MPC iteration 0, 1, ... to the maximum; empty without rows.
        failures: the arm's rows that failed.
    """

    name: str
    labels: ArmLabels
    role: Role
    episodes: int
    success: float
    low: float
    high: float
    difference: PairedDifference | None
    first_success_median: float | None
    bytes: int | None
    seconds: float | None
    plan_seconds: float
    note: str
    curve: tuple[float, ...]
    rows: tuple[Row, ...]

    @property
    def successes(self) -> int:
        """Episodes that succeeded."""
        return round(self.success * self.episodes)

    @property
    def failures(self) -> tuple[Row, ...]:
        """Rows of the episodes that failed."""
        return tuple(row for row in self.rows if not row["success"])

    @property
    def verdict(self) -> Verdict:
        """How the arm compares with float, as far as its interval supports it."""
        if self.role == "float":
            return "reference"
        if self.difference is None:
            return "not compared"
        if not separable(self.difference):
            return "not separable"
        return "lower" if self.difference.difference < 0 else "higher"


def arms_of(results: TaskResults, summary: Sequence[Mapping[str, Any]]) -> list[Arm]:
    """Arms in the order shown: float, other float arms, the quantized ones, the bounds.

    Args:
        results: what the arms are, and their rows.
        summary: one mapping an arm, as in `summary.csv`; absent values are None, NaN or "".

    Raises:
        UsageError: no arm at all.
        MismatchError: the summary does not belong to the rows.
    """
    if not summary:
        raise UsageError("the summary has no arm, so there is nothing to report; run the study")
    names = [str(line["arm"]) for line in summary]
    for given, other, which in (
        (results.arms, names, "there are episodes of arm {!r}, which the summary lacks"),
        (names, results.arms, "the summary has arm {!r}, of which there are no episodes"),
    ):
        for name in given:
            if name not in other:
                raise MismatchError(
                    f"{which.format(name)}; run the study again to rewrite the summary"
                )
    arms = [_arm(line, name, results) for name, line in zip(names, summary, strict=True)]
    order: tuple[Role, ...] = ("float", "other float", "quantized", "bound")
    return sorted(arms, key=lambda arm: order.index(arm.role))


def _role(name: str, results: TaskResults) -> Role:
    kind = results.arms[name].kind
    if kind in REFERENCES:
        return "bound"
    if kind == "float":
        return "float" if name == results.reference else "other float"
    return "quantized"


def worst_arm(arms: Sequence[Arm]) -> Arm | None:
    """The quantized arm with the least success; of equals, the one that ends farthest away."""

    def key(arm: Arm) -> tuple[float, float]:
        distances = [number(row["final_distance"]) for row in arm.rows]
        finite = [distance for distance in distances if distance is not None]
        return arm.success, -statistics.fmean(finite) if finite else -math.inf

    candidates = [arm for arm in arms if arm.role == "quantized" and arm.rows]
    return min(candidates, key=key) if candidates else None


@dataclass(frozen=True)
class EpisodeChoice:
    """The episode that the filmstrip shows, and how it was chosen, as a sentence's part."""

    episode: int
    reason: str


def choose_episode(shown: Sequence[Arm]) -> EpisodeChoice | None:
    """The first episode that the first arm solves and the last one fails, if there is one.

    Args:
        shown: one arm or two (float, worst).

    Returns:
        None if the arms have no episode in common.
    """
    solved = [{int(row["episode"]): bool(row["success"]) for row in arm.rows} for arm in shown]
    common = sorted(set.intersection(*(set(one) for one in solved))) if solved else []
    if not common:
        return None
    if len(shown) == 1:
        return EpisodeChoice(common[0], "the first one")
    reference, worst = solved[0], solved[-1]
    names = f"{shown[0].name} solves and {shown[-1].name} fails"
    telling = [episode for episode in common if reference[episode] and not worst[episode]]
    if telling:
        return EpisodeChoice(telling[0], f"the first of {len(telling)} that {names}")
    return EpisodeChoice(common[0], f"the first one; there is none that {names}")


def failure_kind(row: Row) -> str:
    """Why an episode failed, without the details: "goal not reached", "non_finite"."""
    reason = str(row["failure"])
    return "goal not reached" if reason == "not_reached" else reason.partition(":")[0]


def number(value: object) -> float | None:
    """A finite number, or None for what is absent: None, "", NaN and infinities."""
    if value is None or value == "":
        return None
    result = float(str(value))
    return result if math.isfinite(result) else None


def _arm(line: Mapping[str, Any], name: str, results: TaskResults) -> Arm:
    rows = results.rows[name]
    reference = results.float_rows(name) or []
    success, low, high = (_required(line, column) for column in ("success", "low", "high"))
    seen = sum(bool(row["success"]) for row in rows) / len(rows) if rows else success
    if abs(seen - success) > _TOLERANCE:
        raise MismatchError(
            f"arm {name!r}: the summary says success {success:.4f}, its episodes say "
            f"{seen:.4f}; run the study again to rewrite the summary"
        )
    stored = number(line.get("bytes"))
    return Arm(
        name=name,
        labels=results.arms[name],
        role=_role(name, results),
        episodes=int(_required(line, "episodes")),
        success=success,
        low=low,
        high=high,
        difference=_difference(line, rows, reference),
        first_success_median=number(line.get("first_success_median")),
        bytes=None if stored is None else int(stored),
        seconds=number(line.get("seconds")),
        plan_seconds=mean_plan_seconds(rows),  # summaries of older studies lack it
        note=str(line.get("note") or ""),
        curve=_curve(rows),
        rows=tuple(sorted(rows, key=lambda row: int(row["episode"]))),
    )


def _required(line: Mapping[str, Any], column: str) -> float:
    value = number(line.get(column))
    if value is None:
        raise MismatchError(
            f"arm {line['arm']!r}: the summary has no {column}; run the study again"
        )
    return value


def _difference(
    line: Mapping[str, Any], rows: Sequence[Row], reference: Sequence[Row]
) -> PairedDifference | None:
    value = number(line.get("difference"))
    low, high = number(line.get("difference_low")), number(line.get("difference_high"))
    if value is None or low is None or high is None:
        return None
    p_value = number(line.get("p_value"))
    key = "episode_seed"
    solved = {row[key]: bool(row["success"]) for row in reference}
    pairs = [(bool(row["success"]), solved[row[key]]) for row in rows if row[key] in solved]
    return PairedDifference(
        difference=value,
        low=low,
        high=high,
        p_value=math.nan if p_value is None else p_value,  # without it nothing is separable
        wins=pairs.count((True, False)),
        losses=pairs.count((False, True)),
        n=len(pairs),
    )


def _curve(rows: Sequence[Row]) -> tuple[float, ...]:
    columns = zip(*(row["success_by_iteration"] for row in rows), strict=True)
    return tuple(sum(map(bool, column)) / len(rows) for column in columns)
