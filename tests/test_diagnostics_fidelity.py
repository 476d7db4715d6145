"""Quantized models against float ones: hand-made models with known drifts and costs."""

import json

import numpy as np
import pytest
import torch

from dino_wm_support import tiny_model
from foreign import Field, PointWorld
from quantwm.diagnostics.candidates import Cases, planned_populations
from quantwm.diagnostics.fidelity import COST_PAIRS, diagnose_fidelity
from quantwm.errors import MismatchError, NonFiniteError, UsageError
from quantwm.methods import quantize
from quantwm.planning.cem import CEM
from quantwm.planning.gradient import GradientDescent
from quantwm.planning.objective import Objective
from quantwm.planning.rollout import ModelCost
from quantwm.seeds import episode_seeds
from study_support import PointModel, PointTask

CANDIDATES = 40
ONE_STEP = CEM(samples=CANDIDATES, elites=8, steps=1, horizon=3, sigma=0.5)
THREE_STEPS = CEM(samples=CANDIDATES, elites=8, steps=3, horizon=3)
QUICK = {"episodes": 4, "planner": THREE_STEPS, "dtype": "float32", "device": "cpu"}


def compare(reference, other, task=None, **changes):
    settings = QUICK | changes
    return diagnose_fidelity(reference, {"arm": other}, task or PointTask(), **settings)["arm"]


def first_candidates(episodes=4, planner=ONE_STEP):
    """Starts and goals (E, 2), and summed actions (E, N, H, 2) of the first populations."""
    drawn = PointTask().episodes(episode_seeds("tuning", 0, episodes))
    shape = (planner.horizon, 2)
    mean, deviation = np.zeros(shape, np.float32), np.full(shape, planner.sigma, np.float32)
    spec = PointModel().action_spec
    actions = [planner.candidates(mean, deviation, int(s), 0, 0, spec) for s in drawn.seeds]
    return drawn.start, drawn.goal, np.stack(actions).astype(np.float64).cumsum(axis=2)


def relative(error, size):
    """(E, N, H, 2) each → (H,)."""
    return np.sqrt((error**2).sum((0, 1, 3)) / (size**2).sum((0, 1, 3)))


class Scrambled(PointModel):
    """Imagines rightly, but mixes up which candidate leads where."""

    def rollout(self, latent, actions, *, last_only=False):
        generator = torch.Generator().manual_seed(int(actions.double().abs().sum() * 1e6))
        order = torch.randperm(actions.shape[1], generator=generator)
        return super().rollout(latent, actions[:, order], last_only=last_only)


class Scaled(PointModel):
    """Latents three times as long, so that every cost is nine times as high."""

    def encode(self, observation):
        return 3 * super().encode(observation)

    def rollout(self, latent, actions, *, last_only=False):
        return 3 * super().rollout(latent / 3, actions, last_only=last_only)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_faithful_to_itself(dtype):
    found = compare(PointModel(), PointModel(), dtype=dtype)
    assert (found.drift[""].against_float == 0).all()
    assert found.drift[""].observed == 0
    for ranks in (found.first, found.last):
        np.testing.assert_allclose(ranks.rank_correlation, 1)
        assert (ranks.top_k_overlap == 1).all()
        assert (ranks.regret == 0).all()
    assert (found.costs == found.float_costs).all()


def test_drift_is_what_a_linear_model_has_by_hand():
    """The latent is a rotated position: actions that count double move it twice as far."""
    start, _, moved = first_candidates()
    found = compare(PointModel(), PointModel(speed=2), planner=ONE_STEP, drift_candidates=99)
    true = start[:, None, None] + moved
    expected = relative(moved, true)
    np.testing.assert_allclose(found.drift[""].against_float, expected, rtol=1e-4)
    np.testing.assert_allclose(found.drift[""].against_truth, expected, rtol=1e-4)
    assert found.drift[""].float_against_truth.max() < 1e-5
    assert found.drift[""].observed == 0


