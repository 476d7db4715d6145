"""The loop that CEM, iCEM and MPPI share: sample candidates, ask for their costs, update."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quantwm.planning.noise import action_noise
from quantwm.planning.settings import PlannerSettings
from quantwm.protocols import ActionSpec, CostFunction, PlanResult


@dataclass(frozen=True)
class Belief:
    """Where the next candidates of one episode come from.

    Attributes:
        mean, deviation: (H, D) of the normal distribution that is sampled, float32.
        kept: (K, H, D) candidates that are asked about once more, the best first; None for none.
    """

    mean: npt.NDArray[np.float32]
    deviation: npt.NDArray[np.float32]
    kept: npt.NDArray[np.float32] | None = None


class PopulationPlanner(PlannerSettings):
    """Base of the sampling planners; each is its settings and an update rule.

    Candidate 0 of every step is the mean itself, and the last mean is the plan. Actions are not
    clipped.

    Attributes:
        samples: candidates a step, all told.
        steps: optimisation steps.
        horizon: model actions in a plan.
        sigma: initial standard deviation, in normalised actions.
        noise_correlation: ρ of an AR(1) process over consecutive raw actions; 0 is white noise.
        noise_exponent: β of noise whose power over the raw actions falls as 1/f^β; 0 is white.
    """

    samples: int
    steps: int
    horizon: int
    sigma: float
    noise_correlation: float = 0.0
    noise_exponent: float = 0.0

    def update(
        self,
        belief: Belief,
        candidates: npt.NDArray[np.float32],
        costs: npt.NDArray[np.float32],
    ) -> Belief:
        """The next belief, from candidates (N, H, D) and their finite costs (N,)."""
        raise NotImplementedError

    def population(self, step: int) -> int:
        """Candidates in an optimisation step."""
        del step
        return self.samples

    @property
    def rollouts(self) -> int:
        """Candidate rollouts that one plan asks for."""
        return sum(self.population(step) for step in range(self.steps))

    def plan(
        self,
        cost: CostFunction,
        seeds: npt.NDArray[np.int64],
        iteration: int,
        action_spec: ActionSpec,
    ) -> PlanResult:
        """Plan for B episodes; each one's plan depends on its own costs and seed alone.

        An episode with a cost that is NaN or infinite is given up, with the reason in `failures`.
        """
        shape = (self.horizon, action_spec.model_dim)
        start = Belief(np.zeros(shape, np.float32), np.full(shape, self.sigma, np.float32))
        beliefs = [start] * len(seeds)
        best = np.full((len(seeds), self.steps), np.nan)
        failures: list[str | None] = [None] * len(seeds)
        for step in range(self.steps):
            alive = still_planned(failures)
            if len(alive) == 0:
                break
            candidates = np.stack(
                [
                    self._propose(beliefs[i], int(seeds[i]), iteration, step, action_spec)
                    for i in alive
                ]
            )
            costs = cost(alive, torch.from_numpy(candidates)).numpy()
            for i, row, proposed in zip(alive.tolist(), costs, candidates, strict=True):
                failures[i] = non_finite(row, "costs", step)
                if failures[i] is None:
                    best[i, step] = row.min()
                    beliefs[i] = self.update(beliefs[i], proposed, row)
        means = np.array([belief.mean for belief in beliefs], np.float32)
        actions = torch.from_numpy(means.reshape(len(seeds), *shape))
        return PlanResult(actions, best[:, -1], best, tuple(failures))

    def candidates(
        self,
        mean: npt.NDArray[np.float32],
        deviation: npt.NDArray[np.float32],
        seed: int,
        iteration: int,
        step: int,
        action_spec: ActionSpec,
    ) -> npt.NDArray[np.float32]:
        """Candidates (N, H, D) around a mean (H, D), which is the first of them."""
        noise = action_noise(
            seed,
            iteration,
            step,
            samples=self.population(step),
            horizon=self.horizon,
            action_spec=action_spec,
            correlation=self.noise_correlation,
            exponent=self.noise_exponent,
        )
        proposed = mean + deviation * noise
        proposed[0] = mean
        return proposed

    def _propose(
        self, belief: Belief, seed: int, iteration: int, step: int, action_spec: ActionSpec
    ) -> npt.NDArray[np.float32]:
        proposed = self.candidates(
            belief.mean, belief.deviation, seed, iteration, step, action_spec
        )
        if belief.kept is not None:
            kept = belief.kept[: len(proposed) - 1]
            proposed[1 : 1 + len(kept)] = kept
        return proposed


def cheapest(
    candidates: npt.NDArray[np.float32], costs: npt.NDArray[np.float32], count: int
) -> npt.NDArray[np.float32]:
    """The `count` candidates of lowest cost, the best first; the earlier one where costs tie."""
    return candidates[np.argsort(costs, kind="stable")[:count]]


def still_planned(failures: list[str | None]) -> npt.NDArray[np.intp]:
    """Positions of the episodes that have not failed."""
    return np.array([i for i, reason in enumerate(failures) if reason is None], np.intp)


def non_finite(values: npt.NDArray[np.float32], what: str, step: int) -> str | None:
    """Why values (N, ...) of N candidates cannot be planned with, or None where all are finite."""
    bad = int((~np.isfinite(values.reshape(len(values), -1)).all(axis=1)).sum())
    if not bad:
        return None
    return (
        f"non_finite: {bad} of {len(values)} candidate {what} were NaN or infinite "
        f"in optimisation step {step + 1}"
    )
