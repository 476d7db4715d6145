"""Rounding whose ranges and channel factors are learned by gradient (OmniQuant, arXiv 2308.13137).

The modules here stand in for a block's normalisations and linears while it is learned. They
compute what the folded and quantized block will compute, from the same functions, and let
gradients through: rounding counts as the identity (arXiv 1308.3432), and what lies beyond a
grid's end moves with that end, as in LSQ+ (arXiv 2004.09576).
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from quantwm.quant.fold import norm_parameters
from quantwm.quant.input_quantizer import InputQuantizer, QuantTap
from quantwm.quant.modules import input_matrix
from quantwm.quant.observers import RangeObserver
from quantwm.quant.primitives import (
    Range,
    affine_parameters,
    code_range,
    from_groups,
    symmetric_scale,
    to_groups,
    weight_parameters,
    weight_range,
)
from quantwm.quant.scheme import ActivationScheme, LayerScheme, WeightScheme

INITIAL_LOGIT = 4.0
"""Of the share of a range that is kept: sigmoid(4) = 0.98, as in OmniQuant."""
_LARGEST_LOG = math.log(1e5)


class _RoundToGrid(torch.autograd.Function):
    """s (clamp(round(x / s) + z) - z) with a gradient to x, s and z.

    Inside the grid dx̂/dx = 1, dx̂/ds = round(x / s) - x / s and dx̂/dz = 0; beyond an end with
    code q, dx̂/dx = 0, dx̂/ds = q - z and dx̂/dz = -s.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, lowest: int, highest: int
    ) -> Tensor:
        steps = x / scale
        codes = steps.round()
        if zero_point is not None:
            codes += zero_point
        clamped = codes.clamp(lowest, highest)
        # Ones and zeros as floats: products with a bool tensor take several times as long.
        inside = torch.eq(clamped, codes, out=codes)
        if zero_point is not None:
            clamped -= zero_point
        slope = torch.sub(clamped, steps.mul_(inside), out=steps)
        ctx.save_for_backward(slope, inside, scale, zero_point)
        return clamped.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (slope, inside, scale, zero_point) = gradients, ctx.saved_tensors
        to_x = to_scale = to_zero_point = None
        if ctx.needs_input_grad[0]:
            to_x = gradient * inside
        if ctx.needs_input_grad[1]:
            to_scale = (gradient * slope).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            beyond = (inside - 1).mul_(gradient).mul_(scale)
            to_zero_point = beyond.sum_to_size(zero_point.shape)
        return to_x, to_scale, to_zero_point, None, None


def round_to_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, *, symmetric: bool
) -> Tensor:
    """`primitives.fake_quantize` with a gradient to all three tensors; x is float32."""
    apply = cast(Callable[..., Tensor], _RoundToGrid.apply)
    return apply(x, scale, zero_point, *code_range(bits, symmetric=symmetric))


def input_grid(low: Tensor, high: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None if symmetric) of inputs from `low` to `high`, with gradients."""
    if scheme.symmetric:
        return symmetric_scale(torch.maximum(low.abs(), high.abs()), scheme.bits), None
    scale, zero_point = affine_parameters(low, high, scheme.bits)
    return scale, _unrounded_gradient(zero_point, low, scale)


def weight_grid(extent: Range, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """`primitives.weight_parameters` with a gradient to both ends of each range."""
    scale, zero_point = weight_parameters(extent, scheme)
    if zero_point is None:
        return scale, None
    return scale, _unrounded_gradient(zero_point, extent[0], scale)


def _unrounded_gradient(zero_point: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """The zero point with the gradient of -low / s, which it was rounded from."""
    exact = -low.clamp(max=0) / scale
    return zero_point.detach() + (exact - exact.detach())


class LearnedScaling(nn.Module):
    """Per-channel factors and shifts of what a normalisation gives: x → (x - shift) / scale.

    OmniQuant's learnable equivalent transformation. The factor is learned as its logarithm, the
    shift in units of `reach`, so that a step means the same for every channel.

    Args:
        scale: (width,), positive; to start from.
        reach: (width,), largest magnitude of each channel; None where nothing takes a shift in.
    """

    reach: Tensor | None

    def __init__(self, scale: Tensor, reach: Tensor | None) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(scale.log())
        self.relative_shift = None if reach is None else nn.Parameter(torch.zeros_like(reach))
        self.register_buffer("reach", reach)

    def scale(self) -> Tensor:
        """(width,), from 1e-5 to 1e5, so that folding it does not cost digits."""
        return self.log_scale.clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()

    def shift(self) -> Tensor | None:
        """(width,), or None."""
        if self.relative_shift is None or self.reach is None:
            return None
        return self.relative_shift * self.reach


class LearnedNorm(nn.Module):
    """A normalisation that has taken a scaling in, as `fold.scale_inputs` will leave it."""

    def __init__(self, norm: nn.Module, scaling: LearnedScaling) -> None:
        super().__init__()
        self.norm, self.scaling = norm, scaling

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → (..., width)."""
        weight, bias = norm_parameters(self.norm)
        scale, shift = self.scaling.scale(), self.scaling.shift()
        changed = {"weight": (weight.double() / scale).to(weight.dtype)}
        if bias is not None:
            moved = bias.double() if shift is None else bias.double() - shift
            changed["bias"] = (moved / scale).to(bias.dtype)
        return cast(Tensor, functional_call(self.norm, changed, (x,)))


