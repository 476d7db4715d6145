"""PushT's picture: a function of the state, with the look of DINO-WM's public code.

That code draws with pygame on a 512-pixel window and shrinks it with OpenCV, bilinear and not
antialiased; here Pillow and numpy do. Colours, radii, rounded corners and the shrinking are the
same, single pixels along edges are not. It also marks contact points by lines of four pixels,
which depend on more than the state; they are left out.

The green T is not the episode's goal: it marks the same pose in every picture.
"""

from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
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

Corners: TypeAlias = list[tuple[int, int]]
FRAME = 224
TARGET_POSE = (256.0, 256.0, np.pi / 4)
_RATIO = WINDOW / FRAME
_OUTLINE = 2
_RIM = 4
_TABLE = (255, 255, 255)
_TARGET = (144, 238, 144)
_WALL = (211, 211, 211)
_BLOCK, _BLOCK_EDGE = (142, 163, 183), (119, 136, 153)
_AGENT, _AGENT_EDGE = (78, 126, 255), (65, 105, 225)


def draw(states: FloatArray, shape: str) -> npt.NDArray[np.uint8]:
    """Frames (B, 224, 224, 3) of states (B, 7).

    Only what lies around block and agent is shrunk; the rest is the same in all frames.
    """
    table, shrunk = _table(shape)
    frames = np.repeat(shrunk[None], len(states), axis=0)
    for frame, state in zip(frames, states, strict=True):
        window = table.copy()
        canvas = ImageDraw.Draw(window)
        corners = []
        for part in BLOCKS[shape].parts:
            corners += (placed := _placed(part, state[2:5]))
            canvas.polygon(placed, fill=_BLOCK)
            _outline(canvas, placed, _OUTLINE, _BLOCK_EDGE)
        x, y = (round(float(v)) for v in state[:2])
        _disc(canvas, x, y, AGENT_RADIUS, _AGENT_EDGE)
        _disc(canvas, x, y, AGENT_RADIUS - _RIM, _AGENT)
        _add_walls(canvas)
        _shrink_around(frame, window, corners, _OUTLINE + 1)
        _shrink_around(frame, window, [(x, y)], AGENT_RADIUS + 1)
    return frames


def _shrink_around(
    frame: npt.NDArray[np.uint8], window: Image.Image, points: Corners, reach: int
) -> None:
    """Renew the frame's pixels that read the window within `reach` of the points' box."""
    places = np.asarray(points)
    first = np.floor((places.min(0) - reach) / _RATIO).astype(int) - 1
    last = np.ceil((places.max(0) + reach) / _RATIO).astype(int) + 1
    (left, top), (right, bottom) = np.clip([first, last], 0, FRAME).tolist()
    if left < right and top < bottom:
        frame[top:bottom, left:right] = _shrunk(window, slice(left, right), slice(top, bottom))


@cache
def _table(shape: str) -> tuple[Image.Image, npt.NDArray[np.uint8]]:
    """The window with the green block and nothing on it; and the same with walls, shrunk."""
    table = Image.new("RGB", (WINDOW, WINDOW), _TABLE)
    canvas = ImageDraw.Draw(table)
    for part in BLOCKS[shape].parts:
        canvas.polygon(_placed(part, np.asarray(TARGET_POSE)), fill=_TARGET)
    walled = table.copy()
    _add_walls(ImageDraw.Draw(walled))
    return table, _shrunk(walled, slice(0, FRAME), slice(0, FRAME))


def _add_walls(canvas: ImageDraw.ImageDraw) -> None:
    low, high = WALL_LOW, WALL_HIGH
    corners = [(low, low), (high, low), (high, high), (low, high)]
    _outline(canvas, corners, WALL_RADIUS, _WALL)


@cache
def _taps() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Of each frame pixel in a direction, the two window pixels that it reads (2, 224), and the
    second one's weight."""
    ratio = np.float32(_RATIO)
    place = (np.arange(FRAME, dtype=np.float32) + np.float32(0.5)) * ratio - np.float32(0.5)
    before = place.astype(np.int64)
    return np.stack([before, np.minimum(before + 1, WINDOW - 1)]), place - before.astype(np.float32)


def _shrunk(window: Image.Image, x: slice, y: slice) -> npt.NDArray[np.uint8]:
    """The frame's pixels in columns x and rows y.

    Bilinear and not antialiased, in float32, as OpenCV and torch have it.
    """
    taps, weights = _taps()
    columns, rows = taps[:, x], taps[:, y]
    left, top = int(columns[0, 0]), int(rows[0, 0])
    part = np.asarray(window.crop((left, top, int(columns[1, -1]) + 1, int(rows[1, -1]) + 1)))
    across, down = weights[x, None], weights[y, None, None]
    upper, lower = (
        (1 - across) * part[row][:, columns[0] - left] + across * part[row][:, columns[1] - left]
        for row in rows - top
    )
    return np.asarray(np.rint((1 - down) * upper + down * lower), np.uint8)


def _placed(part: Polygon, pose: FloatArray) -> Corners:
    """Whole window pixels of a polygon's corners at a pose (x, y, angle)."""
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    return [
        (round(float(pose[0] + x * cos - y * sin)), round(float(pose[1] + x * sin + y * cos)))
        for x, y in part
    ]


def _outline(
    canvas: ImageDraw.ImageDraw,
    corners: Corners,
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
