"""Modules that round what a layer reads, with a gradient for those who plan by it."""

from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from quantwm.errors import UsageError
from quantwm.quant.buffers import ExactBuffers
from quantwm.quant.primitives import (
    Range,
    affine_parameters,
    code_range,
    fake_quantize_rows,
    fake_quantize_static,
    symmetric_scale,
    within_grid,
)
from quantwm.quant.scheme import ActivationScheme, LayerScheme


class _StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is the identity, but zero where a static grid clips.

    The straight-through estimator of arXiv 1308.3432, clipped as in arXiv 1806.08342.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: "InputQuantizer") -> Tensor:
        ctx.save_for_backward(quantizer.within_grid(x))
        return quantizer.rounded(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (inside,) = gradients, ctx.saved_tensors
        return gradient if inside is None else gradient.masked_fill(~inside, 0), None


class InputQuantizer(ExactBuffers):
    """Rounds a layer's input to a low-bit grid and back, in float32, then to its own type.

    Gradients pass straight through it; where a static grid clips, they end. Scales found while
    running count as constants.

    Args:
        scheme: bits, symmetry and granularity.
        tokens_per_frame: of the input (..., tokens, width); None if a row is one frame.
        scale, zero_point: float32 tensors without dimensions; static granularity only.
    """

    exact: ClassVar[tuple[str, ...]] = ("scale", "zero_point")
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self,
        scheme: ActivationScheme,
        tokens_per_frame: int | None = None,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.tokens_per_frame = tokens_per_frame
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self._refresh()

    @classmethod
    def from_range(
        cls, scheme: ActivationScheme, tokens_per_frame: int | None, extent: Range | None
    ) -> "Self":
        """A quantizer; a static one covers `extent`, the lowest and highest input.

        Raises:
            UsageError: a static quantizer without a range.
        """
        if not scheme.static:
            return cls(scheme, tokens_per_frame)
        if extent is None:
            raise UsageError("static activations need a calibrated range")
        low, high = extent
        if scheme.symmetric:
            scale = symmetric_scale(torch.maximum(low.abs(), high.abs()), scheme.bits)
            return cls(scheme, tokens_per_frame, scale, torch.zeros_like(scale))
        return cls(scheme, tokens_per_frame, *affine_parameters(low, high, scheme.bits))

    def _refresh(self) -> None:
        self._ends = (0.0, 0.0)
        if self.zero_point is not None and not self.zero_point.is_meta:
            zero_point = self.zero_point.item()
            lowest, highest = code_range(self.scheme.bits, symmetric=self.scheme.symmetric)
            self._ends = (lowest - zero_point, highest - zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """(..., tokens, width) → the same, every value on the grid of its tensor, frame or token.

        Leading dimensions are rows (candidates): no scale found while running crosses them.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            apply = cast(Callable[..., Tensor], _StraightThrough.apply)
            return apply(x, self)
        return self.rounded(x)

    @torch.no_grad()
    def rounded(self, x: Tensor) -> Tensor:
        """What `forward` returns, without a gradient."""
        if self.scale is not None:
            flat = x.reshape(-1, x.shape[-1])
            return fake_quantize_static(flat, self.scale, *self._ends).view(x.shape)
        rows = self.by_scale(x)
        rounded = fake_quantize_rows(rows, self.scheme.bits, symmetric=self.scheme.symmetric)
        return rounded.view(x.shape)

    def by_scale(self, x: Tensor) -> Tensor:
        """(..., tokens, width) → (scales, values that share one), of a grid found while running."""
        width = x.shape[-1]
        if self.scheme.granularity == "per_tensor_dynamic":
            width *= self._tokens_of_a_frame(x)
        return x.reshape(-1, width)

    def within_grid(self, x: Tensor) -> Tensor | None:
        """Which values are not clipped, bool like `x`; None if the grid follows the values."""
        return None if self.scale is None else within_grid(x, self.scale, *self._ends)

    def _tokens_of_a_frame(self, x: Tensor) -> int:
        tokens = x.shape[-2] if x.ndim > 2 else 1
        size = self.tokens_per_frame or tokens
        if tokens % size:
            raise UsageError(
                f"an input of {tokens} tokens a row does not divide into frames of {size}; "
                "correct tokens_per_frame in the model's quantizable_groups()"
            )
        return size

    def extra_repr(self) -> str:
        """Scheme and frame size."""
        frame = f", {self.tokens_per_frame} tokens a frame" if self.tokens_per_frame else ""
        return f"{LayerScheme(activation=self.scheme)}{frame}"


class QuantTap(InputQuantizer):
    """Rounds an operand of an attention matmul; takes the place of an `nn.Identity`.

    Operands are (rows, heads, tokens, width): one scale found while running serves all heads of
    a candidate and frame, or one head's token.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(rows, heads, tokens, width) → the same."""
        if self.scheme.granularity != "per_tensor_dynamic" or x.ndim != 4:
            return super().forward(x)
        by_token = x.transpose(1, 2)
        merged = by_token.reshape(*by_token.shape[:2], -1)
        return super().forward(merged).view(by_token.shape).transpose(1, 2)
