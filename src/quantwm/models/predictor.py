"""DINO-WM's predictor: a ViT over the tokens of the last frames (Zhou et al., arXiv 2411.04983).

It has no input or output projection: tokens go in, the next frame's tokens come out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from quantwm.models.attention import KeyValueCache
from quantwm.models.transformer import Block, residual_stream
from quantwm.protocols import ResidualStream

Value = TypeVar("Value")

_REFERENCE_LAYER = re.compile(r"^(?:transformer\.)?layers\.(\d+)\.(?:(0|attn)|(1|ff|mlp))\.(.+)$")
_REFERENCE_ATTENTION = {"norm": "norm1", "to_qkv": "attn.qkv", "to_out.0": "attn.proj"}
_REFERENCE_MLP = {"net.0": "norm2", "net.1": "mlp.fc1", "net.4": "mlp.fc2"}


class Predictor(nn.Module):
    """Frame-causal ViT; the tap `entry` sees the tokens that come in.

    Args:
        num_patches: tokens a frame.
        num_frames: frames in the window, `num_hist` of DINO-WM.
        width: of a token.
        depth, heads, head_dim, mlp_width: of the transformer.
        dropout: while training.
    """

    def __init__(
        self,
        num_patches: int,
        num_frames: int,
        width: int,
        depth: int,
        heads: int,
        head_dim: int,
        mlp_width: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_patches, self.num_frames, self.width = num_patches, num_frames, width
        self.entry = nn.Identity()
        self.pos_embedding = nn.Parameter(torch.zeros(1, num_frames * num_patches, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                head_dim,
                mlp_width,
                qkv_bias=False,
                layer_scale=False,
                eps=1e-5,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def new_cache(self) -> list[KeyValueCache]:
        """An empty window, to be filled by `forward`."""
        capacity = self.num_frames * self.num_patches
        return [KeyValueCache(capacity) for _ in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: list[KeyValueCache] | None = None,
        newest_only: bool = False,
    ) -> Tensor:
        """Predict each frame's successor.

        Args:
            tokens: of T frames, (rows, T·P, width), T ≤ num_frames less those in `cache`.
            cache: frames of the same window that came before; takes in those of `tokens`.
                Frames keep their positions in a window, so once it slides a new cache is needed.
            newest_only: return the newest frame's successor only.

        Returns:
            (rows, T·P, width), or (rows, P, width).
        """
        caches: Sequence[KeyValueCache | None] = cache or [None] * len(self.blocks)
        begin = cache[0].length if cache else 0
        position = self.pos_embedding[:, begin : begin + tokens.shape[1]]
        tokens = self.entry(tokens)
        tokens = tokens + position.to(tokens.dtype)
        last = len(self.blocks) - 1
        for number, (block, own) in enumerate(zip(self.blocks, caches, strict=True)):
            only = newest_only and number == last
            tokens = block(tokens, self.num_patches, cache=own, newest_only=only)
        if newest_only and last < 0:
            tokens = tokens[:, -self.num_patches :]
        return cast(Tensor, self.norm(tokens))

    def residual_stream(self, name: str) -> ResidualStream:
        """The declaration of this module's stream; `name` is the module's."""
        return residual_stream(
            name,
            list(self.blocks),
            width=self.width,
            embeddings=("pos_embedding",),
            entry="entry",
        )


class Window:
    """The last `num_frames` frames of a rollout, predicted from with the fewest operations.

    Until the window slides, a frame keeps its position and what it sees, so its keys and values
    are kept and only the newest frame is computed. Once it slides, every position has moved and
    with it everything that was computed: the whole window is computed again, but of the last
    block only what the newest frame needs.

    Args:
        predictor: to predict with.
        keep: whether keys and values may be kept; without, every frame of the window is computed
            at every call, so that no call depends on an earlier one.
    """

    def __init__(self, predictor: Predictor, *, keep: bool = True) -> None:
        self._predictor = predictor
        self._frames: list[Tensor] = []
        self._seen = 0
        self._cache = predictor.new_cache() if keep and predictor.num_frames > 1 else None

    def successor(self, fresh: Sequence[Tensor]) -> Tensor:
        """Take in frames and predict the newest one's successor.

        Args:
            fresh: the frames since the last call, each (rows, P, width).

        Returns:
            (rows, P, width).
        """
        size = self._predictor.num_frames
        self._frames = [*self._frames, *fresh][-size:]
        self._seen += len(fresh)
        if self._seen > size:
            self._cache = None
        if self._cache is None:
            fresh = self._frames
        tokens = torch.cat(list(fresh), dim=1) if len(fresh) > 1 else fresh[0]
        return cast(Tensor, self._predictor(tokens, cache=self._cache, newest_only=True))


def reference_state_dict(state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename the public code's predictor parameters to ours.

    Accepts `transformer.layers.N.0.*` (DINO-WM) and `layers.N.attn.*` (the quantization study).

    Raises:
        KeyError: a name that belongs to no part of the predictor.
    """
    renamed: dict[str, Value] = {}
    for name, tensor in state.items():
        match = _REFERENCE_LAYER.match(name)
        if match is None:
            plain = name.removeprefix("transformer.")
            if plain not in {"pos_embedding", "norm.weight", "norm.bias"}:
                raise KeyError(f"{name!r} is no parameter of a DINO-WM predictor")
            renamed[plain] = tensor
            continue
        index, attention, _, rest = match.groups()
        part, _, parameter = rest.rpartition(".")
        table = _REFERENCE_ATTENTION if attention is not None else _REFERENCE_MLP
        if part not in table:
            raise KeyError(f"{name!r} is no parameter of a DINO-WM predictor")
        renamed[f"blocks.{index}.{table[part]}.{parameter}"] = tensor
    return renamed
