"""PushT against what the public code's own environment did, see tests/fixtures/README.md."""

import numpy as np
import pytest

from quantwm.envs import PushT
from quantwm.protocols import Episodes
from simulator_support import angle_between, load, off_pixels

SHAPES = ("T", "small_tee", "L", "Z", "square", "I", "+")


@pytest.fixture(scope="module")
def recorded():
    return load("pusht")


def simulate(task, starts, actions):
    seeds = np.zeros(len(starts), np.int64)
    simulation = task.start(Episodes(seeds, starts, starts, {}))
    first = simulation.states.copy()
    visited = simulation.step(np.arange(len(starts)), actions)
    return np.concatenate([first[:, None], visited], axis=1)


def test_every_shape_of_the_public_code_is_recorded(recorded):
    assert tuple(recorded["shapes"]) == SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_states_are_those_of_the_public_environment(recorded, shape):
    """Recorded in float32, hence the tolerance: 512 pixels have a spacing of 6e-5 there."""
    theirs = recorded[f"{shape}/state"]
    ours = simulate(PushT(shape=shape), recorded[f"{shape}/start"], recorded[f"{shape}/action"])
    places = [0, 1, 2, 3, 5, 6]
    np.testing.assert_allclose(ours[..., places], theirs[..., places], rtol=2e-7, atol=5e-5)
    assert angle_between(ours[..., 4], theirs[..., 4]).max() < 1e-6
    pushed = np.linalg.norm(theirs[:, -1, 2:4] - theirs[:, 0, 2:4], axis=-1)
    assert np.median(pushed) > 30, "the recording is about contacts"


@pytest.mark.parametrize("shape", SHAPES)
def test_frames_look_like_those_of_the_public_environment(recorded, shape):
    task, theirs = PushT(shape=shape), recorded[f"{shape}/frame"]
    starts = recorded[f"{shape}/start"][: len(theirs)]
    states = task.start(Episodes(np.zeros(len(starts)), starts, starts, {})).states
    ours = task.observe(states[:, None], {})["visual"][:, 0]
    shifted = np.roll(ours, 2, axis=2)
    assert off_pixels(ours, theirs) < 0.006
    assert off_pixels(shifted, theirs) > 4 * off_pixels(ours, theirs), "two pixels off is seen"


def test_random_starts_and_goals_are_those_of_the_public_code(recorded):
    episodes = PushT(goal_source="random_state").episodes(recorded["random/seed"].tolist())
    ours = np.stack([episodes.start, episodes.goal], axis=1)
    np.testing.assert_array_equal(ours, recorded["random/state"])


def test_success_is_the_public_rule_but_for_angles_that_it_does_not_wrap(recorded):
    goal, state = recorded["success/goal"], recorded["success/state"]
    theirs = recorded["success/success"]
    ours = PushT().success(state, goal)
    wrapped = (goal[:, 4] >= 0) & (goal[:, 4] < 2 * np.pi)
    np.testing.assert_array_equal(ours[wrapped], theirs[wrapped])
    apart = angle_between(state[:, 4], goal[:, 4])
    near = np.linalg.norm((state - goal)[:, :4], axis=1) < 20
    np.testing.assert_array_equal(ours, near & (apart < np.pi / 9))
    missed = theirs & (apart > np.pi / 9)
    assert missed.any(), "the public rule passes some that are far off; ours does not"
    assert not ours[missed].any()
