"""Collecting trajectories of a policy: a task's scripted one, or another."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from quantwm.data.trajectories import Trajectories, TrajectoryFolder
from quantwm.errors import QuantWMError, UsageError
from quantwm.protocols import FloatArray, Layout, Task
from quantwm.seeds import MAX_SEED, SeedBlock, episode_seeds

SHARD = 1000
_SHARDS = 64
"""Shards of a split that a collection may have, each with an episode seed of its own."""
DEFAULT_COUNTS = {"train": 12_000, "validation": 500}


@runtime_checkable
class Scripted(Protocol):
    """A behaviour in a task; tasks that can behave by themselves are one."""

    policy: str
    """Name and version of the policy."""
    trajectory_steps: int
    """Raw actions in a trajectory."""

    def scripted(self, seeds: list[int], steps: int) -> tuple[FloatArray, FloatArray]:
        """States (B, steps + 1, S) and raw actions (B, steps, A)."""
        ...

    def sample_layout(self, seeds: list[int]) -> Layout:
        """The layout (B,) of each seed's world."""
        ...


def collect(
    task: Task,
    folder: Path,
    *,
    policy: Scripted | None = None,
    train: int = DEFAULT_COUNTS["train"],
    validation: int = DEFAULT_COUNTS["validation"],
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> TrajectoryFolder:
    """Write trajectories in shards; shards that are there already are kept.

    Args:
        task: where it happens.
        folder: where to; made if it is not there.
        policy: what acts, see `quantwm.data.planned`; None for the task's scripted policy.
        train, validation: trajectories of each split, from disjoint seed blocks.
        seed: 0 to 1,023; another seed gives other trajectories, none of them in common.
        workers: processes that simulate; the data do not depend on how many.
        progress: called with (trajectories done, of how many).

    Raises:
        UsageError: the task has no scripted policy and none is given, a count below 1 or above
            64,000 a split, or a seed out of range.
        MismatchError: the folder holds data of another task, policy, seed or size.
        QuantWMError: a process died.
    """
    if policy is None:
        if not isinstance(task, Scripted):
            raise UsageError(f"task {task.name!r} has no scripted policy to collect with")
        policy = task
    if train < 1 or validation < 1:
        raise UsageError(f"need at least one trajectory a split, got {train} and {validation}")
    if max(train, validation) > SHARD * _SHARDS:
        raise UsageError(
            f"a seed gives at most {SHARD * _SHARDS} trajectories a split, and {train} and "
            f"{validation} were asked for: collect further ones with another seed"
        )
    if not 0 <= seed < MAX_SEED // _SHARDS:
        raise UsageError(f"seed must be 0 to {MAX_SEED // _SHARDS - 1}, got {seed}")
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    store = TrajectoryFolder(folder)
    counts: dict[SeedBlock, int] = {"train": train, "validation": validation}
    store.begin(
        task.settings(),
        {"policy": policy.policy, "seed": seed, "train": train, "validation": validation},
    )
    shards = [shard for split, count in counts.items() for shard in _shards(split, count, seed)]
    missing = [shard for shard in shards if not store.has_shard(shard.name)]
    done, total = (
        train + validation - sum(len(shard.seeds) for shard in missing),
        train + validation,
    )
    for shard, trajectories in zip(missing, _simulated(policy, missing, workers), strict=True):
        store.add_shard(shard.name, shard.split, trajectories)
        done += len(shard.seeds)
        if progress is not None:
            progress(done, total)
    return store


@dataclass(frozen=True)
class _Shard:
    """Trajectories that are simulated and stored together."""

    name: str
    split: SeedBlock
    seeds: list[int]


def _shards(split: SeedBlock, count: int, seed: int) -> Iterator[_Shard]:
    for number, first in enumerate(range(0, count, SHARD)):
        size = min(SHARD, count - first)
        # Each shard takes an episode seed of its own: a block never runs out of episodes, and no
        # two collections share one.
        seeds = episode_seeds(split, seed * _SHARDS + number, size)
        yield _Shard(f"{split}-{number:04d}-{size}", split, seeds)


def _simulated(policy: Scripted, shards: list[_Shard], workers: int) -> Iterator[Trajectories]:
    """The trajectories of each shard, in order."""
    if workers == 1 or len(shards) < 2:
        yield from (_simulate(policy, shard.seeds) for shard in shards)
        return
    # Spawned, not forked: a fork of a process with torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(shards)), mp_context=context)
    futures = [pool.submit(_simulate, policy, shard.seeds) for shard in shards]
    try:
        yield from (future.result() for future in futures)
    except BrokenProcessPool as error:
        raise QuantWMError(
            "a process that simulates died, perhaps for want of memory; complete shards are kept: "
            "run the same command to go on, with fewer workers"
        ) from error
    finally:
        # A caller who has given up does not wait. Neither does `with` serve, which waits for every
        # shard, nor `cancel_futures`, which does nothing once nobody holds the pool.
        for future in futures:
            future.cancel()
        pool.shutdown(wait=False)


def _simulate(policy: Scripted, seeds: list[int]) -> Trajectories:
    steps = policy.trajectory_steps
    states, actions = policy.scripted(seeds, steps)
    return Trajectories(
        states.reshape(-1, states.shape[-1]),
        actions.reshape(-1, actions.shape[-1]).astype(np.float32),
        np.full(len(seeds), steps, np.int64),
        dict(policy.sample_layout(seeds)),
        np.asarray(seeds, np.int64),
    )
