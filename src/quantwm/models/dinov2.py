"""DINOv2's Vision Transformer (Oquab et al., arXiv 2304.07193), patch tokens only.

Parameter names and arithmetic are those of Meta's release, so its files load as they are.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantwm.models.transformer import Block, residual_stream
from quantwm.protocols import ResidualStream

POSITION_OFFSET = 0.1
"""Meta's code adds this to the target grid before it forms the scale factor; the released
features depend on it."""


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to a token."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, patches, width), row-major."""
        return cast(Tensor, self.proj(images)).flatten(2).transpose(1, 2)


class DINOv2(nn.Module):
    """The stock encoder; `forward` returns `x_norm_patchtokens`.

    Args:
        depth, width, heads: of the transformer.
        mlp_ratio: hidden width of the MLP over `width`.
        patch_size: pixels a patch side.
        pretrained_grid: patches a side of the position grid; interpolated to the image's grid.
        position_offset: added to the image's grid before the scale is formed; 0 in Hugging Face's
            code, which otherwise computes the same.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        patch_size: int = 14,
        pretrained_grid: int = 37,
        position_offset: float = POSITION_OFFSET,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.width, self.patch_size, self.pretrained_grid = width, patch_size, pretrained_grid
        self.position_offset = position_offset
        self.patch_embed = PatchEmbed(patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + pretrained_grid**2, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                width // heads,
                int(width * mlp_ratio),
                qkv_bias=True,
                layer_scale=True,
                eps=1e-6,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), sides multiples of the patch → (B, patches, width)."""
        return self.tokens(images)[:, 1:]

    def tokens(self, images: Tensor) -> Tensor:
        """The same after the class token, `x_norm_clstoken`: (B, 1 + patches, width)."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image {height}x{width} is no multiple of patch {self.patch_size}")
        tokens = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        grid = (height // self.patch_size, width // self.patch_size)
        tokens = tokens + self.position_embedding(*grid).to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        return cast(Tensor, self.norm(tokens))

    def residual_stream(self, name: str) -> ResidualStream:
        """The declaration of this module's stream; `name` is the module's."""
        return residual_stream(
            name,
            list(self.blocks),
            width=self.width,
            writers=("patch_embed.proj",),
            embeddings=("cls_token", "pos_embed"),
        )

    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """Position embedding (1, 1 + rows·columns, width), bicubic as in Meta's code."""
        side = self.pretrained_grid
        if (rows, columns) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if self.position_offset:
            scales = [float(n + self.position_offset) / math.sqrt(side**2) for n in (rows, columns)]
            grid = F.interpolate(grid, scale_factor=tuple(scales), mode="bicubic")
        else:
            # By size: of a factor alone, side * (rows / side) may round to one row too few.
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic")
        patches = grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)
        return torch.cat([self.pos_embed[:, :1].float(), patches], dim=1)


def vit_small() -> DINOv2:
    """DINOv2 ViT-S/14: 12 blocks, width 384, 6 heads."""
    return DINOv2(depth=12, width=384, heads=6)


def vit_base() -> DINOv2:
    """DINOv2 ViT-B/14: 12 blocks, width 768, 12 heads."""
    return DINOv2(depth=12, width=768, heads=12)
