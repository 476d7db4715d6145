"""SmoothQuant: what is hard to round moves from the activations into the weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantwm.checks import is_integer, is_number
from quantwm.errors import UsageError
from quantwm.methods.registry import register
from quantwm.methods.roles import Clipping
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
from quantwm.quant.fold import usable_scale
from quantwm.quant.layer_inputs import ChannelAbsMax
from quantwm.quant.observers import Observer
from quantwm.quant.scheme import LayerScheme

SEARCH = "search"


@register
@dataclass(frozen=True)
class SmoothQuant:
    """Divides each input channel of a group of linears by s_j = max|X_j|^α / max|W_j|^(1 - α).

    arXiv 2211.10438, equation 4: the normalisation in front takes the division in, the weights
    the multiplication, so that the float model's outputs stay what they were. max|X_j| is over
    all that calibration data make the layers read in the float model, max|W_j| over all linears
    that read it, in the plan or not.

    Only what a normalisation feeds can be scaled so (LayerNorm → qkv, LayerNorm → fc1): layers
    that read something else (an attention's output linear, an MLP's second, a patch embedding,
    attention matmuls) are left alone. A channel whose inputs or weights are all zero is too.

    Attributes:
        alpha: how much moves, from 0 (weights become even) to 1 (inputs do); or "search": for
            each group that of 0, 1/grid, … 1 that gives the least output error on a sample of
            tokens, weights and inputs rounded as the plan and the method's clipping say. Input
            ranges are then those of the sample, also where another part chooses them in the end.
        grid: steps of that search.

    Raises:
        UsageError: an option out of range.
    """

    name: ClassVar[str] = "smoothquant"
    scales_channels: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True

    alpha: float | str = 0.5
    grid: int = 20

    def __post_init__(self) -> None:
        if self.alpha != SEARCH and not (is_number(self.alpha) and 0 <= self.alpha <= 1):
            raise UsageError(
                f"smoothquant.alpha is a number from 0 to 1 or {SEARCH!r}, got {self.alpha!r}"
            )
        if not is_integer(self.grid, 1):
            raise UsageError(
                f"smoothquant.grid is an integer of at least 1, the steps of the search for "
                f"alpha, got {self.grid!r}"
            )

    @property
    def alphas(self) -> tuple[float, ...]:
        """Those that are tried, lowest first."""
        if isinstance(self.alpha, str):
            return tuple(step / self.grid for step in range(self.grid + 1))
        return (float(self.alpha),)

    def idle_options(self, clipping: Clipping) -> dict[str, str]:  # noqa: ARG002
        """The search's steps where nothing is searched."""
        return {} if self.alpha == SEARCH else {"grid": f"alpha is not {SEARCH!r}"}

    def problems(
        self,
        world_model: WorldModel,  # noqa: ARG002
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],
    ) -> list[str]:
        """A plan without a layer that a normalisation feeds."""
        layers = unscalable(schemes, groups)
        if not layers:
            return []
        return [
            "it scales what a normalisation gives to linears, and no layer of the plan is fed by "
            f"one: {', '.join(layers)}; add layers that are (qkv, fc1), or leave smoothquant out"
        ]

    @torch.no_grad()
    def transform(self, work: Work, clipping: Clipping) -> None:
        """Scale every group that a normalisation feeds; one replay serves all.

        Raises:
            NonFiniteError: a layer's input holds NaN or infinite values.
        """
        groups = {reader(work, group): group for group in scalable_groups(work)}
        extremes = {name: ChannelAbsMax(name) for name in groups}
        samples = {name: work.token_sample(name) for name in groups if len(self.alphas) > 1}
        observers: dict[str, list[Observer]] = {name: [one] for name, one in extremes.items()}
        for name, sample in samples.items():
            observers[name].append(sample)
        work.replay.show(observers)
        scales = []
        for name, group in groups.items():
            candidates = list(self._scales(work, group, extremes[name].value()))
            if name in samples:
                error = OutputError(work, group, samples[name].value(), clipping)
                scales.append((group, best_scale(error, candidates, group)))
            else:
                scales.append((group, candidates[0]))
        fold_scales(work, scales)

    def _scales(self, work: Work, group: LinearGroup, input_absmax: Tensor) -> Iterator[Tensor]:
        absmax = [work.weight(name).abs().amax(0).float() for name in group.layers]
        weight_absmax = torch.stack(absmax).amax(0)
        for alpha in self.alphas:
            yield smoothing_scale(input_absmax, weight_absmax, alpha)


def smoothing_scale(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """max|X_j|^α / max|W_j|^(1 - α), arXiv 2211.10438, equation 4.

    Args:
        input_absmax, weight_absmax: (width,), of each input channel.
        alpha: from 0 to 1.

    Returns:
        (width,) float32, positive; 1 for a channel whose inputs or weights are all zero.
    """
    inputs, weights = input_absmax.double(), weight_absmax.double()
    scale = inputs.pow(alpha) / weights.pow(1 - alpha)
    dead = (inputs == 0) | (weights == 0)
    return usable_scale(torch.where(dead, 1.0, scale))
