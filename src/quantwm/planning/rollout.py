"""Costs of candidate plans, by rolling them out in the world model.

A cost is observed (`observe`) once a replan and then asked for candidates many times. An episode's
candidates come in chunks of one fixed size, padded where they do not fill it. A CPU core takes one
chunk at a time and a GPU a fixed number of them, of any episodes, padded likewise; observations are
encoded one image at a time. So kernels always see the same shapes, and an episode's numbers cannot
depend on the episodes beside it, on how many are planned together, or on the memory at hand.
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

CPU_CHUNK, CUDA_CHUNK = 16, 64
"""Candidates in a chunk, unless the model says otherwise for the CPU (`rollout_chunk`)."""
_CORES = 16
"""How many times what keeps a CPU core busy a GPU's kernels see."""


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
        chunk: candidates of one episode. Fixed, because results may depend on it within rounding:
            the model's `rollout_chunk` if it has one, else 16 (CUDA: 64).
        together: chunks that a kernel sees, fixed likewise: 1, and on CUDA so many that a kernel
            has enough to do.
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
        together: int | None = None,
        memory_budget: int | None = None,
        recorded: bool = True,
    ) -> None:
        self._model, self._objective = world_model, objective
        self._device = device_of(world_model)
        self.chunk = _chunk_of(world_model, self._device) if chunk is None else chunk
        if self.chunk < 1:
            raise UsageError(f"chunk must be at least 1, got {self.chunk}")
        if together is None:
            together = chunks_together(world_model, self._device, self.chunk)
        self.together = together
        if self.together < 1:
            raise UsageError(f"together must be at least 1, got {self.together}")
        replay = recorded and self._device.type == "cuda"
        self._price = Recorded(self._cost) if replay else self._cost
        what = "a rollout of {} candidates"
        self.workers = Workers(self._device, memory_budget, what.format(self.chunk * self.together))
        self._gradient_workers = Workers(
            self._device, memory_budget, f"the gradient of {what.format(self.chunk)}"
        )

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
        def run(jobs: Sequence[tuple[int, int]]) -> Tensor:
            episodes = [episode for episode, _ in jobs]
            chunks = [self._padded(placed[episode], begin) for episode, begin in jobs]
            return self._price(
                _stacked([latents[episode] for episode in episodes], self.together),
                _stacked([goals[episode] for episode in episodes], self.together),
                padded(torch.stack(chunks), self.together),
            )

        jobs = self._jobs(actions)
        kernels = [jobs[i : i + self.together] for i in range(0, len(jobs), self.together)]
        priced = torch.cat(self.workers.map(run, kernels))[: len(jobs)]
        return self._joined(priced, actions)

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
                (cost,) = self._cost(latents[episode], goals[episode], chunk[None].to(self._device))
            (gradient,) = torch.autograd.grad(cost.sum(), chunk)
            return cost.detach(), gradient.float()

        results = self._gradient_workers.map(run, self._jobs(actions))
        costs, gradients = (torch.stack(parts) for parts in zip(*results, strict=True))
        return self._joined(costs, actions), self._joined(gradients, actions)

    def _cost(self, latent: Latent, goal: Latent, chunks: Tensor) -> Tensor:
        """Costs (C, chunk) float32 of candidates (C, chunk, H, D), all on the model's device."""
        predicted = self._model.rollout(latent, chunks, last_only=self._objective.mode == "last")
        return self._objective(predicted, goal).float()

    def _jobs(self, actions: Tensor) -> list[tuple[int, int]]:
        episodes, candidates = actions.shape[:2]
        return [(b, begin) for b in range(episodes) for begin in range(0, candidates, self.chunk)]

    def _padded(self, candidates: Tensor, begin: int) -> Tensor:
        return padded(candidates[begin : begin + self.chunk], self.chunk)

    def _joined(self, chunks: Tensor, actions: Tensor) -> Tensor:
        """(B · chunks an episode, chunk, ...) → (B, N, ...) on the CPU, without padding."""
        episodes, candidates = actions.shape[:2]
        each = ceil(candidates / self.chunk)
        whole = chunks.cpu()
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


def chunks_together(world_model: WorldModel, device: torch.device, chunk: int) -> int:
    """How many chunks a kernel sees where many episodes are planned."""
    if device.type == "cpu":
        return 1
    return max(1, _CORES * _core_chunk(world_model) // chunk)


def _stacked(latents: Sequence[Latent], size: int) -> Latent:
    """Latents (1, 1, ...) of n ≤ size chunks as one (size, 1, ...), the last one repeated."""
    parts = [as_parts(latent) for latent in latents]
    whole = {name: padded(torch.cat([part[name] for part in parts]), size) for name in parts[0]}
    return like(whole, latents[0])


def _chunk_of(world_model: WorldModel, device: torch.device) -> int:
    return _core_chunk(world_model) if device.type == "cpu" else CUDA_CHUNK


def _core_chunk(world_model: WorldModel) -> int:
    return int(getattr(world_model, "rollout_chunk", CPU_CHUNK))


def _copied(latent: Latent) -> Latent:
    return like({name: part.clone() for name, part in as_parts(latent).items()}, latent)
