"""Layers that hold integer codes and simulate low-bit arithmetic.

Scales stay in float32 and codes stay integers whatever a model is cast to; the weight that the
matrix product reads is computed from them once, not at every forward.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantwm.errors import NonFiniteError, UsageError
from quantwm.protocols import WorldModel
from quantwm.quant.buffers import ExactBuffers
from quantwm.quant.input_quantizer import InputQuantizer, QuantTap
from quantwm.quant.primitives import (
    Range,
    dequantize_weight,
    quantize_weight,
    weight_parameters,
    weight_range,
)
from quantwm.quant.scheme import LayerScheme, WeightScheme

__all__ = [
    "FloatWeight",
    "InputQuantizer",
    "QuantConv2d",
    "QuantLinear",
    "QuantTap",
    "QuantizedWeight",
    "assemble",
    "input_matrix",
    "quantized_layer",
    "replace_module",
]


class QuantizedWeight(ExactBuffers):
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

    def _product(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight: Tensor = self.stored_weight.value
        bias: Tensor | None = self.bias
        if outputs is not None:
            weight, bias = weight[outputs], None if bias is None else bias[outputs]
        return F.linear(x, weight, bias)


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

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """(..., in) → (..., out), or only the output features `outputs`."""
        return self._product(x, outputs)


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
        (high, wide), (batch, _, height, width) = self.kernel_size, images.shape
        product = self._product(input_matrix(self, images))
        return product.transpose(1, 2).reshape(batch, -1, height // high, width // wide)


def input_matrix(convolution: nn.Module, images: Tensor) -> Tensor:
    """A patch embedding's input as its product reads it.

    Args:
        convolution: an `nn.Conv2d` whose kernel equals its stride, or a `QuantConv2d`.
        images: (B, channels, H, W).

    Returns:
        (B, patches, channels·height·width), patches row by row.
    """
    high, wide = cast(tuple[int, int], convolution.kernel_size)
    batch, channels, height, width = images.shape
    rows, columns = height // high, width // wide
    patches = images[..., : rows * high, : columns * wide]
    patches = patches.reshape(batch, channels, rows, high, columns, wide)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


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
