"""A block whose ranges and channel factors are learned, and what becomes of it afterwards."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from quantwm.methods.smoothquant import smoothing_scale
from quantwm.methods.work import Work
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.apply import copy_sharing_tensors
from quantwm.quant.block_inputs import BlockCall
from quantwm.quant.fold import norm_parameters, scale_inputs
from quantwm.quant.layer_inputs import ChannelAbsMax
from quantwm.quant.learned import LearnedInput, LearnedLinear, LearnedNorm, LearnedScaling
from quantwm.quant.modules import QuantizedWeight
from quantwm.quant.observers import RangeObserver, watching
from quantwm.quant.primitives import Range
from quantwm.quant.scheme import LayerScheme

_TOKENS_AT_ONCE = 4096
"""Tokens that are computed together where no gradient is needed."""
_ALPHA = 0.5
"""Of the factors to start from, see `smoothing_scale`."""


@dataclass(frozen=True)
class Example:
    """Rows of a block's input, and what is to come of them, float32 (rows, ...)."""

    call: BlockCall
    target: Tensor

    def rows(self, index: Tensor) -> "Example":
        """Some of them; `index` as in `BlockCall.rows`."""
        return Example(self.call.rows(index), self.target[index.to(self.target.device)])


class LearnedBlock:
    """A copy of a block in which learned modules stand for its layers and normalisations.

    Args:
        work: the block is still float in its model.
        name: of the block.
        calls: of the block, all that are known.
        make_observer: for the ranges of static inputs.
    """

    def __init__(
        self,
        work: Work,
        name: str,
        calls: Sequence[BlockCall],
        make_observer: Callable[[str], RangeObserver],
    ) -> None:
        self.name = name
        self._work, self._calls, self._make_observer = work, calls, make_observer
        self._names = work.blocks[name]
        self._float, self.module = _copy(work, name), _copy(work, name)
        self._layers: dict[str, LearnedLinear] = {}
        self._inputs: dict[str, LearnedInput] = {}
        self._scalings = self._initial_scalings()
        self._install()
        self.measure()

    def parameters(self, *kinds: str) -> list[nn.Parameter]:
        """What is learned; only "logit", "log_scale" or "relative_shift" if named."""
        return [
            parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and (not kinds or name.rpartition(".")[2] in kinds)
        ]

    def float_outputs(self) -> list[Tensor]:
        """What the float block makes of each call, float32."""
        return [block_output(self._float, call) for call in self._calls]

    @torch.no_grad()
    def error(self, examples: Sequence[Example]) -> float:
        """Relative L2 error of the block's output over examples, ‖ŷ - y‖ / ‖y‖."""
        error = norm = 0.0
        for example in examples:
            apart = block_output(self.module, example.call) - example.target
            error += float(apart.double().square().sum())
            norm += float(example.target.double().square().sum())
        return math.sqrt(error / max(norm, 1e-30))

    @torch.no_grad()
    def measure(self) -> None:
        """Set the ranges of static inputs: from rounded weights, and inputs in float."""
        static = {name: one for name, one in self._inputs.items() if one.scheme.static}
        if not static:
            return
        for name, one in static.items():
            one.observer = self._make_observer(name)
        for call in self._calls:
            block_output(self.module, call)
        for one in static.values():
            assert one.observer is not None
            one.cover(one.observer.range())
            one.observer = None

    def state(self) -> list[Tensor]:
        """Copies of what is learned."""
        return [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Go back to a state, and to its ranges."""
        for parameter, value in zip(self.parameters(), state, strict=True):
            parameter.copy_(value)
        self.measure()

    @torch.no_grad()
    def quantize(self) -> None:
        """Fold what was learned into the model, and put quantized layers into it."""
        for group, scaling in self._scalings.items():
            scale_inputs(self._work.world_model, group, scaling.scale(), scaling.shift())
        weights = {}
        for name, scheme in self._work.weighted(self._names).items():
            weight, clipping = self._work.weight(name), self._layers[name].clipping
            assert clipping is not None
            weights[name] = QuantizedWeight.from_float(weight, scheme, clipping.extent(weight))
        ranges: dict[str, Range] = {
            name: one.extent for name, one in self._inputs.items() if one.extent is not None
        }
        self._work.quantize(self._names, weights, ranges)

    def _initial_scalings(self) -> dict[LinearGroup, LearnedScaling]:
        """SmoothQuant's factors where inputs are rounded, ones elsewhere; no shifts."""
        groups = list(scalable(self._work, self.name))
        observers = {group: ChannelAbsMax(group.layers[0]) for group in groups}
        by_name = {within(group.layers[0], self.name): [one] for group, one in observers.items()}
        with torch.no_grad(), watching(cast(WorldModel, self._float), by_name):
            for call in self._calls if groups else ():
                block_output(self._float, call)
        scalings = {}
        for group, observer in observers.items():
            reach = observer.value()
            absmax = [self._work.weight(name).abs().amax(0).float() for name in group.layers]
            rounded = any(
                name in self._work.schemes and self._work.schemes[name].activation is not None
                for name in group.layers
            )
            factors = smoothing_scale(reach, torch.stack(absmax).amax(0), _ALPHA)
            norm = self._work.world_model.get_submodule(cast(str, group.producer))
            shiftable = norm_parameters(norm)[1] is not None
            scalings[group] = LearnedScaling(
                factors if rounded else torch.ones_like(reach), reach if shiftable else None
            )
        return scalings

    def _install(self) -> None:
        """Put learned modules into the copy."""
        for name in self._names:
            scheme, group = self._work.schemes[name], self._work.group_of[name]
            layer = self._float.get_submodule(within(name, self.name))
            if isinstance(layer, nn.Identity):
                assert scheme.activation is not None
                tap = LearnedInput(scheme.activation, group.tokens_per_frame, tap=True)
                self._inputs[name] = tap
                self._put(name, tap)
            else:
                self._put_linear(name, scheme, group)
        for group, scaling in self._scalings.items():
            for name in group.layers:
                if name not in self._layers:
                    self._put_linear(name, LayerScheme(), group)
            producer = cast(str, group.producer)
            norm = self._float.get_submodule(within(producer, self.name))
            self._put(producer, LearnedNorm(norm, scaling))

    def _put_linear(self, name: str, scheme: LayerScheme, group: LinearGroup) -> None:
        layer = cast(nn.Linear, self._float.get_submodule(within(name, self.name)))
        scaling = self._scalings.get(group)
        learned = LearnedLinear(layer, scheme, group.tokens_per_frame, scaling)
        self._layers[name] = learned
        if learned.input is not None:
            self._inputs[name] = learned.input
        self._put(name, learned)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = within(name, self.name).rpartition(".")
        if child:
            setattr(self.module.get_submodule(parent), child, module)
        else:
            self.module = module


def within(name: str, block: str) -> str:
    """A module's name within a block that holds it; "" is the block itself.

    Raises:
        ValueError: it does not.
    """
    if not holds(block, name):
        raise ValueError(f"{name} is not within {block}")
    return name[len(block) + 1 :]


def holds(block: str, name: str) -> bool:
    """Whether a module is a block, or in it."""
    return name == block or name.startswith(f"{block}.")


def scalable(work: Work, block: str) -> Iterator[LinearGroup]:
    """Groups of a block whose normalisation lies in it, with a layer in the plan."""
    for group in work.groups:
        if group.block == block and can_scale(work.world_model, group, work.schemes):
            yield group


def can_scale(
    world_model: WorldModel, group: LinearGroup, schemes: Mapping[str, LayerScheme]
) -> bool:
    """Whether a group's normalisation can take a scaling in while its block is learned."""
    if group.producer is None or not any(name in schemes for name in group.layers):
        return False
    if not all(holds(group.block, name) for name in (group.producer, *group.layers)):
        return False
    return isinstance(getattr(world_model.get_submodule(group.producer), "weight", None), Tensor)


def _copy(work: Work, block: str) -> nn.Module:
    """A block that shares its tensors with the model's; it is in evaluation mode and constant."""
    twin = copy_sharing_tensors(cast(WorldModel, work.world_model.get_submodule(block)))
    return cast(nn.Module, twin).eval().requires_grad_(False)


@torch.no_grad()
def block_output(block: nn.Module, call: BlockCall) -> Tensor:
    """What a block makes of a call, float32, a few rows at a time."""
    rows = torch.split(torch.arange(len(call)), max(1, _TOKENS_AT_ONCE // call.tokens))
    return torch.cat([call.rows(part).run(block).float() for part in rows])
