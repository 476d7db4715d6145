"""CEM, iCEM and MPPI: one loop, three update rules, and finding a planner by its name."""

from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch

from quantwm.errors import UsageError
from quantwm.planning.cem import CEM
from quantwm.planning.defaults import default_planner
from quantwm.planning.gradient import GradientDescent
from quantwm.planning.icem import ICEM
from quantwm.planning.mppi import MPPI, softmin
from quantwm.planning.noise import action_noise, power_law
from quantwm.planning.planners import PLANNERS, planner_from_settings
from quantwm.planning.population import Belief
from quantwm.planning.random_plans import RandomPlans
from quantwm.protocols import ActionSpec
from quantwm.study.dry_run import plan_study
from quantwm.study.estimate import estimated_seconds
from quantwm.study.prepare import build_planner, prepare
from quantwm.study.run import run_study
from study_support import point_spec, study

SPEC = ActionSpec(dim=2, frameskip=3, mean=(0.0, 0.0), std=(1.0, 1.0))
TARGET = torch.linspace(-1, 1, 30).reshape(5, 6)
SMALL = {"samples": 24, "steps": 4, "horizon": 5}
POPULATION = [
    CEM(**SMALL, elites=6, noise_correlation=0.8),
    ICEM(**SMALL, elites=6),
    MPPI(**SMALL, noise_correlation=0.8),
    MPPI(**SMALL, refit_deviation=True),
]


def bowl(index, actions):
    """Each episode's own bowl, so that episodes differ."""
    shift = torch.from_numpy(np.asarray(index, np.float32))[:, None, None, None] / 10
    return ((actions - TARGET - shift) ** 2).flatten(2).sum(-1)


class Asked:
    """A cost that remembers the candidates of its first episode, and its costs."""

    def __init__(self, cost=bowl):
        self.candidates, self.costs, self._cost = [], [], cost

    def __call__(self, index, actions):
        costs = self._cost(index, actions)
        self.candidates.append(actions[0].numpy().copy())
        self.costs.append(costs[0].numpy().copy())
        return costs


def literal_cem(cost, seed, iteration, planner):
    """One episode's plan by CEM, restated; the last mean and the lowest cost of every step."""
    shape = (planner.horizon, SPEC.model_dim)
    mean, deviation = np.zeros(shape, np.float32), np.full(shape, planner.sigma, np.float32)
    best = []
    for step in range(planner.steps):
        noise = action_noise(
            seed,
            iteration,
            step,
            samples=planner.samples,
            horizon=planner.horizon,
            action_spec=SPEC,
            correlation=planner.noise_correlation,
        )
        candidates = np.concatenate([mean[None], mean + deviation * noise[1:]])
        costs = cost(torch.from_numpy(candidates[None]))[0].numpy()
        best.append(float(costs.min()))
        order = sorted(range(planner.samples), key=lambda i: (costs[i], i))
        elites = np.stack([candidates[i] for i in order[: planner.elites]])
        mean, deviation = np.mean(elites, axis=0), np.std(elites, axis=0, ddof=1)
    return mean, best


@pytest.mark.parametrize(
    "planner",
    [
        CEM(samples=64, elites=8, steps=5, noise_correlation=0.8),
        CEM(samples=7, elites=7, steps=3, sigma=0.5, horizon=2),
    ],
    ids=["compact", "tiny"],
)
def test_cem_is_bit_for_bit_the_literal_one(planner):
    target = torch.linspace(-1, 1, planner.horizon * 6).reshape(planner.horizon, 6)

    def cost(actions):
        return ((actions - target).abs() ** 1.5 + torch.sin(3 * actions)).flatten(2).sum(-1)

    seeds = np.array([3, 4, 5_000_000_001])
    result = planner.plan(lambda index, actions: cost(actions), seeds, 2, SPEC)
    for b, seed in enumerate(seeds.tolist()):
        mean, best = literal_cem(cost, seed, 2, planner)
        np.testing.assert_array_equal(result.actions[b].numpy(), mean)
        assert result.cost_by_step[b].tolist() == best
        assert result.cost[b] == best[-1]


