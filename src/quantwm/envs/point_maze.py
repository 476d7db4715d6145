"""DINO-WM's PointMaze task: a ball is driven through a U-shaped maze.

Dynamics, start and goal regions and success follow the public code of DINO-WM
(github.com/gaoyuezhou/dino_wm, `env/pointmaze/`), whose maze is D4RL's maze2d-umaze; recorded
states and frames of that code, run on MuJoCo's own package, are the test fixtures.

Two deviations: the solver starts from zero at every environment step, so that a state is all that
the next one depends on; and a frame shows the position of its state. In the public code a frame
taken after a step shows where the ball was 10 ms before, at most 0.06.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from quantwm.envs import point_maze_view
from quantwm.envs.arrays import check_actions, check_episodes, check_states
from quantwm.envs.point_maze_physics import is_free, step
from quantwm.envs.point_maze_policy import POLICY, scripted
from quantwm.errors import unknown_name
from quantwm.protocols import BoolArray, Episodes, FloatArray, Layout, Observation

SUCCESS_DISTANCE = 0.5
STATE_DIM = 4
"""Position x, y; velocity x, y."""
_START_SPEED = 5.2262554
Renderer = Literal["drawn", "mujoco"]


@dataclass(frozen=True)
class PointMaze:
    """The PointMaze task.

    Attributes:
        renderer: "drawn" needs no GL library; "mujoco" is MuJoCo's own renderer.
    """

    renderer: Renderer = "drawn"

    name = "point_maze"
    action_dim = 2
    proprio_dim = 4
    policy = POLICY
    trajectory_steps = 50

    def __post_init__(self) -> None:
        if self.renderer not in get_args(Renderer):
            raise unknown_name("renderer", self.renderer, get_args(Renderer))

    def settings(self) -> dict[str, Any]:
        """Settings and version of the task, as JSON values."""
        return {"name": self.name, "version": 1, **asdict(self)}

    def episodes(self, seeds: Sequence[int]) -> Episodes:
        """Starts and goals anywhere in the corridors, as DINO-WM draws them from each seed."""
        pairs = [self.random_state(seed) for seed in seeds]
        start = np.stack([pair[0] for pair in pairs])
        goal = np.stack([pair[1] for pair in pairs])
        return Episodes(np.asarray(seeds, np.int64), start, goal, {})

    @staticmethod
    def random_state(seed: int) -> tuple[FloatArray, FloatArray]:
        """A start and a goal (4,), drawn as by the public code from `RandomState(seed)`."""
        generator = np.random.RandomState(seed)

        def draw_state() -> FloatArray:
            while True:
                x, y = generator.uniform(0.5, 3.1), generator.uniform(0.5, 3.1)
                if x <= 1.1 or x >= 2.5 or y >= 2.5:
                    break
            speed = [generator.uniform(-_START_SPEED, _START_SPEED) for _ in range(2)]
            return np.array([x, y, *speed])

        return draw_state(), draw_state()

    def sample_layout(self, seeds: Sequence[int]) -> dict[str, npt.NDArray[np.int64]]:
        """Nothing: all mazes are alike."""
        del seeds
        return {}

    def scripted(self, seeds: list[int], steps: int) -> tuple[FloatArray, FloatArray]:
        """The scripted policies: states (B, steps + 1, 4) and raw actions (B, steps, 2)."""
        return scripted(self, seeds, steps)

    def start(self, episodes: Episodes) -> "PointMazeSimulation":
        """A simulation at the episodes' start states.

        Raises:
            UsageError: a start or goal of another width, not finite, or in or behind a wall.
        """
        places = "the corridors between 0.3 and 3.3"
        check_episodes("PointMaze", episodes, STATE_DIM, is_free, places)
        return PointMazeSimulation(self, episodes.start.copy())

    def rollout(self, states: FloatArray, layout: Layout, actions: FloatArray) -> FloatArray:
        """True dynamics: states (B, 4), raw actions (B, T, 2) → states (B, T, 4).

        Raises:
            UsageError: states or actions of another width, or not finite.
        """
        del layout
        check_states("PointMaze", states, STATE_DIM)
        check_actions("PointMaze", actions, self.action_dim)
        visited = np.empty((*actions.shape[:2], STATE_DIM))
        for t in range(actions.shape[1]):
            states = step(states, actions[:, t])
            visited[:, t] = states
        return visited

    def observe(self, states: FloatArray, layout: Layout) -> Observation:
        """Frames (B, T, 224, 224, 3) uint8 and proprioception (B, T, 4) of states (B, T, 4).

        Raises:
            UsageError: states of another width, or not finite.
        """
        del layout
        check_states("PointMaze", states, STATE_DIM)
        draw = point_maze_view.draw if self.renderer == "drawn" else point_maze_view.render
        frames = draw(states.reshape(-1, STATE_DIM))
        visual = frames.reshape(*states.shape[:2], *frames.shape[1:])
        return {"visual": visual, "proprio": self.proprio(states)}

    def proprio(self, states: FloatArray) -> npt.NDArray[np.float32]:
        """The whole state, (..., 4)."""
        return states.astype(np.float32)

    def distance(self, states: FloatArray, goals: FloatArray) -> FloatArray:
        """Euclidean distance of the positions; velocities do not count."""
        return np.asarray(np.linalg.norm((goals - states)[..., :2], axis=-1), np.float64)

    def success(self, states: FloatArray, goals: FloatArray) -> BoolArray:
        """Distance below 0.5."""
        return np.asarray(self.distance(states, goals) < SUCCESS_DISTANCE)


class PointMazeSimulation:
    """Running PointMaze episodes; a step is a function of the state, so only states are kept."""

    def __init__(self, task: PointMaze, states: FloatArray) -> None:
        self._task, self._states = task, states

    @property
    def states(self) -> FloatArray:
        """Current states (B, 4)."""
        return self._states

    def step(self, index: npt.NDArray[np.intp], actions: FloatArray) -> FloatArray:
        """Execute raw actions (len(index), T, 2); returns the states after each."""
        visited = self._task.rollout(self._states[index], {}, actions)
        self._states[index] = visited[:, -1]
        return visited
