"""PushT's physics: a block on a table, pushed by a kinematic disc under PD control.

The geometry, masses and controller are those of DINO-WM's public code
(github.com/gaoyuezhou/dino_wm, `env/pusht/pusht_env.py`), on the same engine, pymunk. What it does
is kept where it looks like an oversight, because the dynamics follow from it: the moment of
inertia of "T" and "+" counts their first part once for every part, the T is always built at scale
30 and the other shapes at 40, and friction is set on bodies, so that it never reaches the shapes.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from quantwm.errors import MissingExtraError
from quantwm.protocols import FloatArray

WINDOW = 512
AGENT_RADIUS = 15
WALL_RADIUS = 2
WALL_LOW, WALL_HIGH = 5, 506
SIMULATION_HZ, CONTROL_HZ = 100, 10
POSITION_GAIN, VELOCITY_GAIN = 100, 20
ACTION_SCALE = 100.0
STATE_DIM = 7
"""Agent x, y; block x, y, angle; agent velocity x, y. Window pixels, radians, pixels a second."""

Polygon: TypeAlias = tuple[tuple[float, float], ...]


def _box(left: float, right: float, low: float, high: float, scale: float) -> Polygon:
    corners = ((left, high), (right, high), (right, low), (left, low))
    return tuple((x * scale, y * scale) for x, y in corners)


@dataclass(frozen=True)
class Block:
    """A block's shape.

    Attributes:
        parts: convex polygons in its own coordinates, window pixels.
        moment_of: the parts whose moments of inertia are added up.
    """

    parts: tuple[Polygon, ...]
    moment_of: tuple[int, ...]


BLOCKS = {
    "T": Block((_box(-2, 2, 0, 1, 30), _box(-0.5, 0.5, 1, 4, 30)), (0, 0)),
    "small_tee": Block((_box(-1.5, 1.5, 0, 1, 40), _box(-0.5, 0.5, 1, 2, 40)), (0, 1)),
    "L": Block((_box(0, 1, 0, 2, 40), _box(0, 2, -1, 0, 40)), (0, 1)),
    "Z": Block((_box(0, 2, 0, 1, 40), _box(-1, 1, -1, 0, 40)), (0, 1)),
    "square": Block((_box(-1, 1, -1, 1, 40),), (0,)),
    "I": Block((_box(-0.5, 0.5, -2, 2, 40),), (0,)),
    "+": Block(
        (
            _box(-1.5, 1.5, -0.5, 0.5, 40),
            _box(-0.5, 0.5, 0.5, 1.5, 40),
            _box(-0.5, 0.5, -1.5, -0.5, 40),
        ),
        (0, 0, 0),
    ),
}


class PushTWorld:
    """One running world.

    Args:
        shape: of the block, one of `BLOCKS`.
        state: (7,) where to start.
        settle: run one physics step first, as the public code does when it sets a state: the
            agent then moves on by 10 ms of its velocity, and bodies that overlap part.

    Raises:
        MissingExtraError: pymunk is not installed.
    """

    def __init__(self, shape: str, state: FloatArray, *, settle: bool) -> None:
        pymunk = _pymunk()
        self._space = pymunk.Space()
        # Velocities do not survive a physics step: a block moves only while it is pushed.
        self._space.damping = 0
        low, high = WALL_LOW, WALL_HIGH
        ends = [
            ((low, high), (low, low)),
            ((low, low), (high, low)),
            ((high, low), (high, high)),
            ((low, high), (high, high)),
        ]
        static = self._space.static_body
        self._space.add(*(pymunk.Segment(static, a, b, WALL_RADIUS) for a, b in ends))
        self._agent = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
        self._space.add(self._agent, pymunk.Circle(self._agent, AGENT_RADIUS))
        self._block = _add_block(pymunk, self._space, BLOCKS[shape])
        values = [float(value) for value in state]
        self._agent.velocity = values[5], values[6]
        self._agent.position = values[0], values[1]
        # A body turns about its centre of mass, which moves its origin: the angle comes first.
        self._block.angle = values[4]
        self._block.position = values[2], values[3]
        if settle:
            self._space.step(1 / SIMULATION_HZ)

    @property
    def state(self) -> FloatArray:
        """(7,), the angle in [0, 2π)."""
        agent, block = self._agent, self._block
        angle = block.angle % (2 * np.pi)
        return np.array([*agent.position, *block.position, angle, *agent.velocity], np.float64)

    def step(self, action: Sequence[float]) -> FloatArray:
        """A tenth of a second towards `action` · 100 pixels from where the agent is; the state."""
        agent, dt = self._agent, 1 / SIMULATION_HZ
        x, y = agent.position
        target_x, target_y = x + action[0] * ACTION_SCALE, y + action[1] * ACTION_SCALE
        for _ in range(SIMULATION_HZ // CONTROL_HZ):
            x, y = agent.position
            vx, vy = agent.velocity
            ax = POSITION_GAIN * (target_x - x) + VELOCITY_GAIN * (0 - vx)
            ay = POSITION_GAIN * (target_y - y) + VELOCITY_GAIN * (0 - vy)
            agent.velocity = vx + ax * dt, vy + ay * dt
            self._space.step(dt)
        return self.state


def _add_block(pymunk: Any, space: Any, block: Block) -> Any:
    mass = 1
    moment = sum(pymunk.moment_for_poly(mass, block.parts[i]) for i in block.moment_of)
    body = pymunk.Body(mass, moment)
    polygons = [pymunk.Poly(body, part) for part in block.parts]
    centres = [polygon.center_of_gravity for polygon in polygons]
    body.center_of_gravity = (
        sum(c[0] for c in centres) / len(centres),
        sum(c[1] for c in centres) / len(centres),
    )
    space.add(body, *polygons)
    return body


def _pymunk() -> Any:
    try:
        return importlib.import_module("pymunk")
    except ImportError as error:
        raise MissingExtraError("the PushT task", "pymunk", "tasks") from error
