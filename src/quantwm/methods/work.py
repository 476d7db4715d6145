"""A model on its way to being quantized, and what every method does with it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quantwm.errors import UsageError
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.layer_inputs import DEFAULT_TOKENS, TokenSample
from quantwm.quant.modules import QuantizedWeight, quantized_layer, replace_module
from quantwm.quant.observers import CalibrationData, RangeObserver, Replay, input_ranges
from quantwm.quant.primitives import Range
from quantwm.quant.scheme import LayerScheme, WeightScheme


@dataclass
class Work:
    """A model on its way to being quantized.

    Attributes:
        world_model: a copy that shares its tensors with the float model: put new tensors in the
            place of old ones, never write into them. Its layers become quantized one by one.
        schemes: of the layers that the plan changes, in forward order.
        groups: all that the model declares, in forward order.
        calibration: present where a part or a scheme needs it.
        memory: what a part knows from one of its turns to the next, by the part's name; parts
            themselves hold options and no state.
        report: what parts have to tell of their work, JSON values by the part's name.
    """

    world_model: WorldModel
    schemes: Mapping[str, LayerScheme]
    groups: Sequence[LinearGroup]
    calibration: CalibrationData | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def replay(self) -> Replay:
        """Shows layers what calibration data make them read.

        Raises:
            UsageError: there are no calibration data.
        """
        if self.calibration is None:
            raise UsageError("this method needs calibration data: pass calibration=")
        return Replay(self.world_model, self.calibration)

    @cached_property
    def group_of(self) -> dict[str, LinearGroup]:
        """The group of each layer that the model declares."""
        return {name: group for group in self.groups for name in group.layers}

    @property
    def layers(self) -> list[str]:
        """Layers of the plan in forward order."""
        return [name for name in self.group_of if name in self.schemes]

    @property
    def blocks(self) -> dict[str, list[str]]:
        """Block → its layers of the plan, in forward order."""
        return blocks_of(self.schemes, self.groups)

    def weight(self, name: str) -> Tensor:
        """A float layer's weight as a matrix (out, in)."""
        return self.world_model.get_submodule(name).get_parameter("weight").detach().flatten(1)

    def weighted(self, names: Iterable[str]) -> dict[str, WeightScheme]:
        """Those of the layers whose weights are quantized, with their schemes."""
        found = {name: self.schemes[name].weight for name in names}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    def token_sample(self, name: str, capacity: int = DEFAULT_TOKENS) -> TokenSample:
        """An observer, yet to be shown anything, that takes a sample of what a layer reads.

        Of a layer whose input scale is one a frame it takes whole frames.
        """
        activation = self.schemes[name].activation if name in self.schemes else None
        framed = activation is not None and activation.granularity == "per_tensor_dynamic"
        unit = self.group_of[name].tokens_per_frame if framed else 1
        return TokenSample(name, capacity, unit)

    def samples(
        self, names: Iterable[str], capacity: int = DEFAULT_TOKENS
    ) -> dict[str, TokenSample]:
        """A `token_sample` of each layer in the model as it is now, all in one replay."""
        observers = {name: self.token_sample(name, capacity) for name in names}
        self.replay.show({name: [observer] for name, observer in observers.items()})
        return observers

    def static_ranges(
        self, names: Iterable[str], make_observer: Callable[[str], RangeObserver]
    ) -> dict[str, Range]:
        """Input ranges of those of the layers whose activations are static."""
        static = [
            name
            for name in names
            if (activation := self.schemes[name].activation) is not None and activation.static
        ]
        return input_ranges(self.replay, static, make_observer) if static else {}

    @torch.no_grad()
    def quantize(
        self,
        names: Iterable[str],
        weights: Mapping[str, QuantizedWeight],
        ranges: Mapping[str, Range],
    ) -> None:
        """Put quantized layers in the place of float ones.

        Args:
            names: of the layers.
            weights: codes of those whose weights are quantized.
            ranges: inputs of those whose activations are static.
        """
        names = list(names)
        for name in names:
            layer = quantized_layer(
                self.world_model.get_submodule(name),
                self.schemes[name],
                tokens_per_frame=self.group_of[name].tokens_per_frame,
                input_range=ranges.get(name),
                weight=weights.get(name),
            )
            replace_module(self.world_model, name, layer)
        if self.calibration is not None:
            self.replay.changed(names)


def blocks_of(
    schemes: Mapping[str, LayerScheme], groups: Sequence[LinearGroup]
) -> dict[str, list[str]]:
    """Block → its layers among `schemes`, in forward order."""
    blocks: dict[str, list[str]] = {}
    for group in groups:
        for name in group.layers:
            if name in schemes:
                blocks.setdefault(group.block, []).append(name)
    return blocks