def test_drift_from_the_truth_tells_whose_fault_it_is():
    """Here the float model is the one that is wrong, and the other one mends it."""
    start, _, moved = first_candidates()
    found = compare(PointModel(speed=2), PointModel(), planner=ONE_STEP, drift_candidates=99)
    true = start[:, None, None] + moved
    drift = found.drift[""]
    np.testing.assert_allclose(drift.against_float, relative(moved, true + moved), rtol=1e-4)
    np.testing.assert_allclose(drift.float_against_truth, relative(moved, true), rtol=1e-4)
    assert drift.against_truth.max() < 1e-5


def test_an_encoder_that_is_off_shows_before_the_first_step():
    other = PointModel()
    with torch.no_grad():
        other.encoder[0].weight *= 1.5
    start, _, moved = first_candidates()
    found = compare(PointModel(), other, planner=ONE_STEP, drift_candidates=99)
    assert found.drift[""].observed == pytest.approx(0.5)
    constant = np.broadcast_to(0.5 * start[:, None, None], moved.shape)
    expected = relative(constant, start[:, None, None] + moved)
    np.testing.assert_allclose(found.drift[""].against_float, expected, rtol=1e-4)


def test_drift_is_measured_on_the_first_candidates_alone():
    """The first candidate stands still, so that a wrong speed does not show in it."""
    found = compare(PointModel(), PointModel(speed=2), planner=ONE_STEP, drift_candidates=1)
    assert found.drift[""].against_float.max() < 1e-6
    assert found.last.rank_correlation.mean() < 1, "costs are compared on all candidates"


def test_regret_is_what_the_favourite_costs_by_the_float_model():
    start, goal, moved = first_candidates()
    found = compare(PointModel(), PointModel(speed=-1), planner=ONE_STEP)
    ends = moved[:, :, -1]
    costs = ((start[:, None] + ends - goal[:, None]) ** 2).sum(-1)
    theirs = ((start[:, None] - ends - goal[:, None]) ** 2).sum(-1)
    chosen = costs[np.arange(len(costs)), theirs.argmin(1)]
    expected = (chosen - costs.min(1)) / np.median(costs, axis=1)
    np.testing.assert_allclose(found.first.regret, expected, rtol=1e-4)
    assert (found.first.regret > 0.1).all()


def test_a_scrambled_cost_has_no_fidelity():
    found = compare(PointModel(), Scrambled(), episodes=12)
    for ranks in (found.first, found.last):
        assert abs(ranks.rank_correlation.mean()) < 0.2
        assert ranks.top_k_overlap.mean() == pytest.approx(8 / CANDIDATES, abs=0.1)
        assert ranks.regret.mean() > 0.01


def test_a_monotone_change_of_the_cost_keeps_fidelity():
    found = compare(PointModel(), Scaled())
    for ranks in (found.first, found.last):
        np.testing.assert_allclose(ranks.rank_correlation, 1)
        np.testing.assert_allclose(ranks.top_k_overlap, 1)
        np.testing.assert_allclose(ranks.regret, 0, atol=1e-7)
    np.testing.assert_allclose(found.drift[""].against_float, 2, rtol=1e-5)
    np.testing.assert_allclose(found.costs, 9 * found.float_costs, rtol=1e-4)


def test_costs_are_in_units_of_a_plan_at_random():
    found = compare(PointModel(), PointModel(), episodes=1)
    assert np.median(found.float_costs[:CANDIDATES]) == pytest.approx(1)
    assert np.median(found.float_costs[CANDIDATES:]) < 0.9, "plans that were searched for"


def test_pairs_of_costs_are_few_however_many_candidates_there_are():
    many = compare(PointModel(), PointModel(), episodes=30)
    assert 30 * 2 <= len(many.costs) <= COST_PAIRS
    assert len(compare(PointModel(), PointModel(), episodes=1).costs) == 2 * CANDIDATES


