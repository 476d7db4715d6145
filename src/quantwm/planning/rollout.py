"""Costs of candidate plans, by rolling them out in the world model.

A cost is observed (`observe`) once a replan and then asked for candidates many times. Every kernel
sees one episode's candidates in chunks of one fixed size, padded where they do not fill it, and
one image at a time when observations are encoded. So an episode's numbers cannot depend on the
episodes beside it, on how many are planned together, or on the memory at hand.
"""

from collections.abc import Sequence
from math import ceil
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantwm.compute import device_of
from quantwm.errors import UsageError
from quantwm.planning.objective import Objective, as_parts, like
from quantwm.planning.recorded import Recorded
from quantwm.planning.workers import Workers
from quantwm.protocols import Episodes, FloatArray, Latent, Observation, Task, WorldModel

CPU_CHUNK, CUDA_CHUNK = 16, 128
"""Candidates that a kernel sees at once, unless the model says otherwise (`rollout_chunk`)."""


class ObservedCost(Protocol):
    """A `CostFunction` that can be told what the episodes look like now."""

    def observe(self, index: npt.NDArray[np.intp], states: FloatArray) -> None:
        """Episodes `index` are now in `states` (len(index), S)."""
        ...

    def __call__(self, index: npt.NDArray[np.intp], actions: Tensor) -> Tensor:
        """Costs (B, N) of candidate actions (B, N, H, D) of episodes `index`."""
        ...


