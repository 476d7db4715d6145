"""What a world model's planner considers, executed: data about plans that a model believes in.

A planner asks about actions that no scripted policy takes, and prefers those of which the model
errs in its favour. Trained on what really comes of them, it errs less where it is asked (data
aggregation: Ross et al. 2011, arXiv 1011.0686).
"""

import json
import multiprocessing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantwm.compute import placed, resolve_device, resolve_dtype
from quantwm.errors import QuantWMError, UsageError
from quantwm.evaluation import check_fits
from quantwm.fingerprint import model_hash
from quantwm.loading import load
from quantwm.models.dino_wm import DINOWM
from quantwm.planning.cem import CEM
from quantwm.planning.defaults import default_planner
from quantwm.planning.objective import Objective
from quantwm.planning.rollout import ModelCost
from quantwm.protocols import Episodes, FloatArray, Layout, Task
from quantwm.quant.apply import check_is_float
from quantwm.seeds import MAX_EPISODES, keyed_generator

_STREAM = 21
PLANS = 2
"""Plans of an episode, each from where the one before has led."""
DRAWN = 2
"""Elites of each optimisation step that become trajectories."""
_TOGETHER = 8


class PlannedPolicy:
    """A behaviour of a task, as `collect` takes it: candidates of a model's plans.

    The trajectories of an episode begin at its start, and where its first plan has led; they are
    elites of each CEM step, and the last mean, which is executed.

    Args:
        task: what is planned in.
        model: a bundled model's name, or a model's folder; float.

    Raises:
        UsageError: no such model, or a quantized one.
        MismatchError: it was trained in another task.
        MissingStatisticsError: it carries no action statistics.
    """

    def __init__(self, task: Task, model: str | Path) -> None:
        self._task, self._source = task, model
        planner = default_planner(task.name)
        assert isinstance(planner, CEM)
        self._planner = planner
        check_is_float(self._model)
        check_fits(self._model, task)
        self.policy = (
            f"planned-1 by {model_hash(self._model)[:16]}, {PLANS} plans an episode, "
            f"{DRAWN} elites a step, {json.dumps(self._planner.settings())}"
        )
        self.trajectory_steps = self._planner.horizon * self._model.action_spec.frameskip

    @property
    def of_an_episode(self) -> int:
        """Trajectories that an episode gives."""
        return PLANS * (DRAWN * self._planner.steps + 1)

    @cached_property
    def _model(self) -> DINOWM:
        return load(self._source)

    def __getstate__(self) -> dict[str, Any]:
        # Processes that simulate load the model themselves.
        return {name: value for name, value in self.__dict__.items() if name != "_model"}

    def sample_layout(self, seeds: list[int]) -> Layout:
        """The layouts (B,) of the episodes that the trajectories are of."""
        firsts, owner, _ = self._places(seeds)
        return self._task.episodes(firsts).select(owner).layout

    def scripted(self, seeds: list[int], steps: int) -> tuple[FloatArray, FloatArray]:
        """States (B, steps + 1, S) and raw actions (B, steps, A), rounded to float32.

        Trajectory i depends on `seeds[i]` alone.

        Raises:
            UsageError: `steps` are not those of a plan.
            QuantWMError: the model's costs are not finite.
        """
        if steps != self.trajectory_steps:
            raise UsageError(f"a plan has {self.trajectory_steps} actions, not {steps}")
        firsts, owner, at = self._places(seeds)
        device = resolve_device("auto")
        if multiprocessing.parent_process() is not None:
            torch.set_num_threads(1)  # its siblings have the other cores
        model = placed(self._model, device, resolve_dtype("auto", device))
        made = [
            self._considered(model, self._task.episodes(firsts[begin : begin + _TOGETHER]))
            for begin in range(0, len(firsts), _TOGETHER)
        ]
        states, actions = (np.concatenate(parts) for parts in zip(*made, strict=True))
        return states[owner, at], actions[owner, at]

    def _places(
        self, seeds: list[int]
    ) -> tuple[list[int], npt.NDArray[np.intp], npt.NDArray[np.int64]]:
        """Seeds of the episodes, each trajectory's episode among them, its place among that's."""
        numbers = np.asarray(seeds, np.int64)
        at = numbers % MAX_EPISODES % self.of_an_episode
        firsts, owner = np.unique(numbers - at, return_inverse=True)
        return firsts.tolist(), owner, at

    def _considered(self, model: DINOWM, episodes: Episodes) -> tuple[FloatArray, FloatArray]:
        """States (E, n, T + 1, S) and actions (E, n, T, A) of every episode's n trajectories."""
        cost = ModelCost(model, self._task, episodes, Objective(model.objective_weights))
        simulation, everyone = self._task.start(episodes), np.arange(len(episodes))
        states, actions = [], []
        for iteration in range(PLANS):
            before = simulation.states.copy()
            cost.observe(everyone, before)
            elites = _Elites(cost, episodes, iteration, self._planner.elites)
            plan = self._planner.plan(elites, episodes.seeds, iteration, model.action_spec)
            for failure in filter(None, plan.failures):
                raise QuantWMError(f"the model cannot plan: {failure}")
            kept = torch.cat([*elites.drawn, plan.actions[:, None]], dim=1)
            # Stored as float32, so executed as float32.
            raw = model.action_spec.denormalize(kept).astype(np.float32).astype(np.float64)
            visited = self._executed(before, episodes.layout, raw)
            states.append(visited)
            actions.append(raw)
            simulation.step(everyone, raw[:, -1])
        return np.concatenate(states, axis=1), np.concatenate(actions, axis=1)

    def _executed(self, before: FloatArray, layout: Layout, raw: FloatArray) -> FloatArray:
        """States (E, n, T + 1, S) of actions (E, n, T, A) from states (E, S)."""
        episodes, count = raw.shape[:2]
        begin = np.repeat(before, count, axis=0)
        worlds = {name: np.repeat(values, count, axis=0) for name, values in layout.items()}
        after = self._task.rollout(begin, worlds, raw.reshape(-1, *raw.shape[2:]))
        visited = np.concatenate([begin[:, None], after], axis=1)
        return visited.reshape(episodes, count, *visited.shape[1:])


class _Elites:
    """A cost that keeps some of the cheapest candidates of each step.

    Attributes:
        drawn: (B, DRAWN, H, D) of each step so far.
    """

    def __init__(self, cost: ModelCost, episodes: Episodes, iteration: int, elites: int) -> None:
        self._cost, self._seeds, self._iteration = cost, episodes.seeds, iteration
        self._elites = elites
        self.drawn: list[Tensor] = []

    def __call__(self, index: npt.NDArray[np.intp], actions: Tensor) -> Tensor:
        costs = self._cost(index, actions)
        kept = []
        for episode, row, candidates in zip(index.tolist(), costs, actions, strict=True):
            key = (int(self._seeds[episode]), _STREAM, self._iteration, len(self.drawn))
            cheapest = np.argsort(row.numpy(), kind="stable")[: self._elites]
            drawn = keyed_generator(*key).choice(cheapest, DRAWN, replace=False)
            kept.append(candidates[torch.from_numpy(drawn)])
        self.drawn.append(torch.stack(kept))
        return costs
