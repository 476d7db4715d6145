"""DINO-WM's PushT task: a disc pushes a T-shaped block to a pose on a table.

Dynamics, drawing and success follow the public code of DINO-WM (github.com/gaoyuezhou/dino_wm,
`env/pusht/`); recorded states and frames of that code are the test fixtures.

Deviations: an angle is compared on the circle. The public rule does not wrap goals that it draws
at random, whose angles lie outside [0, 2π), and there passes some that are far off. Pictures leave
out contact marks, see `pusht_view`.

A state is that of the public code, agent and block and the agent's velocity. The engine also keeps
the block's velocity and its contacts' impulses, so a running simulation is not quite a function
of it: one that is rebuilt from its own state drifts apart slowly, by pixels in 25 steps of pushing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from quantwm.envs.arrays import check_actions, check_episodes, check_states, within
from quantwm.envs.pusht_physics import AGENT_RADIUS, BLOCKS, STATE_DIM, WINDOW, PushTWorld
from quantwm.envs.pusht_policy import POLICY, scripted
from quantwm.envs.pusht_view import draw
from quantwm.errors import unknown_name
from quantwm.protocols import BoolArray, Episodes, FloatArray, Layout, Observation
from quantwm.seeds import keyed_generator

SUCCESS_DISTANCE = 20.0
SUCCESS_ANGLE = np.pi / 9
GOAL_STEPS = 25
_LOW, _HIGH = -AGENT_RADIUS, WINDOW + AGENT_RADIUS
GoalSource = Literal["dset", "random_state"]
_GOAL_STREAM = 5


@dataclass(frozen=True)
class PushT:
    """The PushT task.

    Attributes:
        shape: of the block, one of `quantwm.envs.pusht_physics.BLOCKS`.
        goal_source: "dset": the state 25 actions later on a trajectory of the scripted policy,
            a trajectory an episode; "random_state": start and goal drawn independently, as the
            public code draws them.
    """

    shape: str = "T"
    goal_source: GoalSource = "dset"

    name = "pusht"
    action_dim = 2
    proprio_dim = 4
    policy = POLICY
    trajectory_steps = 50

    def __post_init__(self) -> None:
        if self.shape not in BLOCKS:
            raise unknown_name("block shape", self.shape, BLOCKS)
        if self.goal_source not in get_args(GoalSource):
            raise unknown_name("goal source", self.goal_source, get_args(GoalSource))

    def settings(self) -> dict[str, Any]:
        """Settings and version of the task, as JSON values."""
        return {"name": self.name, "version": 1, **asdict(self)}

    def episodes(self, seeds: Sequence[int]) -> Episodes:
        """Starts and goals; episode i depends on `seeds[i]` alone."""
        pairs = [self._start_and_goal(seed) for seed in seeds]
        start = np.stack([pair[0] for pair in pairs])
        goal = np.stack([pair[1] for pair in pairs])
        return Episodes(np.asarray(seeds, np.int64), start, goal, {})

    def _start_and_goal(self, seed: int) -> tuple[FloatArray, FloatArray]:
        if self.goal_source == "random_state":
            return self.random_state(seed)
        pairs = (self._of_trajectory(seed + (attempt << 32)) for attempt in count())
        # Few are drawn again: a block that is off the table is in no picture.
        return next(pair for pair in pairs if _on_table(np.stack(pair)).all())

    def _of_trajectory(self, seed: int) -> tuple[FloatArray, FloatArray]:
        """A start and a goal (7,) of the seed's trajectory, wherever they are."""
        states, actions = self.scripted([seed], self.trajectory_steps)
        latest = self.trajectory_steps - GOAL_STEPS
        first = int(keyed_generator(seed, _GOAL_STREAM).integers(0, latest, endpoint=True))
        # Executed again from the start's state alone, as the public code does, so that the goal
        # can be reached.
        world = PushTWorld(self.shape, states[0, first], settle=True)
        for action in actions[0, first : first + GOAL_STEPS]:
            world.step(action)
        return states[0, first], world.state

    @staticmethod
    def random_state(seed: int) -> tuple[FloatArray, FloatArray]:
        """A start and a goal (7,), drawn as by the public code from `RandomState(seed)`."""
        generator = np.random.RandomState(seed)

        def draw_state() -> FloatArray:
            agent = [generator.randint(50, 450) for _ in range(2)]
            block = [generator.randint(100, 400) for _ in range(2)]
            angle = generator.randn() * 2 * np.pi - np.pi
            return np.array([*agent, *block, angle, 0, 0], np.float64)

        return draw_state(), draw_state()

    def sample_layout(self, seeds: Sequence[int]) -> dict[str, npt.NDArray[np.int64]]:
        """Nothing: all worlds are alike."""
        del seeds
        return {}

    def scripted(self, seeds: list[int], steps: int) -> tuple[FloatArray, FloatArray]:
        """The scripted policies: states (B, steps + 1, 7) and raw actions (B, steps, 2)."""
        return scripted(self.shape, seeds, steps)

    def start(self, episodes: Episodes) -> "PushTSimulation":
        """A simulation at the episodes' start states, one physics step later.

        Raises:
            UsageError: a start or goal of another width, not finite, or off the table.
        """
        places = f"{_LOW:g} to {_HIGH:g} pixels"
        check_episodes("PushT", episodes, STATE_DIM, _on_table, places)
        return PushTSimulation(self.shape, episodes.start)

    def rollout(self, states: FloatArray, layout: Layout, actions: FloatArray) -> FloatArray:
        """True dynamics from blocks at rest: (B, 7), raw actions (B, T, 2) → states (B, T, 7)."""
        del layout
        check_states("PushT", states, STATE_DIM)
        check_actions("PushT", actions, self.action_dim)
        visited = np.empty((*actions.shape[:2], STATE_DIM))
        for state, moves, out in zip(states, actions, visited, strict=True):
            world = PushTWorld(self.shape, state, settle=False)
            for t, action in enumerate(moves.tolist()):
                out[t] = world.step(action)
        return visited

    def observe(self, states: FloatArray, layout: Layout) -> Observation:
        """Frames (B, T, 224, 224, 3) uint8 and proprioception (B, T, 4) of states (B, T, 7).

        Raises:
            UsageError: states of another width, or not finite.
        """
        del layout
        check_states("PushT", states, STATE_DIM)
        frames = draw(states.reshape(-1, STATE_DIM), self.shape)
        visual = frames.reshape(*states.shape[:2], *frames.shape[1:])
        return {"visual": visual, "proprio": self.proprio(states)}

    def proprio(self, states: FloatArray) -> npt.NDArray[np.float32]:
        """The agent's position and velocity, (..., 4)."""
        return states[..., [0, 1, 5, 6]].astype(np.float32)

    def distance(self, states: FloatArray, goals: FloatArray) -> FloatArray:
        """Distance in window pixels, an angle of π/9 counting as 20 of them.

        √(‖Δ(agent, block)‖² + (Δangle · 20 / (π/9))²): below 20 it implies success.
        """
        position, angle = _errors(states, goals)
        return np.asarray(np.hypot(position, angle * SUCCESS_DISTANCE / SUCCESS_ANGLE), np.float64)

    def success(self, states: FloatArray, goals: FloatArray) -> BoolArray:
        """‖Δ(agent, block)‖ < 20 pixels and |Δangle| < π/9."""
        position, angle = _errors(states, goals)
        return np.asarray((position < SUCCESS_DISTANCE) & (angle < SUCCESS_ANGLE))


