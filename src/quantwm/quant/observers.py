"""What layers read while calibration data pass through a model."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from quantwm.errors import NonFiniteError, UsageError
from quantwm.protocols import Latent, WorldModel
from quantwm.quant.modules import QuantConv2d, input_matrix, replace_module
from quantwm.quant.primitives import Range

logger = logging.getLogger(__name__)


class CalibrationData(Protocol):
    """Inputs that a planner really feeds a model, to be replayed on it."""

    @property
    def model_hash(self) -> str:
        """`quantwm.fingerprint.model_hash` of the model that the data were gathered with."""
        ...

    def encode(self, world_model: WorldModel) -> Latent:
        """Latents of all frames, encoded in chunks of bounded memory."""
        ...

    def roll_out(self, world_model: WorldModel, latents: Latent) -> None:
        """Roll all sequences out from `encode`'s latents, in chunks of bounded memory."""
        ...


class Observer(ABC):
    """Sees a layer's inputs batch by batch.

    Args:
        layer: dotted name, for errors.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.seen = 0
        """Values seen so far."""

    def see(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],  # noqa: ARG002
    ) -> None:
        """See one call of the layer, before it runs."""
        convolution = isinstance(module, nn.Conv2d | QuantConv2d)
        self.update(input_matrix(module, args[0]) if convolution else args[0])

    def update(self, x: Tensor) -> None:
        """See one batch of inputs, (..., width).

        Raises:
            NonFiniteError: NaN or infinite values, which would spoil everything that is learnt.
        """
        x = x.detach()
        low, high = (extreme.float() for extreme in x.aminmax())
        if not (low.isfinite() and high.isfinite()):
            raise NonFiniteError(
                f"calibration: the input of {self.layer} holds NaN or infinite values; "
                "check the model's weights and its compute type"
            )
        self.seen += x.numel()
        self._update(x, low, high)

    @abstractmethod
    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """See finite inputs whose extremes are `low` and `high`."""

    def check_seen(self) -> None:
        """Refuse to conclude anything from nothing.

        Raises:
            UsageError: no input was seen.
        """
        if not self.seen:
            raise UsageError(
                f"calibration never ran {self.layer}; gather it with this model's encoder and "
                "rollouts"
            )


class RangeObserver(Observer):
    """Settles on the range that a layer's static input grid covers."""

    @abstractmethod
    def range(self) -> Range:
        """Lowest and highest value to represent, float32 tensors without dimensions.

        Raises:
            UsageError: no input was seen.
        """


class MinMax(RangeObserver):
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
        self.check_seen()
        assert self._range is not None
        return self._range


Observers = Mapping[str, Sequence[Observer]]
"""By name of a layer, or of a block; its observers see the same inputs."""
RunContext: TypeAlias = Callable[[WorldModel], AbstractContextManager[WorldModel]]
"""Entered around the running of a model; gives what calibration data are then run on."""


class Replay:
    """Shows layers what calibration data make them read, again and again while a model changes.

    Frames are encoded again only after a layer that encodes them was changed, and sequences are
    rolled out again only for layers that a rollout runs: the first replay finds out which.

    Args:
        world_model: of which layers are being replaced, in place.
        calibration: of the float model that `world_model` was copied from.
    """

    def __init__(self, world_model: WorldModel, calibration: CalibrationData) -> None:
        self._model, self._calibration = world_model, calibration
        self._latents: Latent | None = None
        self._encoding: set[str] = set()
        self._rolling: set[str] = set()
        self._known: set[str] = set()

    def show(self, observers: Observers, context: RunContext = nullcontext) -> None:
        """Show their layers' inputs to observers, in one replay of the model as it is now.

        Args:
            observers: by name of a layer or block.
            context: to run the model in.

        Raises:
            NonFiniteError: a layer's input holds NaN or infinite values.
            UsageError: a layer that the replay never runs.
        """
        if not observers:
            return
        logger.debug("observing the inputs of %d layers", len(observers))
        names = set(observers)
        fresh = {name for name in names if not _meet(name, self._known)}
        with torch.no_grad():
            if self._latents is None or fresh or any(_meet(n, self._encoding) for n in names):
                with self._running(observers, self._encoding, context) as model:
                    self._latents = self._calibration.encode(model)
            if fresh or any(_meet(n, self._rolling) for n in names):
                with self._running(observers, self._rolling, context) as model:
                    self._calibration.roll_out(model, self._latents)
        if fresh:
            self._known |= names | self._declared()
        for several in observers.values():
            for observer in several:
                observer.check_seen()

    def changed(self, layers: Iterable[str]) -> None:
        """Note that `layers` compute something else from now on."""
        names = set(layers)
        if names & self._encoding or names - self._known:
            self._latents = None

    def rolls_out(self, name: str) -> bool:
        """Whether rolling out runs a layer or block that was shown."""
        return _meet(name, self._rolling)

    def _declared(self) -> set[str]:
        """Layers that the model declares, but no taps: it may skip those while none is watched."""
        names = (name for group in self._model.quantizable_groups() for name in group.layers)
        return {n for n in names if type(self._model.get_submodule(n)) is not nn.Identity}

    @contextmanager
    def _running(
        self, observers: Observers, running: set[str], context: RunContext
    ) -> Iterator[WorldModel]:
        """Watch a run, and enter into `running` which of all declared layers take part in it."""
        handles = []
        with watching(self._model, observers), context(self._model) as model:
            for name in set(observers) | self._declared():
                hook = partial(_enter, running, name)
                handles.append(self._model.get_submodule(name).register_forward_pre_hook(hook))
            try:
                yield model
            finally:
                for handle in handles:
                    handle.remove()


def input_ranges(
    replay: Replay,
    layers: Iterable[str],
    make_observer: Callable[[str], RangeObserver] = MinMax,
) -> dict[str, Range]:
    """Ranges of the inputs of `layers`, all observed in one replay.

    Raises:
        NonFiniteError: a layer's input holds NaN or infinite values.
        UsageError: a layer that the replay never runs.
    """
    observers = {name: make_observer(name) for name in layers}
    replay.show({name: [observer] for name, observer in observers.items()})
    return {name: observer.range() for name, observer in observers.items()}


class _WatchedTap(nn.Identity):
    """Stands in for an `nn.Identity` tap: models may skip what a plain identity would see."""


@contextmanager
def watching(world_model: WorldModel, observers: Observers) -> Iterator[None]:
    """Show the named layers' inputs to their observers while the context lasts.

    Inputs come as the layer's product reads them, (..., width): a patch embedding's as patches.
    """
    handles, taps = [], []
    try:
        for name, several in observers.items():
            module = world_model.get_submodule(name)
            if type(module) is nn.Identity:
                taps.append((name, module))
                module = _WatchedTap()
                replace_module(world_model, name, module)
            handles.append(module.register_forward_pre_hook(_feed(several), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, tap in taps:
            replace_module(world_model, name, tap)


def _feed(observers: Sequence[Observer]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for observer in observers:
            observer.see(module, args, kwargs)

    return hook


def _meet(name: str, layers: Iterable[str]) -> bool:
    """Whether a layer is one of `layers`, or a block holds one of them."""
    return any(layer == name or layer.startswith(f"{name}.") for layer in layers)


def _enter(names: set[str], name: str, *_: object) -> None:
    names.add(name)