class TestTheLoop:
    @pytest.mark.parametrize("planner", POPULATION, ids=lambda p: p.name)
    def test_it_lowers_the_cost(self, planner):
        result = planner.plan(bowl, np.array([1, 2, 3]), 0, SPEC)
        assert result.failures == (None, None, None)
        start = bowl(np.arange(3), torch.zeros(3, 1, 5, 6))[:, 0].numpy()
        assert (result.cost < 0.9 * start).all()

    @pytest.mark.parametrize("planner", POPULATION, ids=lambda p: p.name)
    def test_the_first_candidate_is_the_mean_and_the_last_mean_is_the_plan(self, planner):
        asked = Asked()
        plan = planner.plan(asked, np.array([1]), 0, SPEC).actions[0].numpy()
        np.testing.assert_array_equal(asked.candidates[0][0], np.zeros((5, 6)))
        longer = Asked()
        replace(planner, steps=planner.steps + 1).plan(longer, np.array([1]), 0, SPEC)
        np.testing.assert_array_equal(longer.candidates[-1][0], plan)

    @pytest.mark.parametrize("planner", POPULATION, ids=lambda p: p.name)
    def test_a_plan_depends_on_its_own_episode_alone(self, planner):
        seeds = np.array([7, 8, 9])
        together = planner.plan(bowl, seeds, 1, SPEC)

        def broken(index, actions):
            costs = bowl(index, actions)
            costs[torch.from_numpy(index == 0), 3] = float("inf")
            return costs

        def last(index, actions):
            return bowl(index + 2, actions)

        beside_a_failure = planner.plan(broken, seeds, 1, SPEC)
        alone = planner.plan(last, seeds[2:], 1, SPEC)
        for other, row in ((beside_a_failure, 2), (alone, 0)):
            np.testing.assert_array_equal(other.actions[row], together.actions[2])
            np.testing.assert_array_equal(other.cost_by_step[row], together.cost_by_step[2])
        reason = "non_finite: 1 of 24 candidate costs were NaN or infinite in optimisation step 1"
        assert beside_a_failure.failures == (reason, None, None)
        assert np.isnan(beside_a_failure.cost_by_step[0]).all()


class TestPowerLawNoise:
    @pytest.mark.parametrize("length", [24, 25, 1])
    @pytest.mark.parametrize("exponent", [0.5, 2.0, 4.0])
    def test_every_entry_has_unit_variance(self, length, exponent):
        # Noise is linear in the white noise, so its responses to unit impulses are its covariance.
        response = power_law(np.eye(length, dtype=np.float32)[:, :, None], exponent)[:, :, 0]
        np.testing.assert_allclose((response**2).sum(axis=0), 1, atol=1e-5)

    def test_power_falls_with_the_frequency_to_the_exponent(self):
        response = power_law(np.eye(24, dtype=np.float32)[:, :, None], 2.0)[:, :, 0]
        power = (np.abs(np.fft.rfft(response, axis=1)) ** 2).mean(axis=0)
        np.testing.assert_allclose(power[1] / power[1:], np.arange(1, 13) ** 2, rtol=1e-3)
        assert power[0] == pytest.approx(power[1], rel=1e-4)

    def test_it_runs_along_raw_actions_and_apart_for_each_dimension(self):
        settings = {"samples": 2000, "horizon": 5, "action_spec": SPEC}
        raw = action_noise(1, 0, 0, exponent=2.0, **settings).reshape(2000, 15, 2)
        assert (raw[:, 1:] * raw[:, :-1]).mean() > 0.7
        assert (raw[..., 0] * raw[..., 1]).mean() == pytest.approx(0, abs=0.06)
        assert raw.std() == pytest.approx(1, abs=0.03)

    def test_one_colour_at_a_time(self):
        with pytest.raises(UsageError, match="a correlation or an exponent"):
            action_noise(
                1, 0, 0, samples=2, horizon=5, action_spec=SPEC, correlation=0.5, exponent=1.0
            )