class PushTSimulation:
    """Running PushT worlds, one an episode."""

    def __init__(self, shape: str, states: FloatArray) -> None:
        self._worlds = [PushTWorld(shape, state, settle=True) for state in states]
        self._states = np.stack([world.state for world in self._worlds])

    @property
    def states(self) -> FloatArray:
        """Current states (B, 7)."""
        return self._states

    def step(self, index: npt.NDArray[np.intp], actions: FloatArray) -> FloatArray:
        """Execute raw actions (len(index), T, 2); returns the states after each."""
        check_actions("PushT", actions, PushT.action_dim)
        visited = np.empty((*actions.shape[:2], STATE_DIM))
        for episode, moves, out in zip(index.tolist(), actions, visited, strict=True):
            for t, action in enumerate(moves.tolist()):
                out[t] = self._worlds[episode].step(action)
            self._states[episode] = self._worlds[episode].state
        return visited


def _on_table(states: FloatArray) -> BoolArray:
    """Whether agent and block are on the table, (B, 7) → (B,)."""
    return within(states[:, :4], _LOW, _HIGH)


def _errors(states: FloatArray, goals: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Distance of agent and block in pixels, and of the angles on the circle, in radians."""
    difference = states - goals
    position = np.linalg.norm(difference[..., :4], axis=-1)
    turned = np.abs(difference[..., 4]) % (2 * np.pi)
    return np.asarray(position), np.asarray(np.minimum(turned, 2 * np.pi - turned))
