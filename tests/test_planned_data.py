"""Data of plans: what a model's planner considers, executed."""

import numpy as np
import pytest
from typer.testing import CliRunner

from dino_wm_support import tiny_model
from quantwm.cli import app
from quantwm.data.collect import collect
from quantwm.data.planned import PLANS, PlannedPolicy
from quantwm.data.trajectories import TrajectoryFolder
from quantwm.envs import PointMaze, Wall
from quantwm.errors import MismatchError, UsageError
from quantwm.loading import save
from quantwm.planning.cem import CEM
from quantwm.seeds import episode_seeds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(tiny_model(num_hist=1), folder)
    return folder


def test_trajectories_are_executed_plans_that_depend_on_their_seeds_alone(folder):
    task = Wall()
    policy = PlannedPolicy(task, folder)
    seeds = episode_seeds("train", 3, policy.of_an_episode + 2)
    steps = policy.trajectory_steps
    states, actions = policy.scripted(seeds, steps)
    assert states.shape == (len(seeds), steps + 1, 2)
    layout = policy.sample_layout(seeds)
    np.testing.assert_array_equal(states[:, 1:], task.rollout(states[:, 0], layout, actions))
    some = [0, 5, policy.of_an_episode - 1, policy.of_an_episode]
    again = policy.scripted([seeds[i] for i in some], steps)
    np.testing.assert_array_equal(again[0], states[some])
    np.testing.assert_array_equal(again[1], actions[some])
    assert actions.dtype == np.float64
    np.testing.assert_array_equal(actions, actions.astype(np.float32))


def test_the_second_plan_begins_where_the_first_has_led(folder):
    task = Wall()
    policy = PlannedPolicy(task, folder)
    seeds = episode_seeds("train", 4, policy.of_an_episode)
    states, _ = policy.scripted(seeds, policy.trajectory_steps)
    a_plan = policy.of_an_episode // PLANS
    np.testing.assert_array_equal(states[0, 0], task.episodes(seeds[:1]).start[0])
    assert len(np.unique(states[:a_plan, 0], axis=0)) == 1
    np.testing.assert_allclose(states[a_plan, 0], states[a_plan - 1, -1], atol=1e-9)


def test_what_is_executed_is_cheap_to_the_model(folder, monkeypatch):
    """The trajectories are the elites, not any candidates."""
    asked = []
    update = CEM.update

    def watched(self, belief, candidates, costs):
        asked.append((candidates, costs))
        return update(self, belief, candidates, costs)

    monkeypatch.setattr(CEM, "update", watched)
    policy = PlannedPolicy(Wall(), folder)
    seeds = episode_seeds("train", 5, policy.of_an_episode)
    _, actions = policy.scripted(seeds, policy.trajectory_steps)
    model = policy._model
    planned = model.action_spec.normalize(actions).numpy()
    for number, (candidates, costs) in enumerate(asked[: len(asked) // PLANS]):
        elites = candidates[np.argsort(costs)[: policy._planner.elites]]
        for drawn in planned[2 * number : 2 * number + 2]:
            assert np.abs(elites - drawn).max(axis=(1, 2)).min() < 1e-5


def test_a_collection_of_plans_says_whose_they_are(folder, tmp_path):
    policy = PlannedPolicy(Wall(), folder)
    store = collect(Wall(), tmp_path / "plans", policy=policy, train=6, validation=4)
    assert len(store.load("train")) == 6
    assert store.index()["origin"]["policy"] == policy.policy
    other = tmp_path / "other"
    save(tiny_model(seed=1, num_hist=1), other)
    with pytest.raises(MismatchError, match="another origin"):
        collect(Wall(), store.folder, policy=PlannedPolicy(Wall(), other), train=6, validation=4)


def test_a_model_of_another_task_or_steps_that_are_no_plan_are_refused(folder):
    with pytest.raises(MismatchError, match="trained in task 'wall'"):
        PlannedPolicy(PointMaze(), folder)
    policy = PlannedPolicy(Wall(), folder)
    with pytest.raises(UsageError, match="a plan has 25 actions, not 50"):
        policy.scripted([1], 50)


def test_the_command_collects_plans_and_refuses_what_cannot_plan(folder, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["collect", *map(str, arguments)])

    counts = ("--train", 3, "--validation", 2)
    done = run("wall", "--out", tmp_path / "data", "--planned-by", folder, *counts)
    assert done.exit_code == 0, done.output
    shown = TrajectoryFolder(tmp_path / "data").index()["origin"]
    assert shown["policy"] == PlannedPolicy(Wall(), folder).policy
    refused = run("point_maze", "--out", tmp_path / "no", "--planned-by", folder, *counts)
    assert refused.exit_code == 1
    assert "trained in task 'wall'" in refused.stderr
    unknown = run("wall", "--out", tmp_path / "no", "--planned-by", "nothing", *counts)
    assert unknown.exit_code == 2
    assert not (tmp_path / "no").exists()
