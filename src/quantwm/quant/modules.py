"""Layers that hold integer codes and simulate low-bit arithmetic.

Scales stay in float32 and codes stay integers whatever a model is cast to; the weight that the
matrix product reads is computed from them once, not at every forward.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantwm.errors import NonFiniteError, UsageError
from quantwm.protocols import WorldModel
from quantwm.quant.primitives import (
    Range,
    affine_parameters,
    code_range,
    dequantize_weight,
    fake_quantize_rows,
    fake_quantize_static,
    quantize_weight,
    symmetric_scale,
    weight_parameters,
    weight_range,
)
from quantwm.quant.scheme import ActivationScheme, LayerScheme, WeightScheme


class _ExactBuffers(nn.Module, ABC):
    """A module whose `exact` buffers keep float32 when the module is cast or moved."""

    exact: ClassVar[tuple[str, ...]] = ("scale",)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers.get(name) for name in self.exact}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, original in before.items():
            after = self._buffers.get(name)
            if original is not None and after is not None and after.dtype != torch.float32:
                self._buffers[name] = original.to(after.device)
        self._refresh()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    @abstractmethod
    def _refresh(self) -> None:
        """Compute again what derives from the buffers."""


class QuantizedWeight(_ExactBuffers):
    """A weight matrix (out, in) as integer codes.

    Args:
        codes: int8 (symmetric) or uint8 (asymmetric), (out, in).
        scale: float32 (rows, groups), see `primitives.to_groups`.
        zero_point: uint8 in the shape of `scale`; None if symmetric.
        scheme: what the codes mean.
        dtype: of `value`, the compute type.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    value: Tensor
    """The weight that the codes stand for, (out, in) in the compute type."""

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        scheme: WeightScheme,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("value", torch.empty(0, dtype=dtype), persistent=False)
        self._refresh()

    @classmethod
    @torch.no_grad()
    def from_float(
        cls, weight: Tensor, scheme: WeightScheme, extent: Range | None = None
    ) -> "QuantizedWeight":
        """Round a weight (out, in) to the nearest codes.

        Args:
            weight: of any float type, which becomes the compute type.
            scheme: bits, granularity and scale rule.
            extent: lowest and highest value of each group's grid, (rows, groups); the weight's
                own range if None. A narrower one clips.

        Raises:
            NonFiniteError: the weight holds NaN or infinite values.
        """
        if not weight.isfinite().all():
            raise NonFiniteError("the weight holds NaN or infinite values")
        extent = weight_range(weight, scheme.granularity) if extent is None else extent
        scale, zero_point = weight_parameters(extent, scheme)
        codes = quantize_weight(weight, scale, zero_point, scheme)
        stored = None if zero_point is None else zero_point.to(torch.uint8)
        return cls(codes, scale, stored, scheme, weight.dtype)

    @torch.no_grad()
    def _refresh(self) -> None:
        value = dequantize_weight(self.codes, self.scale, self.zero_point, self.scheme)
        self.value = value.to(self.value.dtype)

    def extra_repr(self) -> str:
        """Scheme and shape."""
        return f"{LayerScheme(weight=self.scheme)}, {tuple(self.codes.shape)}"


