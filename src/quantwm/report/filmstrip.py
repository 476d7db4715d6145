"""The report's filmstrip: real frames of one episode, beside the frame of its goal."""

import base64
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from quantwm.protocols import Layout, Task
from quantwm.report.arms import Arm, EpisodeChoice, Row, number

Frame = npt.NDArray[np.uint8]
"""One frame (H, W, 3)."""

MOST_FRAMES = 9
SIDE = 224
_BUDGET = 1_000_000
_SMALLEST = 56


@dataclass(frozen=True)
class Still:
    """One frame of a strip.

    Attributes:
        iteration: MPC iterations executed before it; None for the goal.
        distance: to the goal in the task's units; None if unknown or not finite.
        reached: whether the episode had succeeded by then.
        image: a PNG as a data URI; None if the state cannot be drawn (not finite).
    """

    iteration: int | None
    distance: float | None
    reached: bool
    image: str | None


@dataclass(frozen=True)
class Strip:
    """One arm's frames of the episode, its goal first."""

    arm: Arm
    row: Row
    goal: Still
    stills: tuple[Still, ...]


def strips(arms: Sequence[Arm], choice: EpisodeChoice, task: Task) -> list[Strip]:
    """The chosen episode of each arm.

    An episode of more than `MOST_FRAMES` states shows evenly spread ones, the first and the last
    among them. Frames are at most `SIDE` pixels wide, and smaller if all together would take
    more than a megabyte.
    """
    rows = [next(r for r in arm.rows if r["episode"] == choice.episode) for arm in arms]
    frames = [_frames(row, task) for row in rows]
    images = _encoded([frame for one in frames for frame in one])
    return [_strip(arm, row, images) for arm, row in zip(arms, rows, strict=True)]


def _strip(arm: Arm, row: Row, images: Iterator[str | None]) -> Strip:
    goal = Still(None, None, False, next(images))
    stills = []
    for iteration in _shown(len(row["states"])):
        distances: Sequence[Any] = row["distance_by_iteration"]
        reached: Sequence[Any] = row["success_by_iteration"]
        distance = number(distances[iteration]) if iteration < len(distances) else None
        done = bool(reached[iteration]) if iteration < len(reached) else bool(row["success"])
        stills.append(Still(iteration, distance, done, next(images)))
    return Strip(arm, row, goal, tuple(stills))


def _shown(count: int) -> list[int]:
    """Which of `count` states are shown."""
    spread = np.linspace(0, count - 1, min(count, MOST_FRAMES))
    return [int(index) for index in spread.round()]


def _frames(row: Row, task: Task) -> list[Frame | None]:
    """The goal's frame, then those of the shown states."""
    shown = [row["goal"], *(row["states"][index] for index in _shown(len(row["states"])))]
    values = [[math.nan if v is None else float(v) for v in state] for state in shown]
    finite = [all(map(math.isfinite, state)) for state in values]
    states = np.asarray([s for s, ok in zip(values, finite, strict=True) if ok], np.float64)
    if not len(states):
        return [None] * len(shown)
    visual = task.observe(states[None], _layout(row))["visual"][0]
    drawn = iter(visual)
    return [next(drawn) if ok else None for ok in finite]


def _layout(row: Row) -> Layout:
    return {name: np.asarray([value]) for name, value in json.loads(row["layout"]).items()}


def _encoded(frames: Sequence[Frame | None]) -> Iterator[str | None]:
    side = SIDE
    while True:
        images = [None if frame is None else _png(frame, side) for frame in frames]
        total = sum(len(image) for image in images if image)
        if total <= _BUDGET or side <= _SMALLEST:
            return iter(images)
        side //= 2


def _png(frame: Frame, side: int) -> str:
    image = Image.fromarray(frame)
    if max(image.size) > side:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
