"""Costs of candidate plans by the simulator: what planning could do with a perfect model."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantwm.compute import device_of
from quantwm.errors import UsageError
from quantwm.planning.objective import Objective, as_parts, like
from quantwm.planning.rollout import StateEncoder, padded
from quantwm.planning.simulators import Simulators
from quantwm.planning.workers import Workers
from quantwm.protocols import (
    ActionSpec,
    Episodes,
    FloatArray,
    Observation,
    Task,
    WorldModel,
)

CPU_IMAGES, CUDA_IMAGES = 16, 128
"""Images that are encoded at once; fixed, because results may depend on it within rounding."""


class _TrueDynamics:
    """What the oracles share: the simulator, started from the episodes' true states.

    Args:
        processes: that simulate at most, see `Simulators`.
    """

    def __init__(
        self, task: Task, episodes: Episodes, action_spec: ActionSpec, processes: int = 1
    ) -> None:
        self._task, self._episodes, self._spec = task, episodes, action_spec
        self._simulators = Simulators(task, processes)
        self._states = episodes.start.copy()

    def observe(self, index: npt.NDArray[np.intp], states: FloatArray) -> None:
        """Remember the true states."""
        self._states[index] = states

    def _final_states(self, index: npt.NDArray[np.intp], actions: Tensor) -> FloatArray:
        """Where the simulator ends after candidate actions (B, N, H, D): (B, N, S)."""
        batch, candidates = actions.shape[:2]
        raw = self._spec.denormalize(actions)
        repeated = np.repeat(index, candidates)
        final = self._simulators.final_states(
            self._states[repeated],
            self._episodes.select(repeated).layout,
            raw.reshape(-1, *raw.shape[2:]),
        )
        return final.reshape(batch, candidates, -1)


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
        *,
        memory_budget: int | None = None,
        processes: int = 1,
    ) -> None:
        if objective.mode != "last":
            raise UsageError("oracle-latent sees final frames only: objective mode must be 'last'")
        super().__init__(task, episodes, world_model.action_spec, processes)
        self._model, self._objective = world_model, objective
        device = device_of(world_model)
        self._images = CPU_IMAGES if device.type == "cpu" else CUDA_IMAGES
        self._workers = Workers(device, memory_budget, f"encoding {self._images} images")
        everyone = np.arange(len(episodes))
        encoder = StateEncoder(world_model, task, episodes, memory_budget)
        self._goals = encoder(everyone, episodes.goal)

    def __call__(self, index: npt.NDArray[np.intp], actions: Tensor) -> Tensor:
        """Costs (B, N), float32 on the CPU."""
        final = self._final_states(index, actions)
        rows = [self._costs(i, states) for i, states in zip(index.tolist(), final, strict=True)]
        return torch.stack(rows)

    def _costs(self, episode: int, states: FloatArray) -> Tensor:
        """Costs (N,) of final states (N, S) of one episode."""
        layout = self._episodes.select(np.full(len(states), episode)).layout
        # Rendered here and not by the workers: not every simulator may be asked by many threads.
        observation = self._task.observe(states[:, None], layout)
        frames = torch.from_numpy(observation["visual"])
        proprio = torch.from_numpy(observation["proprio"])
        goal = self._goals[episode]

        @torch.inference_mode()
        def run(begin: int) -> Tensor:
            part = slice(begin, begin + self._images)
            chunk: Observation = {
                "visual": padded(frames[part], self._images).numpy(),
                "proprio": padded(proprio[part], self._images).numpy(),
            }
            parts = as_parts(self._model.encode(chunk))
            candidates = like({name: tensor[None] for name, tensor in parts.items()}, goal)
            return self._objective(candidates, goal)[0].float().cpu()

        chunks = self._workers.map(run, range(0, len(states), self._images))
        return torch.cat(chunks)[: len(states)]
