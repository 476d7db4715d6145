"""Objective alignment: planted costs, hand-computed areas, invariances."""

import json
import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from quantwm.diagnostics.alignment import objective_alignment, objective_fall
from quantwm.errors import UsageError
from results_support import row


def episode(number, costs, success_at=None, distances=None, arm="w3"):
    """Planned with these costs; `success_at` is the number of iterations it took."""
    one = row(arm, number, False, iterations=len(costs))
    reached = [success_at is not None and k >= success_at for k in range(len(costs) + 1)]
    planned = len(costs) if success_at is None else success_at
    return one | {
        "success": reached[-1],
        "success_by_iteration": reached,
        "cost_by_iteration": list(costs)[:planned],
        "distance_by_iteration": list(distances or range(len(costs) + 1))[: planned + 1],
    }


def test_a_hand_computed_area():
    # Successes cost 1 and 3, failures 2, 3 and 5: of six pairs four and a half are in order.
    rows = [episode(0, [1.0], 1), episode(1, [3.0], 1)]
    rows += [episode(2 + i, [cost]) for i, cost in enumerate((2.0, 3.0, 5.0))]
    (first,) = objective_alignment(rows).iterations
    assert (first.episodes, first.successes) == (5, 2)
    assert first.auc == pytest.approx(4.5 / 6)
    assert first.low < first.auc < first.high


def test_only_episodes_that_were_still_planned_count():
    rows = [episode(0, [1.0, 9.0], 1), episode(1, [2.0, 1.0], 2), episode(2, [3.0, 4.0])]
    first, second = objective_alignment(rows).iterations
    assert (first.episodes, first.successes, first.auc) == (3, 1, 1.0)
    # The first episode had succeeded; its cost of 9 was never planned with.
    assert (second.episodes, second.successes, second.auc) == (2, 1, 1.0)


def test_a_broken_objective_is_no_better_than_a_coin_or_worse():
    wrong = [episode(i, [float(i)], 1 if i >= 20 else None) for i in range(40)]
    assert objective_alignment(wrong).auc == 0.0
    right = [episode(i, [-float(i)], 1 if i >= 20 else None) for i in range(40)]
    assert objective_alignment(right).auc == 1.0
    flat = [episode(i, [1.0], 1 if i >= 20 else None) for i in range(40)]
    assert objective_alignment(flat).auc == 0.5


@pytest.mark.parametrize("success_at", [1, None])
def test_alike_outcomes_have_no_area(success_at):
    alignment = objective_alignment([episode(i, [float(i)], success_at) for i in range(5)])
    assert alignment.auc is None
    assert alignment.iterations[0].auc is None
    assert alignment.iterations[0].episodes == 5


def test_iterations_are_weighted_by_their_pairs():
    rows = [episode(0, [1.0, 0.0], 1), episode(1, [2.0, 7.0], 2), episode(2, [3.0, 5.0])]
    rows.append(episode(3, [4.0, 6.0]))
    first, second = objective_alignment(rows).iterations
    assert (first.auc, second.auc) == (1.0, 0.0)
    assert objective_alignment(rows).auc == pytest.approx((3 * 1.0 + 2 * 0.0) / 5)


def test_rank_correlation_of_cost_and_distance():
    costs, ends = [1.0, 2.0, 3.0, 4.0], [0.3, 0.1, 0.7, 0.9]
    rows = [
        episode(i, [cost], None, [5.0, end])
        for i, (cost, end) in enumerate(zip(costs, ends, strict=True))
    ]
    (only,) = objective_alignment(rows).iterations
    assert only.rank_correlation == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert objective_alignment(rows[:2]).iterations[0].rank_correlation is None


def test_costs_that_are_not_finite_are_left_out():
    rows = [episode(0, [1.0], 1), episode(1, [2.0]), episode(2, [math.nan]), episode(3, [math.inf])]
    assert objective_alignment(rows).iterations[0].episodes == 2


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=3, max_size=25),
    st.integers(0, 100),
)
def test_area_ignores_order_and_monotone_transforms(outcomes, seed):
    rows = [episode(i, [float(cost)], 1 if ok else None) for i, (cost, ok) in enumerate(outcomes)]
    before = objective_alignment(rows)
    shuffled = Random(seed).sample(rows, len(rows))
    stretched = [
        one | {"cost_by_iteration": [math.exp(cost) + 3 for cost in one["cost_by_iteration"]]}
        for one in shuffled
    ]
    after = objective_alignment(stretched)
    assert after.iterations[0].auc == before.iterations[0].auc
    assert after.iterations[0].low == before.iterations[0].low
    if before.auc is not None:
        success = [-float(cost) for cost, ok in outcomes if ok]
        failure = [-float(cost) for cost, ok in outcomes if not ok]
        u = stats.mannwhitneyu(success, failure, method="asymptotic", use_continuity=False)
        assert before.auc == pytest.approx(u.statistic / (len(success) * len(failure)))


def test_fall_of_the_objective():
    rows = [
        row("w3", 0, False) | {"cost_by_step": [[4.0, 2.0, 1.0], [2.0, 2.0, 1.0]]},
        row("w3", 1, False) | {"cost_by_step": [[1.0, 2.0, 3.0]]},
        # Nothing can be said of these.
        row("w3", 2, False) | {"cost_by_step": [[0.0, 0.0, 0.0], [1.0, math.inf, 1.0], []]},
        row("w3", 3, False) | {"cost_by_step": []},
    ]
    fall = objective_fall(rows)
    assert (fall.episodes, fall.plans, fall.falling) == (2, 3, 1)
    # Ends: 1/4 and 1/2 in the first episode, whose median is 0.375; 3 in the second.
    assert fall.median == pytest.approx((0.375 + 3.0) / 2)
    assert fall.by_step == pytest.approx((1.0, (0.75 + 2.0) / 2, (0.375 + 3.0) / 2))


def test_rows_without_costs_by_step():
    old = [{key: value for key, value in row("w3", 0, True).items() if key != "cost_by_step"}]
    fall = objective_fall(old)
    assert (fall.episodes, fall.median, fall.by_step) == (0, None, ())


def test_to_dict_is_json():
    rows = [episode(0, [1.0], 1), episode(1, [2.0])]
    values = objective_alignment(rows).to_dict()
    assert (values["kind"], values["arm"], values["auc"]) == ("alignment", "w3", 1.0)
    assert json.loads(json.dumps(values)) == values


def test_rows_of_one_arm_are_asked_for():
    with pytest.raises(UsageError, match="one arm"):
        objective_alignment([])
    with pytest.raises(UsageError, match="one arm"):
        objective_alignment([episode(0, [1.0]), episode(1, [1.0], arm="w4")])
