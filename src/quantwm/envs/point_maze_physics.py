"""PointMaze's physics: a ball on two sliders, pushed by a force, in a maze of boxes, on MuJoCo.

Geometry, masses, gear, damping and frame skip are those of DINO-WM's public code
(github.com/gaoyuezhou/dino_wm, `env/pointmaze/maze_model.py`). That code writes its model for
MuJoCo 2.1; this is the same model for MuJoCo's own package.
"""

import importlib
from functools import cache
from typing import Any

import numpy as np

from quantwm.errors import MissingExtraError
from quantwm.protocols import BoolArray, FloatArray

U_MAZE = ("#####", "#OOO#", "###O#", "#OOO#", "#####")
"""Cell (i, j) is row i, column j, '#' a wall; its centre is at x = i + 1, y = j + 1."""
HALF_CELL = 0.5
WALL_HEIGHT = 0.2
GROUND_Z = -0.1
BALL_RADIUS, MARKER_RADIUS = 0.1, 0.2
"""Of the ball, which is invisible, and of the green marker that is drawn in its place."""
ORIGIN = 1.2
"""World coordinates of position (0, 0)."""
FRAME_SKIP = 5
VELOCITY_LIMIT = 5.0
WALL_COLOUR, MARKER_COLOUR = (0.7, 0.5, 0.3), (0.3, 0.6, 0.3)
GROUND_COLOURS = ((0.2, 0.3, 0.4), (0.1, 0.2, 0.3))


def walls() -> FloatArray:
    """World x, y of the centres of all wall boxes, (n, 2)."""
    cells = [(i, j) for i, row in enumerate(U_MAZE) for j, cell in enumerate(row) if cell == "#"]
    return np.asarray(cells, np.float64) + 1.0


def is_free(states: FloatArray) -> BoolArray:
    """Which states (B, 4) are in a corridor."""
    maze = np.array([list(row) for row in U_MAZE])
    row, column = np.floor(states[:, :2] + ORIGIN - HALF_CELL).astype(np.int64).T
    inside = (row >= 0) & (row < len(maze)) & (column >= 0) & (column < maze.shape[1])
    return np.asarray(inside & (maze[np.where(inside, row, 0), np.where(inside, column, 0)] == "O"))


def step(states: FloatArray, actions: FloatArray) -> FloatArray:
    """One environment step of 50 ms, (B, 4) positions and velocities and (B, 2) → (B, 4).

    Actions are clipped to ±1 and velocities, beforehand, to ±5, as in the public code. A state is
    all that a step depends on: the solver starts from zero each time.
    """
    rollout = load_mujoco("mujoco.rollout").rollout
    initial = np.zeros((len(states), 5))  # time, positions, velocities
    initial[:, 1:3] = states[:, :2]
    initial[:, 3:5] = np.clip(states[:, 2:], -VELOCITY_LIMIT, VELOCITY_LIMIT)
    control = np.clip(actions, -1, 1)[:, None]
    visited, _ = rollout(maze_model(), _data(), initial, control, nstep=FRAME_SKIP)
    return np.asarray(visited[:, -1, 1:5], np.float64)


@cache
def maze_model() -> Any:
    """MuJoCo's model of the maze."""
    return load_mujoco().MjModel.from_xml_string(model_xml())


@cache
def _data() -> Any:
    return load_mujoco().MjData(maze_model())


def load_mujoco(module: str = "mujoco") -> Any:
    """MuJoCo's package or a module of it, which other tasks do without.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError("the PointMaze task", "mujoco", "tasks") from error


def model_xml() -> str:
    """The model in MuJoCo's format, with the public code's look."""
    boxes = "\n".join(
        f'    <geom type="box" material="wall" pos="{x} {y} 0" '
        f'size="{HALF_CELL} {HALF_CELL} {WALL_HEIGHT}"/>'
        for x, y in walls()
    )
    light, dark = (_numbers(colour) for colour in GROUND_COLOURS)
    return f"""
<mujoco model="point_maze">
  <compiler inertiafromgeom="true" angle="radian"/>
  <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
  <default>
    <joint damping="1" limited="false"/>
    <geom friction=".5 .1 .1" density="1000" margin="0.002" condim="1" contype="2"
          conaffinity="1"/>
  </default>
  <asset>
    <texture type="2d" name="ground" builtin="checker" rgb1="{light}" rgb2="{dark}"
             width="100" height="100"/>
    <material name="ground" texture="ground" texrepeat="20 20"/>
    <material name="wall" rgba="{_numbers(WALL_COLOUR)} 1"/>
  </asset>
  <visual>
    <headlight ambient=".4 .4 .4" diffuse=".8 .8 .8" specular="0.1 0.1 0.1"/>
    <map znear=".01"/>
  </visual>
  <worldbody>
    <geom type="plane" size="40 40 0.25" pos="0 0 {GROUND_Z}" contype="1" conaffinity="0"
          material="ground"/>
    <body pos="{ORIGIN} {ORIGIN} 0">
      <geom type="sphere" size="{BALL_RADIUS}" rgba="0 0 1 0" contype="1"/>
      <site size="{MARKER_RADIUS}" rgba="{_numbers(MARKER_COLOUR)} 1"/>
      <joint name="ball_x" type="slide" axis="1 0 0"/>
      <joint name="ball_y" type="slide" axis="0 1 0"/>
    </body>
{boxes}
  </worldbody>
  <actuator>
    <motor joint="ball_x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
    <motor joint="ball_y" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
  </actuator>
</mujoco>"""


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(str(value) for value in values)