def test_the_last_population_is_what_the_float_planner_asks_about_last():
    model, task = PointModel(), PointTask()
    cases = Cases.resolve(model, task, THREE_STEPS, 2, 0, "tuning")
    for case in cases:
        cost = ModelCost(model, task, case.episode, Objective(model.objective_weights))
        cost.observe(np.array([0]), case.start[None])
        plan = THREE_STEPS.plan(cost, case.episode.seeds, 0, model.action_spec)
        found = planned_populations(THREE_STEPS, model, case)
        for step, population in ((0, found.first), (-1, found.last)):
            assert cost(np.array([0]), population[None]).min() == plan.cost_by_step[0, step]
        assert found.last.std(0).mean() < 0.7 * found.first.std(0).mean()


def test_several_models_are_compared_at_once_as_if_each_were_alone():
    model = PointModel()
    arms = {name: quantize(model, name) for name in ("w8", "w2")}
    together = diagnose_fidelity(model, arms, PointTask(), **QUICK)
    assert list(together) == ["w8", "w2"]
    alone = diagnose_fidelity(model, {"w2": arms["w2"]}, PointTask(), **QUICK)["w2"]
    assert together["w2"].to_dict() == alone.to_dict()
    assert together["w8"].last.regret.mean() <= together["w2"].last.regret.mean()


def test_a_foreign_model_drifts_more_the_fewer_its_bits():
    model = PointWorld()
    arms = {name: quantize(model, name) for name in ("w8", "w4", "w2")}
    settings = QUICK | {"planner": CEM(samples=32, elites=8, steps=2)}
    found = diagnose_fidelity(model, arms, Field(), **settings)
    drifts = [found[name].drift[""].against_float[-1] for name in arms]
    assert drifts == sorted(drifts)
    assert drifts[0] > 0
    assert found["w8"].first.rank_correlation.mean() > found["w2"].first.rank_correlation.mean()


def test_parts_of_a_latent_are_told_apart_and_written_as_json():
    model = tiny_model()
    settings = QUICK | {"episodes": 1, "planner": CEM(samples=4, elites=2, steps=2, horizon=2)}
    found = diagnose_fidelity(model, {"w3": quantize(model, "w3")}, "wall", **settings)["w3"]
    facts = json.loads(json.dumps(found.to_dict()))
    assert (facts["kind"], facts["arm"], facts["episodes"], facts["k"]) == ("fidelity", "w3", 1, 2)
    assert set(facts["drift"]) == {"visual", "proprio"}
    for drift in facts["drift"].values():
        for name in ("against_float", "against_truth", "float_against_truth"):
            assert len(drift[name]) == 2
    assert facts["drift"]["proprio"]["observed"] == 0, "the proprio embedding stays float"
    for name in ("rank_correlation", "top_k_overlap", "regret"):
        assert facts[name] == getattr(found.last, name).tolist()
        assert facts["first_population"][name] == getattr(found.first, name).tolist()
    assert len(facts["costs"]["float"]) == len(facts["costs"]["arm"]) == 8


def test_progress_is_by_episode():
    seen = []
    compare(PointModel(), PointModel(), progress=lambda *at: seen.append(at))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_what_cannot_be_compared_is_refused():
    model, small = PointModel(), quantize(PointModel(), "w4")
    with pytest.raises(MismatchError, match="'arm' was made from model"):
        compare(PointModel(speed=2), small)
    with pytest.raises(UsageError, match="quantized already"):
        compare(small, small)
    with pytest.raises(UsageError, match="at least one"):
        diagnose_fidelity(model, {}, PointTask())
    with pytest.raises(UsageError, match="cem, icem or mppi"):
        compare(model, small, planner=GradientDescent())
    with pytest.raises(UsageError, match="drift_candidates must be at least 1, got 0"):
        compare(model, small, drift_candidates=0)


def test_costs_that_are_not_finite_name_the_model():
    broken = PointModel()
    with torch.no_grad():
        broken.predictor[0].weight.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="by arm that is NaN"):
        compare(PointModel(), broken)
    with pytest.raises(NonFiniteError, match="the float model cannot plan"):
        compare(broken, PointModel())
