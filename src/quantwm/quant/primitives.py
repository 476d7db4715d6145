"""Integer affine quantization as pure functions.

q = clamp(round(x / s) + z, qmin, qmax) and x̂ = s (q - z), rounding half to even. All arithmetic is
in float32 whatever the tensors' type: bfloat16 cannot hold an 8-bit grid. Codes are signed where
quantization is symmetric (z = 0) and unsigned where it is asymmetric.

A range always takes in zero (low = min(low, 0), high = max(high, 0)): otherwise z would leave the
codes' range, be clamped, and cut off the far end of the values. A range of width zero, or one too
narrow for a normal float32 scale, gets scale 1.
"""

from math import ceil
from typing import TypeAlias

import torch
from torch import Tensor

from quantwm.quant import fused
from quantwm.quant.scheme import PerGroup, PerTensor, ScaleRule, WeightGranularity, WeightScheme

Range: TypeAlias = tuple[Tensor, Tensor]
"""Lowest and highest value, float32 tensors of one shape."""

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_CACHE_ELEMENTS = 160 * 1024
"""Float32 values that a CPU core's second-level cache holds beside a chunk's input and output."""


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Lowest and highest code: signed if symmetric, else unsigned."""
    if symmetric:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def symmetric_scale(absmax: Tensor, bits: int, rule: ScaleRule = "absmax") -> Tensor:
    """Scale of a symmetric grid, float32 in the shape of `absmax`.

    Args:
        absmax: largest magnitude that the grid has to reach.
        bits: width of a code.
        rule: "absmax" = absmax / (2^(b-1) - 1), which represents both ends; "study" =
            absmax / ((2^b - 1) / 2), as in arXiv 2602.02110, whose top end is clamped.
    """
    steps = 2 ** (bits - 1) - 1 if rule == "absmax" else (2**bits - 1) / 2
    return _usable(_divide(absmax.float(), steps))


def affine_parameters(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an asymmetric grid, float32 in the shape of `low`.

    s = (high - low) / (2^b - 1) and z = clamp(round(-low / s), 0, 2^b - 1), the range first widened
    to take in zero.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    top = 2**bits - 1
    scale = _usable(_divide(high - low, top))
    return scale, (-low / scale).round_().clamp_(0, top)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, *, symmetric: bool
) -> Tensor:
    """Codes of `x` as whole float32 numbers; `scale` and `zero_point` broadcast against it."""
    codes = (x.float() / scale).round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(*code_range(bits, symmetric=symmetric))


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Float32 values that codes stand for."""
    values = codes.float()
    if zero_point is not None:
        values = values - zero_point.float()
    return values * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, *, symmetric: bool
) -> Tensor:
    """`x` rounded to the grid, float32: `dequantize(quantize(x))`."""
    codes = quantize(x, scale, zero_point, bits, symmetric=symmetric)
    return dequantize(codes, scale, zero_point)


# Weights: (out, in) matrices, looked at as (scales' rows, groups, values that share a scale).


def to_groups(weight: Tensor, granularity: WeightGranularity) -> Tensor:
    """Split a weight (out, in) into what shares a scale.

    Returns:
        (1, 1, out·in) per tensor, (out, 1, in) per channel, (out, ceil(in / g), g) per group, a
        ragged last group filled up with zeros, which change no range.
    """
    if isinstance(granularity, PerTensor):
        return weight.reshape(1, 1, -1)
    if not isinstance(granularity, PerGroup):
        return weight.unsqueeze(1)
    size = granularity.size
    groups = ceil(weight.shape[1] / size)
    filled = torch.nn.functional.pad(weight, (0, groups * size - weight.shape[1]))
    return filled.reshape(len(weight), groups, size)


def from_groups(grouped: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Undo `to_groups` for a weight of `shape` (out, in)."""
    rows, width = shape
    if grouped.shape[0] == rows:
        return grouped.reshape(rows, -1)[:, :width].contiguous()
    return grouped.reshape(rows, width)


def weight_range(weight: Tensor, granularity: WeightGranularity) -> Range:
    """Lowest and highest weight of each group, float32 (rows, groups), zero included."""
    grouped = to_groups(weight.float(), granularity)
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def weight_parameters(extent: Range, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None if symmetric) of ranges (rows, groups), float32."""
    low, high = extent
    if scheme.symmetric:
        return symmetric_scale(torch.maximum(-low, high), scheme.bits, scheme.scale_rule), None
    return affine_parameters(low, high, scheme.bits)


def quantize_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme
) -> Tensor:
    """Codes of a weight (out, in): int8 if symmetric, else uint8, in the weight's shape.

    Args:
        weight: (out, in), any float type.
        scale, zero_point: (rows, groups) as `weight_parameters` gives them.
        scheme: of the weight.
    """
    grouped = to_groups(weight.float(), scheme.granularity)
    codes = quantize(
        grouped,
        scale.unsqueeze(-1),
        None if zero_point is None else zero_point.unsqueeze(-1),
        scheme.bits,
        symmetric=scheme.symmetric,
    )
    return from_groups(codes.to(code_dtype(symmetric=scheme.symmetric)), weight.shape)


