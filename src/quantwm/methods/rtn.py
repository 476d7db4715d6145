"""Round to nearest: the min-max grid of every weight and input, nothing optimised."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quantwm.methods.registry import register
from quantwm.methods.work import Work
from quantwm.quant.modules import QuantizedWeight
from quantwm.quant.observers import MinMax, RangeObserver
from quantwm.quant.primitives import Range, weight_range
from quantwm.quant.scheme import WeightScheme


@register
@dataclass(frozen=True)
class RTN:
    """Round-to-nearest. Static input ranges are those of the float model, extremes included.

    What another part of a method does not choose is chosen as here.
    """

    name: ClassVar[str] = "rtn"
    needs_calibration: ClassVar[bool] = False

    def extents(
        self,
        work: Work,  # noqa: ARG002
        weights: Mapping[str, Tensor],
        schemes: Mapping[str, WeightScheme],
    ) -> dict[str, Range]:
        """The range of each group's weights."""
        return {
            name: weight_range(weight, schemes[name].granularity)
            for name, weight in weights.items()
        }

    def codes(self, work: Work, extents: Mapping[str, Range]) -> dict[str, QuantizedWeight]:
        """The nearest codes."""
        schemes = work.weighted(extents)
        return {
            name: QuantizedWeight.from_float(work.weight(name), schemes[name], extent)
            for name, extent in extents.items()
        }

    def observer(self, layer: str) -> RangeObserver:
        """Extremes of all inputs."""
        return MinMax(layer)
