"""How faithfully quantized models imagine and rank what the float model does.

All models meet the same candidates: those that the planner asks about in its first plan of an
episode when it plans with the float model, in its first optimisation step (plans at random) and in
its last (plans near the chosen one, among which ranks decide). As in planning, each model encodes
start and goal itself. The true future is what the simulator shows, encoded by the float model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from quantwm.compute import placed, resolve_device, resolve_dtype
from quantwm.diagnostics.candidates import (
    CHUNK,
    Case,
    Cases,
    Imagination,
    listed,
    on_cpu,
    planned_populations,
    rank_correlation,
    relative_error,
    squares_by_frame,
    top_k_overlap,
)
from quantwm.errors import MismatchError, UsageError
from quantwm.fingerprint import model_hash
from quantwm.planning.objective import as_parts
from quantwm.planning.population import PopulationPlanner
from quantwm.protocols import FloatArray, Latent, Task, WorldModel
from quantwm.quant.apply import check_is_float, quantization_of
from quantwm.seeds import SeedBlock

DRIFT_CANDIDATES = 16
COST_PAIRS = 400
"""Pairs of costs that are kept for a scatter plot, at most."""
_Ranks: TypeAlias = tuple[float, float, float]
"""Rank correlation, overlap and regret of one population of an episode."""


@dataclass(frozen=True)
class Drift:
    """Relative L2 errors of one part of the latent, √(Σ‖a − b‖² / Σ‖b‖²) over candidates.

    Attributes:
        against_float: (H,) after each model step, from what the float model imagines.
        against_truth: (H,) from the encoded true future.
        float_against_truth: (H,) the same of the float model.
        observed: of the observed frame, from the float model's encoding: before any step.
    """

    against_float: FloatArray
    against_truth: FloatArray
    float_against_truth: FloatArray
    observed: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        arrays = ("against_float", "against_truth", "float_against_truth")
        return {n: listed(getattr(self, n)) for n in arrays} | {"observed": self.observed}


@dataclass(frozen=True)
class Ranking:
    """How a model ranks one population of candidates, by episode.

    Attributes:
        rank_correlation: (E,) Spearman's of its costs and the float model's; 0 where either are
            all alike.
        top_k_overlap: (E,) share of its k cheapest that are among the float model's k cheapest.
        regret: (E,) what its cheapest costs by the float model, above the lowest such cost; in
            units of the float model's median cost of the first population, a plan at random.
    """

    rank_correlation: FloatArray
    top_k_overlap: FloatArray
    regret: FloatArray

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: listed(values) for name, values in vars(self).items()}


@dataclass(frozen=True)
class Fidelity:
    """One quantized model against the float model.

    Attributes:
        arm: what the quantized model is called.
        k: how many candidates count as cheapest: the planner's elites.
        drift: by part of the latent.
        first, last: ranks within the planner's first and last population.
        float_costs, costs: (P,) costs of the same candidates of both populations, P at most
            `COST_PAIRS`, by the float and the quantized model; unit as of `Ranking.regret`.
    """

    arm: str
    k: int
    drift: Mapping[str, Drift]
    first: Ranking
    last: Ranking
    float_costs: FloatArray
    costs: FloatArray

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; the ranks at the top are those of the last population."""
        return {
            "kind": "fidelity",
            "arm": self.arm,
            "episodes": len(self.last.regret),
            "k": self.k,
            **self.last.to_dict(),
            "first_population": self.first.to_dict(),
            "drift": {name or "latent": drift.to_dict() for name, drift in self.drift.items()},
            "costs": {"float": listed(self.float_costs), "arm": listed(self.costs)},
        }


