"""A layer's weight and input as they are once rounded."""

from torch import Tensor

from quantwm.quant.input_quantizer import InputQuantizer
from quantwm.quant.modules import QuantizedWeight
from quantwm.quant.primitives import Range
from quantwm.quant.scheme import ActivationScheme, WeightScheme


def rounded_weight(weight: Tensor, scheme: WeightScheme | None, extent: Range | None) -> Tensor:
    """The weight (out, in) that rounding to nearest gives, or itself where it stays float."""
    if scheme is None:
        return weight
    return QuantizedWeight.from_float(weight, scheme, extent).value


def rounded_input(
    x: Tensor,
    scheme: ActivationScheme | None,
    tokens_per_frame: int | None,
    extent: Range | None = None,
) -> Tensor:
    """A layer's input (rows, tokens, width) as it reads it once quantized.

    Args:
        extent: of a static grid; what `x` spans if None.
    """
    if scheme is None:
        return x
    if scheme.static and extent is None:
        extent = x.min(), x.max()
    return InputQuantizer.from_range(scheme, tokens_per_frame, extent).rounded(x)
