"""Bias correction: quantized layers give the mean output that float ones would give."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from quantwm.methods.registry import register
from quantwm.methods.work import Work
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.input_quantizer import InputQuantizer
from quantwm.quant.modules import QuantConv2d, QuantLinear
from quantwm.quant.observers import Observer
from quantwm.quant.scheme import LayerScheme

_Layers: TypeAlias = dict[str, QuantLinear | QuantConv2d]


@register
@dataclass(frozen=True)
class BiasCorrection:
    """The mean error of each quantized layer's outputs moves into its bias.

    b += E[W x - Ŵ x̂] (Nagel et al., arXiv 1906.04721, equation 1 and section 4.2; Banner et al.,
    arXiv 1810.05723), with x what the layer reads in the model quantized and corrected so far,
    and x̂ what its input quantizer makes of it. The mean is over every token that calibration data
    make the layer read. Layers are corrected in forward order, with one replay for those that
    read the same tensor; a layer without a bias gets one. In a rollout a block also reads what
    later blocks made of earlier frames, and those are quantized after it: its mean is that of the
    moment. Attention matmuls have no bias and are left alone.
    """

    name: ClassVar[str] = "bias_correction"
    needs_calibration: ClassVar[bool] = True

    def problems(
        self,
        world_model: WorldModel,  # noqa: ARG002
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],
    ) -> list[str]:
        """A plan without anything to correct."""
        biased = {n for group in groups if group.kind != "attention_matmul" for n in group.layers}
        if biased & set(schemes):
            return []
        return [
            "the plan quantizes no linear and no patch embedding, so there is no bias to correct; "
            "quantize some, or leave bias_correction out"
        ]

    @torch.no_grad()
    def correct(self, work: Work, floats: Mapping[str, nn.Module]) -> None:
        """Give the layers of one block new biases, group by group."""
        for layers in _groups(work, floats):
            means = {name: MeanInput(name, layer.input_quantizer) for name, layer in layers.items()}
            work.replay.show({name: [mean] for name, mean in means.items()})
            for name, layer in layers.items():
                bias = corrected_bias(
                    floats[name].get_parameter("weight").flatten(1),
                    layer.bias,
                    layer.weight,
                    *means[name].value(),
                )
                layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
            work.replay.changed(layers)


def corrected_bias(
    weight: Tensor, bias: Tensor | None, rounded: Tensor, mean: Tensor, rounded_mean: Tensor
) -> Tensor:
    """b + W E[x] - Ŵ E[x̂], float64 (out,).

    Args:
        weight, rounded: W and Ŵ, (out, in).
        bias: b, (out,); None counts as zero.
        mean, rounded_mean: E[x] and E[x̂], (in,) float64.
    """
    error = weight.double() @ mean - rounded.double() @ rounded_mean
    return error if bias is None else bias.double() + error


class MeanInput(Observer):
    """The mean of a layer's inputs, and of what its quantizer makes of them.

    Args:
        layer: dotted name.
        quantizer: of the layer's inputs; None if they stay float.
    """

    def __init__(self, layer: str, quantizer: InputQuantizer | None) -> None:
        super().__init__(layer)
        self._quantizer = quantizer
        self._sums: Tensor | None = None
        self._tokens = 0

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:  # noqa: ARG002
        # The quantizer gets the layer's own (rows, tokens, width): scales may be one a frame.
        rounded = x if self._quantizer is None else self._quantizer.rounded(x)
        new = torch.stack([one.reshape(-1, x.shape[-1]).double().sum(0) for one in (x, rounded)])
        self._sums = new if self._sums is None else self._sums + new
        self._tokens += x.numel() // x.shape[-1]

    def value(self) -> tuple[Tensor, Tensor]:
        """E[x] and E[x̂], (width,) float64 each."""
        self.check_seen()
        assert self._sums is not None
        mean, rounded_mean = self._sums / self._tokens
        return mean, rounded_mean


def _groups(work: Work, floats: Mapping[str, nn.Module]) -> Iterator[_Layers]:
    """Those of the layers that have a product, by what they read, in forward order."""
    for group in work.groups:
        found: _Layers = {}
        for name in group.layers:
            layer = work.world_model.get_submodule(name)
            if name in floats and isinstance(layer, QuantLinear | QuantConv2d):
                found[name] = layer
        if found:
            yield found