class TestICEM:
    def test_with_nothing_improved_it_is_cem(self):
        plain = ICEM(
            **SMALL, elites=6, noise_exponent=0.0, fraction_reused=0.0, decay=1.0, momentum=0.0
        )
        seeds = np.array([1, 2])
        ours, cem = (p.plan(bowl, seeds, 0, SPEC) for p in (plain, CEM(**SMALL, elites=6)))
        np.testing.assert_array_equal(ours.actions, cem.actions)
        np.testing.assert_array_equal(ours.cost_by_step, cem.cost_by_step)

    def test_the_best_elites_come_back_behind_the_mean(self):
        asked = Asked()
        planner = ICEM(**SMALL, elites=6, fraction_reused=0.5, decay=1.0)
        planner.plan(asked, np.array([1]), 0, SPEC)
        for before, costs, after in zip(
            asked.candidates, asked.costs, asked.candidates[1:], strict=False
        ):
            np.testing.assert_array_equal(after[1:4], before[np.argsort(costs)[:3]])
            assert not (after[4] == before).all(axis=(1, 2)).any()

    def test_a_kept_elite_keeps_the_lowest_cost_from_rising(self):
        cold = ICEM(samples=6, steps=8, elites=3, fraction_reused=0.0, decay=1.0)
        seeds = np.arange(20)
        kept = replace(cold, fraction_reused=0.4).plan(bowl, seeds, 0, SPEC).cost_by_step
        assert (np.diff(kept, axis=1) <= 0).all()
        assert (np.diff(cold.plan(bowl, seeds, 0, SPEC).cost_by_step, axis=1) > 0).any()

    def test_the_population_decays_to_twice_the_elites(self):
        asked = Asked()
        planner = ICEM(samples=100, elites=15, steps=5, decay=1.5)
        planner.plan(asked, np.array([1]), 0, SPEC)
        sizes = [len(candidates) for candidates in asked.candidates]
        assert sizes == [100, 66, 44, 30, 30]
        assert planner.rollouts == sum(sizes)

    def test_keeping_every_candidate_still_leaves_the_mean(self):
        asked = Asked()
        planner = ICEM(samples=4, elites=4, steps=3, fraction_reused=1.0, decay=1.0)
        plan = planner.plan(asked, np.array([1]), 0, SPEC)
        assert [len(candidates) for candidates in asked.candidates] == [4, 4, 4]
        assert plan.failures == (None,)

    def test_momentum_keeps_a_share_of_mean_and_deviation(self):
        planner = ICEM(samples=4, elites=2, momentum=0.25)
        candidates = np.array([1.0, 5.0, 3.0, 9.0], np.float32).reshape(4, 1, 1)
        ones = np.ones((1, 1), np.float32)
        costs = np.array([0.2, 9.0, 0.1, 9.0], np.float32)
        belief = planner.update(Belief(10 * ones, 4 * ones), candidates, costs)
        assert belief.mean.item() == pytest.approx(0.25 * 10 + 0.75 * 2)
        assert belief.deviation.item() == pytest.approx(0.25 * 4 + 0.75 * np.sqrt(2))
        assert belief.mean.dtype == belief.deviation.dtype == np.float32


