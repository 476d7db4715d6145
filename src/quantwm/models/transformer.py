"""The pre-LayerNorm transformer block that DINOv2 and DINO-WM's predictor share.

Parameter names are those of Meta's DINOv2 release.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → (..., width)."""
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention.

    The four `*_input` taps see the operands of the two matrix products (q and k; probabilities
    and v), so that a quantizer can be put there without changing this class. While `p_input` is
    an identity the fused kernel runs, which never forms the probabilities.
    """

    def __init__(self, width: int, heads: int, head_dim: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * head_dim, width)
        self.q_input = nn.Identity()
        self.k_input = nn.Identity()
        self.p_input = nn.Identity()
        self.v_input = nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(rows, tokens, width) → the same; `mask` (tokens, tokens) is True where one may look."""
        rows, tokens, _ = x.shape
        qkv = self.qkv(x).view(rows, tokens, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = self.q_input(q), self.k_input(k), self.v_input(v)
        if type(self.p_input) is nn.Identity:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            logits = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            if mask is not None:
                logits = logits.masked_fill(~mask, float("-inf"))
            mixed = self.p_input(logits.softmax(-1)) @ v
        mixed = mixed.transpose(1, 2).reshape(rows, tokens, self.heads * self.head_dim)
        return cast(Tensor, self.proj(mixed))


class MLP(nn.Module):
    """Two linears with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → (..., width)."""
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(rows, tokens, width) → the same."""
        x = x + self._drop(self.ls1(self.attn(self.norm1(x), mask)))
        return x + self._drop(self.ls2(self.mlp(self.norm2(x))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x
