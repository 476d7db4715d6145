"""Closed-loop evaluation: plan, execute, count successes, one row an episode."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from quantwm.compute import (
    cores,
    parse_bytes,
    peak_memory_mb,
    placed,
    provenance_json,
    resolve_device,
    resolve_dtype,
)
from quantwm.envs import get_task
from quantwm.errors import MismatchError, UsageError, unknown_name
from quantwm.planning.defaults import default_iterations, default_planner
from quantwm.planning.mpc import Trace, run_episodes
from quantwm.planning.objective import Objective
from quantwm.planning.oracles import OracleLatentCost, OracleStateCost
from quantwm.planning.random_plans import RandomPlans
from quantwm.planning.rollout import ModelCost, ObservedCost
from quantwm.protocols import Episodes, HasTask, Planner, Task, WorldModel
from quantwm.seeds import SeedBlock, episode_seeds
from quantwm.statistics import PairedDifference, paired_difference, wilson_interval

SCHEMA_VERSION = 2
Oracle: TypeAlias = Literal["oracle-state", "oracle-latent"]
ORACLES: tuple[Oracle, ...] = ("oracle-state", "oracle-latent")
Reference: TypeAlias = Oracle | Literal["random"]
REFERENCES: tuple[Reference, ...] = (*ORACLES, "random")
"""What a model's success is read against: what planning could reach, and what chance does."""
Row: TypeAlias = dict[str, Any]
Progress: TypeAlias = Callable[[int, int], None]
"""(episode-iterations done, of how many); the second shrinks as episodes succeed."""
OnRows: TypeAlias = Callable[[list[Row]], object]
"""Takes the rows of episodes that were planned together, as soon as they are over."""


