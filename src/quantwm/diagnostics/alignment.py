"""Objective alignment: does a lower predicted cost mean that the goal is reached?

A planner chooses the candidate of the lowest predicted cost. That helps only if, among episodes
planned in the same MPC iteration, those whose plans promise less cost are the ones that succeed.
Optimisation may go on lowering the cost where that no longer holds.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from quantwm.errors import UsageError
from quantwm.evaluation import Row
from quantwm.protocols import FloatArray
from quantwm.statistics import auc


@dataclass(frozen=True)
class IterationAlignment:
    """The episodes that were planned in one MPC iteration.

    Attributes:
        iteration: counted from 0.
        episodes: planned in it with a finite cost; those that had succeeded before are not.
        successes: of them, those that had reached the goal after it.
        auc: chance that a success had the lower predicted cost than a failure, a tie counting
            half; 0.5 is no better than a coin. None where all succeeded or none did.
        low, high: its 95% interval.
        rank_correlation: Spearman's, of the predicted cost and the distance to the goal reached;
            None with fewer than 3 episodes or where one of them is all alike.
    """

    iteration: int
    episodes: int
    successes: int
    auc: float | None
    low: float | None
    high: float | None
    rank_correlation: float | None


@dataclass(frozen=True)
class ObjectiveFall:
    """How far the predicted cost falls while plans are optimised.

    Attributes:
        episodes: with at least one plan whose costs are known, finite, and not 0 at the start.
        plans: of all of them together.
        falling: episodes whose plans end lower than they began, in the median.
        median: over episodes, of the cost of the last step as a share of the first step's; below
            1 the objective falls. None without plans.
        by_step: the same after each step; the first is 1. Up to the fewest steps of any plan.
    """

    episodes: int
    plans: int
    falling: int
    median: float | None
    by_step: tuple[float, ...]


@dataclass(frozen=True)
class ObjectiveAlignment:
    """Objective alignment of one arm.

    Attributes:
        arm: its name.
        iterations: one a planned MPC iteration.
        auc: mean of the iterations' AUC, each weighted by its pairs of a success and a failure;
            None without such pairs. Costs are only compared within an iteration.
        fall: how far the cost falls in optimisation.
    """

    arm: str
    iterations: tuple[IterationAlignment, ...]
    auc: float | None
    fall: ObjectiveFall

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with `"kind": "alignment"`."""
        values = asdict(self)
        values["iterations"] = list(values["iterations"])
        values["fall"]["by_step"] = list(self.fall.by_step)
        return {"kind": "alignment", **values}


def objective_alignment(rows: Sequence[Row]) -> ObjectiveAlignment:
    """Compare predicted costs with what was reached, from the rows of one arm.

    Args:
        rows: one an episode, in any order.

    Raises:
        UsageError: no rows, or rows of several arms.
    """
    names = {str(row["arm"]) for row in rows}
    if len(names) != 1:
        raise UsageError(f"alignment needs the rows of one arm, got those of {sorted(names)}")
    planned = max(len(row["cost_by_iteration"]) for row in rows)
    iterations = tuple(_iteration(rows, number) for number in range(planned))
    weights = [one.successes * (one.episodes - one.successes) for one in iterations]
    total = sum(weights)
    known = [(one.auc, weight) for one, weight in zip(iterations, weights, strict=True)]
    mean = (
        sum(area * weight for area, weight in known if area is not None) / total if total else None
    )
    return ObjectiveAlignment(names.pop(), iterations, mean, objective_fall(rows))


def objective_fall(rows: Sequence[Row]) -> ObjectiveFall:
    """How far the predicted cost falls while plans are optimised.

    Args:
        rows: one an episode; those of schema version 1, which know no costs by step, count
            nothing.
    """
    by_episode = [plans for row in rows if (plans := _relative_costs(row))]
    ends = [float(np.median([plan[-1] for plan in plans])) for plans in by_episode]
    steps = min((len(plan) for plans in by_episode for plan in plans), default=0)
    by_step = [
        float(np.median([np.median([plan[step] for plan in plans]) for plans in by_episode]))
        for step in range(steps)
    ]
    return ObjectiveFall(
        episodes=len(by_episode),
        plans=sum(len(plans) for plans in by_episode),
        falling=sum(end < 1 for end in ends),
        median=float(np.median(ends)) if ends else None,
        by_step=tuple(by_step),
    )


def _relative_costs(row: Row) -> list[list[float]]:
    """Each plan's costs by optimisation step, divided by that of its first step."""
    plans = row.get("cost_by_step") or []
    return [
        [cost / plan[0] for cost in plan]
        for plan in plans
        if plan and all(map(math.isfinite, plan)) and plan[0] > 0
    ]


def _iteration(rows: Sequence[Row], number: int) -> IterationAlignment:
    chosen = [
        row
        for row in rows
        if len(row["cost_by_iteration"]) > number
        and math.isfinite(row["cost_by_iteration"][number])
    ]
    costs = np.array([row["cost_by_iteration"][number] for row in chosen], np.float64)
    reached = np.array([bool(row["success_by_iteration"][number + 1]) for row in chosen], np.bool_)
    away = np.array([row["distance_by_iteration"][number + 1] for row in chosen], np.float64)
    area = auc(-costs, reached)
    return IterationAlignment(
        iteration=number,
        episodes=len(chosen),
        successes=int(reached.sum()),
        auc=None if area is None else area.auc,
        low=None if area is None else area.low,
        high=None if area is None else area.high,
        rank_correlation=_rank_correlation(costs, away),
    )


def _rank_correlation(first: FloatArray, second: FloatArray) -> float | None:
    if first.size < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first, second).statistic)
