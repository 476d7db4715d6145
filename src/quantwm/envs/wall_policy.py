"""Scripted behaviour that covers Wall: both rooms, the walls, and above all the door.

Three policies share the trajectories:

* "drift" (40%): DINO-WM's own data policy, a direction that wanders a little each step (von
  Mises, concentration 5) and steps of truncated-normal length (mean 1, deviation 0.4, 0.2 to 1.8).
* "door" (35%): drift that is steered, through a point in the door opening, from one room into the
  other. Random motion alone crosses a nine-pixel door too rarely to teach it.
* "planner" (25%): Gaussian actions correlated in time, of many correlation lengths and scales:
  what a sampling planner proposes, pushes into walls and corners included.
"""

from typing import TYPE_CHECKING

import numpy as np

from quantwm.envs.random_actions import correlated_actions
from quantwm.protocols import FloatArray
from quantwm.seeds import keyed_generator

if TYPE_CHECKING:
    from quantwm.envs.wall import Wall

POLICY = "wall-scripted-1"
_STREAM = 2
_ACTION_SCALE = 2.0


def scripted_start(
    generator: np.random.Generator, policy: str, wall_x: int, door_y: int
) -> FloatArray:
    """A free position (2,): half of the "door" starts are near the door, all others anywhere."""
    while True:
        if policy == "door" and generator.random() < 0.5:
            point = np.array([wall_x, door_y]) + generator.uniform(-14, 14, 2)
        else:
            point = generator.uniform(4.3, 59.7, 2)
        inside_board = bool(((point > 4.3) & (point < 59.7)).all())
        in_wall = abs(point[0] - wall_x) <= 3.3 and abs(point[1] - door_y) >= 3.7
        if inside_board and not in_wall:
            return point


def scripted(task: "Wall", seeds: list[int], steps: int) -> tuple[FloatArray, FloatArray]:
    """Trajectories of the scripted policies.

    Returns:
        states (B, steps + 1, 2) and raw actions (B, steps, 2), rounded to float32; trajectory i
        depends on `seeds[i]` alone.
    """
    layout = task.sample_layout(seeds)
    generators = [keyed_generator(seed, _STREAM) for seed in seeds]
    kinds = [g.choice(["drift", "door", "planner"], p=[0.4, 0.35, 0.25]) for g in generators]
    start = np.stack(
        [
            scripted_start(g, kind, int(x), int(y))
            for g, kind, x, y in zip(
                generators, kinds, layout["wall_x"], layout["door_y"], strict=True
            )
        ]
    )
    actions = np.empty((len(seeds), steps, 2))
    for i, (generator, kind) in enumerate(zip(generators, kinds, strict=True)):
        if kind == "planner":
            noise = correlated_actions(generator, steps, 2)
            actions[i] = noise * generator.uniform(0.3, 1.6)
        else:
            door = np.array([layout["wall_x"][i], layout["door_y"][i]], np.float64)
            through = door if kind == "door" else None
            actions[i] = _drift(generator, steps, start[i], through)
    # Stored as float32, so executed as float32: the states then follow from what is stored.
    actions = actions.astype(np.float32).astype(np.float64)
    visited = task.rollout(start, layout, actions)
    return np.concatenate([start[:, None], visited], axis=1), actions


def _drift(
    generator: np.random.Generator, steps: int, start: FloatArray, through: FloatArray | None
) -> FloatArray:
    """Wandering actions (steps, 2), steered through the door at `through` and on to a point
    beyond it. The walk is planned without collisions; a drifting dot may scrape along the wall,
    which is data too."""
    waypoints = []
    if through is not None:
        side = np.sign(through[0] - start[0]) or 1.0
        opening = through + np.array([0.0, generator.uniform(-3, 3)])
        beyond = np.array([through[0] + side * generator.uniform(6, 20), generator.uniform(10, 54)])
        waypoints = [
            opening - np.array([side * 3.5, 0]),
            opening + np.array([side * 3.5, 0]),
            beyond,
        ]
    heading = generator.uniform(0, 2 * np.pi)
    position = start.copy()
    actions = np.empty((steps, 2))
    for t in range(steps):
        if waypoints:
            offset = waypoints[0] - position
            if np.linalg.norm(offset) < 1.5:
                waypoints.pop(0)
            heading = np.arctan2(offset[1], offset[0])
        heading += generator.vonmises(0.0, 5.0 if not waypoints else 20.0)
        length = 0.0
        while not 0.2 <= length <= 1.8:
            length = generator.normal(1.0, 0.4)
        actions[t] = length * np.array([np.cos(heading), np.sin(heading)])
        position = position + _ACTION_SCALE * actions[t]
    return actions
