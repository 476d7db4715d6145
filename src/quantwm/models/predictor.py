"""DINO-WM's predictor: a ViT over the tokens of the last frames (Zhou et al., arXiv 2411.04983).

It has no input or output projection: tokens go in, the next frame's tokens come out.
"""

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from quantwm.models.transformer import Block

_REFERENCE_LAYER = re.compile(r"^(?:transformer\.)?layers\.(\d+)\.(?:(0|attn)|(1|ff|mlp))\.(.+)$")
_REFERENCE_ATTENTION = {"norm": "norm1", "to_qkv": "attn.qkv", "to_out.0": "attn.proj"}
_REFERENCE_MLP = {"net.0": "norm2", "net.1": "mlp.fc1", "net.4": "mlp.fc2"}


class Predictor(nn.Module):
    """Frame-causal ViT.

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
        self.num_patches, self.num_frames = num_patches, num_frames
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
        frame = torch.arange(num_frames * num_patches) // num_patches
        self.register_buffer("mask", frame[:, None] >= frame[None, :], persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of T ≤ num_frames frames (rows, T·P, width) → each frame's successor."""
        count = tokens.shape[1]
        mask = None
        if count > self.num_patches:
            mask = cast(Tensor, self.mask)[:count, :count]
        tokens = tokens + self.pos_embedding[:, :count].to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, mask)
        return cast(Tensor, self.norm(tokens))


def reference_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the public code's predictor parameters to ours.

    Accepts `transformer.layers.N.0.*` (DINO-WM) and `layers.N.attn.*` (the quantization study).

    Raises:
        KeyError: a name that belongs to no part of the predictor.
    """
    renamed: dict[str, Tensor] = {}
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
