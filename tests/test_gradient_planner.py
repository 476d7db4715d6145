"""Gradient descent through the cost: its steps, its choice, its failures."""

import numpy as np
import pytest
import torch

from foreign import Field, PointWorld
from quantwm.errors import UsageError
from quantwm.planning.gradient import GradientDescent
from quantwm.planning.mpc import run_episodes
from quantwm.planning.noise import action_noise
from quantwm.planning.objective import Objective
from quantwm.planning.oracles import OracleStateCost
from quantwm.planning.rollout import ModelCost
from quantwm.protocols import ActionSpec

SPEC = ActionSpec(dim=2, frameskip=3, mean=(0.0, 0.0), std=(1.0, 1.0))
TARGET = torch.linspace(-1, 1, 30).reshape(5, 6)
STILL = {"step_noise": 0.0}


class Bowl:
    """cost = Σ (a − target − episode / 10)², with its derivative."""

    def __init__(self):
        self.asked = []

    def _offset(self, index, actions):
        self.asked.append(actions.clone())
        shift = torch.from_numpy(np.asarray(index, np.float32))[:, None, None, None] / 10
        return actions - TARGET - shift

    def __call__(self, index, actions):
        return (self._offset(index, actions) ** 2).flatten(2).sum(-1)

    def gradient(self, index, actions):
        offset = self._offset(index, actions)
        return (offset**2).flatten(2).sum(-1), 2 * offset


def test_one_step_of_sgd_worked_by_hand():
    planner = GradientDescent(samples=1, steps=1, optimizer="sgd", learning_rate=0.25, **STILL)
    result = planner.plan(Bowl(), np.array([1]), 0, SPEC)
    # From zeros against the gradient 2 (0 − target): half the way to the target.
    torch.testing.assert_close(result.actions[0], TARGET / 2)
    assert result.cost[0] == pytest.approx((TARGET**2).sum().item() / 4)


def test_the_first_step_of_adam_is_the_learning_rate_whatever_the_scale():
    planner = GradientDescent(samples=1, steps=1, optimizer="adam", learning_rate=0.25, **STILL)
    result = planner.plan(Bowl(), np.array([1]), 0, SPEC)
    torch.testing.assert_close(result.actions[0], 0.25 * TARGET.sign())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_many_steps_reach_the_optimum(optimizer):
    planner = GradientDescent(
        samples=4, steps=150, optimizer=optimizer, learning_rate=0.1, step_noise=0.0
    )
    result = planner.plan(Bowl(), np.array([1, 2]), 0, SPEC)
    torch.testing.assert_close(result.actions[0], TARGET, atol=2e-3, rtol=0)
    torch.testing.assert_close(result.actions[1], TARGET + 0.1, atol=2e-3, rtol=0)


def test_starts_are_zeros_and_keyed_noise():
    cost = Bowl()
    planner = GradientDescent(samples=3, steps=1, sigma=0.5, noise_correlation=0.8)
    planner.plan(cost, np.array([9]), 2, SPEC)
    noise = action_noise(9, 2, 0, samples=3, horizon=5, action_spec=SPEC, correlation=0.8)
    start = cost.asked[0][0].numpy()
    np.testing.assert_array_equal(start[0], np.zeros((5, 6)))
    np.testing.assert_array_equal(start[1:], np.float32(0.5) * noise[1:])


def test_noise_follows_every_step_but_the_last():
    cost = Bowl()
    planner = GradientDescent(
        samples=2, steps=2, optimizer="sgd", learning_rate=0.25, step_noise=0.1
    )
    planner.plan(cost, np.array([9]), 2, SPEC)
    first, second, last = (asked[0] for asked in cost.asked)
    noise = action_noise(9, 2, 1, samples=2, horizon=5, action_spec=SPEC)
    stepped = (first + TARGET) / 2
    torch.testing.assert_close(second, stepped + 0.1 * torch.from_numpy(noise))
    torch.testing.assert_close(last, (second + TARGET) / 2)


