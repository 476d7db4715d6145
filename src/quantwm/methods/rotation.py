"""Rotation: orthogonal matrices folded into the weights, so that no channel stands out."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantwm.checks import is_integer
from quantwm.errors import UsageError
from quantwm.methods.registry import register
from quantwm.methods.roles import Clipping
from quantwm.methods.work import Work
from quantwm.protocols import HasResidualStreams, LinearGroup, ResidualStream, WorldModel
from quantwm.quant import rotation as fold
from quantwm.quant.hadamard import hadamard_matrix_exists, random_orthogonal
from quantwm.quant.sampling import named_generator
from quantwm.quant.scheme import LayerScheme

logger = logging.getLogger(__name__)


@register
@dataclass(frozen=True)
class Rotation:
    """Rotates residual streams, values and MLPs (QuaRot, arXiv 2404.00456), matrices at random.

    SpinQuant (arXiv 2405.16406) learns the matrices; here they are drawn once: a Hadamard matrix
    with random signs, or a uniform orthogonal matrix where none of that order is known (404, the
    width of DINO-WM's predictor). The model must declare its streams
    (`quantwm.protocols.HasResidualStreams`).

    Only streams that hold layers of the plan are rotated, each as a whole. Inside a stream this
    costs nothing at inference. Where tokens enter or leave a stream with no linear to fold into,
    and in front of each second linear of an MLP that the plan quantizes, one product stays that
    is computed in float; `quantwm.quant.structure.added_multiply_adds` counts them.

    What q and k read in an attention matmul and what a patch embedding reads stays as it was.

    Args:
        hidden: rotate what the second linear of an MLP reads.
        values: rotate each head's values, which is what the attention's output linear reads.
        seed: of the matrices, which depend on it and on the stream's name alone.

    Raises:
        UsageError: an option of another type or out of range.
    """

    hidden: bool = True
    values: bool = True
    seed: int = 0

    name: ClassVar[str] = "rotation"
    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option in ("hidden", "values"):
            if not isinstance(getattr(self, option), bool):
                raise UsageError(f"{option} is true or false, got {getattr(self, option)!r}")
        if not is_integer(self.seed, 0):
            raise UsageError(f"seed is an integer of at least 0, got {self.seed!r}")

    def problems(
        self,
        world_model: WorldModel,
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],
    ) -> list[str]:
        """A model or a layer that is in no declared stream, a stream that cannot be rotated, a
        width without a Hadamard matrix."""
        if not isinstance(world_model, HasResidualStreams):
            return [
                f"{type(world_model).__name__} declares no residual streams, so nothing says what "
                "must be rotated together: give it a method residual_streams() (see "
                "quantwm.protocols.ResidualStream), or take another method"
            ]
        streams = _streams_of(world_model, schemes)
        problems = [p for stream in streams for p in fold.stream_problems(world_model, stream)]
        inside = {name for stream in streams for name in _layers(stream)}
        taps = {n for g in groups if g.kind == "attention_matmul" for n in g.layers}
        outside = [name for name in schemes if name not in inside | taps]
        if outside:
            problems.append(f"no residual stream holds {', '.join(outside)}: leave them in float")
        elif schemes and not streams:
            problems.append("the plan quantizes no linear of a residual stream: nothing to rotate")
        if not problems:
            problems += self._hidden_problems(world_model, streams, schemes)
        return problems

    def _hidden_problems(
        self,
        world_model: WorldModel,
        streams: Iterable[ResidualStream],
        schemes: Mapping[str, LayerScheme],
    ) -> list[str]:
        unknown: dict[int, list[str]] = {}
        for stream in streams:
            for layer in self._hidden(stream, schemes).values():
                width = world_model.get_submodule(layer).get_parameter("weight").shape[1]
                if not hadamard_matrix_exists(width):
                    unknown.setdefault(width, []).append(layer)
        return [
            f"no Hadamard matrix of order {width} (a power of two, or 12 times one) is known for "
            f"what {', '.join(layers)} read: set the option hidden to false"
            for width, layers in unknown.items()
        ]

    def transform(self, work: Work, clipping: Clipping) -> None:  # noqa: ARG002
        """Rotate all streams that hold layers of the plan."""
        world_model = work.world_model
        for stream in _streams_of(world_model, work.schemes):
            complete = fold.open_boundaries(world_model, stream)
            fold.absorb_layer_scales(world_model, complete)
            fold.absorb_norms(world_model, complete)
            fold.remove_mean(world_model, complete)
            generator = named_generator(f"{self.seed}/{stream.name}")
            rotation = random_orthogonal(stream.width, generator)
            fold.rotate_stream(world_model, complete, rotation)
            if self.values:
                for path in stream.values:
                    heads = self._heads(path.qkv, path.heads, path.head_dim)
                    fold.rotate_values(world_model, path, heads)
            hidden = self._hidden(stream, work.schemes)
            for tap, layer in hidden.items():
                fold.rotate_hidden(world_model, tap, layer)
            logger.info("rotated stream %s and %d MLPs", stream.name, len(hidden))
            if work.calibration is not None:
                work.replay.changed(_layers(stream))

    def _heads(self, qkv: str, heads: int, head_dim: int) -> Tensor:
        generator = named_generator(f"{self.seed}/{qkv}")
        return torch.stack([random_orthogonal(head_dim, generator) for _ in range(heads)])

    def _hidden(self, stream: ResidualStream, schemes: Mapping[str, LayerScheme]) -> dict[str, str]:
        """Taps to put a Hadamard product into → the linears that read them."""
        if not self.hidden:
            return {}
        return {tap: layer for tap, layer in stream.hidden.items() if layer in schemes}


def _layers(stream: ResidualStream) -> set[str]:
    """Linears and convolutions that write or read the stream."""
    return set(stream.writers).union(*stream.readers.values())


def _streams_of(
    world_model: WorldModel, schemes: Mapping[str, LayerScheme]
) -> list[ResidualStream]:
    """Those that hold layers of the plan."""
    assert isinstance(world_model, HasResidualStreams)
    streams = world_model.residual_streams()
    return [stream for stream in streams if not _layers(stream).isdisjoint(schemes)]
