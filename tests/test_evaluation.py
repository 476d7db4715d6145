"""Closed-loop evaluation: pairing, independence, failures, and a foreign model's whole path."""

import copy

import numpy as np
import pytest
import torch

import quantwm as qwm
from foreign import Field, PointWorld
from quantwm.calibration import Calibration, calibrate
from quantwm.errors import CorruptFileError, MismatchError, UsageError
from quantwm.evaluation import evaluate, evaluate_reference
from quantwm.planning.cem import CEM
from quantwm.planning.gradient import GradientDescent
from quantwm.study.rows import comparable
from quantwm.study.run import run_study
from quantwm.study.spec import StudySpec

PLANNER = CEM(samples=64, elites=8, steps=4)
QUICK = {"episodes": 6, "planner": PLANNER, "mpc_iterations": 3, "dtype": "float32"}


def rows_of(outcome):
    return [comparable(row) for row in outcome.rows]


@pytest.fixture(scope="module")
def calibration():
    return calibrate(
        PointWorld(), Field(), episodes=3, samples=40, planner=PLANNER, mpc_iterations=2
    )


def test_the_same_call_gives_the_same_rows():
    first = evaluate(PointWorld(), Field(), **QUICK)
    assert first.success == 1.0
    assert rows_of(first) == rows_of(evaluate(PointWorld(), Field(), **QUICK))


def test_rows_do_not_depend_on_how_many_episodes_are_planned_together():
    whole = rows_of(evaluate(PointWorld(), Field(), **QUICK))
    for batch_size in (1, 4):
        assert rows_of(evaluate(PointWorld(), Field(), **QUICK, batch_size=batch_size)) == whole
    fewer = evaluate(PointWorld(), Field(), **{**QUICK, "episodes": 2})
    assert rows_of(fewer) == whole[:2]


def test_another_seed_or_block_meets_other_goals():
    goals = [
        evaluate(PointWorld(), Field(), **QUICK, **other).rows[0]["goal"]
        for other in ({}, {"seed": 2}, {"block": "tuning"})
    ]
    assert len({tuple(goal) for goal in goals}) == 3


def test_arms_meet_the_same_goals_and_the_same_model_shows_no_difference():
    outcome = evaluate(PointWorld(), Field(), **QUICK, baseline=PointWorld())
    assert outcome.difference.difference == 0
    assert "against float" in str(outcome)
    oracle = evaluate_reference("oracle-state", Field(), world_model=PointWorld(), **QUICK)
    assert [row["goal"] for row in oracle.rows] == [row["goal"] for row in outcome.rows]
    assert oracle.success == 1.0


def test_random_plans_meet_the_same_goals_and_mostly_miss_them():
    settings = {**QUICK, "episodes": 40}
    chance = evaluate_reference("random", Field(), world_model=PointWorld(), **settings)
    chosen = evaluate(PointWorld(), Field(), **settings)
    assert [row["goal"] for row in chance.rows] == [row["goal"] for row in chosen.rows]
    assert chance.success < 0.5 < chosen.success
    assert {row["arm"] for row in chance.rows} == {"random"}
    # What a plan costs is how far from its goal it ends.
    for row in chance.rows:
        np.testing.assert_allclose(
            row["cost_by_iteration"], row["distance_by_iteration"][1:], rtol=1e-5
        )


def test_an_unknown_reference_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'random'"):
        evaluate_reference("randon", Field(), world_model=PointWorld(), **QUICK)


def test_evaluation_leaves_the_model_as_it_was():
    model = PointWorld().train()
    before = copy.deepcopy(model.state_dict())
    evaluate(model, Field(), **{**QUICK, "dtype": "bfloat16"})
    assert model.training
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_success_by_iteration_is_sticky_and_complete():
    for row in evaluate(PointWorld(), Field(), **QUICK).rows:
        curve = row["success_by_iteration"]
        assert len(curve) == QUICK["mpc_iterations"] + 1
        assert curve == sorted(curve)
        assert curve.index(True) == row["first_success"] == row["iterations"]
        assert len(row["states"]) == len(row["distance_by_iteration"]) == row["iterations"] + 1
        assert len(row["cost_by_iteration"]) == row["iterations"]


