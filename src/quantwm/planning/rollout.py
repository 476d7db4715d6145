"""Costs of candidate plans: by the world model, or by the simulator for the oracles.

A cost is observed (`observe`) once a replan and then asked for candidates many times. Every kernel
sees one episode's candidates in chunks of one fixed size, padded where they do not fill it, and
one image at a time when observations are encoded. So an episode's numbers cannot depend on the
episodes beside it, on how many are planned together, or on the memory at hand.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantwm.compute import device_of
from quantwm.errors import UsageError
from quantwm.planning.objective import Objective, as_parts, like
from quantwm.protocols import (
    ActionSpec,
    Episodes,
    FloatArray,
    Latent,
    Task,
    WorldModel,
)

CHUNK = 64
"""Candidates that a kernel sees at once; fixed, because results may depend on it."""


class ObservedCost(Protocol):
    """A `CostFunction` that can be told what the episodes look like now."""

    def observe(self, index: npt.NDArray[np.intp], states: FloatArray) -> None:
        """Episodes `index` are now in `states` (len(index), S)."""
        ...

    def __call__(self, index: npt.NDArray[np.intp], actions: Tensor) -> Tensor:
        """Costs (B, N) of candidate actions (B, N, H, D) of episodes `index`."""
        ...


class ModelCost:
    """The world model's own opinion: roll out in latent space, compare with the encoded goal."""

    def __init__(
        self,
        world_model: WorldModel,
        task: Task,
        episodes: Episodes,
        objective: Objective,
        chunk: int = CHUNK,
    ) -> None:
        if chunk < 1:
            raise UsageError(f"chunk must be at least 1, got {chunk}")
        self._model, self._task, self._episodes = world_model, task, episodes
        self._objective, self._chunk = objective, chunk
        self._device = device_of(world_model)
        everyone = np.arange(len(episodes))
        self._goals = encode_states(world_model, task, episodes, everyone, episodes.goal)
        self._current: dict[int, Latent] = {}

    def observe(self, index: npt.NDArray[np.intp], states: FloatArray) -> None:
        """Encode the current frame of each episode, once a replan."""
        latents = encode_states(self._model, self._task, self._episodes, index, states)
        self._current = dict(zip(index.tolist(), latents, strict=True))

    @torch.inference_mode()
    def __call__(self, index: npt.NDArray[np.intp], actions: Tensor) -> Tensor:
        """Costs (B, N), float32 on the CPU."""
        last_only = self._objective.mode == "last"
        rows = []
        for episode, candidates in zip(index.tolist(), actions, strict=True):
            costs = []
            for chunk, count in padded_chunks(candidates, self._chunk):
                predicted = self._model.rollout(
                    self._current[episode], chunk[None].to(self._device), last_only=last_only
                )
                cost = self._objective(predicted, self._goals[episode])
                costs.append(cost[0, :count].float().cpu())
            rows.append(torch.cat(costs))
        return torch.stack(rows)


class _TrueDynamics:
    """What the oracles share: the simulator, started from the episodes' true states."""

    def __init__(self, task: Task, episodes: Episodes, action_spec: ActionSpec) -> None:
        self._task, self._episodes, self._spec = task, episodes, action_spec
        self._states = episodes.start.copy()

    def observe(self, index: npt.NDArray[np.intp], states: FloatArray) -> None:
        """Remember the true states."""
        self._states[index] = states

    def _final_states(self, index: npt.NDArray[np.intp], actions: Tensor) -> FloatArray:
        """Where the simulator ends after candidate actions (B, N, H, D): (B, N, S)."""
        batch, candidates = actions.shape[:2]
        raw = self._spec.denormalize(actions)
        repeated = np.repeat(index, candidates)
        visited = self._task.rollout(
            self._states[repeated],
            self._episodes.select(repeated).layout,
            raw.reshape(-1, *raw.shape[2:]),
        )
        return visited[:, -1].reshape(batch, candidates, -1)


class OracleStateCost(_TrueDynamics):
    """The simulator's own dynamics and distance: what the planner could do with a perfect model."""

    def __call__(self, index: npt.NDArray[np.intp], actions: Tensor) -> Tensor:
        """Final distance to the goal (B, N)."""
        final = self._final_states(index, actions)
        goals = np.repeat(self._episodes.goal[index][:, None], final.shape[1], axis=1)
        return torch.from_numpy(self._task.distance(final, goals).astype(np.float32))


class OracleLatentCost(_TrueDynamics):
    """The simulator's true final frame, encoded, under the model's own objective.

    Against oracle-state it shows what representation and objective cost; against the model, what
    its dynamics cost.
    """

    def __init__(
        self,
        world_model: WorldModel,
        task: Task,
        episodes: Episodes,
        objective: Objective,
        chunk: int = CHUNK,
    ) -> None:
        if objective.mode != "last":
            raise UsageError("oracle-latent sees final frames only: objective mode must be 'last'")
        super().__init__(task, episodes, world_model.action_spec)
        self._model, self._objective, self._chunk = world_model, objective, chunk
        everyone = np.arange(len(episodes))
        self._goals = encode_states(world_model, task, episodes, everyone, episodes.goal)

    @torch.inference_mode()
    def __call__(self, index: npt.NDArray[np.intp], actions: Tensor) -> Tensor:
        """Costs (B, N), float32 on the CPU."""
        final = torch.from_numpy(self._final_states(index, actions))
        rows = []
        for episode, states in zip(index.tolist(), final, strict=True):
            costs = []
            for chunk, count in padded_chunks(states, self._chunk):
                layout = self._episodes.select(np.full(len(chunk), episode)).layout
                observation = self._task.observe(chunk.numpy()[:, None], layout)
                parts = as_parts(self._model.encode(observation))
                candidates = {name: part[None] for name, part in parts.items()}
                goal = self._goals[episode]
                cost = self._objective(like(candidates, goal), goal)
                costs.append(cost[0, :count].float().cpu())
            rows.append(torch.cat(costs))
        return torch.stack(rows)


@torch.inference_mode()
def encode_states(
    world_model: WorldModel,
    task: Task,
    episodes: Episodes,
    index: npt.NDArray[np.intp],
    states: FloatArray,
) -> list[Latent]:
    """Latents (1, 1, ...) of the states (len(index), S) of episodes `index`, one image a call."""
    layout = episodes.select(index).layout
    observation = task.observe(states[:, None], layout)
    return [
        world_model.encode(
            {
                "visual": observation["visual"][i : i + 1],
                "proprio": observation["proprio"][i : i + 1],
            }
        )
        for i in range(len(index))
    ]


def padded_chunks(rows: Tensor, size: int) -> list[tuple[Tensor, int]]:
    """Split (N, ...) into chunks of exactly `size` rows, the last filled with copies of its last
    row; each with how many of its rows are real."""
    chunks = []
    for begin in range(0, len(rows), size):
        chunk = rows[begin : begin + size]
        count = len(chunk)
        if count < size:
            filler = chunk[-1:].expand(size - count, *chunk.shape[1:])
            chunk = torch.cat([chunk, filler])
        chunks.append((chunk, count))
    return chunks
