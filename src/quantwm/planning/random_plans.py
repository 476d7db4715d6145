"""Plans that nothing chose: the floor that a success rate is to be read against."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantwm.planning.noise import action_noise
from quantwm.protocols import ActionSpec, CostFunction, Planner, PlanResult


@dataclass(frozen=True)
class RandomPlans:
    """Executes a sample of another planner's first proposal, without asking what it costs.

    The sample is the planner's second candidate, seeded alike; the first one is the mean. The cost
    is asked for what the chosen plan costs, and changes nothing.

    Attributes:
        planner: whose horizon and noise are taken; where it has no such settings, five model steps
            of standard normal noise.
    """

    planner: Planner

    def plan(
        self,
        cost: CostFunction,
        seeds: npt.NDArray[np.int64],
        iteration: int,
        action_spec: ActionSpec,
    ) -> PlanResult:
        """A random plan for each of B episodes, with its cost."""
        plans = np.stack([self._draw(int(seed), iteration, action_spec) for seed in seeds])
        actions = torch.from_numpy(plans)
        costs = cost(np.arange(len(seeds)), actions[:, None]).numpy().astype(np.float64)
        return PlanResult(actions, costs[:, 0], costs, (None,) * len(seeds))

    def settings(self) -> dict[str, Any]:
        """Those of the other planner."""
        return self.planner.settings()

    def _draw(self, seed: int, iteration: int, action_spec: ActionSpec) -> npt.NDArray[np.float32]:
        noise = action_noise(
            seed,
            iteration,
            0,
            samples=2,
            horizon=getattr(self.planner, "horizon", 5),
            action_spec=action_spec,
            correlation=getattr(self.planner, "noise_correlation", 0.0),
            exponent=getattr(self.planner, "noise_exponent", 0.0),
        )
        sigma = float(getattr(self.planner, "sigma", 1.0))
        return np.asarray(sigma * noise[1], np.float32)