def test_non_finite_latents_fail_their_episodes_with_the_reason():
    model = PointWorld()
    with torch.no_grad():
        model.move.weight[0, 0] = float("inf")
    outcome = evaluate(model, Field(), **QUICK)
    assert outcome.success == 0
    assert all(row["failure"].startswith("non_finite") for row in outcome.rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episodes": 0}, "episodes must be 1 to"),
        ({"mpc_iterations": 0}, "at least 1"),
        ({"dtype": "float61"}, "known: auto, bfloat16, float32"),
        ({"device": "cuda:0"}, "no CUDA device"),
        ({"device": "mps"}, "cpu and cuda"),
        ({"device": "cpu:5"}, "not there"),
        ({"block": "evaluaton"}, "did you mean 'evaluation'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    if change.get("device") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match=message):
        evaluate(PointWorld(), Field(), **{**QUICK, **change})


def test_unknown_task_suggests_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'wall'"):
        evaluate(PointWorld(), "wal", **QUICK)


def test_calibration_holds_distinct_sequences_of_its_own_episodes(calibration):
    assert len(calibration) == 40
    assert len(np.unique(calibration.actions, axis=0)) == 40
    evaluated = evaluate(PointWorld(), Field(), **QUICK)
    goals = {tuple(np.float32(row["goal"])) for row in evaluated.rows}
    assert not goals & {tuple(proprio) for proprio in calibration.proprio}


def test_calibration_comes_back_from_its_file_and_damage_is_seen(calibration, tmp_path):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    assert Calibration.load(path).hash == calibration.hash
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(CorruptFileError):
        Calibration.load(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    with pytest.raises(CorruptFileError, match="checksum"):
        Calibration.load(path)


def test_what_a_gradient_planner_considers_is_recorded_too():
    found = calibrate(
        PointWorld(), Field(), episodes=2, samples=12, mpc_iterations=1,
        planner=GradientDescent(samples=4, steps=3),
    )  # fmt: skip
    assert len(found) == 12


def test_a_subset_keeps_the_frames_its_sequences_start_from(calibration):
    part = calibration.subset(5)
    for new, old in zip(part.frame, calibration.frame, strict=False):
        np.testing.assert_array_equal(part.proprio[new], calibration.proprio[old])
    with pytest.raises(UsageError, match="1 to 40"):
        calibration.subset(41)


def test_too_many_samples_are_refused():
    with pytest.raises(UsageError, match="distinct sequences"):
        calibrate(PointWorld(), Field(), episodes=1, samples=10_000, planner=PLANNER)


def test_calibration_of_another_model_is_refused(calibration):
    with pytest.raises(MismatchError, match="calibrate this model"):
        qwm.quantize(PointWorld(seed=1), "w8a8", calibration)


def test_a_foreign_model_goes_the_whole_path(tmp_path):
    spec = StudySpec.from_dict(
        {
            "task": "field",
            "model": "point",
            "arms": ["oracle-state", "float", "twin=float", "w8a8", "w2"],
            "episodes": 8,
            "mpc_iterations": 3,
            "planner": {"samples": 64, "elites": 8, "steps": 4},
            "calibration": {"episodes": 8, "samples": 128},
            "dtype": "float32",
        }
    )
    result = run_study(spec, tmp_path, world_model=PointWorld(), task=Field(), planner=PLANNER)
    success = {row["arm"]: row["success"] for row in result.summary}
    size = {row["arm"]: row["bytes"] for row in result.summary}
    assert success["oracle-state"] == success["float"] == success["twin"] == 1.0
    assert success["w8a8"] >= 0.75
    assert success["w2"] < 0.5
    assert size["w2"] < size["w8a8"] < size["float"]
    by_arm = {
        arm: [comparable(row) for row in result.rows if row["arm"] == arm]
        for arm in ("float", "twin")
    }
    assert by_arm["float"] == by_arm["twin"]


@pytest.mark.parametrize("task", ["pusht", "point_maze"])
def test_a_model_of_another_task_is_refused_before_anything_is_planned(task):
    wall = qwm.load("wall")
    with pytest.raises(MismatchError, match=f"trained in task 'wall', and this is '{task}'"):
        evaluate(wall, task, episodes=1)
    with pytest.raises(MismatchError, match="trained in task 'wall'"):
        evaluate_reference("oracle-state", task, world_model=wall, episodes=1)
    with pytest.raises(MismatchError, match="trained in task 'wall'"):
        calibrate(wall, task, episodes=1)