class Rollouts:
    """Rolls candidates out from observed latents and asks the objective what they are worth.

    Args:
        world_model: in evaluation mode, on its device.
        objective: compares what is predicted with the goal.
        chunk: candidates that a kernel sees at once. Fixed, because results may depend on it
            within rounding: the model's `rollout_chunk` if it has one, else 16 (CUDA: 128).
        memory_budget: bytes that the chunks in flight may take together; changes no result.
        recorded: whether a GPU replays a recording of its kernels; changes no result.

    Raises:
        UsageError: a number below one.
    """

    def __init__(
        self,
        world_model: WorldModel,
        objective: Objective,
        *,
        chunk: int | None = None,
        memory_budget: int | None = None,
        recorded: bool = True,
    ) -> None:
        self._model, self._objective = world_model, objective
        self._device = device_of(world_model)
        self.chunk = _chunk_of(world_model, self._device) if chunk is None else chunk
        if self.chunk < 1:
            raise UsageError(f"chunk must be at least 1, got {self.chunk}")
        replay = recorded and self._device.type == "cuda"
        self._price = Recorded(self._cost) if replay else self._cost
        what = f"a rollout of {self.chunk} candidates"
        self.workers = Workers(self._device, memory_budget, what)
        self._gradient_workers = Workers(self._device, memory_budget, f"the gradient of {what}")

    def costs(self, latents: Sequence[Latent], goals: Sequence[Latent], actions: Tensor) -> Tensor:
        """Costs of candidates.

        Args:
            latents, goals: of each episode, tensors (1, 1, ...) on the model's device.
            actions: normalised, (B, N, H, D).

        Returns:
            (B, N) float32 on the CPU.
        """

        placed = actions.to(self._device)

        @torch.inference_mode()
        def run(job: tuple[int, int]) -> Tensor:
            episode, begin = job
            chunk = self._padded(placed[episode], begin)
            return self._price(latents[episode], goals[episode], chunk)

        return self._joined(self.workers.map(run, self._jobs(actions)), actions)

    def gradients(
        self, latents: Sequence[Latent], goals: Sequence[Latent], actions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Costs (B, N) and their derivatives with respect to the actions (B, N, H, D).

        Arguments as in `costs`; both results are float32 on the CPU.
        """
        # What was encoded in inference mode cannot take part in a backward pass; a copy can.
        latents = [_copied(latent) for latent in latents]

        def run(job: tuple[int, int]) -> tuple[Tensor, Tensor]:
            episode, begin = job
            chunk = self._padded(actions[episode], begin).requires_grad_()
            with torch.enable_grad():
                cost = self._cost(latents[episode], goals[episode], chunk.to(self._device))
            (gradient,) = torch.autograd.grad(cost.sum(), chunk)
            return cost.detach(), gradient.float()

        results = self._gradient_workers.map(run, self._jobs(actions))
        costs = self._joined([cost for cost, _ in results], actions)
        return costs, self._joined([gradient for _, gradient in results], actions)

    def _cost(self, latent: Latent, goal: Latent, chunk: Tensor) -> Tensor:
        """Costs (chunk,) float32 of candidates (chunk, H, D), all on the model's device."""
        predicted = self._model.rollout(
            latent, chunk[None], last_only=self._objective.mode == "last"
        )
        return self._objective(predicted, goal)[0].float()

    def _jobs(self, actions: Tensor) -> list[tuple[int, int]]:
        episodes, candidates = actions.shape[:2]
        return [(b, begin) for b in range(episodes) for begin in range(0, candidates, self.chunk)]

    def _padded(self, candidates: Tensor, begin: int) -> Tensor:
        return padded(candidates[begin : begin + self.chunk], self.chunk)

    def _joined(self, results: Sequence[Tensor], actions: Tensor) -> Tensor:
        """Chunks (chunk, ...), episode after episode → (B, N, ...) on the CPU, without padding."""
        episodes, candidates = actions.shape[:2]
        each = ceil(candidates / self.chunk)
        whole = torch.stack(list(results)).cpu()
        return whole.view(episodes, each * self.chunk, *whole.shape[2:])[:, :candidates]


class ModelCost:
    """The world model's own opinion: roll out in latent space, compare with the encoded goal.

    Args:
        world_model, task: what imagines, and what is observed.
        episodes: whose goals are encoded at once.
        objective: compares the two.
        chunk, memory_budget: see `Rollouts`.
    """

    def __init__(
        self,
        world_model: WorldModel,
        task: Task,
        episodes: Episodes,
        objective: Objective,
        *,
        chunk: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self._rollouts = Rollouts(world_model, objective, chunk=chunk, memory_budget=memory_budget)
        self._encoder = StateEncoder(world_model, task, episodes, memory_budget)
        everyone = np.arange(len(episodes))
        self._goals = self._encoder(everyone, episodes.goal)
        self._current: dict[int, Latent] = {}

    def observe(self, index: npt.NDArray[np.intp], states: FloatArray) -> None:
        """Encode the current frame of each episode, once a replan."""
        self._current.update(zip(index.tolist(), self._encoder(index, states), strict=True))

    def __call__(self, index: npt.NDArray[np.intp], actions: Tensor) -> Tensor:
        """Costs (B, N), float32 on the CPU."""
        return self._rollouts.costs(*self._ends(index), actions)

    def gradient(self, index: npt.NDArray[np.intp], actions: Tensor) -> tuple[Tensor, Tensor]:
        """Costs (B, N) and their derivatives (B, N, H, D), float32 on the CPU."""
        return self._rollouts.gradients(*self._ends(index), actions)

    def _ends(self, index: npt.NDArray[np.intp]) -> tuple[list[Latent], list[Latent]]:
        """Where the episodes are and where they should go."""
        episodes = index.tolist()
        return [self._current[i] for i in episodes], [self._goals[i] for i in episodes]


class StateEncoder:
    """Encodes states of episodes, one image a call.

    Args:
        world_model, task: what encodes, and what renders.
        episodes: whose layouts are rendered.
        memory_budget: see `Workers`.
    """

    def __init__(
        self,
        world_model: WorldModel,
        task: Task,
        episodes: Episodes,
        memory_budget: int | None = None,
    ) -> None:
        self._model, self._task, self._episodes = world_model, task, episodes
        self._workers = Workers(device_of(world_model), memory_budget, "encoding an image")

    def __call__(self, index: npt.NDArray[np.intp], states: FloatArray) -> list[Latent]:
        """Latents (1, 1, ...) of the states (len(index), S) of episodes `index`."""
        layout = self._episodes.select(index).layout
        observation = self._task.observe(states[:, None], layout)

        @torch.inference_mode()
        def encode(i: int) -> Latent:
            one: Observation = {
                "visual": observation["visual"][i : i + 1],
                "proprio": observation["proprio"][i : i + 1],
            }
            return self._model.encode(one)

        return self._workers.map(encode, range(len(index)))


def padded(rows: Tensor, size: int) -> Tensor:
    """(n ≤ size, ...) filled up to `size` rows with copies of its last one."""
    missing = size - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def _chunk_of(world_model: WorldModel, device: torch.device) -> int:
    if device.type != "cpu":
        return CUDA_CHUNK
    return int(getattr(world_model, "rollout_chunk", CPU_CHUNK))


def _copied(latent: Latent) -> Latent:
    return like({name: part.clone() for name, part in as_parts(latent).items()}, latent)
