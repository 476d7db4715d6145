"""PointMaze's picture from above, close to what MuJoCo draws, without a GL library.

The scene is fixed but for the ball, so it is ray-traced once, with its depths; each frame then
traces the few pixels around the ball, four rays a pixel. Camera, light and materials are those of
the public code's model under mujoco_py: the free camera looks down on the middle of the maze from
as far away as the model is large, and the picture comes bottom row first, so that y points down.

MuJoCo's own renderer draws the same picture where a GL library is there (`render`).
"""

import atexit
import os
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from quantwm.envs.point_maze_physics import (
    GROUND_COLOURS,
    GROUND_Z,
    MARKER_COLOUR,
    MARKER_RADIUS,
    ORIGIN,
    U_MAZE,
    WALL_COLOUR,
    WALL_HEIGHT,
    load_mujoco,
    maze_model,
)
from quantwm.errors import MissingExtraError, QuantWMError
from quantwm.protocols import FloatArray

FRAME = 224
CENTRE = 3.0
"""World x and y that the camera looks at."""
DISTANCE = 9.734846922834954
"""Of the camera above the ball's plane: the extent that MuJoCo computes for the model."""
_FIELD_OF_VIEW = 45.0
_RAYS = 2
"""Rays a pixel, in each direction."""
_SIDE = FRAME * _RAYS
_CHECKER = 2.0
_AMBIENT, _DIFFUSE = 0.4, 0.8
_SPECULAR, _SHININESS = 0.1 * 0.5, 64.0
"""The headlight's specular part times a material's, and a material's exponent."""


def draw(states: FloatArray) -> npt.NDArray[np.uint8]:
    """Frames (B, 224, 224, 3) of states (B, 4)."""
    colours, _ = _scene()
    frames = np.repeat(_pixels(colours)[None], len(states), axis=0)
    for frame, state in zip(frames, states, strict=True):
        _add_ball(frame, state[:2] + ORIGIN)
    return frames


def _add_ball(frame: npt.NDArray[np.uint8], centre: FloatArray) -> None:
    """Draw the ball at world coordinates (2,) into a frame."""
    # Perspective keeps the ball within a radius and a bit of its centre's pixel.
    scale = FRAME / (2 * _half_width() * DISTANCE)
    middle = (centre - CENTRE) * scale + FRAME / 2
    reach = MARKER_RADIUS * scale * 1.3 + 1
    low = np.clip(np.floor(middle - reach), 0, FRAME).astype(int)
    high = np.clip(np.ceil(middle + reach), 0, FRAME).astype(int)
    if (low >= high).any():
        return
    columns, rows = (slice(a * _RAYS, b * _RAYS) for a, b in zip(low, high, strict=True))
    colours, depths = _scene()
    slope = _slopes()
    x, y = slope[None, columns], slope[rows, None]
    # The ray (x, y, -1)·t from the camera meets the sphere where a t² - 2 b t + c = 0.
    to_centre = [*(centre - CENTRE), -DISTANCE]
    a = x * x + y * y + 1
    b = x * to_centre[0] + y * to_centre[1] + DISTANCE
    c = sum(v * v for v in to_centre) - MARKER_RADIUS**2
    inside = b * b - a * c
    depth = (b - np.sqrt(np.maximum(inside, 0))) / a
    seen = (inside > 0) & (depth < depths[rows, columns])
    normal = np.stack(
        [x * depth - to_centre[0], y * depth - to_centre[1], -depth - to_centre[2]], axis=-1
    )
    shaded = _lit(MARKER_COLOUR, normal / MARKER_RADIUS, x, y)
    patch = np.where(seen[..., None], shaded, colours[rows, columns])
    frame[low[1] : high[1], low[0] : high[0]] = _pixels(patch)


@cache
def _scene() -> tuple[FloatArray, FloatArray]:
    """Colours (S, S, 3) and depths (S, S) of maze and ground, one a ray."""
    slope = _slopes()
    x, y = slope[None, :], slope[:, None]
    ground = DISTANCE - GROUND_Z
    squares = (np.floor((CENTRE + slope * ground) / _CHECKER)).astype(int)
    parity = (squares[None, :] + squares[:, None]) % 2
    light, dark = (np.asarray(colour) for colour in GROUND_COLOURS)
    colours = np.where((parity == 1)[..., None], light, dark)
    depths = np.full((_SIDE, _SIDE), ground)
    # Down from the tops of the walls, the first depth at which a ray is within a wall; later than
    # at the top it came in through a side, which the light from above does not reach.
    top = DISTANCE - WALL_HEIGHT
    for depth in np.linspace(ground, top, 25):
        within = _in_wall(CENTRE + x * depth, CENTRE + y * depth)
        if depth == top:
            upward = np.broadcast_to([0.0, 0.0, 1.0], (_SIDE, _SIDE, 3))
            colour = _lit(WALL_COLOUR, upward, x, y)
        else:
            colour = np.broadcast_to(np.asarray(WALL_COLOUR) * _AMBIENT, colours.shape)
        colours = np.where(within[..., None], colour, colours)
        depths = np.where(within, depth, depths)
    return colours, depths


