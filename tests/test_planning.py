"""The cross-entropy method, its noise, the objective and the receding-horizon loop."""

import numpy as np
import pytest
import torch

from foreign import Field, PointWorld
from quantwm.errors import UsageError
from quantwm.planning.cem import CEM
from quantwm.planning.defaults import default_planner
from quantwm.planning.mpc import run_episodes
from quantwm.planning.noise import action_noise
from quantwm.planning.objective import Objective
from quantwm.planning.oracles import OracleLatentCost, OracleStateCost
from quantwm.planning.rollout import ModelCost
from quantwm.protocols import ActionSpec

SPEC = ActionSpec(dim=2, frameskip=3, mean=(0.0, 0.0), std=(1.0, 1.0))


def noise(seed=7, iteration=0, step=0, **options):
    settings = {"samples": 500, "horizon": 5, "action_spec": SPEC} | options
    return action_noise(seed, iteration, step, **settings)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_cem_finds_the_optimum_of_a_known_function(correlation):
    target = torch.linspace(-1, 1, 5 * 6).reshape(5, 6)

    def cost(index, actions):
        return ((actions - target) ** 2).flatten(2).sum(-1)

    planner = CEM(samples=300, elites=30, steps=40, noise_correlation=correlation)
    plan = planner.plan(cost, np.array([3, 4]), 0, SPEC)
    if correlation == 0.0:
        torch.testing.assert_close(plan.actions[0], target, atol=0.05, rtol=0)
    first = ((0 - target) ** 2).sum()
    assert (plan.cost < 0.2 * first.item()).all()
    assert (np.diff(plan.cost_by_step[:, ::10], axis=1) < 0).all()


def test_the_first_candidate_is_the_mean():
    planner = CEM(samples=8, elites=2)
    mean = np.full((5, 6), 0.25, np.float32)
    proposed = planner.candidates(mean, np.ones((5, 6), np.float32), 1, 0, 0, SPEC)
    np.testing.assert_array_equal(proposed[0], mean)
    assert not np.array_equal(proposed[1], mean)


def test_refitting_takes_mean_and_unbiased_deviation_of_the_elites():
    planner = CEM(samples=4, elites=2)
    candidates = np.array([1.0, 5.0, 3.0, 9.0], np.float32).reshape(4, 1, 1)
    mean, deviation = planner.refit(candidates, np.array([0.2, 9.0, 0.1, 9.0], np.float32))
    assert mean.item() == 2.0
    assert deviation.item() == pytest.approx(np.sqrt(2.0))


def test_noise_is_keyed_by_episode_iteration_and_step():
    same = noise()
    np.testing.assert_array_equal(same, noise())
    for key in ({"seed": 8}, {"iteration": 1}, {"step": 1}):
        assert not np.array_equal(same, noise(**key))
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  a global state that must not matter
    np.testing.assert_array_equal(same, noise())


def test_noise_has_unit_variance_and_the_asked_correlation_between_raw_actions():
    raw = noise(samples=4000, correlation=0.8).reshape(4000, 15, 2)
    assert raw.std() == pytest.approx(1.0, abs=0.02)
    neighbours = (raw[:, 1:] * raw[:, :-1]).mean()
    assert neighbours == pytest.approx(0.8, abs=0.02)
    white = noise(samples=4000).reshape(4000, 15, 2)
    assert (white[:, 1:] * white[:, :-1]).mean() == pytest.approx(0.0, abs=0.02)


def test_objective_against_numbers_worked_by_hand():
    predicted = {
        "visual": torch.tensor([0.0, 1.0, 3.0]).reshape(1, 1, 3, 1, 1),
        "proprio": torch.tensor([0.0, 0.0, 2.0]).reshape(1, 1, 3, 1),
    }
    goal = {"visual": torch.zeros(1, 1, 1, 1), "proprio": torch.zeros(1, 1, 1)}
    weights = {"visual": 1.0, "proprio": 0.5}
    assert Objective(weights)(predicted, goal).item() == pytest.approx(9 + 0.5 * 4)
    # Frames weigh 1, 2 and 4 sevenths, and the public code then takes the mean over frames.
    every = Objective(weights, mode="all")(predicted, goal).item()
    assert every == pytest.approx(((2 * 1 + 4 * 9) / 7 + 0.5 * (4 * 4) / 7) / 3)


def test_objective_refuses_a_part_that_the_latent_has_not():
    with pytest.raises(UsageError, match="sound"):
        Objective({"sound": 1.0})(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2))


@pytest.mark.parametrize("oracle", ["model", "state", "latent"])
def test_every_cost_drives_the_dot_to_its_goal(oracle):
    task, model = Field(), PointWorld()
    episodes = task.episodes(range(6))
    objective = Objective(model.objective_weights)
    cost = {
        "model": lambda: ModelCost(model, task, episodes, objective),
        "state": lambda: OracleStateCost(task, episodes, model.action_spec),
        "latent": lambda: OracleLatentCost(model, task, episodes, objective),
    }[oracle]()
    planner = CEM(samples=64, elites=8, steps=6)
    traces = run_episodes(task, episodes, cost, planner, model.action_spec, 4)
    assert all(trace.success[-1] for trace in traces)
    assert all(trace.distance[-1] < trace.distance[0] for trace in traces if trace.iterations)


def test_a_finished_episode_is_not_planned_further():
    task, model = Field(), PointWorld()
    episodes = task.episodes(range(4))
    episodes.goal[2] = episodes.start[2]
    planned = []

    class Counting(OracleStateCost):
        def observe(self, index, states):
            planned.append(index.tolist())
            super().observe(index, states)

    cost = Counting(task, episodes, model.action_spec)
    traces = run_episodes(task, episodes, cost, CEM(samples=64, elites=8), model.action_spec, 5)
    assert traces[2].success == [True]
    assert all(2 not in index for index in planned)
    for number, trace in enumerate(traces):
        assert sum(number in index for index in planned) == trace.iterations


def test_a_cost_that_is_not_finite_fails_its_own_episode_only():
    task, model = Field(), PointWorld()
    episodes = task.episodes(range(3))

    class Broken(OracleStateCost):
        def __call__(self, index, actions):
            costs = super().__call__(index, actions)
            costs[index == 1, 5] = float("nan")
            return costs

    cost = Broken(task, episodes, model.action_spec)
    traces = run_episodes(task, episodes, cost, CEM(samples=64, elites=8), model.action_spec, 4)
    assert "non_finite" in traces[1].failure
    assert "1 of 64" in traces[1].failure
    assert traces[0].success[-1]
    assert traces[2].success[-1]


def test_settings_round_trip_and_unknown_ones_are_refused():
    planner = default_planner("wall")
    assert CEM.from_settings(planner.settings()) == planner
    with pytest.raises(UsageError, match="did you mean 'samples'"):
        CEM.from_settings({"sample": 3})
    with pytest.raises(UsageError, match=r"elites must be 2 to samples \(5\), got 9"):
        CEM(samples=5, elites=9)
    with pytest.raises(UsageError, match="paper"):
        default_planner("wall", "papr")
    assert (default_planner("pusht", "paper").steps, default_planner("wall", "paper").steps) == (
        30,
        10,
    )
