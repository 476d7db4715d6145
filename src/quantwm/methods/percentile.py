"""Percentile: static input ranges that leave the rarest values out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantwm.checks import is_number
from quantwm.errors import UsageError
from quantwm.methods.registry import register
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.observers import MinMax, RangeObserver
from quantwm.quant.primitives import Range
from quantwm.quant.sampling import Reservoir
from quantwm.quant.scheme import LayerScheme

EXTREMES, SAMPLE = 2**18, 2**19
"""Values of each layer that are kept at either end and of all: up to 10 MiB together."""
_PIECE = 2**20
"""Values that are looked at together, so that memory stays bounded."""


@register
@dataclass(frozen=True)
class Percentile:
    """Clipping of static inputs at quantiles of what the float model reads on calibration data.

    A layer's range goes from the (100 - p)th to the pth percentile of all values that it reads
    (in Wu et al., arXiv 2004.09602, of their magnitudes), interpolated linearly. Zero is taken in
    only as the grid itself requires. Percentiles are exact while no more than `EXTREMES` values
    lie beyond them, which at p = 99.9 is 262 million values a layer; further from the ends they
    are those of a uniform sample of `SAMPLE` values. Layers whose activations are dynamic or float
    are left alone.

    The default is high because rare large values carry meaning in DINOv2 (docs/methods.md).

    Attributes:
        percentile: p, above 50 and at most 100, which is the full range.

    Raises:
        UsageError: p out of range.
    """

    percentile: float = 99.999
    name: ClassVar[str] = "percentile"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_number(self.percentile) or not 50 < self.percentile <= 100:
            raise UsageError(
                "percentile.percentile must be above 50 and at most 100, such as 99.9, "
                f"got {self.percentile!r}"
            )

    def problems(
        self,
        world_model: WorldModel,  # noqa: ARG002
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],  # noqa: ARG002
    ) -> list[str]:
        """A plan without anything to clip."""
        activations = [scheme.activation for scheme in schemes.values()]
        if any(activation is not None and activation.static for activation in activations):
            return []
        return [
            "no layer of the plan has static activations, so there is no input range to choose; "
            "write 'a8' (without -token or -dynamic) for some layers, or leave percentile out"
        ]

    def observer(self, layer: str) -> RangeObserver:
        """Percentiles of all inputs, or their extremes where p is 100."""
        if self.percentile == 100:
            return MinMax(layer)
        return PercentileRange(layer, self.percentile)


class PercentileRange(RangeObserver):
    """Settles on the (100 - p)th and the pth percentile of what it sees.

    Args:
        layer: dotted name.
        percentile: p.
        extremes: largest and smallest values to keep, for percentiles near the ends.
        sample: values to keep of all, for other percentiles.
    """

    def __init__(
        self, layer: str, percentile: float, extremes: int = EXTREMES, sample: int = SAMPLE
    ) -> None:
        super().__init__(layer)
        self.percentile = percentile
        self._smallest, self._largest = _Largest(extremes), _Largest(extremes)
        self._sample = Reservoir(layer, sample)

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:  # noqa: ARG002
        # A copy, because models write into what layers have read.
        for values in torch.split(x.flatten().to(torch.float32, copy=True), _PIECE):
            self._largest.update(values)
            self._smallest.update(-values)
            self._sample.update(values)

    def range(self) -> Range:
        """The two percentiles: exact, or of the sample where they are too far from the ends."""
        self.check_seen()
        share = (100 - self.percentile) / 100
        position = share * (self.seen - 1)
        low, high = self._smallest.at(position), self._largest.at(position)
        if low is not None and high is not None:
            return -low, high
        values = self._sample.value().double()
        shares = torch.tensor([share, 1 - share], dtype=torch.float64, device=values.device)
        sampled_low, sampled_high = torch.quantile(values, shares).float()
        return sampled_low, sampled_high


class _Largest:
    """The largest values seen, exactly."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: list[Tensor] = []
        self._count = 0
        self._least = -torch.inf

    def update(self, values: Tensor) -> None:
        """See values (n,)."""
        if self._least > -torch.inf:
            values = values[values > self._least]
        self._kept.append(values)
        self._count += len(values)
        if self._count > 2 * self._capacity:
            self._drop_small()

    def at(self, position: float) -> Tensor | None:
        """The value `position` ranks below the largest, interpolated; None if no longer known."""
        values = self._drop_small()
        above, below = math.floor(position), math.ceil(position)
        if below >= len(values):
            return None
        ordered = values.topk(below + 1).values
        return torch.lerp(
            ordered[above].double(), ordered[below].double(), position - above
        ).float()

    def _drop_small(self) -> Tensor:
        values = torch.cat(self._kept)
        if len(values) > self._capacity:
            values = values.topk(self._capacity, sorted=False).values
            self._least = values.min().item()
        self._kept, self._count = [values], len(values)
        return values
