"""The report's filmstrips: real frames of telling episodes, each beside the frame of its goal."""

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from quantwm.evaluation import Row
from quantwm.protocols import Layout, Task
from quantwm.report.arms import Arm, choose_episode, failure_kind, number, worst_arm

Frame = npt.NDArray[np.uint8]
"""One frame (H, W, 3)."""

MOST_FRAMES = 9
SIDE, SMALL_SIDE = 224, 112
"""Pixels: twice as many as a page shows, and as many."""
_BUDGET = 1_000_000
_SMALLEST = 56


@dataclass(frozen=True)
class Still:
    """One frame of a strip.

    Attributes:
        iteration: MPC iterations executed before it; None for the goal.
        distance: to the goal in the task's units; None if unknown or not finite.
        reached: whether the episode had succeeded by then.
        image: a WebP as a data URI, without loss; None if the state cannot be drawn (not finite).
    """

    iteration: int | None
    distance: float | None
    reached: bool
    image: str | None


@dataclass(frozen=True)
class Scene:
    """An episode of an arm that a strip shows, and what to say of it as plain text."""

    arm: Arm
    row: Row
    remark: str = ""


@dataclass(frozen=True)
class Strip:
    """A scene's frames, its goal first."""

    scene: Scene
    goal: Still
    stills: tuple[Still, ...]


def choose_scenes(arms: Sequence[Arm], causes: Mapping[str, str]) -> tuple[list[Scene], str]:
    """What the strips show: an episode of float and of the worst arm, then every other cause.

    Args:
        arms: of one task.
        causes: arm's name → what an intervention found to break it.

    Returns:
        the scenes, and a sentence on how the episode of the first ones was chosen; no scenes
        where no arm has an episode in common with float.
    """
    reference = next((arm for arm in arms if arm.role == "float"), None)
    first = [arm for arm in (reference, worst_arm(arms)) if arm]
    choice = choose_episode(first)
    if choice is None:
        return [], ""
    scenes = [_scene(arm, _row(arm, choice.episode), causes) for arm in first]
    if not any(scene.row["success"] for scene in scenes):
        scenes[:0] = _success(arms)
    solved = {row["episode"] for row in reference.rows if row["success"]} if reference else set()
    seen = {_cause(scene.arm, scene.row, causes) for scene in scenes if not scene.row["success"]}
    quantized = [arm for arm in arms if arm.role == "quantized"]
    for arm in sorted(quantized, key=lambda arm: arm.success):
        # A failure where float succeeds tells most.
        for row in sorted(arm.failures, key=lambda row: row["episode"] not in solved):
            cause = _cause(arm, row, causes)
            if cause not in seen:
                seen.add(cause)
                scenes.append(Scene(arm, row, f"Episode {row['episode']}: {cause}."))
    return scenes, f"Episode {choice.episode}: {choice.reason}."


def _scene(arm: Arm, row: Row, causes: Mapping[str, str]) -> Scene:
    """A scene that tells the cause where it is more than a goal that was not reached."""
    cause = "" if row["success"] else _cause(arm, row, causes)
    return Scene(arm, row, "" if cause in ("", "goal not reached") else f"Cause: {cause}.")


def _cause(arm: Arm, row: Row, causes: Mapping[str, str]) -> str:
    kind = failure_kind(row)
    return causes.get(arm.name, kind) if kind == "goal not reached" else kind


def _success(arms: Sequence[Arm]) -> list[Scene]:
    best = max(arms, key=lambda arm: (arm.role != "bound", arm.success))
    solved = [row for row in best.rows if row["success"]]
    return [Scene(best, solved[0], f"Episode {solved[0]['episode']}.")] if solved else []


def _row(arm: Arm, episode: int) -> Row:
    return next(row for row in arm.rows if row["episode"] == episode)


def strips(scenes: Sequence[Scene], task: Task, *, side: int = SIDE) -> list[Strip]:
    """The scenes drawn.

    An episode of more than `MOST_FRAMES` states shows evenly spread ones, the first and the last
    among them. Frames are at most `side` pixels wide, and smaller if all together would take
    more than a megabyte.
    """
    frames = [_frames(scene.row, task) for scene in scenes]
    images = _encoded([frame for one in frames for frame in one], side)
    return [_strip(scene, images) for scene in scenes]


def _strip(scene: Scene, images: Iterator[str | None]) -> Strip:
    row = scene.row
    goal = Still(None, None, False, next(images))
    stills = []
    for iteration in _shown(len(row["states"])):
        distances: Sequence[Any] = row["distance_by_iteration"]
        reached: Sequence[Any] = row["success_by_iteration"]
        distance = number(distances[iteration]) if iteration < len(distances) else None
        done = bool(reached[iteration]) if iteration < len(reached) else bool(row["success"])
        stills.append(Still(iteration, distance, done, next(images)))
    return Strip(scene, goal, tuple(stills))


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


def _encoded(frames: Sequence[Frame | None], side: int) -> Iterator[str | None]:
    while True:
        images = [None if frame is None else _picture(frame, side) for frame in frames]
        total = sum(len(image) for image in images if image)
        if total <= _BUDGET or side <= _SMALLEST:
            return iter(images)
        side //= 2


def _picture(frame: Frame, side: int) -> str:
    image = Image.fromarray(frame)
    if max(image.size) > side:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=True, quality=100, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
