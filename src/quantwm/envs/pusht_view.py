"""PushT's picture: a function of the state, with the look of DINO-WM's public code.

That code draws with pygame on a 512-pixel window and shrinks it with OpenCV, bilinear and not
antialiased; here Pillow and torch do. Colours, radii, rounded corners and the shrinking are the
same, single pixels along edges are not. It also marks contact points by lines of four pixels,
which depend on more than the state; they are left out.

The green T is not the episode's goal: it marks the same pose in every picture.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from quantwm.envs.pusht_physics import (
    AGENT_RADIUS,
    BLOCKS,
    WALL_HIGH,
    WALL_LOW,
    WALL_RADIUS,
    WINDOW,
    Polygon,
)
from quantwm.protocols import FloatArray

FRAME = 224
TARGET_POSE = (256.0, 256.0, np.pi / 4)
_OUTLINE = 2
_RIM = 4
_TABLE = (255, 255, 255)
_TARGET = (144, 238, 144)
_WALL = (211, 211, 211)
_BLOCK, _BLOCK_EDGE = (142, 163, 183), (119, 136, 153)
_AGENT, _AGENT_EDGE = (78, 126, 255), (65, 105, 225)
_CHUNK = 4
"""Frames shrunk at once: more of 512 pixels, as floats, fall out of the caches, twice as slow."""


def draw(states: FloatArray, shape: str) -> npt.NDArray[np.uint8]:
    """Frames (B, 224, 224, 3) of states (B, 7)."""
    frames = np.empty((len(states), FRAME, FRAME, 3), np.uint8)
    for begin in range(0, len(states), _CHUNK):
        windows = np.stack([_window(s, shape) for s in states[begin : begin + _CHUNK]])
        pixels = torch.from_numpy(windows).permute(0, 3, 1, 2).float()
        small = torch.nn.functional.interpolate(
            pixels, size=(FRAME, FRAME), mode="bilinear", align_corners=False
        )
        frames[begin : begin + len(windows)] = small.round_().permute(0, 2, 3, 1).numpy()
    return frames


def _window(state: FloatArray, shape: str) -> npt.NDArray[np.uint8]:
    """One window (512, 512, 3)."""
    image = _target(shape).copy()
    canvas = ImageDraw.Draw(image)
    for part in BLOCKS[shape].parts:
        corners = _placed(part, state[2:5])
        canvas.polygon(corners, fill=_BLOCK)
        _outline(canvas, corners, _OUTLINE, _BLOCK_EDGE)
    x, y = (round(float(v)) for v in state[:2])
    _disc(canvas, x, y, AGENT_RADIUS, _AGENT_EDGE)
    _disc(canvas, x, y, AGENT_RADIUS - _RIM, _AGENT)
    low, high = WALL_LOW, WALL_HIGH
    _outline(canvas, [(low, low), (high, low), (high, high), (low, high)], WALL_RADIUS, _WALL)
    return np.asarray(image)


@cache
def _target(shape: str) -> Image.Image:
    """The table with the green block."""
    image = Image.new("RGB", (WINDOW, WINDOW), _TABLE)
    canvas = ImageDraw.Draw(image)
    for part in BLOCKS[shape].parts:
        canvas.polygon(_placed(part, np.asarray(TARGET_POSE)), fill=_TARGET)
    return image


def _placed(part: Polygon, pose: FloatArray) -> list[tuple[int, int]]:
    """Whole window pixels of a polygon's corners at a pose (x, y, angle)."""
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    return [
        (round(float(pose[0] + x * cos - y * sin)), round(float(pose[1] + x * sin + y * cos)))
        for x, y in part
    ]


def _outline(
    canvas: ImageDraw.ImageDraw,
    corners: list[tuple[int, int]],
    radius: int,
    colour: tuple[int, int, int],
) -> None:
    for a, b in zip(corners, [*corners[1:], corners[0]], strict=True):
        canvas.line([a, b], fill=colour, width=2 * radius + 1)
        _disc(canvas, *a, radius, colour)


def _disc(
    canvas: ImageDraw.ImageDraw, x: int, y: int, radius: int, colour: tuple[int, int, int]
) -> None:
    """A disc 2·radius pixels wide, as pygame counts."""
    canvas.ellipse([x - radius, y - radius, x + radius - 1, y + radius - 1], fill=colour)
