"""What methods learn from the inputs of a layer: extremes, second moments, a sample of tokens."""

import torch
from torch import Tensor

from quantwm.quant.observers import Observer
from quantwm.quant.sampling import Reservoir

DEFAULT_TOKENS = 1024


class ChannelAbsMax(Observer):
    """Largest magnitude of each input channel."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self._absmax: Tensor | None = None

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:  # noqa: ARG002
        new = x.reshape(-1, x.shape[-1]).abs().amax(0).float()
        self._absmax = new if self._absmax is None else torch.maximum(self._absmax, new)

    def value(self) -> Tensor:
        """(width,) float32; zero for a dead channel."""
        self.check_seen()
        assert self._absmax is not None
        return self._absmax


class SecondMoment(Observer):
    """XᵀX of all inputs X (tokens, width)."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self._sum: Tensor | None = None
        self.tokens = 0

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:  # noqa: ARG002
        flat = x.reshape(-1, x.shape[-1]).float()
        new = (flat.T @ flat).double()
        self._sum = new if self._sum is None else self._sum.add_(new)
        self.tokens += len(flat)

    def value(self) -> Tensor:
        """(width, width) float64, summed over `tokens`."""
        self.check_seen()
        assert self._sum is not None
        return self._sum


class TokenSample(Observer):
    """A uniform sample of what a layer reads, all of it where there is little enough.

    It depends on the layer's name and inputs alone (`Reservoir`).

    Args:
        layer: dotted name.
        capacity: tokens to keep.
        unit: consecutive tokens that are kept or dropped together: those of a frame for scales
            that are one a frame. None: all tokens of a row.
    """

    def __init__(self, layer: str, capacity: int = DEFAULT_TOKENS, unit: int | None = 1) -> None:
        super().__init__(layer)
        self.capacity, self.unit = capacity, unit
        self._units: Reservoir | None = None
        self.tokens = 0
        """Tokens seen."""

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:  # noqa: ARG002
        unit = x.shape[-2] if self.unit is None else self.unit
        if self._units is None:
            self._units = Reservoir(self.layer, max(1, self.capacity // unit))
        units = x.reshape(-1, unit, x.shape[-1])
        self.tokens += len(units) * unit
        self._units.update(units.float())

    def value(self) -> Tensor:
        """(units, tokens of a unit, width) float32, in the order they were seen."""
        self.check_seen()
        assert self._units is not None
        return self._units.value()