class LearnedClipping(nn.Module):
    """Ranges of a weight, as a learned share of what it spans (learnable weight clipping).

    Args:
        weight: (out, in); only its shape matters.
        scheme: asymmetric ranges have a share for each end, symmetric ones one for both.
    """

    def __init__(self, weight: Tensor, scheme: WeightScheme) -> None:
        super().__init__()
        self.scheme = scheme
        spans = weight_range(weight, scheme.granularity)[0]
        ends = 1 if scheme.symmetric else 2
        self.logit = nn.Parameter(spans.new_full((ends, *spans.shape), INITIAL_LOGIT))

    def extent(self, weight: Tensor) -> Range:
        """Lowest and highest value of each grid, (rows, groups), of a weight (out, in)."""
        low, high = weight_range(weight, self.scheme.granularity)
        share = self.logit.sigmoid()
        if self.scheme.symmetric:
            reach = torch.maximum(-low, high) * share[0]
            return -reach, reach
        return low * share[0], high * share[1]

    def forward(self, weight: Tensor) -> Tensor:
        """The weight (out, in) rounded to the grids, in its own type."""
        scale, zero_point = weight_grid(self.extent(weight), self.scheme)
        rounded = round_to_grid(
            to_groups(weight.float(), self.scheme.granularity),
            scale.unsqueeze(-1),
            None if zero_point is None else zero_point.unsqueeze(-1),
            self.scheme.bits,
            symmetric=self.scheme.symmetric,
        )
        return from_groups(rounded, weight.shape).to(weight.dtype)


class LearnedInput(nn.Module):
    """Rounds a layer's input as `InputQuantizer` does, with a gradient to what its range is of.

    A static grid covers the range that was measured, whose gradient is taken to be that of the
    extremes at hand.

    Args:
        scheme: bits, symmetry and granularity.
        tokens_per_frame: of the input, see `LinearGroup`.
        tap: the input is an operand of an attention matmul; its range has no gradient.
    """

    def __init__(
        self, scheme: ActivationScheme, tokens_per_frame: int | None, *, tap: bool = False
    ) -> None:
        super().__init__()
        self.scheme, self.tap = scheme, tap
        self._tokens_per_frame = tokens_per_frame
        self.extent: Range | None = None
        """Measured; static granularity only."""
        self.observer: RangeObserver | None = None
        """While there is one, it sees the inputs and they stay as they are."""
        self._quantizer: InputQuantizer | None = None
        if not scheme.static:
            self.cover(None)

    def cover(self, extent: Range | None) -> None:
        """Round to the grid that covers `extent` from now on; None if it is not static."""
        make = QuantTap if self.tap else InputQuantizer
        self.extent = extent
        self._quantizer = make.from_range(self.scheme, self._tokens_per_frame, extent)

    def forward(self, x: Tensor) -> Tensor:
        """(..., tokens, width) → the same."""
        if self.observer is not None:
            self.observer.update(x)
            return x
        assert self._quantizer is not None
        if self.tap or not (torch.is_grad_enabled() and x.requires_grad):
            return cast(Tensor, self._quantizer(x))
        if self.extent is not None:
            values = x.float()
            extremes = values.amin(), values.amax()
            low, high = (
                measured + (extreme - extreme.detach())
                for measured, extreme in zip(self.extent, extremes, strict=True)
            )
        else:
            values = self._quantizer.by_scale(x).float()
            low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        grid = input_grid(low, high, self.scheme)
        rounded = round_to_grid(values, *grid, self.scheme.bits, symmetric=self.scheme.symmetric)
        return rounded.view(x.shape).to(x.dtype)


class LearnedLinear(nn.Module):
    """A linear or a patch embedding with learned ranges, behind a learned scaling if there is one.

    Args:
        layer: an `nn.Linear` or a patch-embedding `nn.Conv2d`; its tensors are shared.
        scheme: what to quantize.
        tokens_per_frame: of its input, see `LinearGroup`.
        scaling: of its input, which the normalisation before it takes in.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        scheme: LayerScheme,
        tokens_per_frame: int | None,
        scaling: LearnedScaling | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.scaling = layer, scaling
        self.clipping = self.input = None
        if scheme.weight is not None:
            self.clipping = LearnedClipping(layer.weight.flatten(1), scheme.weight)
        if scheme.activation is not None:
            self.input = LearnedInput(scheme.activation, tokens_per_frame)

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """What the float layer gives, or the features `outputs` of it, from rounded operands."""
        if not isinstance(self.layer, nn.Conv2d):
            return self._product(x, outputs)
        (high, wide), (batch, _, height, width) = self.layer.kernel_size, x.shape
        product = self._product(input_matrix(self.layer, x))
        return product.transpose(1, 2).reshape(batch, -1, height // high, width // wide)

    def _product(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        weight, bias = self._folded()
        if self.input is not None:
            x = self.input(x)
        if self.clipping is not None:
            weight = self.clipping(weight)
        if outputs is not None:
            weight, bias = weight[outputs], None if bias is None else bias[outputs]
        return F.linear(x, weight, bias)

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias as `fold.scale_inputs` will leave them."""
        weight, bias = self.layer.weight.flatten(1), self.layer.bias
        if self.scaling is None:
            return weight, bias
        shift = self.scaling.shift()
        if shift is not None:
            added = weight.float() @ shift
            bias = (added if bias is None else bias + added).to(weight.dtype)
        return (weight * self.scaling.scale()).to(weight.dtype), bias
