"""AWQ: input channels that carry much get more of the weights' grid; then clipping by output."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantwm.checks import is_integer, is_number
from quantwm.compute import cpu_threads
from quantwm.errors import UsageError
from quantwm.methods.registry import register
from quantwm.methods.roles import Clipping
from quantwm.methods.rtn import RTN
from quantwm.methods.scale_search import (
    OutputError,
    best_scale,
    fold_scales,
    reader,
    scalable_groups,
    unscalable,
)
from quantwm.methods.work import Work
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.clipping import best_ratios, clip_ratios
from quantwm.quant.fold import usable_scale
from quantwm.quant.primitives import Range, from_groups, to_groups, weight_range
from quantwm.quant.scheme import (
    LayerScheme,
    PerChannel,
    PerTensor,
    WeightGranularity,
    WeightScheme,
)


@register
@dataclass(frozen=True)
class AWQ:
    """Activation-aware weight quantization, arXiv 2306.00978: scales, then clipping.

    Scales (section 3.2): the inputs of each group of linears that a normalisation feeds are
    divided, and their weights multiplied, by mean|X_j|^r, r being that of 0, 1/grid, …
    1 - 1/grid with the least output error. r = 0 scales nothing. The error is that of weights
    and inputs rounded as the plan says, with ranges found anew for every candidate's scaled
    weights; static input ranges are those of the token sample. Groups without a quantized weight
    are left alone, as are layers that no normalisation feeds (an attention's output linear, an
    MLP's second) and channels that are always zero.

    Clipping: each scale's range shrinks by the ratio that gives the least error of its own part
    of the output, ‖X_g (w_g - ŵ_g)ᵀ‖², both ends by the same ratio. Every layer whose weights are
    quantized is clipped, patch embeddings included. (The authors' code leaves queries and keys
    unclipped, which are fused with the values here.) Inputs count as float in that error.

    While AWQ is what clips, scales are searched with min-max ranges, and clipping follows, as in
    the authors' code. If a part that only clips is named as well ("awq+omse"), that one clips, in
    the search and in the end, and AWQ's own clipping is not run.

    X is a sample of tokens of the float model, taken once. Attention matmuls have no weights,
    and nothing happens to them here.

    Attributes:
        grid: values of r that are tried.
        clip: whether ranges are clipped; if not, they are min-max.
        clip_ratios: how many ratios are tried, evenly spaced from 1 down to `lowest`; 1 tries 1
            alone.
        lowest: the smallest ratio, above 0 and at most 1.

    Raises:
        UsageError: an option out of range.
    """

    name: ClassVar[str] = "awq"
    scales_channels: ClassVar[bool] = True
    rounds_to_nearest: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True

    grid: int = 20
    clip: bool = True
    clip_ratios: int = 20
    lowest: float = 0.5

    def __post_init__(self) -> None:
        for option in ("grid", "clip_ratios"):
            value = getattr(self, option)
            if not is_integer(value, 1):
                raise UsageError(f"awq.{option} is an integer of at least 1, got {value!r}")
        if not isinstance(self.clip, bool):
            raise UsageError(f"awq.clip is true or false, got {self.clip!r}")
        if not is_number(self.lowest) or not 0 < self.lowest <= 1:
            raise UsageError(f"awq.lowest is above 0 and at most 1, got {self.lowest!r}")

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of clipping, largest first."""
        return clip_ratios(self.clip_ratios, self.lowest)

    def idle_options(self, clipping: Clipping) -> dict[str, str]:
        """Those of its clipping where it does not clip."""
        if self.clip and isinstance(clipping, AWQ):
            return {}
        reason = "another part clips" if self.clip else "clip is false"
        return dict.fromkeys(("clip_ratios", "lowest"), reason)

    def problems(
        self,
        world_model: WorldModel,  # noqa: ARG002
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],
    ) -> list[str]:
        """A plan without anything to scale or to clip."""
        if not schemes:
            return []
        weighted = {name: one for name, one in schemes.items() if one.weight is not None}
        if not weighted:
            return [
                f"no layer of the plan has quantized weights: {', '.join(schemes)}; give some "
                "weight bits, such as 'w4', or choose another method"
            ]
        layers = unscalable(weighted, groups)
        if layers and not self.clip:
            return [
                "without clip it only scales what a normalisation gives to linears, and no layer "
                f"with quantized weights is fed by one: {', '.join(layers)}; add layers that are "
                "(qkv, fc1), set clip, or leave awq out"
            ]
        return []

    @torch.no_grad()
    def transform(self, work: Work, clipping: Clipping) -> None:
        """Scale every group that a normalisation feeds; one replay serves this and clipping.

        Raises:
            NonFiniteError: a layer's input holds NaN or infinite values.
        """
        itself = isinstance(clipping, AWQ)
        inputs = self._inputs(work, all_layers=itself and self.clip)
        ranges = RTN() if itself else clipping
        scales = []
        for group in _weighted(work, scalable_groups(work)):
            x = inputs[group]
            magnitude = x.abs().flatten(0, 1).mean(0)
            candidates = [
                importance_scale(magnitude, step / self.grid) for step in range(self.grid)
            ]
            best = best_scale(OutputError(work, group, x, ranges), candidates, group)
            inputs[group] = x / best
            scales.append((group, best))
        fold_scales(work, scales)

    @torch.no_grad()
    def extents(
        self, work: Work, weights: Mapping[str, Tensor], schemes: Mapping[str, WeightScheme]
    ) -> dict[str, Range]:
        """The ranges of least output error, or of all weights without `clip`.

        Raises:
            NonFiniteError: a layer's input holds NaN or infinite values.
        """
        if not self.clip:
            return RTN().extents(work, weights, schemes)
        inputs = self._inputs(work, all_layers=True)
        with cpu_threads(1):
            return {
                name: least_output_error_range(
                    weight, schemes[name], inputs[work.group_of[name]], self.ratios
                )
                for name, weight in weights.items()
            }

    def _inputs(self, work: Work, *, all_layers: bool) -> dict[LinearGroup, Tensor]:
        """What groups read, (rows, tokens, width), as first seen, scales since then applied.

        All groups with quantized weights, or only those that can be scaled; those that are
        missing are observed in one replay.
        """
        known: dict[LinearGroup, Tensor] = work.memory.setdefault(self.name, {})
        needed = _weighted(work, work.groups if all_layers else scalable_groups(work))
        missing = {reader(work, group): group for group in needed if group not in known}
        if missing:
            samples = work.samples(missing)
            known |= {group: samples[name].value() for name, group in missing.items()}
        return known


