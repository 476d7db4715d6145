"""Scripted behaviour that covers PointMaze: all of the maze, its walls, all velocities.

Two policies share the trajectories:

* "waypoints" (50%): a proportional-derivative controller drives the ball to random places, one
  after the other, along the corridors; its actions carry correlated noise.
* "planner" (50%): Gaussian actions correlated in time, of many correlation lengths and scales,
  beyond the ±1 at which the motors saturate: what a sampling planner proposes.

Starts are drawn as those of episodes, velocities of up to ±5.2 included.
"""

from typing import TYPE_CHECKING

import numpy as np

from quantwm.envs.point_maze_physics import step
from quantwm.envs.random_actions import correlated_actions
from quantwm.protocols import FloatArray
from quantwm.seeds import keyed_generator

if TYPE_CHECKING:
    from quantwm.envs.point_maze import PointMaze

POLICY = "point-maze-scripted-1"
_STREAM = 2
_CORNERS = np.array([(0.8, 0.8), (0.8, 2.8), (2.8, 2.8), (2.8, 0.8)])
"""The middle of the corridors from one end to the other."""
_HALF_WIDTH = 0.35
_ARRIVED = 0.25
_GAIN, _DAMPING = 10.0, 1.0


def scripted(task: "PointMaze", seeds: list[int], steps: int) -> tuple[FloatArray, FloatArray]:
    """Trajectories of the scripted policies.

    Returns:
        states (B, steps + 1, 4) and raw actions (B, steps, 2), rounded to float32; trajectory i
        depends on `seeds[i]` alone.
    """
    generators = [keyed_generator(seed, _STREAM) for seed in seeds]
    states = [np.stack([task.random_state(seed)[0] for seed in seeds])]
    noise = np.stack([correlated_actions(g, steps, 2) for g in generators])
    drivers = [_Driver(g) if g.random() < 0.5 else None for g in generators]
    scale = [
        g.uniform(0.1, 0.4) if d else g.uniform(0.3, 1.3)
        for g, d in zip(generators, drivers, strict=True)
    ]
    actions = []
    for t in range(steps):
        action = np.array(scale)[:, None] * noise[:, t]
        for i, driver in enumerate(drivers):
            if driver is not None:
                action[i] += driver.action(states[-1][i])
        # Stored as float32, so executed as float32: the states then follow from what is stored.
        actions.append(action.astype(np.float32).astype(np.float64))
        states.append(step(states[-1], actions[-1]))
    return np.stack(states, axis=1), np.stack(actions, axis=1)


class _Driver:
    """Drives the ball from place to place."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._way: list[FloatArray] = []

    def action(self, state: FloatArray) -> FloatArray:
        """(2,) within ±1."""
        if not self._way:
            self._way = self._plan(state[:2])
        action = _GAIN * (self._way[0] - state[:2]) - _DAMPING * state[2:]
        if np.linalg.norm(self._way[0] - state[:2]) < _ARRIVED:
            self._way.pop(0)
        return np.asarray(np.clip(action, -1, 1))

    def _plan(self, position: FloatArray) -> list[FloatArray]:
        """The corners on the way to a random place, and that place."""
        segment, along = int(self._generator.integers(3)), self._generator.random()
        place = (1 - along) * _CORNERS[segment] + along * _CORNERS[segment + 1]
        place = place + self._generator.uniform(-_HALF_WIDTH, _HALF_WIDTH, 2)
        here = _segment(position)
        if segment >= here:
            corners = list(_CORNERS[here + 1 : segment + 1])
        else:
            corners = list(_CORNERS[segment + 1 : here + 1][::-1])
        return [*corners, place]


def _segment(position: FloatArray) -> int:
    """The corridor that a position is in: 0, 1 or 2."""
    if position[1] > 2.3:
        return 1
    return 0 if position[0] < 1.8 else 2
