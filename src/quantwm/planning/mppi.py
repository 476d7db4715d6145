"""Model-predictive path integral control, MPPI (Williams et al. 2017, arXiv 1707.02342)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from quantwm.planning.population import Belief, PopulationPlanner
from quantwm.planning.settings import counts, number


@dataclass(frozen=True)
class MPPI(PopulationPlanner):
    """Move the mean to the average of all candidates, weighted with exp(−cost / λ).

    λ is `temperature` times the difference between the median and the lowest cost of the step,
    so that settings carry over between tasks and objectives: adding to all costs or scaling them
    changes nothing, and at temperature τ a candidate of median cost weighs exp(−1/τ) of the best.

    What differs from the paper, and why:

    * λ is a fixed number there; costs here differ by orders of magnitude between tasks.
    * Costs hold no control term λ uᵀ Σ⁻¹ ε: DINO-WM's objective reads the final frame only.
    * Several steps are taken on one observation, the plan is executed to its end and the next
      starts cold, as for the other planners here.

    Attributes:
        samples: candidates a step.
        steps: optimisation steps.
        horizon: model actions in a plan.
        sigma: initial standard deviation, in normalised actions.
        temperature: of the weights; towards 0 only the best candidate counts, large values weigh
            all alike.
        refit_deviation: whether the deviation becomes that of the weighted candidates, as the
            mean does, or stays `sigma`, as in the paper.
        noise_correlation: ρ of an AR(1) process over consecutive raw actions; 0 is white noise.
    """

    name: ClassVar[str] = "mppi"

    samples: int = 300
    steps: int = 10
    horizon: int = 5
    sigma: float = 1.0
    temperature: float = 0.1
    refit_deviation: bool = False
    noise_correlation: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        problems = [
            *counts(samples=self.samples, steps=self.steps, horizon=self.horizon),
            *number("sigma", self.sigma, above=0),
            *number("temperature", self.temperature, above=0),
            *number("noise_correlation", self.noise_correlation, least=0, below=1),
        ]
        if not isinstance(self.refit_deviation, bool):
            problems.append(f"refit_deviation must be true or false, got {self.refit_deviation!r}")
        return problems

    def update(
        self,
        belief: Belief,
        candidates: npt.NDArray[np.float32],
        costs: npt.NDArray[np.float32],
    ) -> Belief:
        """Weighted mean of all candidates and, if asked for, their weighted deviation about it."""
        weights = softmin(costs, self.temperature)[:, None, None]
        mean = (weights * candidates).sum(axis=0)
        deviation = belief.deviation
        if self.refit_deviation:
            spread = np.sqrt((weights * (candidates - mean) ** 2).sum(axis=0))
            deviation = spread.astype(np.float32)
        return Belief(mean.astype(np.float32), deviation)


def softmin(costs: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float64]:
    """Weights (N,) that add up to one, exp(−(cost − lowest) / (temperature · (median − lowest))).

    Where at least half of the candidates tie for the lowest cost, these share the weight.
    """
    excess = costs.astype(np.float64) - costs.min()
    scale = temperature * np.median(excess)
    weights = np.exp(-excess / scale) if scale > 0 else (excess == 0).astype(np.float64)
    return np.asarray(weights / weights.sum(), np.float64)
