"""DINO-WM's Wall task: a dot crosses a wall through a door on a 65-pixel board.

Dynamics, collision rules, rendering and start/goal sampling follow the public code of DINO-WM
(github.com/gaoyuezhou/dino_wm, `env/wall/`); recorded steps and frames of that code are the test
fixtures. Its collision "noise" is a fixed push-back, so a step is deterministic. Everything here
is vectorised over episodes, in float64 as the public code computes.

One deviation: observations are rounded to uint8 after the resize to 224 pixels (the public code
hands the float result on), so that a frame can be stored exactly.

One oddity is kept: a move that is exactly vertical into a border has no slope, and its position
becomes NaN, as in the public code. Planner noise never is exactly vertical.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from quantwm.checks import is_integer
from quantwm.envs.arrays import check_actions, check_episodes, check_width, within
from quantwm.envs.wall_policy import POLICY, scripted
from quantwm.errors import UsageError
from quantwm.protocols import BoolArray, Episodes, FloatArray, Layout, Observation
from quantwm.seeds import keyed_generator

BOARD = 65
BORDER = 5
WALL_WIDTH = 6
DOOR_HALF_HEIGHT = 4
DOT_STD = 1.7
ACTION_SCALE = 2.0
SUCCESS_DISTANCE = 4.5
FRAME = 224
_PADDING = 2 * DOT_STD
_BORDER_PADDING = BORDER - 1 + _PADDING
_LOW, _HIGH = BORDER - 1.0, float(BOARD - BORDER)
"""Coordinates of the border walls, the same in x and y."""
_LAYOUT_STREAM = 1

Position: TypeAlias = int | tuple[int, int]
"""A fixed coordinate, or an inclusive range that each episode draws from."""


@dataclass(frozen=True)
class Wall:
    """The Wall task.

    Attributes:
        wall_x: x of the wall's centre line, 20 to 44, or an inclusive range.
        door_y: y of the door's centre, 10 to 54, or an inclusive range.
    """

    wall_x: Position = 32
    door_y: Position = 30

    name = "wall"
    action_dim = 2
    proprio_dim = 2
    policy = POLICY
    trajectory_steps = 25

    def __post_init__(self) -> None:
        object.__setattr__(self, "wall_x", _checked_range("wall_x", self.wall_x, 20, 44))
        object.__setattr__(self, "door_y", _checked_range("door_y", self.door_y, 10, 54))

    def settings(self) -> dict[str, Any]:
        """Layout and version of the task, as JSON values."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"name": self.name, "version": 1, **fields}

    def episodes(self, seeds: Sequence[int]) -> Episodes:
        """Starts and goals in opposite rooms, as DINO-WM draws them from each seed."""
        layout = self.sample_layout(seeds)
        pairs = [
            self.random_state(seed, int(wall_x), int(door_y))
            for seed, wall_x, door_y in zip(seeds, layout["wall_x"], layout["door_y"], strict=True)
        ]
        start = np.stack([pair[0] for pair in pairs])
        goal = np.stack([pair[1] for pair in pairs])
        return Episodes(np.asarray(seeds, np.int64), start, goal, layout)

    def sample_layout(self, seeds: Sequence[int]) -> dict[str, npt.NDArray[np.int64]]:
        """Wall and door positions (B,); episode i depends on `seeds[i]` alone."""
        draws = [keyed_generator(seed, _LAYOUT_STREAM) for seed in seeds]
        return {
            "wall_x": np.array([_draw(g, self.wall_x) for g in draws], np.int64),
            "door_y": np.array([_draw(g, self.door_y) for g in draws], np.int64),
        }

    def scripted(self, seeds: list[int], steps: int) -> tuple[FloatArray, FloatArray]:
        """The scripted policies: states (B, steps + 1, 2) and raw actions (B, steps, 2)."""
        return scripted(self, seeds, steps)

    @staticmethod
    def random_state(seed: int, wall_x: int, door_y: int) -> tuple[FloatArray, FloatArray]:  # noqa: ARG004
        """A start and a goal on opposite sides of the wall, each (2,).

        The draw is the public code's, from `numpy.random.RandomState(seed)`; it does not look at
        the door.
        """
        generator = np.random.RandomState(seed)
        low, high = _BORDER_PADDING, BOARD - 1 - _BORDER_PADDING
        left = generator.uniform(low, wall_x - WALL_WIDTH // 2 - _PADDING)
        right = generator.uniform(wall_x + WALL_WIDTH // 2 + _PADDING, high)
        start_y = generator.uniform(low, high)
        goal_y = generator.uniform(low, high)
        if generator.uniform(0, 1) < 0.5:
            left, right = right, left
        return np.array([left, start_y]), np.array([right, goal_y])

    def start(self, episodes: Episodes) -> "WallSimulation":
        """A simulation at the episodes' start states.

        Raises:
            UsageError: a start or goal of another width, not finite, off the board or in the wall.
        """
        wall_x, door_y = (np.asarray(episodes.layout[name]) for name in ("wall_x", "door_y"))

        def is_free(states: FloatArray) -> BoolArray:
            x, y = states.T
            closed = (np.abs(x - wall_x) < WALL_WIDTH // 2) & (
                np.abs(y - door_y) > DOOR_HALF_HEIGHT
            )
            return np.asarray(within(states, _LOW, _HIGH) & ~closed)

        places = f"{_LOW:g} to {_HIGH:g} pixels outside of the wall"
        check_episodes("Wall", episodes, 2, is_free, places)
        return WallSimulation(self, episodes.start.copy(), episodes.layout)

    def rollout(self, states: FloatArray, layout: Layout, actions: FloatArray) -> FloatArray:
        """True dynamics: states (B, 2), raw actions (B, T, 2) → states (B, T, 2).

        Raises:
            UsageError: states or actions of another width, or actions that are not finite.
        """
        check_width("Wall states", states, 2)
        check_actions("Wall", actions, self.action_dim)
        visited = np.empty(actions.shape, np.float64)
        for t in range(actions.shape[1]):
            states = self.step(states, layout, actions[:, t])
            visited[:, t] = states
        return visited

    def step(self, states: FloatArray, layout: Layout, actions: FloatArray) -> FloatArray:
        """One environment step, (B, 2) states and raw actions → (B, 2) states.

        Raises:
            UsageError: states or actions of another width, or actions that are not finite.
        """
        check_width("Wall states", states, 2)
        check_actions("Wall", actions, self.action_dim)
        wall_x = np.asarray(layout["wall_x"], np.float64)
        door_y = np.asarray(layout["door_y"], np.float64)
        target = states + actions * ACTION_SCALE
        with np.errstate(divide="ignore", invalid="ignore"):
            in_door, from_door = _hit_door_edge(states, target, wall_x, door_y)
            in_wall, from_wall = _hit_wall(states, target, wall_x, door_y)
        moved = np.where(in_wall[:, None], from_wall, target)
        return np.where(in_door[:, None], from_door, moved)

    def board(self, states: FloatArray, layout: Layout) -> npt.NDArray[np.uint8]:
        """The 65-pixel board: white floor, black walls, red dot. (B, 2) → (B, 65, 65, 3)."""
        pixel = np.arange(BOARD)
        x, y = np.meshgrid(pixel, pixel, indexing="xy")
        wall_x = np.asarray(layout["wall_x"])[:, None, None]
        door_y = np.asarray(layout["door_y"])[:, None, None]
        walls = (np.abs(x - wall_x) <= WALL_WIDTH // 2) & (np.abs(y - door_y) > DOOR_HALF_HEIGHT)
        walls[:, :, [BORDER - 1, -BORDER]] = True
        walls[:, [BORDER - 1, -BORDER], :] = True
        offset_x = x - states[:, 0, None, None]
        offset_y = y - states[:, 1, None, None]
        # The square root and the square cancel, but rounding as the public code does decides
        # which of two neighbouring grey levels a pixel gets.
        squared = np.sqrt(offset_x**2 + offset_y**2) ** 2
        dot = np.exp(-squared / (2 * DOT_STD * DOT_STD)) / (2 * np.pi * DOT_STD * DOT_STD)
        dot /= dot.max(axis=(1, 2), keepdims=True)
        dot = np.nan_to_num(dot)  # a position that is not finite has no dot
        faded = (255 - (dot * 255).astype(np.uint8)).astype(np.uint8)
        image = np.stack([np.full_like(faded, 255), faded, faded], axis=-1)
        image[walls] = 0
        return image

    def observe(self, states: FloatArray, layout: Layout) -> Observation:
        """Frames (B, T, 224, 224, 3) uint8 and proprioception (B, T, 2) of states (B, T, 2).

        Raises:
            UsageError: states of another width.
        """
        check_width("Wall states", states, 2)
        batch, frames = states.shape[:2]
        repeated = {name: np.repeat(values, frames) for name, values in layout.items()}
        board = self.board(states.reshape(-1, 2), repeated)
        pixels = torch.from_numpy(board).permute(0, 3, 1, 2).float()
        pixels = torch.nn.functional.interpolate(
            pixels, size=(FRAME, FRAME), mode="bilinear", antialias=True, align_corners=False
        )
        visual = pixels.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        visual_array = visual.reshape(batch, frames, FRAME, FRAME, 3).contiguous().numpy()
        return {"visual": visual_array, "proprio": self.proprio(states)}

    def proprio(self, states: FloatArray) -> npt.NDArray[np.float32]:
        """Proprioception is the position itself, (..., 2)."""
        return states.astype(np.float32)

    def distance(self, states: FloatArray, goals: FloatArray) -> FloatArray:
        """Euclidean distance in board pixels."""
        return np.asarray(np.linalg.norm(goals - states, axis=-1), np.float64)

    def success(self, states: FloatArray, goals: FloatArray) -> BoolArray:
        """Distance below 4.5 board pixels."""
        return np.asarray(self.distance(states, goals) < SUCCESS_DISTANCE)


class WallSimulation:
    """Running Wall episodes; Wall is a function of its state, so only positions are kept."""

    def __init__(self, task: Wall, states: FloatArray, layout: Layout) -> None:
        self._task = task
        self._states = states
        self._layout = layout

    @property
    def states(self) -> FloatArray:
        """Current positions (B, 2)."""
        return self._states

    def step(self, index: npt.NDArray[np.intp], actions: FloatArray) -> FloatArray:
        """Execute raw actions (len(index), T, 2); returns the positions after each."""
        layout = {name: values[index] for name, values in self._layout.items()}
        visited = self._task.rollout(self._states[index], layout, actions)
        self._states[index] = visited[:, -1]
        return visited


def _checked_range(name: str, value: Any, low: int, high: int) -> Position:
    ends = value if isinstance(value, (tuple, list)) else (value, value)
    valid = len(ends) == 2 and all(is_integer(e) for e in ends)
    if not valid or not low <= ends[0] <= ends[1] <= high:
        raise UsageError(
            f"{name} must be an integer from {low} to {high} or a range [low, high], got {value!r}"
        )
    return (ends[0], ends[1]) if isinstance(value, (tuple, list)) else int(value)


def _draw(generator: np.random.Generator, position: Position) -> int:
    if isinstance(position, int):
        return position
    return int(generator.integers(position[0], position[1], endpoint=True))


def _hit_door_edge(
    start: FloatArray, target: FloatArray, wall_x: FloatArray, door_y: FloatArray
) -> tuple[BoolArray, FloatArray]:
    """Moves that leave the door opening through its upper or lower edge.

    Returns which episodes hit, and where the push-back leaves them. As in the public code, the
    push-back also moves the dot half a pixel to the right, and nothing clips it afterwards.
    """
    x0, y0 = start.T
    slope = (target[:, 1] - y0) / (target[:, 0] - x0)
    hit = np.zeros(len(start), bool)
    position = target.copy()
    for direction in (1, -1):  # +y edge first, as the public code checks it
        edge = door_y + direction * DOOR_HALF_HEIGHT
        crosses = (direction * (target[:, 1] - edge) > 0) & (direction * (y0 - edge) < 0)
        crossing_x = (edge - (y0 - slope * x0)) / slope
        inside = np.abs(crossing_x - wall_x) <= WALL_WIDTH // 2
        new = crosses & inside & ~hit
        position[new, 0] = crossing_x[new] + 0.5
        position[new, 1] = edge[new] - 0.5 * direction
        hit |= new
    return hit, position


def _hit_wall(
    start: FloatArray, target: FloatArray, wall_x: FloatArray, door_y: FloatArray
) -> tuple[BoolArray, FloatArray]:
    """Moves that meet the wall (outside the door) or a border.

    Returns which episodes hit, and the push-back position: half a pixel off the surface, half a
    pixel along it, kept inside the room.
    """
    (x0, y0), (x1, y1) = start.T, target.T
    slope = (y1 - y0) / (x1 - x0)
    intercept = y0 - slope * x0
    on_left = wall_x > x0
    left = np.where(on_left, _LOW, wall_x + WALL_WIDTH // 2)
    right = np.where(on_left, wall_x - WALL_WIDTH // 2, _HIGH)

    def meets_vertical(line: FloatArray, has_door: BoolArray) -> tuple[BoolArray, FloatArray]:
        y = slope * line + intercept
        closed = ~has_door | (y < door_y - DOOR_HALF_HEIGHT) | (y > door_y + DOOR_HALF_HEIGHT)
        return (np.sign(x0 - line) * np.sign(x1 - line) <= 0) & closed, y

    hit_left, y_left = meets_vertical(left, ~on_left)
    hit_right, y_right = meets_vertical(right, on_left)
    vertical = hit_left | hit_right
    wall_line = np.where(hit_left, left, right)
    wall_hit_y = np.where(hit_left, y_left, y_right)

    hit_low = np.sign(y0 - _LOW) * np.sign(y1 - _LOW) <= 0
    hit_high = np.sign(y0 - _HIGH) * np.sign(y1 - _HIGH) <= 0
    horizontal = hit_low | hit_high
    border_line = np.where(hit_low, _LOW, _HIGH)
    border_hit_x = (border_line - intercept) / slope

    nearer = np.hypot(x0 - wall_line, y0 - wall_hit_y) < np.hypot(
        x0 - border_hit_x, y0 - border_line
    )
    use_vertical = vertical & (~horizontal | nearer)
    x = np.where(use_vertical, wall_line + 0.5 * np.sign(x0 - wall_line), border_hit_x + 0.5)
    y = np.where(use_vertical, wall_hit_y + 0.5, border_line + 0.5 * np.sign(y0 - border_line))
    x = np.clip(x, left, right)
    y = np.clip(y, _LOW, _HIGH)
    # The public code computes the step off the inner wall, whose position is an integer tensor,
    # in float32, and the step off the borders in float64.
    off_left, off_right = left + 0.3, right - 0.3
    off_left = np.where(on_left, off_left, off_left.astype(np.float32))
    off_right = np.where(on_left, off_right.astype(np.float32), off_right)
    x = np.where(x <= left, off_left, x)
    x = np.where(x >= right, off_right, x)
    y = np.where(y <= _LOW, _LOW + 0.3, y)
    y = np.where(y >= _HIGH, _HIGH - 0.3, y)
    return vertical | horizontal, np.stack([x, y], axis=-1)
