"""A task's true dynamics, shared out among processes where that is worth it."""

import multiprocessing
import weakref
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter
from typing import TypeAlias

import numpy as np

from quantwm.protocols import FloatArray, Layout, Task

_WORTH = 0.5
"""Seconds a call from which on processes are started: that takes a few."""
_PARTS = 4
"""Parts of a call a process, since some worlds take longer than others."""
_Part: TypeAlias = tuple[FloatArray, Layout, FloatArray]
_own: list[Task] = []
"""What a simulating process simulates."""


class Simulators:
    """Simulates candidates; the number of processes changes no state.

    Args:
        task: must be picklable.
        processes: at most; 1 simulates here. So does a process that may have no children.
    """

    def __init__(self, task: Task, processes: int) -> None:
        self._task = task
        self._processes = 1 if multiprocessing.current_process().daemon else processes
        self._slow = False
        self._pool: ProcessPoolExecutor | None = None

    def final_states(self, states: FloatArray, layout: Layout, actions: FloatArray) -> FloatArray:
        """States (B, S) after raw actions (B, T, A) from states (B, S) in worlds of a layout."""
        if self._slow and self._processes > 1:
            return self._shared(states, layout, actions)
        began = perf_counter()
        final = self._task.rollout(states, layout, actions)[:, -1]
        self._slow = perf_counter() - began > _WORTH
        return final

    def _shared(self, states: FloatArray, layout: Layout, actions: FloatArray) -> FloatArray:
        if self._pool is None:
            # Spawned, not forked: a fork of a process with torch's threads or a GPU may hang.
            self._pool = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(self._task,),
            )
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        parts = [
            (states[rows], {name: values[rows] for name, values in layout.items()}, actions[rows])
            for rows in np.array_split(np.arange(len(states)), _PARTS * self._processes)
            if len(rows)
        ]
        return np.concatenate(list(self._pool.map(_final_states, parts)))


def _begin(task: Task) -> None:
    _own.append(task)


def _final_states(part: _Part) -> FloatArray:
    return np.asarray(_own[0].rollout(*part)[:, -1])
