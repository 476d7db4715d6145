"""PushT beyond its recorded fixtures: goals, determinism, distances, bad input."""

import multiprocessing

import numpy as np
import pytest

from quantwm.envs import PushT, get_task
from quantwm.errors import UsageError
from quantwm.protocols import Episodes
from quantwm.seeds import episode_seeds

SEEDS = episode_seeds("tuning", 3, 12)


def actions(count, seed=0):
    return np.random.default_rng(seed).normal(0, 0.3, (count, 25, 2))


def simulate(seeds):
    """States (B, 26, 7) of these episodes under the same actions."""
    task = PushT()
    simulation = task.start(task.episodes(seeds))
    first = simulation.states.copy()
    visited = simulation.step(np.arange(len(seeds)), actions(len(seeds)))
    return np.concatenate([first[:, None], visited], axis=1)


def test_an_episode_depends_on_its_own_seed_alone():
    whole, part = PushT().episodes(SEEDS), PushT().episodes(SEEDS[7:9])
    np.testing.assert_array_equal(whole.start[7:9], part.start)
    np.testing.assert_array_equal(whole.goal[7:9], part.goal)


def test_the_same_seeds_and_actions_give_the_same_states_in_parallel_processes():
    here = simulate(SEEDS[:4])
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for there in pool.map(simulate, [SEEDS[:4]] * 2):
            np.testing.assert_array_equal(here, there)
    assert np.abs(here[:, -1, 2:4] - here[:, 0, 2:4]).max() > 5, "a block was pushed"


def test_worlds_do_not_depend_on_those_beside_them():
    together = simulate(SEEDS)
    task = PushT()
    alone = task.start(task.episodes(SEEDS[5:6]))
    np.testing.assert_array_equal(
        alone.step(np.array([0]), actions(len(SEEDS))[5:6])[0], together[5, 1:]
    )


def test_one_step_after_another_is_the_same_as_all_at_once():
    task, moves = PushT(), actions(3)
    whole, pieces = (task.start(task.episodes(SEEDS[:3])) for _ in range(2))
    index = np.arange(3)
    at_once = whole.step(index, moves)
    by_one = [pieces.step(index, moves[:, t : t + 1])[:, 0] for t in range(25)]
    np.testing.assert_array_equal(at_once, np.stack(by_one, axis=1))


def test_a_goal_of_a_trajectory_can_be_reached_within_25_actions():
    """The trajectory's own actions, executed from the episode's start, end at the goal."""
    task = PushT()
    episodes = task.episodes(SEEDS)
    states, moves = task.scripted(SEEDS, task.trajectory_steps)
    for i, (start, goal) in enumerate(zip(episodes.start, episodes.goal, strict=True)):
        first = int(np.flatnonzero((states[i] == start).all(axis=1))[0])
        one = Episodes(episodes.seeds[i : i + 1], start[None], goal[None], {})
        reached = task.start(one).step(np.array([0]), moves[i : i + 1, first : first + 25])
        assert task.success(reached[0, -1], goal)
        np.testing.assert_allclose(reached[0, -1], goal, atol=1e-9)


def test_every_episode_is_on_the_table():
    """Their trajectories push the block off it: at the start and the goal, or at the goal."""
    task = PushT()
    off = [episode_seeds("tuning", 0, 1, first=154)[0], episode_seeds("train", 0, 1, first=50)[0]]
    for seed in off:
        pair = np.stack(task._of_trajectory(seed))[:, :4]
        assert ((pair < -15) | (pair > 527)).any()
    episodes = task.episodes(off)
    task.start(episodes)  # refuses what is off the table
    assert not np.array_equal(episodes.start[0], episodes.goal[0])


def test_goals_ask_for_the_block_to_be_moved():
    episodes = PushT().episodes(episode_seeds("tuning", 0, 60))
    moved = np.linalg.norm((episodes.goal - episodes.start)[:, 2:4], axis=1)
    assert (moved > 20).mean() > 0.5
    assert PushT().success(episodes.start, episodes.goal).mean() < 0.15
    assert len(np.unique(episodes.goal, axis=0)) == 60


