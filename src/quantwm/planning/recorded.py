"""A function on a CUDA device that is recorded once and replayed: its kernels, without launching.

A rollout is some hundred small kernels, each of which takes longer to launch than to run.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from quantwm.planning.objective import as_parts, like
from quantwm.protocols import Latent

logger = logging.getLogger(__name__)

Function: TypeAlias = Callable[..., Tensor]
"""Of latents and tensors on one device."""
_WARM_UP = 2
"""Calls before recording, in which libraries choose kernels and allocate what they keep."""


class Recorded:
    """Replays a function's kernels on new inputs; a recording for each set of shapes.

    A function that cannot be recorded, say because a model looks at values on the way, is called.

    Args:
        function: runs the same kernels whatever the inputs' values. What else it reads must stay
            where it is; hooks are not called.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._recordings: dict[tuple[torch.Size, ...], _Recording | None] = {}

    def __call__(self, *inputs: Latent) -> Tensor:
        """What the function returns, in memory of its own."""
        key = tuple(tensor.shape for tensor in _tensors(inputs))
        if key not in self._recordings:
            self._recordings[key] = self._record(inputs)
        recording = self._recordings[key]
        return self._function(*inputs) if recording is None else recording.replay(inputs)

    def _record(self, inputs: Sequence[Latent]) -> "_Recording | None":
        try:
            return _Recording(self._function, inputs)
        except (RuntimeError, AssertionError, ValueError) as error:
            logger.warning("rollouts cannot be recorded and are slower: %s", error)
            return None


class _Recording:
    """One recorded call and the memory that it reads and writes."""

    def __init__(self, function: Function, inputs: Sequence[Latent]) -> None:
        own = [
            like({name: part.clone() for name, part in as_parts(latent).items()}, latent)
            for latent in inputs
        ]
        self._inputs = _tensors(own)
        with self._on_device():
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    function(*own)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # A stream of its own: torch's default is one of the first device that it recorded on.
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self._output = function(*own)

    def replay(self, inputs: Sequence[Latent]) -> Tensor:
        with self._on_device():
            for own, given in zip(self._inputs, _tensors(inputs), strict=True):
                own.copy_(given)
            self._graph.replay()
            return self._output.clone()

    def _on_device(self) -> torch.cuda.device:
        """Streams are the current device's, which need not be the one that the inputs are on."""
        return torch.cuda.device(self._inputs[0].device)


def _tensors(inputs: Sequence[Latent]) -> list[Tensor]:
    return [tensor for latent in inputs for tensor in as_parts(latent).values()]