def importance_scale(magnitude: Tensor, ratio: float) -> Tensor:
    """mean|X_j|^r over the geometric mean of its extremes, so that it is 1 in the middle.

    arXiv 2306.00978, equation 5, with the normalisation of the authors' code.

    Args:
        magnitude: mean|X_j|, (width,).
        ratio: r, from 0 (all ones) to 1.

    Returns:
        (width,) float32, positive; 1 for a channel that is always zero.
    """
    live = magnitude > 0
    if not live.any():
        return torch.ones_like(magnitude)
    scale = magnitude.double().pow(ratio)
    low, high = scale[live].aminmax()
    return usable_scale(torch.where(live, scale / (low * high).sqrt(), 1.0))


def least_output_error_range(
    weight: Tensor, scheme: WeightScheme, x: Tensor, ratios: Iterable[float]
) -> Range:
    """The ranges, shrunk from each group's own, that give the least ‖X_g (w_g - ŵ_g)ᵀ‖².

    One ratio a row and group, or one for the whole matrix where it has one scale.

    Args:
        weight: (out, in), any float type; rounded in float32.
        scheme: of the weight.
        x: what the layer reads, (..., in) float32.
        ratios: to try, each of the whole range; of equally good ones the first wins.

    Returns:
        lowest and highest value of each grid, float32 (rows, groups).
    """
    low, high = weight_range(weight, scheme.granularity)
    grouped = to_groups(weight.float(), scheme.granularity)
    factor = input_factor(x, scheme.granularity)

    def error(delta: Tensor) -> Tensor:
        return _output_error(delta, factor, scheme.granularity, weight.shape)

    best = best_ratios(grouped, (low, high), scheme, tuple(ratios), error)
    return low * best, high * best


def input_factor(x: Tensor, granularity: WeightGranularity) -> Tensor:
    """R_g of each group's columns with ‖X_g d‖ = ‖R_g d‖ for every d, X_g = Q R_g if X is tall.

    The Gram matrix X_gᵀ X_g would serve as well, but squares what float32 rounding does.

    Args:
        x: (..., in).
        granularity: of the weight; with one scale for all of it, all columns are one group.

    Returns:
        (groups, at most a group's width, width of a group), a ragged last group filled up with
        zeros.
    """
    columns = PerChannel() if isinstance(granularity, PerTensor) else granularity
    grouped = to_groups(x.flatten(0, -2), columns).transpose(0, 1)
    if grouped.shape[1] <= grouped.shape[2]:
        return grouped
    factor: Tensor = torch.linalg.qr(grouped, mode="r").R
    return factor


def _output_error(
    delta: Tensor, factor: Tensor, granularity: WeightGranularity, shape: torch.Size
) -> Tensor:
    """‖R_g d‖² of weight errors (rows, groups, values) as `to_groups` gives them: (rows, groups).

    Args:
        delta: ŵ - w.
        factor: `input_factor`.
        granularity, shape: of the weight.
    """
    if isinstance(granularity, PerTensor):
        return (from_groups(delta, shape) @ factor[0].T).square_().sum().reshape(1, 1)
    by_group: Tensor = delta.transpose(0, 1) @ factor.transpose(1, 2)
    return by_group.square_().sum(-1).T


def _weighted(work: Work, groups: Iterable[LinearGroup]) -> list[LinearGroup]:
    """Groups of which the plan quantizes a weight."""
    return [
        group
        for group in groups
        if work.weighted(name for name in group.layers if name in work.schemes)
    ]
