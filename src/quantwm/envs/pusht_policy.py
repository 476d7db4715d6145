"""Scripted behaviour that covers PushT: contacts above all, from every side of the block.

Two policies share the trajectories:

* "push" (70%): go to a point beside the block, push against its outline there at an angle and a
  speed, some steps long; then choose the next push. Going there means going around the block, and
  where that fails, the disc bumps into it: recovery is data too. Actions carry correlated noise.
* "planner" (30%): Gaussian actions correlated in time, of many correlation lengths and scales,
  beside the block: what a sampling planner proposes.

Most trajectories begin beside the block, so that contacts come soon. Targets are kept on the
table: the disc is not stopped by the walls.
"""

from dataclasses import dataclass

import numpy as np

from quantwm.envs.pusht_physics import ACTION_SCALE, AGENT_RADIUS, BLOCKS, Polygon, PushTWorld
from quantwm.envs.random_actions import correlated_actions
from quantwm.protocols import FloatArray
from quantwm.seeds import keyed_generator

POLICY = "pusht-scripted-1"
_STREAM = 2
_REACH = 0.305
"""Pixels that the disc advances in a step, for each that its target is ahead of it."""
_LOW, _HIGH = 20.0, 492.0


def scripted(shape: str, seeds: list[int], steps: int) -> tuple[FloatArray, FloatArray]:
    """Trajectories of the scripted policies.

    Returns:
        states (B, steps + 1, 7) and raw actions (B, steps, 2), rounded to float32; trajectory i
        depends on `seeds[i]` alone.
    """
    runs = [_run(shape, keyed_generator(seed, _STREAM), steps) for seed in seeds]
    return np.stack([states for states, _ in runs]), np.stack([actions for _, actions in runs])


def _run(shape: str, generator: np.random.Generator, steps: int) -> tuple[FloatArray, FloatArray]:
    pose = np.array([*generator.uniform(110, 402, 2), generator.uniform(0, 2 * np.pi)])
    push = Push.draw(generator, shape)
    near = generator.random() < 0.8
    agent = push.beside(pose) if near else generator.uniform(40, 472, 2)
    agent = np.clip(agent + generator.normal(0, 8, 2), _LOW, _HIGH)
    world = PushTWorld(shape, np.array([*agent, *pose, 0, 0]), settle=True)
    noise = correlated_actions(generator, steps, 2)
    pushing = generator.random() < 0.7
    scale = generator.uniform(0.02, 0.1) if pushing else generator.uniform(0.1, 0.4)
    states, actions = [world.state], []
    for t in range(steps):
        aim = np.zeros(2)
        if pushing:
            if push.done:
                push = Push.draw(generator, shape)
            aim = push.action(states[-1])
        target = states[-1][:2] + ACTION_SCALE * (aim + scale * noise[t])
        action = (np.clip(target, _LOW, _HIGH) - states[-1][:2]) / ACTION_SCALE
        # Stored as float32, so executed as float32: the states then follow from what is stored.
        action = action.astype(np.float32).astype(np.float64)
        actions.append(action)
        states.append(world.step(action))
    return np.stack(states), np.stack(actions)


@dataclass
class Push:
    """One push, in the block's own frame.

    Attributes:
        contact: (2,) point on the block's outline.
        outward: (2,) unit normal there.
        heading: (2,) unit direction to push in.
        speed: length of the actions.
        standoff: pixels between the block and the disc where the push begins.
        centre: (2,) what the block is gone around.
        radius: of the circle about `centre` that holds the block and the disc.
        approach_left, push_left: steps.
    """

    contact: FloatArray
    outward: FloatArray
    heading: FloatArray
    speed: float
    standoff: float
    centre: FloatArray
    radius: float
    approach_left: int
    push_left: int

    @classmethod
    def draw(cls, generator: np.random.Generator, shape: str) -> "Push":
        """A push somewhere on the outline, mostly into the block."""
        contact, outward = _outline_point(generator, shape)
        turn = generator.normal(0, 0.35)
        corners = np.array([corner for part in BLOCKS[shape].parts for corner in part])
        centre = (corners.min(0) + corners.max(0)) / 2
        reach = float(np.linalg.norm(corners - centre, axis=1).max())
        return cls(
            contact=contact,
            outward=outward,
            heading=_rotation(turn) @ -outward,
            speed=float(generator.uniform(0.12, 0.5)),
            standoff=float(generator.uniform(3, 20)),
            centre=centre,
            radius=reach + AGENT_RADIUS + 5,
            approach_left=18,
            push_left=int(generator.integers(4, 16)),
        )

    @property
    def done(self) -> bool:
        """Whether the push is over."""
        return self.push_left == 0

    def beside(self, pose: FloatArray) -> FloatArray:
        """(2,) where the disc begins to push a block at `pose`."""
        local = self.contact + self.outward * (AGENT_RADIUS + self.standoff)
        return np.asarray(pose[:2] + _rotation(pose[2]) @ local)

    def action(self, state: FloatArray) -> FloatArray:
        """(2,) the next action: towards the beginning of the push, then the push itself."""
        agent, pose = state[:2], state[2:5]
        begin = self.beside(pose)
        if self.approach_left > 0 and np.linalg.norm(begin - agent) > 12:
            self.approach_left -= 1
            offset = self._around(agent, pose, begin) - agent
            distance = float(np.linalg.norm(offset))
            length = min(max(self.speed, 0.35), distance / (_REACH * ACTION_SCALE))
            return np.asarray(offset / max(distance, 1e-9) * length)
        self.approach_left = 0
        self.push_left -= 1
        return np.asarray(_rotation(pose[2]) @ self.heading * self.speed)

    def _around(self, agent: FloatArray, pose: FloatArray, goal: FloatArray) -> FloatArray:
        """The goal, or a point on the circle around the block where that is in the way."""
        centre = pose[:2] + _rotation(pose[2]) @ self.centre
        path = goal - agent
        along = np.clip((centre - agent) @ path / max(float(path @ path), 1e-9), 0, 1)
        nearest = agent + along * path
        if np.linalg.norm(nearest - centre) > 0.6 * self.radius or np.linalg.norm(path) < 50:
            return goal
        bearing = np.arctan2(*(agent - centre)[::-1])
        wanted = np.arctan2(*(goal - centre)[::-1])
        turn = (wanted - bearing + np.pi) % (2 * np.pi) - np.pi
        ahead = bearing + np.clip(turn, -0.8, 0.8)
        return np.asarray(centre + self.radius * np.array([np.cos(ahead), np.sin(ahead)]))


def _outline_point(generator: np.random.Generator, shape: str) -> tuple[FloatArray, FloatArray]:
    """A point of the outline, uniform along it, and its outward normal."""
    parts = BLOCKS[shape].parts
    while True:
        index = int(generator.integers(len(parts)))
        corners = np.array(parts[index])
        edges = np.roll(corners, -1, axis=0) - corners
        lengths = np.linalg.norm(edges, axis=1)
        edge = int(generator.choice(len(edges), p=lengths / lengths.sum()))
        point = corners[edge] + generator.random() * edges[edge]
        normal = np.array([edges[edge][1], -edges[edge][0]]) / lengths[edge]
        if normal @ (point - corners.mean(0)) < 0:
            normal = -normal
        outside = point + normal
        if not any(_inside(other, outside) for other in parts):
            return point, normal


def _inside(part: Polygon, point: FloatArray) -> bool:
    """Whether an upright rectangle, as all parts are, holds a point."""
    corners = np.array(part)
    return bool(((point >= corners.min(0)) & (point <= corners.max(0))).all())


def _rotation(angle: float) -> FloatArray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])
