"""Frames of a data set, drawn ahead of their use where other processes can."""

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from quantwm.data.sources import Frames, IntArray
from quantwm.errors import QuantWMError

Where: TypeAlias = tuple[IntArray, IntArray]
"""Trajectories (n,) and their steps (n,)."""
Pictures: TypeAlias = npt.NDArray[np.uint8]
_AHEAD = 3
"""Calls a process that may be drawn or waiting: enough for none to idle."""
_own: list[Frames] = []
"""What a drawing process draws with."""


def drawn(frames: Frames, calls: Sequence[Where], workers: int) -> Iterator[Pictures]:
    """Frames (n, H, W, 3) of each call, in order.

    Args:
        frames: draws; with workers, it must be picklable.
        calls: which frames, a batch each.
        workers: processes that draw ahead; 0 draws here, when asked. The same frames either way.

    Raises:
        QuantWMError: a process died.
    """
    if workers == 0 or len(calls) < 2:
        yield from (frames(*call) for call in calls)
        return
    # Spawned, not forked: a fork of a process with torch's threads or a GPU may hang.
    pool = ProcessPoolExecutor(
        min(workers, len(calls)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(frames,),
    )
    waiting: deque[Future[Pictures]] = deque()
    coming = iter(calls)
    try:
        waiting.extend(pool.submit(_draw, call) for call in islice(coming, _AHEAD * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_draw, call) for call in islice(coming, 1))
    except BrokenProcessPool as error:
        raise QuantWMError(
            "a process that draws frames died, perhaps for want of memory; run the same command "
            "to go on"
        ) from error
    finally:
        # Not `cancel_futures`, which does nothing once nobody holds the pool.
        for future in waiting:
            future.cancel()
        pool.shutdown(wait=False)


def _begin(frames: Frames) -> None:
    _own.append(frames)
    torch.set_num_threads(1)


def _draw(call: Where) -> Pictures:
    return _own[0](*call)
