"""Changes of a float model's weights that leave its outputs as they are.

New tensors take the place of old ones; none is written into, because copies share them.
"""

from typing import cast

import torch
from torch import Tensor, nn

from quantwm.protocols import LinearGroup, WorldModel

_SMALLEST = 1e-5
"""Least factor of a channel: below it, float32 rounding of the fold would show."""


def usable_scale(scale: Tensor) -> Tensor:
    """Per-channel factors with dead channels (zero, or not finite) left alone.

    Args:
        scale: (width,); what a channel's inputs are to be divided by.

    Returns:
        (width,) float32, positive and finite.
    """
    scale = scale.float()
    dead = ~scale.isfinite() | (scale <= 0)
    return torch.where(dead, torch.ones_like(scale), scale.clamp(min=_SMALLEST))


@torch.no_grad()
def scale_inputs(
    world_model: WorldModel, group: LinearGroup, scale: Tensor, shift: Tensor | None = None
) -> None:
    """Make a group of linears read (x - shift) / scale instead of x, for the same outputs.

    The normalisation that feeds them takes the division and the shift in, the weights the
    multiplication, and the biases what the shift leaves over:
    W x + b = (W diag(scale)) ((x - shift) / scale) + (b + W shift).

    Args:
        world_model: changed in place, tensor by tensor.
        group: with a producer, an affine normalisation that feeds these linears alone.
        scale: (width,), positive.
        shift: (width,); needs a normalisation that has a bias.

    Raises:
        ValueError: no producer, or a shift where the normalisation has no bias.
    """
    if group.producer is None:
        raise ValueError(f"{', '.join(group.layers)}: no normalisation feeds them")
    norm = world_model.get_submodule(group.producer)
    weight, bias = norm_parameters(norm)
    norm.weight = constant_parameter(weight.double() / scale, weight)
    if bias is not None:
        moved = bias.double() - (0 if shift is None else shift)
        norm.bias = constant_parameter(moved / scale, bias)
    elif shift is not None:
        raise ValueError(f"{group.producer} has no bias to take a shift in")
    for name in group.layers:
        layer = cast(nn.Linear, world_model.get_submodule(name))
        old = layer.weight
        layer.weight = constant_parameter(old.double() * scale, old)
        if shift is not None:
            added = old.double() @ shift.double()
            total = added if layer.bias is None else layer.bias.double() + added
            layer.bias = constant_parameter(total, old)


def norm_parameters(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an affine normalisation; RMSNorm has no bias."""
    bias = getattr(norm, "bias", None)
    return norm.get_parameter("weight"), bias if isinstance(bias, Tensor) else None


def constant_parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter of the type and on the device of `like` that needs no gradient."""
    placed = value.to(like.device, like.dtype)
    return nn.Parameter(placed.contiguous(), requires_grad=False)