def dequantize_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme
) -> Tensor:
    """Float32 weight (out, in) of codes in the same shape."""
    values = dequantize(
        to_groups(codes, scheme.granularity),
        scale.unsqueeze(-1),
        None if zero_point is None else zero_point.unsqueeze(-1),
    )
    return from_groups(values, codes.shape)


def code_dtype(*, symmetric: bool) -> torch.dtype:
    """The byte type that holds codes in memory."""
    return torch.int8 if symmetric else torch.uint8


# Activations: fake quantization is most of the simulation's cost, so it runs in compiled loops
# where it can (`fused`), else in place on chunks that stay in a CPU's cache: the same bits. The
# result is that of `fake_quantize`, rounded to the input's type.


def fake_quantize_rows(x: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """Round each row of a matrix to its own min-max grid.

    Args:
        x: (rows, width), any float type; a NaN or infinite value makes its whole row NaN.
        bits: width of a code.
        symmetric: signed grid with scale absmax / (2^(b-1) - 1), or unsigned with a zero point.

    Returns:
        a new tensor like `x`; no row depends on another.
    """
    top = code_range(bits, symmetric=symmetric)[1]
    if (kernels := fused.kernels_for(x)) is not None:
        return fused.round_rows(kernels, x, top, symmetric=symmetric)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for source, target, buffer in _chunks(x, out):
        buffer.copy_(source)
        low, high = buffer.amin(-1, keepdim=True), buffer.amax(-1, keepdim=True)
        if symmetric:
            scale = symmetric_scale(torch.maximum(-low, high), bits)
            buffer.div_(scale).round_()
        else:
            scale, zero_point = affine_parameters(low, high, bits)
            # The lowest value gets code 0 exactly; only rounding both ends up can pass the top. The
            # quarter rounds away and spares a tie of -0 with 0, whose result has no fixed sign.
            limit = top - zero_point + 0.25
            torch.minimum(buffer.div_(scale), limit, out=buffer).round_()
        target.copy_(buffer.mul_(scale))
    return out


def fake_quantize_static(x: Tensor, scale: Tensor, lowest: float, highest: float) -> Tensor:
    """Round a matrix to one given grid.

    Args:
        x: (rows, width), any float type; NaN stays NaN, an infinity becomes the grid's end.
        scale: float32 tensor without dimensions, on the device of `x` (see `_divide`).
        lowest, highest: ends of the grid in steps, qmin - z and qmax - z.

    Returns:
        a new tensor like `x`.
    """
    if (kernels := fused.kernels_for(x)) is not None:
        return fused.round_static(kernels, x, scale, lowest, highest)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for source, target, buffer in _chunks(x, out):
        buffer.copy_(source).div_(scale).round_().clamp_(lowest, highest)
        target.copy_(buffer.mul_(scale))
    return out


def within_grid(x: Tensor, scale: Tensor, lowest: float, highest: float) -> Tensor:
    """Which values `fake_quantize_static` rounds without clipping them; bool, False for NaN."""
    steps = x.float().div(scale).round_()
    return (steps >= lowest) & (steps <= highest)


def _chunks(x: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Slices of `x` and `out` with a float32 buffer for each (one shared, or `out` itself)."""
    rows, width = x.shape
    if not x.numel():
        return []
    step = min(rows, max(1, _CACHE_ELEMENTS // width)) if x.device.type == "cpu" else rows
    scratch = None
    if out.dtype != torch.float32:
        scratch = torch.empty(step, width, dtype=torch.float32, device=x.device)
    chunks = []
    for start in range(0, rows, step):
        target = out[start : start + step]
        buffer = target if scratch is None else scratch[: len(target)]
        chunks.append((x[start : start + step], target, buffer))
    return chunks


def _divide(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once: CUDA would multiply by the reciprocal of a plain number."""
    return x / torch.full((), number, dtype=torch.float32, device=x.device)


def _usable(scale: Tensor) -> Tensor:
    """Scale 1 where there is no range; NaN and infinity pass, so that they are seen."""
    return torch.where(scale < _SMALLEST_SCALE, torch.ones_like(scale), scale)
