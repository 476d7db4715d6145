"""The cross-entropy method (Rubinstein 1999) as DINO-WM uses it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantwm.errors import UsageError, unknown_name
from quantwm.planning.noise import action_noise
from quantwm.protocols import ActionSpec, CostFunction, PlanResult


@dataclass(frozen=True)
class CEM:
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

    samples: int = 300
    elites: int = 30
    steps: int = 10
    horizon: int = 5
    sigma: float = 1.0
    noise_correlation: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        for name in ("samples", "elites", "steps", "horizon"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"{name} must be a positive integer, got {value!r}")
        if not problems and not 2 <= self.elites <= self.samples:
            problems.append(f"elites must be 2 to samples ({self.samples}), got {self.elites}")
        if not self.sigma > 0:
            problems.append(f"sigma must be positive, got {self.sigma}")
        if not 0 <= self.noise_correlation < 1:
            problems.append(f"noise_correlation must be in [0, 1), got {self.noise_correlation}")
        if problems:
            raise UsageError("invalid CEM settings: " + "; ".join(problems))

    def settings(self) -> dict[str, Any]:
        """The fields and the planner's name, as JSON values."""
        return {"name": "cem", **asdict(self)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "CEM":
        """Build from `settings()`; missing fields take their defaults.

        Raises:
            UsageError: another planner's name, an unknown field, a value out of range.
        """
        values = dict(settings)
        if (name := values.pop("name", "cem")) != "cem":
            raise unknown_name("planner", str(name), ["cem"])
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_name("planner setting", key, known)
        return cls(**values)

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
        means = np.zeros((len(seeds), *shape), np.float32)
        deviations = np.full_like(means, self.sigma)
        best = np.full((len(seeds), self.steps), np.nan)
        failures: list[str | None] = [None] * len(seeds)
        for step in range(self.steps):
            alive = np.array([i for i, reason in enumerate(failures) if reason is None], np.intp)
            if len(alive) == 0:
                break
            candidates = np.stack(
                [
                    self.candidates(
                        means[i], deviations[i], int(seeds[i]), iteration, step, action_spec
                    )
                    for i in alive
                ]
            )
            costs = cost(alive, torch.from_numpy(candidates)).numpy()
            for i, row, proposed in zip(alive.tolist(), costs, candidates, strict=True):
                if not np.isfinite(row).all():
                    bad = int((~np.isfinite(row)).sum())
                    failures[i] = (
                        f"non_finite: {bad} of {len(row)} candidate costs were NaN or infinite "
                        f"in optimisation step {step + 1}"
                    )
                    continue
                best[i, step] = row.min()
                means[i], deviations[i] = self.refit(proposed, row)
        return PlanResult(torch.from_numpy(means), best[:, -1], best, tuple(failures))

    def candidates(
        self,
        mean: npt.NDArray[np.float32],
        deviation: npt.NDArray[np.float32],
        seed: int,
        iteration: int,
        step: int,
        action_spec: ActionSpec,
    ) -> npt.NDArray[np.float32]:
        """Candidates (samples, H, D) around a mean (H, D), which is the first of them."""
        noise = action_noise(
            seed,
            iteration,
            step,
            samples=self.samples,
            horizon=self.horizon,
            action_spec=action_spec,
            correlation=self.noise_correlation,
        )
        proposed = mean + deviation * noise
        proposed[0] = mean
        return proposed

    def refit(
        self, candidates: npt.NDArray[np.float32], costs: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and unbiased standard deviation (H, D) of the elites."""
        elite = candidates[np.argsort(costs, kind="stable")[: self.elites]]
        return elite.mean(axis=0), elite.std(axis=0, ddof=1)
