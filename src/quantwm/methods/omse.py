"""OMSE: clip the range of each scale where its weights' rounding error is least."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantwm.checks import is_integer, is_number
from quantwm.compute import cpu_threads
from quantwm.errors import UsageError
from quantwm.methods.registry import register
from quantwm.methods.roles import without_weights
from quantwm.methods.work import Work
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.clipping import best_ratios, clip_ratios
from quantwm.quant.primitives import Range, to_groups, weight_range
from quantwm.quant.scheme import LayerScheme, WeightScheme

_CACHE_ELEMENTS = 2**16
"""Weights of whole rows that are tried at once on a CPU: with the buffers of one try they stay in
a core's second-level cache."""


@register
@dataclass(frozen=True)
class OMSE:
    """Clipping by least squared weight error, one ratio of the min-max range a scale.

    Choukroun et al., arXiv 1902.06822; searched over a grid of ratios as in arXiv 2602.02110.
    Weights alone are looked at, so it needs no calibration data, and inputs keep their ranges.
    Layers without weights (attention matmuls) and float weights are left alone.

    Attributes:
        ratios: how many are tried, evenly spaced from 1 down to `lowest`; 1 tries 1 alone.
        lowest: the smallest ratio, above 0 and at most 1.

    Raises:
        UsageError: an option out of range.
    """

    ratios: int = 101
    lowest: float = 0.35
    name: ClassVar[str] = "omse"
    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not is_integer(self.ratios, 1):
            raise UsageError(f"omse.ratios must be an integer of at least 1, got {self.ratios!r}")
        if not is_number(self.lowest) or not 0 < self.lowest <= 1:
            raise UsageError(f"omse.lowest must be above 0 and at most 1, got {self.lowest!r}")

    @property
    def candidates(self) -> tuple[float, ...]:
        """The ratios to try, largest first."""
        return clip_ratios(self.ratios, self.lowest)

    def problems(
        self,
        world_model: WorldModel,  # noqa: ARG002
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],  # noqa: ARG002
    ) -> list[str]:
        """A plan without anything to clip."""
        return without_weights(schemes, "clip")

    def extents(
        self,
        work: Work,  # noqa: ARG002
        weights: Mapping[str, Tensor],
        schemes: Mapping[str, WeightScheme],
    ) -> dict[str, Range]:
        """The range of least error of each group."""
        with cpu_threads(1):
            return {
                name: least_error_range(weight, schemes[name], self.candidates)
                for name, weight in weights.items()
            }


@torch.no_grad()
def least_error_range(weight: Tensor, scheme: WeightScheme, ratios: Iterable[float]) -> Range:
    """The ranges, shrunk from each group's own, whose grids give the least ‖w - ŵ‖².

    The MMSE problem of arXiv 1902.06822, with the grid that the weight will be rounded to.

    Args:
        weight: (out, in), any float type; rounded in float32.
        scheme: of the weight.
        ratios: to try, each of the whole range; of equally good ones the largest wins.

    Returns:
        lowest and highest value of each grid, float32 (rows, groups). A group of zeros, or one
        that holds NaN or infinite values, keeps its range.
    """
    grouped = to_groups(weight.float(), scheme.granularity)
    low, high = weight_range(weight, scheme.granularity)
    falling = sorted(ratios, reverse=True)
    on_cpu = grouped.device.type == "cpu"
    step = max(1, _CACHE_ELEMENTS // max(grouped[0].numel(), 1)) if on_cpu else len(grouped)
    chunks = [slice(start, start + step) for start in range(0, len(grouped), step)]
    best = [
        best_ratios(grouped[rows], (low[rows], high[rows]), scheme, falling, _squared_sum)
        for rows in chunks
    ]
    ratio = torch.cat(best)
    return low * ratio, high * ratio


def _squared_sum(delta: Tensor) -> Tensor:
    """(rows, groups, values), which is overwritten → (rows, groups)."""
    return delta.square_().sum(-1)