class FloatWeight(nn.Module):
    """A weight matrix (out, in) left in float, where only the input is quantized."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.value = weight


class InputQuantizer(_ExactBuffers):
    """Rounds a layer's input to a low-bit grid and back, in float32, then to its own type.

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

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(..., tokens, width) → the same, every value on the grid of its tensor, frame or token.

        Leading dimensions are rows (candidates): no scale found while running crosses them.
        """
        if self.scale is not None:
            flat = x.reshape(-1, x.shape[-1])
            return fake_quantize_static(flat, self.scale, *self._ends).view(x.shape)
        width = x.shape[-1]
        if self.scheme.granularity == "per_tensor_dynamic":
            width *= self._tokens_of_a_frame(x)
        rows = fake_quantize_rows(
            x.reshape(-1, width), self.scheme.bits, symmetric=self.scheme.symmetric
        )
        return rows.view(x.shape)

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


class _QuantLayer(nn.Module):
    """What quantized linears and patch embeddings share: weight, bias and input quantizer."""

    def __init__(
        self,
        stored_weight: QuantizedWeight | FloatWeight,
        bias: nn.Parameter | None,
        input_quantizer: InputQuantizer | None,
    ) -> None:
        super().__init__()
        self.stored_weight = stored_weight
        self.bias = bias
        self.input_quantizer = input_quantizer
        self.scheme = LayerScheme(
            stored_weight.scheme if isinstance(stored_weight, QuantizedWeight) else None,
            input_quantizer.scheme if input_quantizer is not None else None,
        )

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in) that the product reads, in the compute type."""
        return self.stored_weight.value

    def _product(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return F.linear(x, self.stored_weight.value, self.bias)


class QuantLinear(_QuantLayer):
    """`nn.Linear` with a quantized weight, a quantized input, or both; the bias stays float."""

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return self._product(x)


class QuantConv2d(_QuantLayer):
    """A patch embedding (`nn.Conv2d` whose kernel equals its stride) as a product of patches.

    Its weight is (out, channels·height·width); its input's tokens are the patches.
    """

    def __init__(
        self,
        stored_weight: QuantizedWeight | FloatWeight,
        bias: nn.Parameter | None,
        input_quantizer: InputQuantizer | None,
        kernel_size: tuple[int, int],
    ) -> None:
        super().__init__(stored_weight, bias, input_quantizer)
        self.kernel_size = kernel_size

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, out, H // kernel, W // kernel)."""
        (high, wide), (batch, channels, height, width) = self.kernel_size, images.shape
        rows, columns = height // high, width // wide
        patches = images[..., : rows * high, : columns * wide]
        patches = patches.reshape(batch, channels, rows, high, columns, wide)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        return self._product(patches).transpose(1, 2).reshape(batch, -1, rows, columns)


def quantized_layer(
    layer: nn.Module,
    scheme: LayerScheme,
    *,
    tokens_per_frame: int | None = None,
    input_range: Range | None = None,
    weight: QuantizedWeight | None = None,
) -> nn.Module:
    """The quantized counterpart of a float layer; the layer itself is not changed.

    Args:
        layer: an `nn.Linear`, a patch-embedding `nn.Conv2d` or an `nn.Identity` tap.
        scheme: what to quantize.
        tokens_per_frame: of the layer's input, see `LinearGroup`.
        input_range: lowest and highest input, for static activations.
        weight: codes that a method chose; rounded to nearest from the layer's weight if None.

    Raises:
        NonFiniteError: a weight holds NaN or infinite values.
        UsageError: static activations without a range, or a layer of another type.
    """
    quantizer = None
    if scheme.activation is not None:
        make = QuantTap if isinstance(layer, nn.Identity) else InputQuantizer
        quantizer = make.from_range(scheme.activation, tokens_per_frame, input_range)
    return assemble(layer, scheme, quantizer, weight)


def assemble(
    layer: nn.Module,
    scheme: LayerScheme,
    quantizer: InputQuantizer | None,
    weight: QuantizedWeight | None,
) -> nn.Module:
    """`quantized_layer` with its input quantizer given."""
    if isinstance(layer, nn.Identity) and quantizer is not None:
        return quantizer
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise UsageError(f"a {type(layer).__name__} cannot be quantized")
    stored: QuantizedWeight | FloatWeight
    if scheme.weight is not None:
        stored = weight or QuantizedWeight.from_float(layer.weight.flatten(1), scheme.weight)
    elif isinstance(layer, nn.Conv2d):
        stored = FloatWeight(nn.Parameter(layer.weight.detach().flatten(1), requires_grad=False))
    else:
        stored = FloatWeight(cast(nn.Parameter, layer.weight))
    bias = cast(nn.Parameter | None, layer.bias)
    if isinstance(layer, nn.Conv2d):
        kernel = cast(tuple[int, int], tuple(layer.kernel_size))
        return QuantConv2d(stored, bias, quantizer, kernel).train(layer.training)
    return QuantLinear(stored, bias, quantizer).train(layer.training)


def replace_module(world_model: WorldModel, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(world_model.get_submodule(parent), child, module)
