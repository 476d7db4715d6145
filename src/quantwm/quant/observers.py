"""Ranges of layer inputs, seen while calibration data pass through a float model."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from quantwm.errors import NonFiniteError, UsageError
from quantwm.protocols import WorldModel
from quantwm.quant.modules import replace_module
from quantwm.quant.primitives import Range

logger = logging.getLogger(__name__)


class CalibrationData(Protocol):
    """Inputs that a planner really feeds a model, to be replayed on it."""

    @property
    def model_hash(self) -> str:
        """`quantwm.fingerprint.model_hash` of the model that the data were gathered with."""
        ...

    def replay(self, world_model: WorldModel) -> None:
        """Run the model's forward passes over all samples, in chunks of bounded memory."""
        ...


class Observer(ABC):
    """Sees a layer's inputs batch by batch and settles on the range that a static grid covers.

    Args:
        layer: dotted name, for errors.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def update(self, x: Tensor) -> None:
        """See one batch of inputs of any shape.

        Raises:
            NonFiniteError: NaN or infinite values, which would spoil every range.
        """
        low, high = (extreme.float() for extreme in x.detach().aminmax())
        if not (low.isfinite() and high.isfinite()):
            raise NonFiniteError(
                f"calibration: the input of {self.layer} holds NaN or infinite values; "
                "check the model's weights and its compute type"
            )
        self._update(x.detach(), low, high)

    @abstractmethod
    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """See finite inputs whose extremes are `low` and `high`."""

    @abstractmethod
    def range(self) -> Range:
        """Lowest and highest value to represent, float32 tensors without dimensions.

        Raises:
            UsageError: no input was seen.
        """

    def _unseen(self) -> UsageError:
        return UsageError(
            f"calibration never ran {self.layer}; gather it with this model's encoder and rollouts"
        )


class MinMax(Observer):
    """The full range of what was seen."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self._range: Range | None = None

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:  # noqa: ARG002
        if self._range is not None:
            low, high = torch.minimum(self._range[0], low), torch.maximum(self._range[1], high)
        self._range = low, high

    def range(self) -> Range:
        """Extremes of all inputs."""
        if self._range is None:
            raise self._unseen()
        return self._range


def input_ranges(
    world_model: WorldModel,
    layers: Iterable[str],
    calibration: CalibrationData,
    make_observer: Callable[[str], Observer] = MinMax,
) -> dict[str, Range]:
    """Ranges of the inputs of `layers` while the calibration data pass through the model.

    All layers are observed in one replay, and the model is left as it was.

    Raises:
        NonFiniteError: a layer's input holds NaN or infinite values.
        UsageError: a layer that the replay never runs.
    """
    observers = {name: make_observer(name) for name in layers}
    if not observers:
        return {}
    logger.debug("observing the inputs of %d layers", len(observers))
    with watching(world_model, observers), torch.no_grad():
        calibration.replay(world_model)
    return {name: observer.range() for name, observer in observers.items()}


class _WatchedTap(nn.Identity):
    """Stands in for an `nn.Identity` tap: models may skip what a plain identity would see."""


@contextmanager
def watching(world_model: WorldModel, observers: dict[str, Observer]) -> Iterator[None]:
    """Show the named layers' inputs to their observers while the context lasts."""
    handles, taps = [], []
    try:
        for name, observer in observers.items():
            module = world_model.get_submodule(name)
            if type(module) is nn.Identity:
                taps.append((name, module))
                module = _WatchedTap()
                replace_module(world_model, name, module)
            handles.append(module.register_forward_pre_hook(_feed(observer)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, tap in taps:
            replace_module(world_model, name, tap)


def _feed(observer: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        observer.update(inputs[0])

    return hook