@dataclass(frozen=True)
class Outcome:
    """Rows of one arm, and what they say.

    Attributes:
        rows: one an episode, in episode order.
        difference: against the baseline's rows, where a baseline was given.
    """

    rows: list[Row]
    difference: PairedDifference | None = None

    @property
    def successes(self) -> list[bool]:
        """Whether each episode succeeded."""
        return [bool(row["success"]) for row in self.rows]

    @property
    def success(self) -> float:
        """Success rate."""
        return float(np.mean(self.successes))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95% interval of the success rate."""
        return wilson_interval(sum(self.successes), len(self.rows))

    def __str__(self) -> str:
        low, high = self.interval
        text = f"success {self.success:.2f} [{low:.2f}, {high:.2f}]"
        if self.difference is None:
            return text
        d = self.difference
        numbers = [
            f"{v:+.2f}".replace("-", "\N{MINUS SIGN}") for v in (d.difference, d.low, d.high)
        ]
        return f"{text}, {numbers[0]} [{numbers[1]}, {numbers[2]}] against float"


def evaluate(
    world_model: WorldModel,
    task: str | Task,
    *,
    episodes: int = 50,
    seed: int = 1,
    block: SeedBlock = "evaluation",
    planner: Planner | None = None,
    mpc_iterations: int | None = None,
    baseline: WorldModel | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    batch_size: int | None = None,
    memory_budget: int | str | None = None,
    arm: str = "model",
    progress: Progress | None = None,
    kept: Sequence[Row] = (),
    on_rows: OnRows | None = None,
) -> Outcome:
    """Plan with a world model in closed loop.

    Every call with the same block, seed and planner meets the same goals and the same noise, and
    a row depends on its own episode alone.

    Args:
        world_model: float or quantized; left unchanged.
        task: a task, or the name of one.
        episodes: how many, 1 to 4,096.
        seed, block: which.
        planner: default: the compact settings for the task.
        mpc_iterations: plans an episode gets at most; default: the task's.
        baseline: evaluated alike, to compare with pair by pair.
        device, dtype: "auto" takes a GPU where there is one, and bfloat16 where it is native.
        batch_size: episodes planned together; default all. Changes no row.
        memory_budget: bytes, or text such as "2GB", that rollouts in flight may take; default
            half of what is free. Changes no row.
        arm: the rows' label.
        progress: called after each MPC iteration.
        kept: rows of the same call, interrupted earlier; their episodes are not planned again.
        on_rows: called with the rows of each batch that is finished, to keep them.

    Raises:
        UsageError: an unknown name or a number out of range.
        MismatchError: the model was trained in another task.
        MissingStatisticsError: the model carries no action statistics.
    """
    settings = _Settings.resolve(
        task,
        episodes,
        seed,
        block,
        planner,
        mpc_iterations,
        device,
        dtype,
        batch_size,
        memory_budget,
    )
    check_fits(world_model, settings.task)
    placed_model = placed(world_model, settings.device, settings.dtype)
    objective = Objective(world_model.objective_weights)

    def cost(batch: Episodes) -> ObservedCost:
        return ModelCost(
            placed_model, settings.task, batch, objective, memory_budget=settings.memory_budget
        )

    rows = _run(settings, cost, placed_model, arm, progress, kept, on_rows)
    if baseline is None:
        return Outcome(rows)
    reference = evaluate(
        baseline,
        settings.task,
        episodes=episodes,
        seed=seed,
        block=block,
        planner=settings.planner,
        mpc_iterations=settings.iterations,
        device=settings.device,
        dtype=settings.dtype,
        batch_size=batch_size,
        memory_budget=memory_budget,
        arm="baseline",
        progress=progress,
    )
    own = [bool(row["success"]) for row in rows]
    return Outcome(rows, paired_difference(own, reference.successes))


def evaluate_reference(
    kind: Reference,
    task: str | Task,
    *,
    world_model: WorldModel,
    episodes: int = 50,
    seed: int = 1,
    block: SeedBlock = "evaluation",
    planner: Planner | None = None,
    mpc_iterations: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    batch_size: int | None = None,
    memory_budget: int | str | None = None,
    arm: str | None = None,
    progress: Progress | None = None,
    kept: Sequence[Row] = (),
    on_rows: OnRows | None = None,
) -> Outcome:
    """Plan without the model's predictions, on the same goals with the same noise.

    Args:
        kind: "oracle-state" minimises the true distance to the goal with the simulator;
            "oracle-latent" encodes the simulator's final frame and minimises the model's own
            objective; "random" executes a sample of the planner's noise (`RandomPlans`).
        world_model: gives the action statistics, and encoder and objective for "oracle-latent".

    Other arguments and errors as in `evaluate`.
    """
    if kind not in REFERENCES:
        raise unknown_name("reference", kind, REFERENCES)
    settings = _Settings.resolve(
        task,
        episodes,
        seed,
        block,
        planner,
        mpc_iterations,
        device,
        dtype,
        batch_size,
        memory_budget,
    )
    check_fits(world_model, settings.task)
    placed_model = placed(world_model, settings.device, settings.dtype)
    objective = Objective(world_model.objective_weights)
    # Beside a GPU the cores are free; on the CPU they are the threads that were asked for.
    processes = torch.get_num_threads() if settings.device.type == "cpu" else cores()

    def cost(batch: Episodes) -> ObservedCost:
        if kind != "oracle-latent":
            return OracleStateCost(settings.task, batch, world_model.action_spec, processes)
        return OracleLatentCost(
            placed_model,
            settings.task,
            batch,
            objective,
            memory_budget=settings.memory_budget,
            processes=processes,
        )

    if kind == "random":
        settings = replace(settings, planner=RandomPlans(settings.planner))
    return Outcome(_run(settings, cost, placed_model, arm or kind, progress, kept, on_rows))


def check_fits(world_model: WorldModel, task: Task) -> None:
    """Refuse a model that cannot plan in this task.

    Raises:
        MismatchError: it was trained in another task, or its actions are not the task's.
        MissingStatisticsError: it carries no action statistics.
    """
    origin = world_model.trained_in if isinstance(world_model, HasTask) else ""
    if origin and origin != task.name:
        raise MismatchError(
            f"the world model was trained in task {origin!r}, and this is {task.name!r}: its "
            "normalisation and what it predicts belong to that task; give a model of this one"
        )
    spec = world_model.action_spec
    if spec.dim != task.action_dim:
        raise MismatchError(
            f"the world model plans actions of width {spec.dim}, task {task.name!r} takes "
            f"{task.action_dim}: give a model that was trained in this task"
        )
    spec.denormalize(torch.zeros(1, 1, spec.model_dim))


@dataclass(frozen=True)
class _Settings:
    """The arguments that `evaluate` and `evaluate_reference` share, resolved."""

    task: Task
    seeds: Sequence[int]
    seed: int
    block: SeedBlock
    planner: Planner
    iterations: int
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    memory_budget: int | None

    @classmethod
    def resolve(
        cls,
        task: str | Task,
        episodes: int,
        seed: int,
        block: SeedBlock,
        planner: Planner | None,
        iterations: int | None,
        device: str | torch.device,
        dtype: str | torch.dtype,
        batch_size: int | None,
        memory_budget: int | str | None,
    ) -> "_Settings":
        resolved_task = get_task(task) if isinstance(task, str) else task
        resolved_device = resolve_device(device)
        seeds = episode_seeds(block, seed, episodes)
        iterations = default_iterations(resolved_task.name) if iterations is None else iterations
        batch_size = episodes if batch_size is None else batch_size
        if iterations < 1 or batch_size < 1:
            raise UsageError(
                f"mpc_iterations and batch_size must be at least 1, got {iterations}, {batch_size}"
            )
        return cls(
            resolved_task,
            seeds,
            seed,
            block,
            planner or default_planner(resolved_task.name),
            iterations,
            resolved_device,
            resolve_dtype(dtype, resolved_device),
            batch_size,
            None if memory_budget is None else parse_bytes(memory_budget),
        )


def _run(
    settings: _Settings,
    cost: Callable[[Episodes], ObservedCost],
    world_model: WorldModel,
    arm: str,
    progress: Progress | None,
    kept: Sequence[Row],
    on_rows: OnRows | None,
) -> list[Row]:
    episodes = settings.task.episodes(settings.seeds)
    rows = list(kept)
    left = np.setdiff1d(np.arange(len(episodes)), [row["episode"] for row in kept])
    finished, waiting = 0, len(left)
    for begin in range(0, len(left), settings.batch_size):
        index = left[begin : begin + settings.batch_size]
        batch = episodes.select(index)
        waiting -= len(index)
        last = (0, 0)

        def report(done: int, total: int, finished: int = finished, waiting: int = waiting) -> None:
            nonlocal last
            last = (done, total)
            if progress is not None:
                progress(finished + done, finished + total + waiting * settings.iterations)

        traces = run_episodes(
            settings.task,
            batch,
            cost(batch),
            settings.planner,
            world_model.action_spec,
            settings.iterations,
            progress=report,
        )
        finished += last[0]
        new = [
            _row(settings, batch, position, int(episode), trace, arm)
            for position, (episode, trace) in enumerate(zip(index, traces, strict=True))
        ]
        rows += new
        if on_rows is not None:
            on_rows(new)
    return sorted(rows, key=lambda row: int(row["episode"]))


def _row(
    settings: _Settings, episodes: Episodes, position: int, episode: int, trace: Trace, arm: str
) -> Row:
    reached = trace.success + [trace.success[-1]] * (settings.iterations - trace.iterations)
    success = trace.success[-1]
    layout = {name: values[position].item() for name, values in episodes.layout.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "cell": "",
        "arm": arm,
        "task": settings.task.name,
        "layout": json.dumps(layout, sort_keys=True),
        "block": settings.block,
        "seed": settings.seed,
        "episode": episode,
        "episode_seed": int(episodes.seeds[position]),
        "success": success,
        "success_by_iteration": reached,
        "first_success": trace.success.index(True) if success else None,
        "iterations": trace.iterations,
        "failure": None if success else (trace.failure or "not_reached"),
        "final_distance": trace.distance[-1],
        "distance_by_iteration": trace.distance,
        "cost_by_iteration": trace.cost,
        "cost_by_step": trace.cost_by_step,
        "states": [_floats(state) for state in trace.states],
        "goal": _floats(episodes.goal[position]),
        "plan_seconds": trace.plan_seconds,
        "peak_memory_mb": peak_memory_mb(settings.device),
        "provenance": provenance_json(settings.device, settings.dtype),
    }


def _floats(values: npt.NDArray[Any]) -> list[float]:
    return [float(value) for value in values]