def test_a_rollout_from_a_state_is_near_the_running_simulation():
    """The state leaves the block's velocity out, which costs a little, and no physics step runs
    before the first action."""
    task, moves = PushT(), actions(len(SEEDS), seed=1)
    simulation = task.start(task.episodes(SEEDS))
    simulation.step(np.arange(len(SEEDS)), actions(len(SEEDS)))
    begin = simulation.states.copy()
    rolled = task.rollout(begin, {}, moves)
    ran = simulation.step(np.arange(len(SEEDS)), moves)
    np.testing.assert_allclose(rolled[..., :2], ran[..., :2], atol=1e-9)
    assert np.median(np.linalg.norm((rolled - ran)[:, -1, 2:4], axis=-1)) < 2


def test_distance_weighs_an_angle_as_success_does_and_wraps_it():
    task = PushT()
    goal = np.array([100, 100, 200, 200, 0.1, 0, 0.0])
    turned = goal + np.array([0, 0, 0, 0, np.pi / 9, 0, 0])
    assert task.distance(turned, goal) == pytest.approx(20)
    assert task.distance(goal + np.array([0, 0, 0, 0, 2 * np.pi, 90, 90]), goal) == pytest.approx(0)
    assert task.distance(goal + np.array([3, 0, 4, 0, 0, 0, 0]), goal) == pytest.approx(5)
    other_side = goal.copy()
    other_side[4] = 2 * np.pi - 0.1
    assert task.success(other_side, goal)


def test_proprioception_is_the_agents_position_and_velocity():
    state = np.arange(7.0)[None, None]
    observation = PushT().observe(state, {})
    np.testing.assert_array_equal(observation["proprio"], [[[0, 1, 5, 6]]])
    assert observation["visual"].shape == (1, 1, 224, 224, 3)


def test_bad_input_is_refused():
    task = PushT()
    states = task.episodes(SEEDS[:2]).start
    with pytest.raises(UsageError, match="width 2, got 3"):
        task.rollout(states, {}, np.zeros((2, 5, 3)))
    with pytest.raises(UsageError, match="NaN"):
        task.start(task.episodes(SEEDS[:1])).step(np.array([0]), np.full((1, 5, 2), np.nan))
    with pytest.raises(UsageError, match="width 7, got 5"):
        task.rollout(states[:, :5], {}, np.zeros((2, 5, 2)))
    states[1, 2] = 700
    with pytest.raises(UsageError, match=r"episode 1 starts at .*700"):
        task.start(Episodes(np.arange(2), states, states, {}))
    free = task.episodes(SEEDS[:2]).start
    with pytest.raises(UsageError, match=r"episode 1 has its goal at .*700"):
        task.start(Episodes(np.arange(2), free, states, {}))
    with pytest.raises(UsageError, match="width 7, got 5"):
        task.observe(states[:, None, :5], {})
    states[1, 2] = np.nan
    with pytest.raises(UsageError, match="finite"):
        task.start(Episodes(np.arange(2), states, states, {}))
    with pytest.raises(UsageError, match="block shape 'Q'"):
        get_task("pusht", shape="Q")
    with pytest.raises(UsageError, match="did you mean 'random_state'"):
        get_task("pusht", goal_source="random")


def test_without_pymunk_the_error_names_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pymunk", None)
    with pytest.raises(Exception, match=r"pip install 'quantwm\[tasks\]'"):
        PushT().episodes(SEEDS[:1])


@pytest.mark.parametrize("shape", ["T", "small_tee", "L", "Z", "square", "I", "+"])
def test_the_scripted_policy_pushes_every_shape_and_stays_on_the_table(shape):
    states, moves = PushT(shape=shape).scripted(episode_seeds("train", 0, 16), 50)
    pushed = np.linalg.norm(states[:, -1, 2:4] - states[:, 0, 2:4], axis=1)
    assert (pushed > 10).mean() > 0.4
    assert states[..., :2].min() > 0
    assert states[..., :2].max() < 512
    np.testing.assert_array_equal(moves, moves.astype(np.float32))


def test_the_scripted_policy_pushes_from_every_side():
    """Contacts seen from the block, by the quarter of its outline they are in."""
    states, _ = PushT().scripted(episode_seeds("train", 1, 120), 50)
    moving = np.linalg.norm(np.diff(states[..., 2:4], axis=1), axis=-1) > 1
    offset = (states[:, 1:, :2] - states[:, 1:, 2:4])[moving]
    bearing = np.arctan2(offset[:, 1], offset[:, 0]) - states[:, 1:, 4][moving]
    shares = np.bincount(((bearing % (2 * np.pi)) // (np.pi / 2)).astype(int), minlength=4)
    assert (shares / shares.sum() > 0.1).all()
