"""Gradient descent through the world model, as DINO-WM's GD planner does it."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantwm.errors import UsageError, unknown_name
from quantwm.planning.noise import action_noise
from quantwm.planning.population import non_finite, still_planned
from quantwm.planning.settings import PlannerSettings, counts, number
from quantwm.protocols import ActionSpec, CostFunction, PlanResult

_OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
_ROLLOUTS_A_GRADIENT = 3
"""A backward pass costs about two forward passes."""


@runtime_checkable
class DifferentiableCost(Protocol):
    """A `CostFunction` that also tells how each candidate's cost changes with its actions."""

    def __call__(self, index: npt.NDArray[np.intp], actions: Tensor) -> Tensor:
        """Costs (B, N) of candidate actions (B, N, H, D) of episodes `index`."""
        ...

    def gradient(self, index: npt.NDArray[np.intp], actions: Tensor) -> tuple[Tensor, Tensor]:
        """Costs (B, N), and the derivative (B, N, H, D) of each with respect to its own actions.

        Both float32 on the CPU.
        """
        ...


@dataclass(frozen=True)
class GradientDescent(PlannerSettings):
    """Follow the cost's gradient from several starts; the cheapest sequence is the plan.

    The first start is all zeros, the mean of the data the model was trained on; the others are
    sampled as in CEM. Costs in `PlanResult` are those after each step. Actions are not clipped.
    The defaults are DINO-WM's, which however starts from one sample instead of zeros, and adds
    noise after the last step too.

    Attributes:
        samples: action sequences that are optimised side by side.
        steps: gradient steps.
        horizon: model actions in a plan.
        sigma: standard deviation of the starts, in normalised actions.
        optimizer: "adam", whose steps do not depend on the cost's scale, or "sgd" as in DINO-WM.
        learning_rate: for "adam" about the most that one step changes a normalised action; for
            "sgd" the factor of the gradient, to be set for each objective.
        step_noise: standard deviation of noise added after every step but the last.
        noise_correlation: ρ of an AR(1) process over consecutive raw actions, of starts and step
            noise; 0 is white noise.
    """

    name: ClassVar[str] = "gradient"
    needs_gradients: ClassVar[bool] = True

    samples: int = 1
    steps: int = 1000
    horizon: int = 5
    sigma: float = 1.0
    optimizer: Literal["adam", "sgd"] = "sgd"
    learning_rate: float = 1.0
    step_noise: float = 0.003
    noise_correlation: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        problems = [
            *counts(samples=self.samples, steps=self.steps, horizon=self.horizon),
            *number("sigma", self.sigma, above=0),
            *number("learning_rate", self.learning_rate, above=0),
            *number("step_noise", self.step_noise, least=0),
            *number("noise_correlation", self.noise_correlation, least=0, below=1),
        ]
        if self.optimizer not in _OPTIMIZERS:
            problems.append(str(unknown_name("optimizer", str(self.optimizer), _OPTIMIZERS)))
        return problems

    @property
    def rollouts(self) -> int:
        """Candidate rollouts that one plan asks for, a gradient counted as three."""
        return self.samples * (self.steps * _ROLLOUTS_A_GRADIENT + 1)

    def plan(
        self,
        cost: CostFunction,
        seeds: npt.NDArray[np.int64],
        iteration: int,
        action_spec: ActionSpec,
    ) -> PlanResult:
        """Plan for B episodes; each one's plan depends on its own costs and seed alone.

        An episode with a cost or gradient that is NaN or infinite is given up, with the reason in
        `failures`.

        Raises:
            UsageError: the cost has no gradients.
        """
        if not isinstance(cost, DifferentiableCost):
            raise UsageError(
                "planner 'gradient' needs a cost with a method `gradient`, which this one lacks: "
                "plan with a differentiable world model, or take planner 'cem', 'icem' or 'mppi'"
            )
        best = np.full((len(seeds), self.steps), np.nan)
        failures: list[str | None] = [None] * len(seeds)
        actions = [self._start(int(seed), iteration, action_spec) for seed in seeds]
        # A list of tensors, not one of all episodes: where an element lies in a tensor may decide
        # which instructions update it, and so its last bit.
        optimizer = _OPTIMIZERS[self.optimizer](actions, lr=self.learning_rate)
        for step in range(self.steps):
            alive = still_planned(failures)
            if len(alive) == 0:
                break
            costs, gradients = cost.gradient(alive, torch.stack([actions[i] for i in alive]))
            for i, row, slope in zip(alive.tolist(), costs.numpy(), gradients, strict=True):
                failures[i] = non_finite(row, "costs", step) or non_finite(
                    slope.numpy(), "gradients", step
                )
                actions[i].grad = slope if failures[i] is None else None
                if step:
                    best[i, step - 1] = row.min()
            optimizer.step()
            if self.step_noise and step < self.steps - 1:
                for i in still_planned(failures):
                    noise = self._noise(int(seeds[i]), iteration, step + 1, action_spec)
                    actions[i].add_(noise, alpha=self.step_noise)
        chosen = self._choose(cost, actions, best, failures)
        return PlanResult(chosen, best[:, -1], best, tuple(failures))

    def _choose(
        self,
        cost: CostFunction,
        actions: list[Tensor],
        best: npt.NDArray[np.float64],
        failures: list[str | None],
    ) -> Tensor:
        """Each episode's cheapest sequence (B, H, D); enters costs and failures of the last step.

        A failed episode's is its first.
        """
        chosen = torch.stack([candidates[0] for candidates in actions])
        alive = still_planned(failures)
        if len(alive) == 0:
            return chosen
        costs = cost(alive, torch.stack([actions[i] for i in alive])).numpy()
        for i, row in zip(alive.tolist(), costs, strict=True):
            failures[i] = non_finite(row, "costs", self.steps - 1)
            if failures[i] is None:
                best[i, -1] = row.min()
                chosen[i] = actions[i][int(row.argmin())]
        return chosen

    def _start(self, seed: int, iteration: int, action_spec: ActionSpec) -> Tensor:
        start = self._noise(seed, iteration, 0, action_spec).mul_(self.sigma)
        start[0] = 0
        return start

    def _noise(self, seed: int, iteration: int, step: int, action_spec: ActionSpec) -> Tensor:
        return torch.from_numpy(
            action_noise(
                seed,
                iteration,
                step,
                samples=self.samples,
                horizon=self.horizon,
                action_spec=action_spec,
                correlation=self.noise_correlation,
            )
        )