class TestMPPI:
    def test_weights_worked_by_hand(self):
        # Excess 0, 1, 2, 3 and 10: the median is 2, so at temperature 0.5 excess e weighs exp(-e).
        costs = np.array([5, 6, 7, 8, 15], np.float32)
        weights = np.exp([-0.0, -1, -2, -3, -10])
        np.testing.assert_allclose(softmin(costs, 0.5), weights / weights.sum(), rtol=1e-6)

    def test_weights_do_not_depend_on_the_costs_scale_or_zero(self):
        costs = np.random.default_rng(0).uniform(1, 2, 50).astype(np.float32)
        wanted = softmin(costs, 0.3)
        for scale, shift in ((1e-6, 0.0), (1e6, 0.0), (4.0, -8.0)):
            moved = (costs * np.float32(scale) + np.float32(shift)).astype(np.float32)
            np.testing.assert_allclose(softmin(moved, 0.3), wanted, rtol=2e-4)

    def test_ties_for_the_lowest_cost_share_the_weight(self):
        assert softmin(np.float32([2, 1, 1, 1]), 0.3).tolist() == [0, 1 / 3, 1 / 3, 1 / 3]
        assert softmin(np.float32([4, 4]), 0.3).tolist() == [0.5, 0.5]

    def test_low_temperature_takes_the_best_and_high_the_average(self):
        costs = np.array([3, 1, 2], np.float32)
        assert softmin(costs, 1e-3).round(6).tolist() == [0, 1, 0]
        np.testing.assert_allclose(softmin(costs, 1e6), 1 / 3, rtol=1e-5)

    @pytest.mark.parametrize("refit", [True, False])
    def test_mean_and_deviation_are_weighted(self, refit):
        planner = MPPI(samples=3, temperature=1 / np.log(2), refit_deviation=refit)
        # Excess 0, 1 and 2 weigh 1, 1/2 and 1/4.
        costs = np.array([7, 8, 9], np.float32)
        candidates = np.array([7.0, 0.0, 14.0], np.float32).reshape(3, 1, 1)
        ones = np.ones((1, 1), np.float32)
        belief = planner.update(Belief(ones, 3 * ones), candidates, costs)
        assert belief.mean.item() == pytest.approx((4 * 7 + 2 * 0 + 14) / 7)
        spread = np.sqrt((4 * 1 + 2 * 36 + 64) / 7)
        assert belief.deviation.item() == pytest.approx(spread if refit else 3)
        assert belief.mean.dtype == belief.deviation.dtype == np.float32


class TestByName:
    @pytest.mark.parametrize("scale", ["compact", "paper"])
    @pytest.mark.parametrize("name", ["cem", "icem", "mppi", "gradient"])
    def test_settings_round_trip(self, name, scale):
        planner = default_planner("wall", scale, name)
        assert type(planner) is PLANNERS[name]
        assert planner.settings()["name"] == name
        assert planner_from_settings(planner.settings()) == planner
        assert build_planner({"name": name, "preset": scale}, "wall") == planner
        with pytest.raises(FrozenInstanceError):
            planner.steps = 3

    def test_a_study_plans_with_cem_as_ever(self):
        assert build_planner({}, "wall").settings() == {
            "name": "cem",
            "samples": 64,
            "elites": 8,
            "steps": 5,
            "horizon": 5,
            "sigma": 1.0,
            "noise_correlation": 0.8,
        }
        assert list(build_planner({}, "wall").settings())[:3] == ["name", "samples", "elites"]

    def test_unknown_names_suggest_the_nearest(self):
        with pytest.raises(UsageError, match="unknown planner 'icm'; did you mean 'icem'"):
            build_planner({"name": "icm"}, "wall")
        with pytest.raises(UsageError, match=r"unknown mppi setting 'temprature'.*'temperature'"):
            build_planner({"name": "mppi", "temprature": 1}, "wall")
        with pytest.raises(UsageError, match="unknown icem setting 'noise_correlation'"):
            build_planner({"name": "icem", "noise_correlation": 0.5}, "wall")
        with pytest.raises(UsageError, match="unknown planner 'mppi'"):
            CEM.from_settings({"name": "mppi"})

    def test_all_problems_are_reported_together(self):
        with pytest.raises(UsageError) as caught:
            build_planner({"name": "icem", "sampels": 3, "steps": 0, "momentum": "high"}, "wall")
        message = str(caught.value)
        for part in ("did you mean 'samples'", "steps must be a positive integer, got 0"):
            assert part in message
        assert "momentum must be a number at least 0 and below 1, got 'high'" in message

    @pytest.mark.parametrize(
        ("cls", "field", "value", "said"),
        [
            (CEM, "sigma", "wide", "sigma must be a number above 0, got 'wide'"),
            (CEM, "sigma", float("inf"), "sigma"),
            (CEM, "noise_correlation", 1, "below 1, got 1"),
            (CEM, "elites", 1, r"elites must be 2 to samples \(300\), got 1"),
            (ICEM, "elites", True, "elites must be a positive integer, got True"),
            (ICEM, "noise_exponent", -1, "noise_exponent must be a number at least 0"),
            (ICEM, "fraction_reused", 1.5, "at most 1, got 1.5"),
            (ICEM, "decay", 0.5, "decay must be a number at least 1, got 0.5"),
            (MPPI, "temperature", 0, "temperature must be a number above 0, got 0"),
            (MPPI, "refit_deviation", 1, "true or false, got 1"),
            (GradientDescent, "learning_rate", float("nan"), "learning_rate"),
            (GradientDescent, "optimizer", "adm", "did you mean 'adam'"),
            (GradientDescent, "step_noise", -0.1, "step_noise"),
        ],
    )
    def test_bad_values(self, cls, field, value, said):
        assert field in {one.name for one in fields(cls)}
        with pytest.raises(UsageError, match=said):
            cls(**{field: value})


