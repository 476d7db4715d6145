"""What a part of a method can do. A part is one file, and may play several of these roles.

A part is a frozen dataclass: its fields are its options, `name` is what plans call it, and
`needs_calibration` says whether it reads calibration data. Two class variables that are true say
what it does not go together with: `scales_channels`, that it chooses a factor for each channel of
what normalisations give, so that two such parts exclude each other and come after what turns
channels into others; `rounds_to_nearest`, that it searches by what rounding to nearest does.
`Recipe` runs the parts of a method in the order of this file.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from quantwm.methods.work import Work
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.modules import QuantizedWeight
from quantwm.quant.observers import RangeObserver
from quantwm.quant.primitives import Range
from quantwm.quant.scheme import LayerScheme, WeightScheme


@runtime_checkable
class Part(Protocol):
    """What all parts have. One with a method `problems` (see `Checked`) is asked before any
    computing."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool]


@runtime_checkable
class Checked(Protocol):
    """A part that cannot apply to every model and plan."""

    def problems(
        self,
        world_model: WorldModel,
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],
    ) -> list[str]:
        """What stands against it, layers named; found without computing."""
        ...


@runtime_checkable
class Selective(Protocol):
    """A part that does not read all of its options in every method."""

    def idle_options(self, clipping: "Clipping") -> dict[str, str]:
        """Options that change nothing, each with the reason.

        Args:
            clipping: the part that clips in the method.
        """
        ...


def without_weights(schemes: Mapping[str, LayerScheme], purpose: str) -> list[str]:
    """The problem of a part that works on weights with a plan that quantizes none.

    Args:
        purpose: what the part does to weights, such as "clip".
    """
    if any(scheme.weight is not None for scheme in schemes.values()):
        return []
    return [
        f"no layer of the plan has quantized weights to {purpose}; give some weight bits, such as "
        "'w4', or choose another method"
    ]


@runtime_checkable
class Transform(Protocol):
    """Changes a float model so that rounding it hurts less; its outputs stay what they were."""

    def transform(self, work: Work, clipping: "Clipping") -> None:
        """Change `work.world_model`.

        Args:
            work: nothing in it is quantized yet.
            clipping: that the weights will be rounded with, for a transform that searches by
                what rounding does.
        """
        ...


@runtime_checkable
class Clipping(Protocol):
    """Chooses the range that each weight's grid covers."""

    def extents(
        self, work: Work, weights: Mapping[str, Tensor], schemes: Mapping[str, WeightScheme]
    ) -> dict[str, Range]:
        """Lowest and highest value of each scale's grid.

        Args:
            work: the model as it is now; some blocks may be quantized.
            weights: of layers, (out, in); not always those that the model holds.
            schemes: of the same layers.

        Returns:
            for each layer two float32 tensors (rows, groups), see `primitives.to_groups`.
        """
        ...


@runtime_checkable
class Rounding(Protocol):
    """Chooses the codes of weights, block by block, the blocks before it quantized already."""

    def codes(self, work: Work, extents: Mapping[str, Range]) -> dict[str, QuantizedWeight]:
        """Quantized weights of the layers of `extents`, which are still float in the model."""
        ...


@runtime_checkable
class BlockLearning(Protocol):
    """Learns a block's transform, ranges and codes together; leaves no other role to a part."""

    def learn(self, work: Work, block: str, make_observer: Callable[[str], RangeObserver]) -> None:
        """Quantize all layers of the plan in one block; the blocks before it are quantized."""
        ...


@runtime_checkable
class InputRange(Protocol):
    """Chooses the range that a static input grid covers."""

    def observer(self, layer: str) -> RangeObserver:
        """Sees the layer's inputs and settles on their range."""
        ...


@runtime_checkable
class Correction(Protocol):
    """Repairs quantized layers, block by block."""

    def correct(self, work: Work, floats: Mapping[str, nn.Module]) -> None:
        """Change quantized layers in place of the model.

        Args:
            work: the block's layers are quantized, and those before it.
            floats: the layers as they were before, transforms folded in.
        """
        ...
