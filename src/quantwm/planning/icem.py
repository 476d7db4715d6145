"""The improved cross-entropy method, iCEM (Pinneri et al. 2020, arXiv 2008.06389)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from quantwm.planning.cem import elite_problems, moments
from quantwm.planning.population import Belief, PopulationPlanner, cheapest
from quantwm.planning.settings import number


@dataclass(frozen=True)
class ICEM(PopulationPlanner):
    """CEM with coloured noise and with elites that stay in the population.

    What differs from the paper, and why:

    * No elites and no mean are carried over from the plan before: every plan here is executed to
      its end, so there is nothing to shift, and each starts cold as in DINO-WM.
    * Kept elites take the place of samples instead of joining them, so that `samples` is what a
      step costs, and they are asked about again: the cost is a function, the answer the same.
    * The mean is a candidate in every step, not only in the last, and the plan is the last mean,
      not the cheapest candidate: so it is for all planners here, and arms stay comparable.
    * The deviation is the unbiased one, as in CEM here; actions are not clipped, as in DINO-WM.

    Attributes:
        samples: candidates in the first step, kept elites and mean included.
        elites: of them that the next mean and deviation are fitted to.
        steps: optimisation steps.
        horizon: model actions in a plan.
        sigma: initial standard deviation, in normalised actions.
        noise_exponent: β of noise whose power over the raw actions falls as 1/f^β, drawn for
            each raw action dimension; 0 is white noise.
        fraction_reused: of the elites, the best of which stay for the next step, rounded down.
        decay: γ; step i, counted from zero, has samples / γ^i candidates, but at least twice the
            elites.
        momentum: α; the share of the old mean and deviation in the new ones.
    """

    name: ClassVar[str] = "icem"

    samples: int = 300
    elites: int = 30
    steps: int = 10
    horizon: int = 5
    sigma: float = 1.0
    noise_exponent: float = 2.0
    fraction_reused: float = 0.3
    decay: float = 1.25
    momentum: float = 0.1

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        return [
            *elite_problems(self.samples, self.elites, self.steps, self.horizon),
            *number("sigma", self.sigma, above=0),
            *number("noise_exponent", self.noise_exponent, least=0, most=10),
            *number("fraction_reused", self.fraction_reused, least=0, most=1),
            *number("decay", self.decay, least=1),
            *number("momentum", self.momentum, least=0, below=1),
        ]

    def population(self, step: int) -> int:
        """Candidates in an optimisation step."""
        least = min(2 * self.elites, self.samples)
        return max(int(self.samples * float(self.decay) ** -step), least)

    def update(
        self,
        belief: Belief,
        candidates: npt.NDArray[np.float32],
        costs: npt.NDArray[np.float32],
    ) -> Belief:
        """Moments of the elites, mixed with the old ones, and the elites that stay."""
        elites = cheapest(candidates, costs, self.elites)
        old = np.float32(self.momentum)
        mean, deviation = (
            old * before + (1 - old) * now
            for before, now in zip((belief.mean, belief.deviation), moments(elites), strict=True)
        )
        return Belief(mean, deviation, elites[: int(self.fraction_reused * self.elites)])
