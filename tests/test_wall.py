"""Wall beyond its recorded fixtures: layouts, independence, bad input, rendering."""

from dataclasses import replace

import numpy as np
import pytest

from quantwm.envs import Wall
from quantwm.errors import UsageError
from quantwm.seeds import episode_seeds

SEEDS = episode_seeds("tuning", 3, 40)


def test_an_episode_depends_on_its_own_seed_alone():
    whole, part = Wall().episodes(SEEDS), Wall().episodes(SEEDS[7:9])
    np.testing.assert_array_equal(whole.start[7:9], part.start)
    np.testing.assert_array_equal(whole.goal[7:9], part.goal)


def test_starts_and_goals_are_in_opposite_rooms():
    episodes = Wall(wall_x=(20, 44)).episodes(SEEDS)
    wall = episodes.layout["wall_x"]
    sides = np.sign(episodes.start[:, 0] - wall), np.sign(episodes.goal[:, 0] - wall)
    np.testing.assert_array_equal(sides[0], -sides[1])
    assert set(sides[0]) == {-1.0, 1.0}


def test_layout_ranges_are_drawn_per_episode_and_within_bounds():
    episodes = Wall(wall_x=(22, 40), door_y=(10, 54)).episodes(SEEDS)
    assert len(set(episodes.layout["wall_x"])) > 5
    assert episodes.layout["wall_x"].min() >= 22
    assert episodes.layout["wall_x"].max() <= 40
    assert len(set(episodes.layout["door_y"])) > 10


@pytest.mark.parametrize(
    "layout",
    [{"door_y": 9}, {"door_y": 55}, {"wall_x": 3.5}, {"wall_x": (30, 25)}, {"wall_x": "a"}],
)
def test_impossible_layouts_are_refused(layout):
    with pytest.raises(UsageError, match="must be an integer from"):
        Wall(**layout)


def test_a_door_lets_through_and_a_wall_does_not():
    layout = {"wall_x": np.array([32, 32]), "door_y": np.array([30, 15])}
    start = np.array([[26.0, 30.2], [26.0, 30.2]])
    ahead = np.tile([1.0, 0.001], (2, 10, 1))
    visited = Wall().rollout(start, layout, ahead)
    assert visited[0, -1, 0] > 40
    assert visited[1, :, 0].max() < 29


def test_the_door_is_drawn_where_it_is():
    layout = {"wall_x": np.array([32]), "door_y": np.array([20])}
    board = Wall().board(np.array([[10.0, 50.0]]), layout)[0]
    assert (board[16:25, 32] == 255).all()
    assert (board[15, 29:36] == 0).all()
    assert (board[25, 29:36] == 0).all()
    assert board[50, 10].tolist() == [255, 0, 0]
    assert (board[10, 28] == 255).all()


def test_vectorised_steps_equal_single_ones():
    episodes = Wall(wall_x=(22, 40), door_y=(10, 54)).episodes(SEEDS)
    actions = np.random.default_rng(0).normal(size=(len(SEEDS), 30, 2)) * 1.5
    whole = Wall().rollout(episodes.start, episodes.layout, actions)
    for i in range(0, len(SEEDS), 7):
        one = episodes.select(np.array([i]))
        np.testing.assert_array_equal(
            Wall().rollout(one.start, one.layout, actions[i : i + 1])[0], whole[i]
        )


def test_a_simulation_moves_only_the_episodes_it_is_told_to():
    task = Wall()
    episodes = task.episodes(SEEDS[:3])
    simulation = task.start(episodes)
    simulation.step(np.array([1]), np.full((1, 5, 2), 0.1))
    np.testing.assert_array_equal(simulation.states[[0, 2]], episodes.start[[0, 2]])
    assert (simulation.states[1] != episodes.start[1]).all()
    np.testing.assert_array_equal(episodes.start, Wall().episodes(SEEDS[:3]).start)


@pytest.mark.parametrize(
    ("actions", "message"),
    [(np.zeros((1, 3)), "width 2, got 3"), (np.array([[np.nan, 0.0]]), "must be finite")],
)
def test_bad_actions_are_refused(actions, message):
    episodes = Wall().episodes(SEEDS[:1])
    with pytest.raises(UsageError, match=message):
        Wall().step(episodes.start, episodes.layout, actions)


def test_states_of_another_width_are_refused():
    episodes = Wall().episodes(SEEDS[:1])
    wide = np.zeros((1, 3))
    for call in (
        lambda: Wall().step(wide, episodes.layout, np.zeros((1, 2))),
        lambda: Wall().rollout(wide, episodes.layout, np.zeros((1, 5, 2))),
        lambda: Wall().observe(wide[:, None], episodes.layout),
    ):
        with pytest.raises(UsageError, match="Wall states have width 2, got 3"):
            call()


@pytest.mark.parametrize("place", [(700.0, -40.0), (32.0, 50.0)], ids=["off", "in the wall"])
def test_starts_and_goals_off_the_board_or_in_the_wall_are_refused(place):
    episodes = Wall().episodes(SEEDS[:2])
    states = episodes.start.copy()
    states[1] = place
    for wrong, message in ({"start": states}, "starts"), ({"goal": states}, "has its goal"):
        with pytest.raises(UsageError, match=f"outside of the wall, and episode 1 {message} at"):
            Wall().start(replace(episodes, **wrong))


def test_frames_and_proprio_have_the_declared_shape():
    episodes = Wall().episodes(SEEDS[:2])
    observation = Wall().observe(np.stack([episodes.start, episodes.goal], axis=1), episodes.layout)
    assert observation["visual"].shape == (2, 2, 224, 224, 3)
    assert observation["visual"].dtype == np.uint8
    np.testing.assert_allclose(observation["proprio"][:, 0], episodes.start, rtol=1e-6)


def test_a_position_that_is_not_finite_is_drawn_without_a_dot_and_is_no_success():
    layout = {"wall_x": np.array([32]), "door_y": np.array([30])}
    lost = np.array([[np.nan, 20.0]])
    assert not Wall().success(lost, np.array([[10.0, 20.0]])).any()
    board = Wall().board(lost, layout)[0]
    assert set(board[..., 1].ravel()) == {0, 255}