def diagnose_fidelity(
    reference: WorldModel,
    quantized: Mapping[str, WorldModel],
    task: str | Task,
    *,
    episodes: int = 16,
    seed: int = 0,
    block: SeedBlock = "tuning",
    planner: PopulationPlanner | None = None,
    drift_candidates: int = DRIFT_CANDIDATES,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Fidelity]:
    """Compare quantized models with the float model that they were made from.

    Several at a time, because what the float model does and what truly happens, which take most
    of the time, are the same for all of them. Memory does not grow with candidates or episodes.

    Args:
        reference: the float model.
        quantized: name → model, at least one.
        task: a task, or the name of one.
        episodes, seed, block: whose starts and goals; by default none of the evaluation's.
        planner: that asks about candidates; default: the compact settings' CEM.
        drift_candidates: of each population, the first of which drift is measured on: each takes
            H true frames to encode. Costs are compared on all candidates.
        device, dtype: as in `evaluate`.
        progress: called with (episodes done, of how many).

    Returns:
        by the names in `quantized`.

    Raises:
        UsageError: a reference that is quantized, no model to compare, a planner that has no
            population, or a number out of range.
        MismatchError: a model was made from another one, or trained in another task.
        NonFiniteError: a model's costs are NaN or infinite.
    """
    check_comparable(reference, quantized)
    if drift_candidates < 1:
        raise UsageError(f"drift_candidates must be at least 1, got {drift_candidates}")
    cases = Cases.resolve(reference, task, planner, episodes, seed, block)
    target = resolve_device(device)
    compute = resolve_dtype(dtype, target)
    model = placed(reference, target, compute)
    others = {arm: placed(one, target, compute) for arm, one in quantized.items()}
    tallies = {arm: _Tally(cases.elites) for arm in others}
    kept = max(1, COST_PAIRS // (2 * episodes))
    for done, case in enumerate(cases, 1):
        own = Imagination.of(model, case, "the float model")
        views = {arm: Imagination.of(other, case, arm) for arm, other in others.items()}
        populations = planned_populations(cases.planner, model, case)
        first = _population(case, populations.first, drift_candidates, own, views, tallies)
        last = _population(case, populations.last, drift_candidates, own, views, tallies)
        for arm, tally in tallies.items():
            tally.add_observed(views[arm].observed, own.observed)
            tally.add_costs((first[0], last[0]), (first[1][arm], last[1][arm]), kept)
        if progress is not None:
            progress(done, episodes)
    return {arm: tally.result(arm) for arm, tally in tallies.items()}


def check_comparable(reference: WorldModel, quantized: Mapping[str, WorldModel]) -> None:
    """Refuse models that cannot be compared with a reference.

    Raises:
        UsageError: the reference is quantized, or there is nothing to compare with it.
        MismatchError: a model was made from another one.
    """
    check_is_float(reference)
    if not quantized:
        raise UsageError("there is no quantized model to compare: give at least one")
    source = model_hash(reference)
    for arm, model in quantized.items():
        record = quantization_of(model)
        if record is not None and record.source_model_hash != source:
            raise MismatchError(
                f"{arm!r} was made from model {record.source_model_hash[:12]}, the float model "
                f"given is {source[:12]}: give the one that it was made from, as it was loaded (a "
                "model cast to another type is another model)"
            )


def _population(
    case: Case,
    actions: Tensor,
    drift_candidates: int,
    own: Imagination,
    others: Mapping[str, Imagination],
    tallies: Mapping[str, "_Tally"],
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Costs (N,) of candidates (N, H, D) by the float model, and by each other; drift is added."""
    float_costs: list[FloatArray] = []
    costs: dict[str, list[FloatArray]] = {arm: [] for arm in others}
    for begin in range(0, len(actions), CHUNK):
        chunk = actions[begin : begin + CHUNK]
        measured = chunk[: max(0, drift_candidates - begin)]
        guess, true = own.imagine(chunk), None
        float_costs.append(own.costs(guess))
        if len(measured):
            true = case.encoded(own.model, case.visited(measured, own.model.action_spec))
        for arm, other in others.items():
            theirs = other.imagine(chunk)
            costs[arm].append(other.costs(theirs))
            if true is not None:
                tallies[arm].add_imagined(theirs, guess, true)
    return np.concatenate(float_costs), {a: np.concatenate(c) for a, c in costs.items()}


@dataclass
class _Squares:
    """Sums of squares of one part of the latent, (H,) each but those of the observed frame."""

    against_float: FloatArray | float = 0.0
    against_truth: FloatArray | float = 0.0
    float_against_truth: FloatArray | float = 0.0
    of_float: FloatArray | float = 0.0
    of_truth: FloatArray | float = 0.0
    observed: FloatArray | float = 0.0
    of_observed: FloatArray | float = 0.0

    def drift(self) -> Drift:
        def ratio(error: FloatArray | float, size: FloatArray | float) -> FloatArray:
            return relative_error(np.atleast_1d(error), np.atleast_1d(size))

        return Drift(
            ratio(self.against_float, self.of_float),
            ratio(self.against_truth, self.of_truth),
            ratio(self.float_against_truth, self.of_truth),
            float(ratio(self.observed, self.of_observed)[0]),
        )


@dataclass
class _Tally:
    """What has been seen of one quantized model."""

    k: int
    squares: dict[str, _Squares] = field(default_factory=dict)
    ranks: tuple[list[_Ranks], list[_Ranks]] = field(default_factory=lambda: ([], []))
    pairs: list[FloatArray] = field(default_factory=list)

    def add_observed(self, latent: Latent, of_float: Latent) -> None:
        """The observed frame (1, 1, ...) by both models."""
        own = as_parts(on_cpu(latent))
        for name, target in as_parts(on_cpu(of_float)).items():
            sums = self.squares.setdefault(name, _Squares())
            sums.observed += squares_by_frame(own[name] - target)
            sums.of_observed += squares_by_frame(target)

    def add_imagined(self, latent: Latent, of_float: Latent, true: Latent) -> None:
        """Imagined (N, H + 1, ...) and true latents (M ≤ N, H, ...) of the first M candidates."""
        for name, target in as_parts(true).items():
            sums = self.squares.setdefault(name, _Squares())
            own = as_parts(latent)[name][: len(target), 1:]
            floats = as_parts(of_float)[name][: len(target), 1:]
            sums.against_float += squares_by_frame(own - floats)
            sums.against_truth += squares_by_frame(own - target)
            sums.float_against_truth += squares_by_frame(floats - target)
            sums.of_float += squares_by_frame(floats)
            sums.of_truth += squares_by_frame(target)

    def add_costs(
        self,
        of_float: tuple[FloatArray, FloatArray],
        own: tuple[FloatArray, FloatArray],
        kept: int,
    ) -> None:
        """An episode's costs of the first and last population, and how many pairs to keep."""
        unit = float(np.median(of_float[0])) or 1.0
        for ranks, theirs, ours in zip(self.ranks, of_float, own, strict=True):
            correlation = rank_correlation(ours, theirs)
            overlap = top_k_overlap(ours, theirs, self.k)
            regret = (theirs[ours.argmin()] - theirs.min()) / unit
            ranks.append((correlation, overlap, float(regret)))
            some = np.linspace(0, len(ours) - 1, min(kept, len(ours))).astype(int)
            self.pairs.append(np.stack([theirs[some], ours[some]]) / unit)

    def result(self, arm: str) -> Fidelity:
        """All of it."""
        first, last = (Ranking(*np.array(ranks).T) for ranks in self.ranks)
        drift = {name: sums.drift() for name, sums in self.squares.items()}
        return Fidelity(arm, self.k, drift, first, last, *np.concatenate(self.pairs, axis=1))
