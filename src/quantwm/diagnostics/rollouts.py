"""What a world model gets wrong when it imagines, and what that does to its choice of plans.

The same candidates are rolled out in the model and in the simulator. The simulator's frames,
encoded by the same encoder, are what the model should have predicted; the cost of the last of
them is what it should have thought of a candidate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from quantwm.compute import device_of, placed, resolve_device, resolve_dtype
from quantwm.envs import get_task
from quantwm.errors import UsageError
from quantwm.evaluation import check_fits
from quantwm.planning.defaults import default_planner
from quantwm.planning.objective import Objective, as_parts, like
from quantwm.planning.population import PopulationPlanner
from quantwm.protocols import Episodes, FloatArray, Latent, Observation, Task, WorldModel
from quantwm.seeds import SeedBlock, episode_seeds

_CHUNK = 16


@dataclass(frozen=True)
class RolloutDiagnosis:
    """How far imagined rollouts are from what happens, and how candidates are ranked by them.

    Attributes:
        error: part of the latent → (H,) relative L2 error of the latent after each model step,
            √(Σ‖imagined − true‖² / Σ‖true‖²) over episodes and candidates.
        still: the same of a model that predicts that nothing changes.
        rank_correlation: (E,) Spearman's of the model's and the true costs of an episode's
            candidates; 0 where either are all alike.
        elite_overlap: (E,) share of the model's cheapest candidates that are truly among the
            cheapest.
        elites: how many candidates count as cheapest.
        regret: (E,) distance to the goal that the model's favourite ends at, above that of the
            best candidate; in the task's units.
        true_regret: (E,) the same of the candidate that the true costs favour: what is lost even
            if the imagined frames were right.
    """

    error: Mapping[str, FloatArray]
    still: Mapping[str, FloatArray]
    rank_correlation: FloatArray
    elite_overlap: FloatArray
    elites: int
    regret: FloatArray
    true_regret: FloatArray

    def to_dict(self) -> dict[str, Any]:
        """Means over episodes, and the errors by step, as JSON values."""
        return {
            "error": {name or "latent": _listed(values) for name, values in self.error.items()},
            "still": {name or "latent": _listed(values) for name, values in self.still.items()},
            "rank_correlation": float(self.rank_correlation.mean()),
            "elite_overlap": float(self.elite_overlap.mean()),
            "elites": self.elites,
            "regret": float(self.regret.mean()),
            "true_regret": float(self.true_regret.mean()),
            "episodes": len(self.regret),
        }


def diagnose_rollouts(
    world_model: WorldModel,
    task: str | Task,
    *,
    episodes: int = 16,
    seed: int = 0,
    block: SeedBlock = "tuning",
    planner: PopulationPlanner | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> RolloutDiagnosis:
    """Compare imagined with true rollouts of the planner's first candidates from the start.

    Args:
        world_model: float or quantized.
        task: a task, or the name of one.
        episodes, seed, block: whose starts and goals; by default none of the evaluation's.
        planner: whose first population of candidates; default: the compact settings' CEM.
        device, dtype: as in `evaluate`.
        progress: called with (episodes done, of how many).

    Raises:
        UsageError: a planner that has no population.
        MismatchError: the model was trained in another task.
    """
    task = get_task(task) if isinstance(task, str) else task
    check_fits(world_model, task)
    planner = planner or default_planner(task.name)  # type: ignore[assignment]
    if not isinstance(planner, PopulationPlanner):
        raise UsageError("candidates come from a planner with a population: cem, icem or mppi")
    target = resolve_device(device)
    model = placed(world_model, target, resolve_dtype(dtype, target))
    objective = Objective(world_model.objective_weights)
    elites = int(getattr(planner, "elites", 0)) or max(1, planner.samples // 8)
    goals = task.episodes(episode_seeds(block, seed, episodes))
    starts = task.start(goals).states
    sums, ranks = _Sums(), _Ranks(elites)
    for i in range(episodes):
        actions = _first_population(planner, int(goals.seeds[i]), model)
        one = goals.select(np.array([i]))
        visited = _visited(task, one, starts[i], actions, model)
        imagined = _imagined(model, task, one, starts[i], actions)
        true = _encoded(model, task, one, visited)
        goal = _encoded(model, task, one, one.goal[:, None])
        sums.add(imagined, true)
        ends = task.distance(visited[:, -1], np.repeat(one.goal, len(visited), axis=0))
        ranks.add(_costs(objective, imagined, goal), _costs(objective, true, goal), ends)
        if progress is not None:
            progress(i + 1, episodes)
    return RolloutDiagnosis(
        *sums.relative(),
        np.asarray(ranks.correlation),
        np.asarray(ranks.overlap),
        elites,
        np.asarray(ranks.regret),
        np.asarray(ranks.true_regret),
    )


@dataclass
class _Sums:
    """Squared norms by part and step."""

    wrong: dict[str, FloatArray] = field(default_factory=dict)
    moved: dict[str, FloatArray] = field(default_factory=dict)
    whole: dict[str, FloatArray] = field(default_factory=dict)

    def add(self, imagined: Latent, true: Latent) -> None:
        """Imagined latents (N, H + 1, ...), the observed frame first, and true ones (N, H, ...)."""
        for name, target in as_parts(true).items():
            guess = as_parts(imagined)[name]
            rows = (
                (self.wrong, guess[:, 1:] - target),
                (self.moved, guess[:, :1] - target),
                (self.whole, target),
            )
            for sums, difference in rows:
                squares = difference.double().square().transpose(0, 1).flatten(1).sum(1)
                sums[name] = sums.get(name, 0.0) + squares.numpy()

    def relative(self) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
        """Errors of the model and of standing still, by part, (H,) each."""
        return (
            {name: np.sqrt(self.wrong[name] / self.whole[name]) for name in self.whole},
            {name: np.sqrt(self.moved[name] / self.whole[name]) for name in self.whole},
        )


@dataclass
class _Ranks:
    """How episodes' candidates are ranked."""

    elites: int
    correlation: list[float] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    regret: list[float] = field(default_factory=list)
    true_regret: list[float] = field(default_factory=list)

    def add(self, costs: FloatArray, true_costs: FloatArray, distances: FloatArray) -> None:
        """Costs by the model and by the simulator's frames, and final distances, (N,) each."""
        flat = np.ptp(costs) == 0 or np.ptp(true_costs) == 0
        self.correlation.append(0.0 if flat else float(spearmanr(costs, true_costs).statistic))
        ours, theirs = (np.argsort(c, kind="stable")[: self.elites] for c in (costs, true_costs))
        self.overlap.append(len(np.intersect1d(ours, theirs)) / self.elites)
        self.regret.append(float(distances[ours[0]] - distances.min()))
        self.true_regret.append(float(distances[theirs[0]] - distances.min()))


