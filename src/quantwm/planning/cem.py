"""The cross-entropy method (Rubinstein 1999) as DINO-WM uses it."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from quantwm.planning.population import Belief, PopulationPlanner, cheapest
from quantwm.planning.settings import counts, number


@dataclass(frozen=True)
class CEM(PopulationPlanner):
    """Sample, keep the cheapest, refit mean and deviation, repeat; the last mean is the plan.

    Candidate 0 is the mean itself. Actions are not clipped. The defaults are DINO-WM's for Wall
    and PointMaze (PushT takes 30 steps).

    Attributes:
        samples: candidates a step.
        elites: of them that the next mean and deviation are fitted to.
        steps: optimisation steps.
        horizon: model actions in a plan.
        sigma: initial standard deviation, in normalised actions.
        noise_correlation: ρ of an AR(1) process over consecutive raw actions; 0 is white noise.
    """

    name: ClassVar[str] = "cem"

    samples: int = 300
    elites: int = 30
    steps: int = 10
    horizon: int = 5
    sigma: float = 1.0
    noise_correlation: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        return [
            *elite_problems(self.samples, self.elites, self.steps, self.horizon),
            *number("sigma", self.sigma, above=0),
            *number("noise_correlation", self.noise_correlation, least=0, below=1),
        ]

    def update(
        self,
        belief: Belief,
        candidates: npt.NDArray[np.float32],
        costs: npt.NDArray[np.float32],
    ) -> Belief:
        """Mean and deviation of the elites; what was believed before is forgotten."""
        del belief
        return Belief(*self.refit(candidates, costs))

    def refit(
        self, candidates: npt.NDArray[np.float32], costs: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and unbiased standard deviation (H, D) of the elites."""
        return moments(cheapest(candidates, costs, self.elites))


def moments(
    elites: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean and unbiased standard deviation (H, D) of candidates (K, H, D), K at least 2."""
    return elites.mean(axis=0), elites.std(axis=0, ddof=1)


def elite_problems(samples: int, elites: int, steps: int, horizon: int) -> list[str]:
    """What is wrong with the settings that CEM and iCEM share."""
    problems = counts(samples=samples, elites=elites, steps=steps, horizon=horizon)
    if not counts(samples=samples, elites=elites) and not 2 <= elites <= samples:
        problems.append(f"elites must be 2 to samples ({samples}), got {elites}")
    return problems
