"""Scaling what normalisations give to linears: which groups, which scale is best, and folding it.

What SmoothQuant and AWQ share; they differ in the scales that they consider.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from quantwm.errors import NonFiniteError
from quantwm.methods.roles import Clipping
from quantwm.methods.work import Work
from quantwm.protocols import LinearGroup
from quantwm.quant.fold import scale_inputs
from quantwm.quant.reconstruction import rounded_input, rounded_weight
from quantwm.quant.scheme import LayerScheme


def scalable_groups(work: Work) -> list[LinearGroup]:
    """Groups that a normalisation feeds and of which the plan changes a layer."""
    planned = set(work.schemes)
    return [g for g in work.groups if g.producer is not None and planned & set(g.layers)]


def reader(work: Work, group: LinearGroup) -> str:
    """The layer whose inputs are observed for the whole group, whose layers all read the same.

    One that is quantized by frame if there is one, so that a sample holds whole frames.
    """
    planned = [name for name in group.layers if name in work.schemes]
    by_frame = [
        name
        for name in planned
        if (activation := work.schemes[name].activation) is not None
        and activation.granularity == "per_tensor_dynamic"
    ]
    return (by_frame or planned)[0]


class OutputError:
    """‖X Wᵀ - X̂ Ŵᵀ‖² of a group's layers of the plan, as a function of the scale of their inputs.

    Every call rounds anew what that scale makes of inputs and weights, as the final model will:
    ranges, scales and zero points are those of the scaled values.

    Args:
        work: the model, in which the group's layers are float and unscaled.
        group: with a producer.
        x: what the layers read, (rows, tokens, width) float32. What it spans once scaled is the
            range of static inputs.
        clipping: chooses the ranges of the scaled weights.
    """

    def __init__(self, work: Work, group: LinearGroup, x: Tensor, clipping: Clipping) -> None:
        self._work, self._group, self._x, self._clipping = work, group, x, clipping
        names = [name for name in group.layers if name in work.schemes]
        self._weights = {name: work.weight(name) for name in names}
        self._exact = {name: x @ weight.float().T for name, weight in self._weights.items()}

    @torch.no_grad()
    def __call__(self, scale: Tensor) -> float:
        """The error, summed over layers, tokens and outputs.

        Args:
            scale: (width,), positive: what the inputs are divided by.
        """
        x, schemes = self._x / scale, self._work.schemes
        rounded = self._rounded_weights(scale)
        # Layers of one scheme, the usual case, read the same rounded input.
        inputs = {
            activation: rounded_input(x, activation, self._group.tokens_per_frame)
            for activation in {schemes[name].activation for name in rounded}
        }
        error = 0.0
        for name, weight in rounded.items():
            off = inputs[schemes[name].activation] @ weight.float().T - self._exact[name]
            error += off.square_().sum(dtype=torch.float64).item()
        return error

    def _rounded_weights(self, scale: Tensor) -> dict[str, Tensor]:
        scaled = {
            name: (weight.double() * scale).to(weight.dtype)
            for name, weight in self._weights.items()
        }
        schemes = self._work.weighted(scaled)
        ranges = self._clipping.extents(
            self._work, {name: scaled[name] for name in schemes}, schemes
        )
        return {
            name: rounded_weight(weight, schemes.get(name), ranges.get(name))
            for name, weight in scaled.items()
        }


def best_scale(
    error: Callable[[Tensor], float], candidates: Iterable[Tensor], group: LinearGroup
) -> Tensor:
    """The scale of least error; of equally good ones the first.

    Raises:
        NonFiniteError: an error that is NaN or infinite.
    """
    best, least = None, torch.inf
    for scale in candidates:
        found = error(scale)
        if not found < torch.inf:
            raise NonFiniteError(
                f"the output error of {', '.join(group.layers)} is {found}; check the size of the "
                "model's weights and activations"
            )
        if found < least:
            best, least = scale, found
    assert best is not None
    return best


def fold_scales(work: Work, scales: Iterable[tuple[LinearGroup, Tensor]]) -> None:
    """Divide what groups read by their scales (width,), and tell whoever replays the model."""
    for group, scale in scales:
        scale_inputs(work.world_model, group, scale)
        work.replay.changed(group.layers)


def unscalable(schemes: Mapping[str, LayerScheme], groups: Iterable[LinearGroup]) -> list[str]:
    """The plan's layers that no normalisation feeds, if that is all of them."""
    fed = {name for group in groups if group.producer is not None for name in group.layers}
    return [] if fed & set(schemes) else list(schemes)