def _first_population(planner: PopulationPlanner, seed: int, model: WorldModel) -> Tensor:
    """Candidates (N, H, D) as the planner draws them first."""
    shape = (planner.horizon, model.action_spec.model_dim)
    mean, deviation = np.zeros(shape, np.float32), np.full(shape, planner.sigma, np.float32)
    return torch.from_numpy(planner.candidates(mean, deviation, seed, 0, 0, model.action_spec))


def _visited(
    task: Task, episode: Episodes, start: FloatArray, actions: Tensor, model: WorldModel
) -> FloatArray:
    """True states at the frames that the model predicts, (N, H, S)."""
    candidates = len(actions)
    repeated = episode.select(np.zeros(candidates, np.int64))
    raw = model.action_spec.denormalize(actions)
    states = task.rollout(np.repeat(start[None], candidates, axis=0), repeated.layout, raw)
    return states[:, model.action_spec.frameskip - 1 :: model.action_spec.frameskip]


@torch.inference_mode()
def _imagined(
    model: WorldModel, task: Task, episode: Episodes, start: FloatArray, actions: Tensor
) -> Latent:
    """Latents (N, H + 1, ...), float32 on the CPU."""
    first = model.encode(task.observe(start[None, None], episode.layout))
    chunks = [
        _on_cpu(model.rollout(first, part[None].to(device_of(model))), batched=True)
        for part in torch.split(actions, _CHUNK)
    ]
    return _joined(chunks)


@torch.inference_mode()
def _encoded(model: WorldModel, task: Task, episode: Episodes, states: FloatArray) -> Latent:
    """Latents (N, K, ...) of states (N, K, S), float32 on the CPU."""
    candidates, frames = states.shape[:2]
    flat = states.reshape(-1, 1, states.shape[-1])
    chunks = []
    for begin in range(0, len(flat), _CHUNK):
        part = flat[begin : begin + _CHUNK]
        layout = episode.select(np.zeros(len(part), np.int64)).layout
        observation: Observation = task.observe(part, layout)
        chunks.append(_on_cpu(model.encode(observation), batched=False))
    whole = _joined(chunks)
    shaped = {
        name: part.reshape(candidates, frames, *part.shape[2:])
        for name, part in as_parts(whole).items()
    }
    return like(shaped, whole)


def _costs(objective: Objective, latents: Latent, goal: Latent) -> FloatArray:
    """Costs (N,) of the last frames of latents (N, K, ...)."""
    candidates = like({name: part[None, :, -1:] for name, part in as_parts(latents).items()}, goal)
    return np.asarray(objective(candidates, goal)[0].numpy(), np.float64)


def _on_cpu(latent: Latent, *, batched: bool) -> Latent:
    parts = {name: part.float().cpu() for name, part in as_parts(latent).items()}
    return like({name: part[0] if batched else part for name, part in parts.items()}, latent)


def _joined(chunks: list[Latent]) -> Latent:
    names = as_parts(chunks[0])
    return like({n: torch.cat([as_parts(c)[n] for c in chunks]) for n in names}, chunks[0])


def _listed(values: FloatArray) -> list[float]:
    return [float(value) for value in values]
