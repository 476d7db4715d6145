"""Candidate plans of episodes: where they come from, what a model imagines of them, what they cost.

The diagnostics share this. Everything that grows with the number of candidates is computed
`CHUNK` of them at a time, and results are float32 on the CPU whatever the model computes in.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr
from torch import Tensor

from quantwm.compute import device_of
from quantwm.envs import get_task
from quantwm.errors import NonFiniteError, UsageError
from quantwm.evaluation import check_fits
from quantwm.planning.defaults import default_planner
from quantwm.planning.objective import Objective, as_parts, like
from quantwm.planning.population import PopulationPlanner
from quantwm.planning.rollout import ModelCost
from quantwm.protocols import (
    ActionSpec,
    CostFunction,
    Episodes,
    FloatArray,
    Latent,
    Planner,
    Task,
    WorldModel,
)
from quantwm.seeds import SeedBlock, episode_seeds

CHUNK = 16


@dataclass(frozen=True)
class Case:
    """One episode at its start.

    Attributes:
        task: that it belongs to.
        episode: one episode.
        start: (S,) the state it starts in.
    """

    task: Task
    episode: Episodes
    start: FloatArray

    def observed(self, model: WorldModel) -> Latent:
        """The first frame as `model` encodes it, (1, 1, ...), as the model gives it."""
        return self._latent(model, self.start[None, None])

    def goal(self, model: WorldModel) -> Latent:
        """The goal as `model` encodes it, (1, 1, ...), float32 on the CPU."""
        return on_cpu(self._latent(model, self.episode.goal[:, None]))

    def visited(self, actions: Tensor, action_spec: ActionSpec) -> FloatArray:
        """True states (N, H, S) at the frames that a model predicts for actions (N, H, D)."""
        repeated = self.episode.select(np.zeros(len(actions), np.int64))
        starts = np.repeat(self.start[None], len(actions), axis=0)
        states = self.task.rollout(starts, repeated.layout, action_spec.denormalize(actions))
        return states[:, action_spec.frameskip - 1 :: action_spec.frameskip]

    def encoded(self, model: WorldModel, states: FloatArray) -> Latent:
        """States (N, K, S) as `model` encodes them, (N, K, ...), float32 on the CPU."""
        flat = states.reshape(-1, 1, states.shape[-1])
        latents = [
            on_cpu(self._latent(model, flat[begin : begin + CHUNK]))
            for begin in range(0, len(flat), CHUNK)
        ]
        whole = joined(latents)
        shaped = {n: p.reshape(*states.shape[:2], *p.shape[2:]) for n, p in as_parts(whole).items()}
        return like(shaped, whole)

    @torch.inference_mode()
    def _latent(self, model: WorldModel, states: FloatArray) -> Latent:
        layout = self.episode.select(np.zeros(len(states), np.int64)).layout
        return model.encode(self.task.observe(states, layout))


@dataclass(frozen=True)
class Cases:
    """Episodes to diagnose, and the planner whose candidates are looked at.

    Attributes:
        task, planner: as asked for, or the defaults.
        episodes: starts, goals and layouts.
        starts: (E, S) states.
    """

    task: Task
    planner: PopulationPlanner
    episodes: Episodes
    starts: FloatArray

    @classmethod
    def resolve(
        cls,
        world_model: WorldModel,
        task: str | Task,
        planner: Planner | None,
        episodes: int,
        seed: int,
        block: SeedBlock,
    ) -> "Cases":
        """Check that task, model and planner go together, and build the episodes.

        Raises:
            UsageError: an unknown task or a planner that has no population.
            MismatchError: the model was trained in another task.
        """
        task = get_task(task) if isinstance(task, str) else task
        check_fits(world_model, task)
        chosen = planner or default_planner(task.name)
        if not isinstance(chosen, PopulationPlanner):
            raise UsageError("candidates come from a planner with a population: cem, icem or mppi")
        drawn = task.episodes(episode_seeds(block, seed, episodes))
        return cls(task, chosen, drawn, task.start(drawn).states)

    @property
    def elites(self) -> int:
        """How many of a population's candidates count as its cheapest."""
        return int(getattr(self.planner, "elites", 0)) or max(1, self.planner.samples // 8)

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[Case]:
        for i in range(len(self)):
            yield Case(self.task, self.episodes.select(np.array([i])), self.starts[i])


@dataclass(frozen=True)
class Populations:
    """Candidates (N, H, D) that a planner asks about in its first plan of an episode.

    Attributes:
        first: of the first optimisation step: plans at random.
        last: of the last one: plans near the one that is chosen, among which ranks decide.
    """

    first: Tensor
    last: Tensor


def first_population(planner: PopulationPlanner, case: Case, action_spec: ActionSpec) -> Tensor:
    """Candidates (N, H, D) as the planner draws them first; no model has a say in them."""
    shape = (planner.horizon, action_spec.model_dim)
    mean, deviation = np.zeros(shape, np.float32), np.full(shape, planner.sigma, np.float32)
    seed = int(case.episode.seeds[0])
    return torch.from_numpy(planner.candidates(mean, deviation, seed, 0, 0, action_spec))


def planned_populations(planner: Planner, model: WorldModel, case: Case) -> Populations:
    """Let a model plan once from the start of an episode, and keep what the planner asked about.

    Raises:
        NonFiniteError: a cost was NaN or infinite.
    """
    cost = ModelCost(model, case.task, case.episode, Objective(model.objective_weights))
    cost.observe(np.array([0]), case.start[None])
    recording = _Recording(cost)
    plan = planner.plan(recording, case.episode.seeds, 0, model.action_spec)
    if plan.failures[0] is not None:
        raise NonFiniteError(f"the float model cannot plan: {plan.failures[0]}")
    return Populations(recording.asked[0], recording.asked[-1])


class _Recording:
    """A cost of one episode that keeps the first and the last candidates it is asked about."""

    def __init__(self, cost: CostFunction) -> None:
        self._cost = cost
        self.asked: list[Tensor] = []

    def __call__(self, index: npt.NDArray[np.intp], actions: Tensor) -> Tensor:
        self.asked = [*self.asked[:1], actions[0].clone()]
        return self._cost(index, actions)


@dataclass(frozen=True)
class Imagination:
    """A model in one episode, whose start and goal it has encoded.

    Attributes:
        model: on its device, in its compute type.
        observed: the first frame, (1, 1, ...), as the model gave it.
        goal: (1, 1, ...), float32 on the CPU.
        name: of the model, for errors.
    """

    model: WorldModel
    observed: Latent
    goal: Latent
    name: str = "the model"

    @classmethod
    def of(cls, model: WorldModel, case: Case, name: str = "the model") -> "Imagination":
        """Encode both."""
        return cls(model, case.observed(model), case.goal(model), name)

    @torch.inference_mode()
    def imagine(self, actions: Tensor, *, last_only: bool = False) -> Latent:
        """What the model imagines of at most `CHUNK` candidates.

        Args:
            actions: normalised, (N, H, D).

        Returns:
            (N, H + 1, ...), the observed frame first, or (N, 1, ...) with `last_only`; float32 on
            the CPU.
        """
        candidates = actions[None].to(device_of(self.model))
        predicted = self.model.rollout(self.observed, candidates, last_only=last_only)
        parts = {name: part[0].float().cpu() for name, part in as_parts(predicted).items()}
        return like(parts, predicted)

    def costs(self, latents: Latent) -> FloatArray:
        """Costs (N,) of the last frames of latents (N, K, ...) by the model's objective.

        Raises:
            NonFiniteError: some are NaN or infinite.
        """
        last = {name: part[None, :, -1:] for name, part in as_parts(latents).items()}
        objective = Objective(self.model.objective_weights)
        costs = np.asarray(objective(like(last, latents), self.goal)[0].numpy(), np.float64)
        bad = int((~np.isfinite(costs)).sum())
        if bad:
            raise NonFiniteError(
                f"{bad} of {len(costs)} candidates have a cost by {self.name} that is NaN or "
                "infinite: look at its weights, or take another scheme or more bits"
            )
        return costs


def rank_correlation(costs: FloatArray, others: FloatArray) -> float:
    """Spearman's of two costs (N,) of the same candidates; 0 where either are all alike."""
    if np.ptp(costs) == 0 or np.ptp(others) == 0:
        return 0.0
    return float(spearmanr(costs, others).statistic)


def top_k_overlap(costs: FloatArray, others: FloatArray, k: int) -> float:
    """Share of the k cheapest by the one that are among the k cheapest by the other."""
    ours, theirs = (np.argsort(c, kind="stable")[:k] for c in (costs, others))
    return len(np.intersect1d(ours, theirs)) / k


def relative_error(error: FloatArray, size: FloatArray) -> FloatArray:
    """√(error / size) of sums of squares; 0 where there is no error at all."""
    return np.sqrt(np.divide(error, size, out=np.zeros_like(error), where=error != 0))


def squares_by_frame(part: Tensor) -> FloatArray:
    """Sums of squares (K,) of (N, K, ...) over everything but frames."""
    summed = part.double().square().transpose(0, 1).flatten(1).sum(1)
    return np.asarray(summed.numpy(), np.float64)


def on_cpu(latent: Latent) -> Latent:
    """The same latent, float32 on the CPU."""
    return like({name: part.float().cpu() for name, part in as_parts(latent).items()}, latent)


def joined(latents: list[Latent]) -> Latent:
    """Latents one after the other in their first dimension."""
    names = as_parts(latents[0])
    return like({n: torch.cat([as_parts(x)[n] for x in latents]) for n in names}, latents[0])


def listed(values: FloatArray) -> list[float]:
    """JSON values."""
    return [float(value) for value in values]
