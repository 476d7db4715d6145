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

from quantwm.compute import placed, resolve_device, resolve_dtype
from quantwm.diagnostics.candidates import (
    CHUNK,
    Case,
    Cases,
    Imagination,
    first_population,
    listed,
    rank_correlation,
    relative_error,
    squares_by_frame,
    top_k_overlap,
)
from quantwm.planning.objective import as_parts
from quantwm.planning.population import PopulationPlanner
from quantwm.protocols import FloatArray, Latent, Task, WorldModel
from quantwm.seeds import SeedBlock


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
            "error": {name or "latent": listed(values) for name, values in self.error.items()},
            "still": {name or "latent": listed(values) for name, values in self.still.items()},
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
    cases = Cases.resolve(world_model, task, planner, episodes, seed, block)
    target = resolve_device(device)
    model = placed(world_model, target, resolve_dtype(dtype, target))
    sums, ranks = _Sums(), _Ranks(cases.elites)
    for done, case in enumerate(cases, 1):
        ranks.add(*_compare(case, cases.planner, model, sums))
        if progress is not None:
            progress(done, episodes)
    return RolloutDiagnosis(
        *sums.relative(),
        np.asarray(ranks.correlation),
        np.asarray(ranks.overlap),
        cases.elites,
        np.asarray(ranks.regret),
        np.asarray(ranks.true_regret),
    )


def _compare(
    case: Case, planner: PopulationPlanner, model: WorldModel, sums: "_Sums"
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Costs by the model and by the simulator's frames, and final distances, (N,) each."""
    own = Imagination.of(model, case)
    actions = first_population(planner, case, model.action_spec)
    parts = []
    for chunk in torch.split(actions, CHUNK):
        visited = case.visited(chunk, model.action_spec)
        guess, true = own.imagine(chunk), case.encoded(model, visited)
        sums.add(guess, true)
        ends = np.repeat(case.episode.goal, len(visited), axis=0)
        away = case.task.distance(visited[:, -1], ends)
        parts.append((own.costs(guess), own.costs(true), away))
    costs, true_costs, distances = (np.concatenate(values) for values in zip(*parts, strict=True))
    return costs, true_costs, distances


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
                sums[name] = sums.get(name, 0.0) + squares_by_frame(difference)

    def relative(self) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
        """Errors of the model and of standing still, by part, (H,) each."""
        return (
            {name: relative_error(self.wrong[name], self.whole[name]) for name in self.whole},
            {name: relative_error(self.moved[name], self.whole[name]) for name in self.whole},
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
        self.correlation.append(rank_correlation(costs, true_costs))
        self.overlap.append(top_k_overlap(costs, true_costs, self.elites))
        self.regret.append(float(distances[costs.argmin()] - distances.min()))
        self.true_regret.append(float(distances[true_costs.argmin()] - distances.min()))
