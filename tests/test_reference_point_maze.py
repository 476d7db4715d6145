"""PointMaze against what the public code's own environment did, see tests/fixtures/README.md."""

import os
import subprocess
import sys

import numpy as np
import pytest

from quantwm.envs import PointMaze
from simulator_support import load, off_pixels


@pytest.fixture(scope="module")
def recorded():
    return load("point_maze")


def test_states_are_those_of_the_public_environment(recorded):
    """Recorded in float32. The public code's solver starts from its last solution, ours from zero:
    that makes no difference that float32 shows."""
    start, actions, theirs = recorded["start"], recorded["action"], recorded["state"]
    ours = PointMaze().rollout(start, {}, actions)
    np.testing.assert_allclose(ours, theirs[:, 1:], rtol=2e-7, atol=2e-7)
    assert (np.abs(start[:, 2:]) > 5).any(), "velocities beyond the clip are among them"
    assert (np.abs(actions) > 1).any(), "so are actions beyond the motors' range"
    change = np.abs(np.diff(theirs[..., 2:], axis=1)).max(axis=-1)
    hits = (change > 2).any(axis=1)  # the motors change a velocity by 1.2 in a step
    assert hits.sum() > 10, "and walls that are met"


def test_frames_look_like_those_of_the_public_environment(recorded):
    """Its frames after a step show the position before the last 10 ms of it."""
    state = recorded["frame_state"].astype(np.float64)
    state[:, :2] -= 0.01 * state[:, 2:]
    ours = PointMaze().observe(state[:, None], {})["visual"][:, 0]
    assert off_pixels(ours, recorded["frame"]) < 0.012
    state[:, 0] += 0.15  # four pixels
    moved = PointMaze().observe(state[:, None], {})["visual"][:, 0]
    ball = np.array([off_pixels(a, b) for a, b in zip(moved, recorded["frame"], strict=True)])
    still = np.array([off_pixels(a, b) for a, b in zip(ours, recorded["frame"], strict=True)])
    assert (ball > still + 0.0008).all(), "a ball a little off is seen"


def test_random_starts_and_goals_are_those_of_the_public_code(recorded):
    episodes = PointMaze().episodes(recorded["random/seed"].tolist())
    ours = np.stack([episodes.start, episodes.goal], axis=1)
    np.testing.assert_array_equal(ours, recorded["random/state"])


def test_success_is_the_public_rule(recorded):
    """Exactly on the edge the last bit of a square root decides, which is left to it."""
    state, goal = recorded["success/state"], recorded["success/goal"]
    ours, away = PointMaze().success(state, goal), PointMaze().distance(state, goal)
    decided = np.abs(away - 0.5) > 1e-12
    assert decided.sum() >= 45
    np.testing.assert_array_equal(ours[decided], recorded["success/success"][decided])
    assert 0.2 < ours.mean() < 0.8


RENDER = """
import numpy as np
from quantwm.envs import PointMaze
from quantwm.errors import QuantWMError
state = np.array([[[1.0, 1.5, 0.0, 0.0]]])
drawn = PointMaze().observe(state, {})["visual"].astype(int)
try:
    rendered = PointMaze(renderer="mujoco").observe(state, {})["visual"]
except QuantWMError as error:
    print("refused:", error)
else:
    print("rendered", (np.abs(drawn - rendered).max(-1) > 8).mean())
"""


@pytest.mark.parametrize("backend", ["osmesa", "egl", "nonsense"])
def test_mujocos_renderer_draws_the_same_or_says_why_it_cannot(backend):
    """In a process of its own: MuJoCo chooses its GL library when it is imported."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    command = [sys.executable, "-W", "ignore", "-c", RENDER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    word, _, rest = done.stdout.strip().partition(" ")
    if backend == "nonsense" or word == "refused:":
        assert "MUJOCO_GL" in done.stdout
        assert "leave the task's renderer at 'drawn'" in done.stdout
    else:
        assert float(rest) < 0.012
