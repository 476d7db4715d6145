"""PointMaze beyond its recorded fixtures: determinism, walls, data, bad input."""

import multiprocessing

import numpy as np
import pytest

from quantwm.envs import PointMaze, get_task
from quantwm.errors import UsageError
from quantwm.protocols import Episodes
from quantwm.seeds import episode_seeds

SEEDS = episode_seeds("tuning", 3, 12)


def actions(count):
    return np.random.default_rng(0).normal(0, 0.8, (count, 25, 2))


def simulate(seeds):
    task = PointMaze()
    simulation = task.start(task.episodes(seeds))
    return simulation.step(np.arange(len(seeds)), actions(len(seeds)))


def test_the_same_seeds_and_actions_give_the_same_states_in_parallel_processes():
    here = simulate(SEEDS)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for there in pool.map(simulate, [SEEDS] * 2):
            np.testing.assert_array_equal(here, there)


def test_a_step_is_a_function_of_its_state():
    """In any company, and however the state was come by."""
    task, moves = PointMaze(), actions(len(SEEDS))
    whole = simulate(SEEDS)
    again = task.rollout(whole[3:5, 9], {}, moves[3:5, 10:])
    np.testing.assert_array_equal(again, whole[3:5, 10:])


def test_the_ball_stays_in_the_corridors():
    states = PointMaze().scripted(episode_seeds("train", 0, 200), 50)[0].reshape(-1, 4)
    x, y = states[:, 0], states[:, 1]
    assert min(x.min(), y.min()) > 0.25
    assert max(x.max(), y.max()) < 3.35
    in_tongue = (x > 1.45) & (x < 2.15) & (y < 2.15)
    assert not in_tongue.any()


def test_the_scripted_policy_visits_all_of_the_maze_at_all_speeds():
    states, moves = PointMaze().scripted(episode_seeds("train", 0, 200), 50)
    x, y = states[..., 0], states[..., 1]
    for low in (0.3, 1.3, 2.3):
        assert ((y > low) & (y < low + 1) & (x < 1.3)).mean() > 0.04
        assert ((y > low) & (y < low + 1) & (x > 2.3)).mean() > 0.04
    assert ((x > 1.3) & (x < 2.3)).mean() > 0.04
    through = (x[:, 0] < 1.3) & (x > 2.3).any(axis=1)
    assert through.mean() > 0.05, "some go from one arm to the other"
    assert np.abs(states[..., 2:]).max() > 5
    assert (np.abs(moves) > 1).mean() > 0.1, "the motors' saturation is seen"


def test_starts_and_goals_are_free_and_depend_on_their_seed_alone():
    whole, part = PointMaze().episodes(SEEDS), PointMaze().episodes(SEEDS[7:9])
    np.testing.assert_array_equal(whole.start[7:9], part.start)
    np.testing.assert_array_equal(whole.goal[7:9], part.goal)
    for x, y in np.concatenate([whole.start, whole.goal])[:, :2]:
        assert 0.5 <= x <= 3.1
        assert 0.5 <= y <= 3.1
        assert x <= 1.1 or x >= 2.5 or y >= 2.5


def test_only_positions_count_for_success():
    goal = np.array([1.0, 1.0, 0.0, 0.0])
    assert PointMaze().success(goal + np.array([0.3, 0.3, 5, 5]), goal)
    assert not PointMaze().success(goal + np.array([0.4, 0.4, 0, 0]), goal)


def test_the_ball_is_drawn_where_it_is():
    """Its marker is the only green thing; a world unit is 27.8 pixels at the height of its middle,
    and a hidden part of it cannot be seen."""
    for place in ([0.8, 0.8], [1.0, 2.0], [1.8, 2.7], [2.8, 1.1]):
        frame = PointMaze().observe(np.array([[[*place, 0, 0]]]), {})["visual"][0, 0].astype(int)
        green = (frame[..., 1] > frame[..., 0] + 20) & (frame[..., 1] > frame[..., 2] + 20)
        rows, columns = np.nonzero(green)
        middle = (np.array(place) + 1.2 - 3.0) * 27.77 + 112
        assert np.abs([columns.mean() + 0.5 - middle[0], rows.mean() + 0.5 - middle[1]]).max() < 1


def test_bad_input_is_refused():
    task = PointMaze()
    states = task.episodes(SEEDS[:2]).start
    with pytest.raises(UsageError, match="width 2, got 1"):
        task.rollout(states, {}, np.zeros((2, 5, 1)))
    with pytest.raises(UsageError, match="NaN"):
        task.rollout(states, {}, np.full((2, 5, 2), np.inf))
    with pytest.raises(UsageError, match="width 4, got 2"):
        task.rollout(states[:, :2], {}, np.zeros((2, 5, 2)))
    states[1, 0] = 4.5
    free = task.episodes(SEEDS[:2]).start
    with pytest.raises(UsageError, match=r"episode 1 starts at \[4.5"):
        task.start(Episodes(np.arange(2), states, free, {}))
    with pytest.raises(UsageError, match=r"episode 1 has its goal at \[4.5"):
        task.start(Episodes(np.arange(2), free, states, {}))
    for wall in ([0.05, 0.05], [3.5, 3.5], [1.8, 1.0], [0.2, 1.0]):
        states[1, :2] = wall
        with pytest.raises(UsageError, match=r"between 0\.3 and 3\.3, and episode 1"):
            task.start(Episodes(np.arange(2), states, free, {}))
    with pytest.raises(UsageError, match="finite"):
        task.observe(np.full((1, 1, 4), np.nan), {})
    with pytest.raises(UsageError, match="did you mean 'drawn'"):
        get_task("point_maze", renderer="draw")


def test_without_mujoco_the_error_names_what_to_install(monkeypatch):
    import sys

    from quantwm.envs import point_maze_physics

    monkeypatch.setitem(sys.modules, "mujoco.rollout", None)
    states = PointMaze().episodes(SEEDS[:1]).start
    with pytest.raises(Exception, match=r"pip install 'quantwm\[tasks\]'"):
        point_maze_physics.step(states, np.zeros((1, 2)))
