"""Multiply-adds of one cost evaluation, counted from the shapes.

Counted are the matrix products: the linears (the embeddings' convolutions among them) and
attention's two products. Norms, activations, softmax and residuals are not, so a share of the
matrix rate that stays below one is the price of everything that is no product.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from quantwm.models.config import DINOWMConfig

_RGB = 3
_MLP_RATIO = 4
"""DINOv2's hidden width over its width."""


@dataclass(frozen=True)
class Operations:
    """Multiply-adds.

    Attributes:
        linears: of products with weights.
        attention: of queries with keys, and of probabilities with values.
    """

    linears: int = 0
    attention: int = 0

    @property
    def multiply_adds(self) -> int:
        """Both."""
        return self.linears + self.attention

    @property
    def flops(self) -> int:
        """Additions and multiplications, two a multiply-add."""
        return 2 * self.multiply_adds

    def __add__(self, other: Self) -> "Operations":
        return Operations(self.linears + other.linears, self.attention + other.attention)

    def __mul__(self, times: int) -> "Operations":
        return Operations(self.linears * times, self.attention * times)


@dataclass(frozen=True)
class _Block:
    """Widths of a transformer block."""

    width: int
    inner: int
    hidden: int

    def tokens(self, count: int) -> Operations:
        """The four linears of tokens that are computed in full."""
        return Operations(count * (4 * self.width * self.inner + 2 * self.width * self.hidden))

    def keys(self, count: int) -> Operations:
        """Keys and values alone."""
        return Operations(count * 2 * self.width * self.inner)

    def attend(self, queries: int, keys: int) -> Operations:
        """Logits and their products with the values."""
        return Operations(attention=2 * queries * keys * self.inner)


def encoding(config: DINOWMConfig) -> Operations:
    """One image through DINOv2, and its proprioception's embedding."""
    e = config.encoder
    block = _Block(e.width, e.width, _MLP_RATIO * e.width)
    tokens = config.image_patches + 1
    patches = config.image_patches * _RGB * e.patch_size**2 * e.width
    embedding = config.proprio_dim * config.proprio_emb_dim
    blocks = (block.tokens(tokens) + block.attend(tokens, tokens)) * e.depth
    return Operations(patches + embedding) + blocks


def literal_operations(
    config: DINOWMConfig, candidates: int, horizon: int, episodes: int = 1
) -> Operations:
    """The literal order: an encoding a candidate, and every window computed whole.

    Args:
        config: of the model.
        candidates: of each episode.
        horizon: model actions in a candidate.
        episodes: planned for.
    """
    one = encoding(config) + _action_embedding(config) * horizon
    for step in range(1, horizon + 1):
        one += whole_window(config, min(step, config.num_hist))
    return one * (candidates * episodes)


def whole_window(config: DINOWMConfig, frames: int) -> Operations:
    """All tokens of a window through all blocks, attention masked but computed."""
    block, tokens = _predictor_block(config), frames * config.frame_tokens
    return (block.tokens(tokens) + block.attend(tokens, tokens)) * config.predictor.depth


def planned_operations(
    config: DINOWMConfig, candidates: int, horizon: int, episodes: int = 1
) -> Operations:
    """What quantwm computes: an encoding an episode, and of each window what is new.

    The copies that fill up an episode's last chunk of candidates are computed, but not counted.

    Arguments as in `literal_operations`.
    """
    one = _action_embedding(config) * horizon
    for step in range(1, horizon + 1):
        if step <= config.num_hist:
            one += _newest_frame(config, step)
        else:
            one += _slid_window(config)
    return (one * candidates + encoding(config)) * episodes


def added_operations(
    config: DINOWMConfig,
    added: Mapping[str, int],
    candidates: int,
    horizon: int,
    episodes: int = 1,
) -> Operations:
    """What a method's own products cost on top of `planned_operations`.

    Args:
        config: of the model.
        added: multiply-adds a token by module, `quantwm.quant.structure.added_multiply_adds`.
        candidates, horizon, episodes: as in `planned_operations`.
    """
    size, slid = config.frame_tokens, max(0, horizon - config.num_hist)
    newest = horizon * size
    whole = newest + slid * (config.num_hist - 1) * size
    last = ("predictor.norm", f"predictor.blocks.{config.predictor.depth - 1}.")
    total = 0
    for name, count in added.items():
        if name.startswith("encoder."):
            total += count * (config.image_patches + 1)
        else:
            total += count * candidates * (newest if name.startswith(last) else whole)
    return Operations(total * episodes)


def _newest_frame(config: DINOWMConfig, frames: int) -> Operations:
    """The newest of `frames` frames; the others' keys and values are kept from earlier steps."""
    block, size = _predictor_block(config), config.frame_tokens
    return (block.tokens(size) + block.attend(size, frames * size)) * config.predictor.depth


def _slid_window(config: DINOWMConfig) -> Operations:
    """All frames, each attending to itself and those before; in the last block the newest frame
    and the older ones' keys and values."""
    block, size = _predictor_block(config), config.frame_tokens
    frames, depth = config.num_hist, config.predictor.depth
    whole = block.tokens(frames * size)
    for frame in range(1, frames + 1):
        whole += block.attend(size, frame * size)
    newest = block.tokens(size) + block.attend(size, frames * size)
    last = newest + block.keys((frames - 1) * size)
    return whole * (depth - 1) + last


def _predictor_block(config: DINOWMConfig) -> _Block:
    p = config.predictor
    return _Block(config.token_width, p.heads * p.head_dim, p.mlp_width)


def _action_embedding(config: DINOWMConfig) -> Operations:
    return Operations(config.action_dim * config.frameskip * config.action_emb_dim)