class TestStudies:
    @pytest.mark.parametrize("name", ["icem", "mppi"])
    def test_a_study_plans_with_any_planner(self, tmp_path, name):
        values = {"samples": 32, "steps": 3, "horizon": 3}
        spec = point_spec(
            arms=["oracle-state", "float"], planner={"name": name, **values}, gate=0.0
        )
        result = run_study(**study(spec), out=tmp_path)
        assert result.spec.planner["name"] == name
        assert all(row["success"] > 0.5 for row in result.summary)
        cells = prepare(**study(spec)).cells
        usual = prepare(**study(point_spec(arms=["oracle-state", "float"]))).cells
        assert cells["float"].id != usual["float"].id

    def test_an_arm_without_gradients_is_refused_before_anything_is_computed(self, tmp_path):
        spec = point_spec(arms=["truth=oracle-state", "float"], planner={"name": "gradient"})
        with pytest.raises(UsageError, match="'gradient' needs gradients, and the simulator of 't"):
            plan_study(**study(spec), out=tmp_path)

    def test_estimates_count_the_rollouts_of_each_planner(self):
        def seconds(**settings):
            cell = prepare(**study(point_spec(arms=["float"]))).cells["float"]
            return estimated_seconds(replace(cell, planner=settings))

        usual = seconds(name="cem", samples=64, elites=8, steps=5)
        assert seconds(name="mppi", samples=64, steps=10) == pytest.approx(2 * usual)
        shrinking = seconds(name="icem", samples=64, elites=16, steps=3, decay=2.0)
        assert shrinking == pytest.approx(usual * (64 + 32 + 32) / 320)
        assert seconds(name="gradient", samples=2, steps=10) == pytest.approx(usual * 62 / 320)
        assert seconds(name="somebody's own") == pytest.approx(usual)


@pytest.mark.parametrize("planner", POPULATION)
def test_a_random_plan_is_the_first_sample_that_its_planner_looks_at(planner):
    asked = Asked()
    seeds = np.array([7, 8])
    planner.plan(asked, seeds, 2, SPEC)
    found = RandomPlans(planner).plan(bowl, seeds, 2, SPEC)
    np.testing.assert_array_equal(found.actions[0].numpy(), asked.candidates[0][1])
    assert found.cost[0] == asked.costs[0][1]
    assert found.cost_by_step.tolist() == [[cost] for cost in found.cost]
    assert found.failures == (None, None)


def test_random_plans_do_not_depend_on_costs_or_neighbours():
    planner = RandomPlans(POPULATION[0])
    both = planner.plan(bowl, np.array([7, 8]), 0, SPEC).actions
    other = planner.plan(lambda index, actions: -bowl(index, actions), np.array([8]), 0, SPEC)
    assert torch.equal(both[1], other.actions[0])
    again = planner.plan(bowl, np.array([8]), 1, SPEC)
    assert not torch.equal(other.actions, again.actions)


def test_random_plans_of_a_planner_that_has_no_noise_are_standard_normal():
    class Bare:
        def plan(self, cost, seeds, iteration, action_spec): ...

        def settings(self):
            return {"name": "bare"}

    seeds = np.arange(200)
    drawn = RandomPlans(Bare()).plan(bowl, seeds, 0, SPEC).actions
    assert drawn.shape == (200, 5, SPEC.model_dim)
    assert abs(drawn.mean()) < 0.05
    assert abs(drawn.std() - 1) < 0.05
    assert RandomPlans(Bare()).settings() == {"name": "bare"}