def test_the_cheapest_sequence_after_the_last_step_is_the_plan():
    """Two basins; the start at zero slides into the shallow one."""

    class Basins(Bowl):
        def gradient(self, index, actions):
            leaf = actions.clone().requires_grad_()
            costs = self._value(leaf)
            return costs.detach(), torch.autograd.grad(costs.sum(), leaf)[0]

        def __call__(self, index, actions):
            self.asked.append(actions.clone())
            return self._value(actions)

        def _value(self, actions):
            x = actions[:, :, 0, 0]
            return torch.minimum((x - 0.3) ** 2 + 1, 4 * (x + 1.5) ** 2)

    cost = Basins()
    planner = GradientDescent(samples=12, steps=80, optimizer="adam", learning_rate=0.05, **STILL)
    result = planner.plan(cost, np.array([1]), 0, SPEC)
    final = cost.asked[-1][0]
    assert final[0, 0, 0] == pytest.approx(0.3, abs=0.02)
    assert result.actions[0, 0, 0] == pytest.approx(-1.5, abs=0.02)
    costs = cost(np.array([0]), final[None])[0]
    assert result.cost[0] == costs.min().item()
    torch.testing.assert_close(result.actions[0], final[costs.argmin()])
    assert result.cost_by_step.shape == (1, 80)
    assert result.cost_by_step[0, -1] == result.cost[0]
    assert (np.diff(result.cost_by_step[0, ::20]) < 0).all()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_what_is_not_finite_fails_its_own_episode_only(optimizer):
    class Broken(Bowl):
        calls = 0

        def gradient(self, index, actions):
            self.calls += 1
            costs, gradients = super().gradient(index, actions)
            if self.calls == 1:
                costs[torch.from_numpy(index == 0), 1] = float("nan")
            if self.calls == 2:
                gradients[torch.from_numpy(index == 2), :2, 0, 0] = float("inf")
            return costs, gradients

        def __call__(self, index, actions):
            costs = super().__call__(index, actions)
            costs[torch.from_numpy(index == 3), 0] = float("inf")
            return costs

    planner = GradientDescent(samples=3, steps=4, optimizer=optimizer, learning_rate=0.1)
    seeds = np.array([11, 12, 13, 14])
    broken = planner.plan(Broken(), seeds, 0, SPEC)
    assert broken.failures == (
        "non_finite: 1 of 3 candidate costs were NaN or infinite in optimisation step 1",
        None,
        "non_finite: 2 of 3 candidate gradients were NaN or infinite in optimisation step 2",
        "non_finite: 1 of 3 candidate costs were NaN or infinite in optimisation step 4",
    )
    assert torch.isfinite(broken.actions).all()
    assert np.isnan(broken.cost[[0, 2, 3]]).all()
    whole = planner.plan(Bowl(), seeds, 0, SPEC)
    assert torch.equal(broken.actions[1], whole.actions[1])
    np.testing.assert_array_equal(broken.cost_by_step[1], whole.cost_by_step[1])


def test_a_cost_without_gradients_is_refused():
    with pytest.raises(UsageError, match=r"needs a cost with a method `gradient`.*'cem'"):
        GradientDescent().plan(
            lambda index, actions: actions.flatten(2).sum(-1), np.array([1]), 0, SPEC
        )
    task, model = Field(), PointWorld()
    episodes = task.episodes(range(2))
    oracle = OracleStateCost(task, episodes, model.action_spec)
    with pytest.raises(UsageError, match="needs a cost with a method `gradient`"):
        run_episodes(task, episodes, oracle, GradientDescent(), model.action_spec, 1)


def test_it_drives_the_dot_to_its_goal_through_the_model():
    task, model = Field(), PointWorld()
    episodes = task.episodes(range(6))
    # A finished episode must not shift the others' gradients.
    episodes.goal[2] = episodes.start[2]
    cost = ModelCost(model, task, episodes, Objective(model.objective_weights))
    planner = GradientDescent(
        samples=2, steps=30, optimizer="adam", learning_rate=0.3, step_noise=0.0
    )
    traces = run_episodes(task, episodes, cost, planner, model.action_spec, 2)
    assert [trace.iterations for trace in traces].count(0) == 1
    assert all(trace.success[-1] for trace in traces)
    assert all(trace.failure is None for trace in traces)
