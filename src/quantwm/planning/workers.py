"""Independent chunks of work, as many at a time as cores and memory allow.

On a CPU every chunk runs on one core, so its numbers depend neither on how many cores there are
nor on how many chunks run beside it, and no core waits for another inside an operation.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantwm.compute import available_memory, shown_bytes
from quantwm.errors import UsageError

Job = TypeVar("Job")
Result = TypeVar("Result")

_SHARE = 0.5
"""Of the memory that is free, what chunks may take where the user sets no budget."""


class Workers:
    """Runs one function on many jobs.

    The first job runs alone and is measured; what it took decides how many run at a time.

    Args:
        device: where the function computes. A CUDA device queues work by itself, so there jobs
            run one after the other.
        memory_budget: bytes that all jobs in flight may allocate together; None takes half of
            what is free on the device.
        what: a job, for messages.
    """

    def __init__(
        self, device: torch.device, memory_budget: int | None = None, what: str = "chunk"
    ) -> None:
        if memory_budget is not None and memory_budget < 1:
            raise UsageError(f"memory_budget must be positive, got {memory_budget} bytes")
        self._device, self._budget, self._what = device, memory_budget, what
        self.job_bytes: int | None = None
        """Peak of what one job allocates, known after the first."""

    @property
    def in_flight(self) -> int:
        """Jobs that run at a time: at most one a core, and at least one."""
        if self._device.type != "cpu":
            return 1
        cores = torch.get_num_threads()
        if self.job_bytes is None or self.job_bytes == 0:
            return cores
        return max(1, min(cores, self._allowed() // self.job_bytes))

    def map(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """Results in the order of the jobs.

        Raises:
            UsageError: one job needs more than the memory budget.
        """
        done: list[Result] = []
        if self.job_bytes is None and jobs:
            done = self._run(lambda job: self._measured(function, job), jobs[:1], 1)
            self._check()
        return done + self._run(function, jobs[len(done) :], self.in_flight)

    def _run(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], count: int
    ) -> list[Result]:
        if self._device.type != "cpu":
            return [function(job) for job in jobs]
        threads = torch.get_num_threads()
        futures = [_pool(count).submit(_on_one_core, function, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            # Workers change the count that threads to come start with; ours stays as it was.
            torch.set_num_threads(threads)

    def _measured(self, function: Callable[[Job], Result], job: Job) -> Result:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            result = function(job)
            self.job_bytes = torch.cuda.max_memory_allocated(self._device) - before
            return result
        with AllocationMeter() as meter:
            result = function(job)
        self.job_bytes = meter.peak
        return result

    def _allowed(self) -> int:
        if self._budget is not None:
            return self._budget
        return int(_SHARE * available_memory(self._device))

    def _check(self) -> None:
        needed, allowed = self.job_bytes or 0, self._allowed()
        if needed > allowed:
            source = "the memory budget" if self._budget is not None else "half of what is free"
            raise UsageError(
                f"{self._what} takes {shown_bytes(needed)} of memory and {source} is "
                f"{shown_bytes(allowed)}; give memory_budget at least the former"
            )


class AllocationMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations create while it is active, in this thread.

    Attributes:
        peak: the most that was alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _is_dense(leaf)}
        for leaf in tree_leaves(result):
            if _is_dense(leaf):
                self._count(leaf, inputs)
        return result

    def _count(self, tensor: Tensor, inputs: set[int]) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key in self._known or key in inputs or storage.nbytes() == 0:
            return
        self._known.add(key)
        self._alive += storage.nbytes()
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="quantwm")


def _on_one_core(function: Callable[[Job], Result], job: Job) -> Result:
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    return function(job)