def _lit(
    colour: tuple[float, float, float], normal: FloatArray, x: FloatArray, y: FloatArray
) -> FloatArray:
    """Colours (..., 3) of surfaces with a normal (..., 3) under the headlight, which shines down.

    Args:
        x, y: the view's rays (x, y, -1), which broadcast to the surfaces.
    """
    view = np.stack(np.broadcast_arrays(-x, -y, np.ones(1)), axis=-1)
    view = view / np.linalg.norm(view, axis=-1, keepdims=True)
    halfway = view + np.array([0.0, 0.0, 1.0])
    halfway = halfway / np.linalg.norm(halfway, axis=-1, keepdims=True)
    diffuse = _AMBIENT + _DIFFUSE * np.maximum(normal[..., 2:], 0)
    shine = np.maximum((normal * halfway).sum(-1, keepdims=True), 0) ** _SHININESS
    return np.asarray(np.minimum(np.asarray(colour) * diffuse + _SPECULAR * shine, 1.0))


def _in_wall(x: FloatArray, y: FloatArray) -> npt.NDArray[np.bool_]:
    maze = np.array([[cell == "#" for cell in row] for row in U_MAZE])
    i, j = np.round(x - 1).astype(int), np.round(y - 1).astype(int)
    i, j = np.broadcast_arrays(i, j)
    on_board = (i >= 0) & (i < maze.shape[0]) & (j >= 0) & (j < maze.shape[1])
    return np.asarray(on_board & maze[np.where(on_board, i, 0), np.where(on_board, j, 0)])


def _half_width() -> float:
    return float(np.tan(np.radians(_FIELD_OF_VIEW / 2)))


def _slopes() -> FloatArray:
    """Sideways extent of each ray a unit of depth, (S,)."""
    return np.asarray((2 * (np.arange(_SIDE) + 0.5) / _SIDE - 1) * _half_width())


def _pixels(colours: FloatArray) -> npt.NDArray[np.uint8]:
    """Colours of rays (h·r, w·r, 3) in [0, 1] → pixels (h, w, 3)."""
    height, width = (n // _RAYS for n in colours.shape[:2])
    cells = colours.reshape(height, _RAYS, width, _RAYS, 3)
    return np.asarray(np.rint(cells.mean((1, 3)) * 255), np.uint8)


def render(states: FloatArray) -> npt.NDArray[np.uint8]:
    """The same frames by MuJoCo's own renderer.

    Raises:
        QuantWMError: no GL library can be used.
    """
    renderer, camera, model, data = _renderer()
    mujoco = load_mujoco()
    frames = np.empty((len(states), FRAME, FRAME, 3), np.uint8)
    for frame, state in zip(frames, states, strict=True):
        data.qpos[:], data.qvel[:] = state[:2], 0
        mujoco.mj_forward(model, data)
        renderer.update_scene(data, camera)
        frame[:] = renderer.render()[::-1]
    return frames


@cache
def _renderer() -> tuple[Any, Any, Any, Any]:
    try:
        mujoco, model = load_mujoco(), maze_model()
        renderer = mujoco.Renderer(model, FRAME, FRAME)
    except MissingExtraError:
        raise
    except Exception as error:
        backend = os.environ.get("MUJOCO_GL", "none")
        raise QuantWMError(
            f"MuJoCo cannot render here ({error}; MUJOCO_GL is {backend}): install a GL library "
            "and set MUJOCO_GL to egl or osmesa, or leave the task's renderer at 'drawn'"
        ) from error
    # At exit the renderer would be collected after the GL modules that it needs.
    atexit.register(renderer.close)
    camera = mujoco.MjvCamera()
    camera.lookat[:] = CENTRE, CENTRE, 0
    camera.distance, camera.azimuth, camera.elevation = DISTANCE, 90, -90
    return renderer, camera, model, mujoco.MjData(model)
