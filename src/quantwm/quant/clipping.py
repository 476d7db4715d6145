"""Searching how far each weight grid's range is to shrink."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantwm.quant.primitives import Range, fake_quantize, weight_parameters
from quantwm.quant.scheme import WeightScheme


def clip_ratios(count: int, lowest: float) -> tuple[float, ...]:
    """Ratios evenly spaced from 1 down to `lowest`; one of them is 1 alone."""
    step = (1 - lowest) / max(count - 1, 1)
    return tuple(1 - step * number for number in range(count))


def best_ratios(
    grouped: Tensor,
    extent: Range,
    scheme: WeightScheme,
    ratios: Sequence[float],
    error: Callable[[Tensor], Tensor],
) -> Tensor:
    """The ratio of each range whose grid gives the least error.

    Args:
        grouped: float32 weights (rows, groups, values), see `primitives.to_groups`.
        extent: of each group, (rows, groups); both its ends shrink by the same ratio.
        scheme: of the weight, whose grid the weights are rounded to.
        ratios: to try; of equally good ones the first wins.
        error: from rounding errors ŵ - w (rows, groups, values), which it may overwrite, to what
            is to be least, in the shape of the ranges; NaN never wins.

    Returns:
        (rows, groups) float32; 1 where no error was finite.
    """
    low, high = extent
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for ratio in ratios:
        scale, zero_point = weight_parameters((low * ratio, high * ratio), scheme)
        rounded = fake_quantize(
            grouped,
            scale.unsqueeze(-1),
            None if zero_point is None else zero_point.unsqueeze(-1),
            scheme.bits,
            symmetric=scheme.symmetric,
        )
        found = error(rounded.sub_(grouped))
        better = found < least
        best, least = torch.where(better, ratio, best), torch.where(better, found, least)
    return best
