"""Attention over frames: who sees whom, which kernel runs, and what can be kept.

A predictor's token sees every token of its own and of earlier frames. Frame by frame that is a
plain attention over a prefix of the keys, so no mask is ever formed, and the keys and values of
earlier frames stay what they are for as long as their positions do.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BLOCK_BYTES = 2**20
"""Logits that the blocked kernel forms at once: what a core's second-level cache holds."""


class KeyValueCache:
    """Keys and values of the frames that a window already holds, for one attention layer.

    Args:
        capacity: tokens of a full window.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, tokens, head_dim); returns all keys and all values so far."""
        rows, heads, tokens, width = keys.shape
        if self.length + tokens > self.capacity:
            total = self.length + tokens
            raise ValueError(f"{total} tokens do not fit a window of {self.capacity}")
        if torch.is_grad_enabled():
            return self._concatenated(keys, values)
        if self._keys is None or self._values is None:
            shape = (rows, heads, self.capacity, width)
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        begin, self.length = self.length, self.length + tokens
        self._keys[:, :, begin : self.length] = keys
        self._values[:, :, begin : self.length] = values
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def _concatenated(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New tensors, because a backward pass needs the earlier ones as they were."""
        if self._keys is not None and self._values is not None:
            keys = torch.cat([self._keys, keys], dim=2)
            values = torch.cat([self._values, values], dim=2)
        self._keys, self._values, self.length = keys, values, keys.shape[2]
        return keys, values


def frame_causal(
    q: Tensor, k: Tensor, v: Tensor, tokens_per_frame: int, p_input: nn.Module
) -> Tensor:
    """Attention in which a frame sees itself and the frames before it.

    Args:
        q: of the newest frames, (rows, heads, queries, head_dim).
        k, v: of all frames, the newest last, (rows, heads, keys, head_dim).
        tokens_per_frame: divides `queries` and `keys`.
        p_input: sees the probabilities; anything but an `nn.Identity` makes them be formed.

    Returns:
        (rows, queries, heads · head_dim).
    """
    queries, keys = q.shape[2], k.shape[2]
    if queries == tokens_per_frame:
        return _attend(q, k, v, p_input)
    mixed = []
    for begin in range(0, queries, tokens_per_frame):
        end = begin + tokens_per_frame
        seen = keys - queries + end
        mixed.append(_attend(q[:, :, begin:end], k[:, :, :seen], v[:, :, :seen], p_input))
    return torch.cat(mixed, dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, p_input: nn.Module) -> Tensor:
    """Every query sees every key: (rows, heads, tokens, head_dim) → (rows, tokens, width)."""
    if type(p_input) is not nn.Identity or _products_win(q):
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mixed = p_input(logits.softmax(-1)) @ v
    elif _blocked_wins(q):
        return blocked_attention(q, k, v)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v)
    return cast(Tensor, mixed.transpose(1, 2).flatten(2))


def _products_win(q: Tensor) -> bool:
    # On a CPU the fused kernel's backward pass takes ten times as long as its forward pass.
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()


def _blocked_wins(q: Tensor) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and not torch.cpu._is_amx_tile_supported()
    )


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as batched matrix products over blocks of rows that stay in a core's cache.

    The logits are rounded to the operands' type, which the fused kernel's are not.

    Args:
        q, k, v: (rows, heads, tokens, head_dim), of any strides.

    Returns:
        (rows, queries, heads · head_dim).
    """
    rows, heads, queries, width = q.shape
    keys = k.shape[2]
    out = q.new_empty(rows, queries, heads, width)
    step = max(1, min(rows, _BLOCK_BYTES // (heads * queries * keys * q.element_size())))
    # The products' fast path wants packed operands; copying them costs a twentieth of what it
    # saves. The buffers serve every block, so that nothing large is allocated inside the loop.
    q_block, k_block = (
        q.new_empty(step, heads, queries, width),
        k.new_empty(step, heads, keys, width),
    )
    v_block, mixed = torch.empty_like(k_block), torch.empty_like(q_block)
    logits = q.new_empty(step * heads, queries, keys)
    probabilities = torch.empty_like(logits)
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        count = part.stop - begin
        size = count * heads
        torch.mul(q[part], width**-0.5, out=q_block[:count])
        k_block[:count].copy_(k[part])
        v_block[:count].copy_(v[part])
        flat_k, flat_v = k_block.flatten(0, 1)[:size], v_block.flatten(0, 1)[:size]
        torch.bmm(q_block.flatten(0, 1)[:size], flat_k.transpose(1, 2), out=logits[:size])
        torch.softmax(logits[:size], -1, out=probabilities[:size])
        torch.bmm(probabilities[:size], flat_v, out=mixed.flatten(0, 1)[:size])
        out[part].transpose(1, 2).copy_(mixed[:count])
    return out.flatten(2)
