"""The pre-LayerNorm transformer block that DINOv2 and DINO-WM's predictor share.

Parameter names are those of Meta's DINOv2 release.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantwm.models.attention import KeyValueCache, frame_causal
from quantwm.protocols import AttentionValues, ResidualStream


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → (..., width)."""
        return x * self.gamma


class Projection(nn.Linear):
    """A linear that can be asked for some of its outputs."""

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """(..., in) → (..., out), or the features `outputs` of it."""
        if outputs is None:
            return super().forward(x)
        bias = None if self.bias is None else self.bias[outputs]
        return F.linear(x, self.weight[outputs], bias)


class Attention(nn.Module):
    """Multi-head self-attention, causal over frames.

    The four `*_input` taps see the operands of the two matrix products (q and k; probabilities
    and v), so that a quantizer can be put there without changing this class. While `p_input` is
    an identity the probabilities need never be formed.
    """

    def __init__(self, width: int, heads: int, head_dim: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = Projection(width, 3 * heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * head_dim, width)
        self.q_input = nn.Identity()
        self.k_input = nn.Identity()
        self.p_input = nn.Identity()
        self.v_input = nn.Identity()

    def forward(
        self,
        x: Tensor,
        tokens_per_frame: int | None = None,
        *,
        cache: KeyValueCache | None = None,
        newest_only: bool = False,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: (rows, tokens, width), frame after frame.
            tokens_per_frame: None if all tokens are one frame.
            cache: of the frames before `x`; takes in those of `x`.
            newest_only: return the newest frame's tokens only; of older frames only keys and
                values are computed.

        Returns:
            (rows, tokens, width), or (rows, tokens_per_frame, width).
        """
        size = tokens_per_frame or x.shape[1]
        q, k, v = self._older_and_newest(x, size) if newest_only else self._heads(self.qkv(x))
        q, k, v = self.q_input(q), self.k_input(k), self.v_input(v)
        if cache is not None:
            k, v = cache.extend(k, v)
        return cast(Tensor, self.proj(frame_causal(q, k, v, size, self.p_input)))

    def _older_and_newest(self, x: Tensor, size: int) -> list[Tensor]:
        """Queries of the newest frame, keys and values of all."""
        # A linear reads a strided part as a batch of products, half as fast as one of packed rows.
        q, *newest = self._heads(self.qkv(x[:, -size:].contiguous()))
        if x.shape[1] == size:
            return [q, *newest]
        inner = self.heads * self.head_dim
        older = self._heads(self.qkv(x[:, :-size].contiguous(), outputs=slice(inner, None)))
        return [q, *(torch.cat(pair, dim=2) for pair in zip(older, newest, strict=True))]

    def _heads(self, projected: Tensor) -> list[Tensor]:
        """(rows, tokens, n · heads · head_dim) → n times (rows, heads, tokens, head_dim)."""
        split = projected.view(*projected.shape[:-1], -1, self.heads, self.head_dim)
        return list(split.permute(2, 0, 3, 1, 4).unbind(0))


class MLP(nn.Module):
    """Two linears with an exact GELU between them; the tap `hidden` sees what the second reads."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.hidden = nn.Identity()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → (..., width)."""
        return cast(Tensor, self.fc2(self.hidden(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        width: of the residual stream.
        heads, head_dim: of the attention; `heads * head_dim` need not equal `width`.
        hidden: width between the MLP's linears.
        qkv_bias, layer_scale: DINOv2 has both, DINO-WM's predictor neither.
        eps: of the LayerNorms.
        dropout: on both branches' outputs while training; never in evaluation mode.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        hidden: int,
        *,
        qkv_bias: bool,
        layer_scale: bool,
        eps: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, head_dim, qkv_bias=qkv_bias)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        tokens_per_frame: int | None = None,
        *,
        cache: KeyValueCache | None = None,
        newest_only: bool = False,
    ) -> Tensor:
        """(rows, tokens, width) → the same, or its newest frame; see `Attention.forward`."""
        mixed = self.attn(self.norm1(x), tokens_per_frame, cache=cache, newest_only=newest_only)
        x = x[:, -mixed.shape[1] :] + self._drop(self.ls1(mixed))
        return x + self._drop(self.ls2(self.mlp(self.norm2(x))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x


def residual_stream(
    name: str,
    blocks: Sequence[nn.Module],
    *,
    width: int,
    writers: Sequence[str] = (),
    embeddings: Sequence[str],
    entry: str | None = None,
) -> ResidualStream:
    """The stream of a module called `name` that holds `blocks` and a last `norm`.

    Args:
        name: dotted.
        blocks: all of type `Block`.
        width: of the stream.
        writers: linears before the first block, named within the module.
        embeddings, entry: as in `ResidualStream`, named within the module.
    """
    written: dict[str, str | None] = {f"{name}.{writer}": None for writer in writers}
    readers: dict[str, tuple[str, ...]] = {}
    hidden: dict[str, str] = {}
    values = []
    for index, block in enumerate(blocks):
        assert isinstance(block, Block)
        own, attn = f"{name}.blocks.{index}", block.attn
        for writer, scale in (("attn.proj", "ls1"), ("mlp.fc2", "ls2")):
            scaled = isinstance(getattr(block, scale), LayerScale)
            written[f"{own}.{writer}"] = f"{own}.{scale}" if scaled else None
        readers |= {f"{own}.norm1": (f"{own}.attn.qkv",), f"{own}.norm2": (f"{own}.mlp.fc1",)}
        hidden[f"{own}.mlp.hidden"] = f"{own}.mlp.fc2"
        values.append(
            AttentionValues(f"{own}.attn.qkv", f"{own}.attn.proj", attn.heads, attn.head_dim)
        )
    return ResidualStream(
        name,
        width,
        written,
        readers,
        tuple(f"{name}.{embedding}" for embedding in embeddings),
        f"{name}.norm",
        None if entry is None else f"{name}.{entry}",
        tuple(values),
        hidden,
    )
