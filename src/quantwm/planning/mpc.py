"""Receding-horizon control: observe, plan, execute the whole plan, observe again."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantwm.planning.gradient import DifferentiableCost
from quantwm.planning.rollout import ObservedCost
from quantwm.protocols import (
    ActionSpec,
    CostFunction,
    Episodes,
    FloatArray,
    Planner,
    Simulation,
    Task,
)


@dataclass
class Trace:
    """What happened in one episode.

    Attributes:
        states: at the start and after each planned iteration, each (S,).
        success: at the same moments, sticky.
        distance: at the same moments.
        cost: the lowest candidate cost at the end of each plan.
        cost_by_step: the same after each optimisation step of each plan.
        plan_seconds: planning time; episodes planned together share it evenly.
        failure: why planning was given up, or None.
    """

    states: list[FloatArray]
    success: list[bool]
    distance: list[float]
    cost: list[float] = field(default_factory=list)
    cost_by_step: list[list[float]] = field(default_factory=list)
    plan_seconds: float = 0.0
    failure: str | None = None

    @property
    def iterations(self) -> int:
        """MPC iterations that were planned and executed."""
        return len(self.states) - 1

    @property
    def running(self) -> bool:
        """Whether another iteration is due."""
        return not self.success[-1] and self.failure is None


def run_episodes(
    task: Task,
    episodes: Episodes,
    cost: ObservedCost,
    planner: Planner,
    action_spec: ActionSpec,
    iterations: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trace]:
    """Run B episodes for at most `iterations` plans each.

    Success is read at the start and after each executed plan, and is sticky: a finished episode
    is not planned any further. The simulator is never asked during planning.

    Args:
        cost: what the planner minimises.
        progress: called with (episode-iterations done, an upper bound of how many).
    """
    simulation = task.start(episodes)
    reached = task.success(simulation.states, episodes.goal)
    away = task.distance(simulation.states, episodes.goal)
    traces = [
        Trace([state.copy()], [bool(ok)], [float(d)])
        for state, ok, d in zip(simulation.states, reached, away, strict=True)
    ]
    done = 0
    for iteration in range(iterations):
        index = np.array([i for i, trace in enumerate(traces) if trace.running], np.intp)
        if len(index) == 0:
            break
        began = perf_counter()
        cost.observe(index, simulation.states[index])
        result = planner.plan(_only(cost, index), episodes.seeds[index], iteration, action_spec)
        seconds = (perf_counter() - began) / len(index)
        for i, reason in zip(index.tolist(), result.failures, strict=True):
            traces[i].plan_seconds += seconds
            traces[i].failure = reason
        alive = np.array([k for k, reason in enumerate(result.failures) if reason is None], np.intp)
        index = index[alive]
        actions = result.actions[torch.from_numpy(alive)]
        if len(index):
            _execute(task, episodes, simulation, index, action_spec.denormalize(actions), traces)
            for i, k in zip(index.tolist(), alive.tolist(), strict=True):
                traces[i].cost.append(float(result.cost[k]))
                traces[i].cost_by_step.append([float(value) for value in result.cost_by_step[k]])
        done += len(result.failures)
        if progress is not None:
            still = sum(trace.running for trace in traces)
            progress(done, done + still * (iterations - iteration - 1))
    return traces


def _only(cost: ObservedCost, index: npt.NDArray[np.intp]) -> CostFunction:
    """The cost of the episodes at `index`, counted from zero; with gradients where it has them."""
    if isinstance(cost, DifferentiableCost):
        return _SelectedDifferentiable(cost, index)
    return _Selected(cost, index)


class _Selected:
    def __init__(self, cost: CostFunction, index: npt.NDArray[np.intp]) -> None:
        self._cost, self._index = cost, index

    def __call__(self, position: npt.NDArray[np.intp], actions: Tensor) -> Tensor:
        return self._cost(self._index[position], actions)


class _SelectedDifferentiable(_Selected):
    def __init__(self, cost: DifferentiableCost, index: npt.NDArray[np.intp]) -> None:
        super().__init__(cost, index)
        self._differentiable = cost

    def gradient(self, position: npt.NDArray[np.intp], actions: Tensor) -> tuple[Tensor, Tensor]:
        return self._differentiable.gradient(self._index[position], actions)


def _execute(
    task: Task,
    episodes: Episodes,
    simulation: Simulation,
    index: npt.NDArray[np.intp],
    raw: FloatArray,
    traces: list[Trace],
) -> None:
    simulation.step(index, raw)
    states, goals = simulation.states[index], episodes.goal[index]
    reached, away = task.success(states, goals), task.distance(states, goals)
    for i, state, ok, distance in zip(index.tolist(), states, reached, away, strict=True):
        traces[i].states.append(state.copy())
        traces[i].success.append(bool(ok))
        traces[i].distance.append(float(distance))
