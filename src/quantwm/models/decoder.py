"""DINO-WM's decoders: pictures of latents, to look at. Nothing plans with them.

Parameter names are those of the public code (github.com/gaoyuezhou/dino_wm, `models/vqvae.py` and
`models/decoder/transposed_conv.py`), so its decoders load as they are, but for the running averages
that only training reads.
"""

import itertools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantwm.models.config import DecoderConfig

_RUNNING_AVERAGES = ("quantize_b.cluster_size", "quantize_b.embed_avg")


class Codebook(nn.Module):
    """Vectors (D, codes); a token becomes the nearest one."""

    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(width, codes))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) → (..., D). Gradients pass straight through."""
        embed = cast(Tensor, self.embed)
        flat = tokens.reshape(-1, tokens.shape[-1])
        # |t|² is the same for every code.
        distance = embed.pow(2).sum(0, keepdim=True) - 2 * flat @ embed
        nearest = embed.t()[distance.argmin(1)].view_as(tokens)
        return tokens + (nearest - tokens).detach()


class ResidualBlock(nn.Module):
    """x + conv₁(relu(conv₃(relu(x))))."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same."""
        return x + cast(Tensor, self.conv(x))


class Upsampler(nn.Module):
    """Residual blocks, then four times the side by two transposed convolutions."""

    def __init__(self, width: int, out: int, channels: int, blocks: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Conv2d(width, channels, 3, padding=1),
            *(ResidualBlock(channels, hidden) for _ in range(blocks)),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(channels // 2, out, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, out, 4·H, 4·W)."""
        return cast(Tensor, self.blocks(x))


class VQVAEDecoder(nn.Module):
    """A grid of tokens to an image of 16 times its side."""

    def __init__(self, width: int, config: DecoderConfig) -> None:
        super().__init__()
        self.quantize_b = Codebook(width, config.n_embed) if config.quantize else nn.Identity()
        sizes = (config.channel, config.n_res_block, config.n_res_channel)
        self.upsample_b = Upsampler(width, width, *sizes)
        self.dec = Upsampler(width, 3, *sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P, D), P a square, row-major → (B, 3, S, S), about −1 to 1."""
        side = round(tokens.shape[1] ** 0.5)
        grid = self.quantize_b(tokens).view(len(tokens), side, side, -1).permute(0, 3, 1, 2)
        return cast(Tensor, self.dec(self.upsample_b(grid)))


class TransposedConvDecoder(nn.Module):
    """One token a frame to an image, by five transposed convolutions and a resize."""

    def __init__(self, width: int, config: DecoderConfig) -> None:
        super().__init__()
        depth, kernel, stride = config.depth, config.kernel_size, config.stride
        channels = [32 * depth, 8 * depth, 4 * depth, 2 * depth, depth, 3]
        layers: list[nn.Module] = [
            nn.Linear(width, channels[0]),
            nn.Unflatten(1, (channels[0], 1)),
            nn.Unflatten(2, (1, 1)),
        ]
        for before, after in itertools.pairwise(channels):
            layers += [nn.ConvTranspose2d(before, after, kernel, stride, padding=1), nn.ReLU()]
        # The last activation's place is the resize's, which has no parameters either.
        layers[-1] = nn.Upsample(config.image_size, mode="bilinear", align_corners=False)
        self.network = nn.Sequential(*layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 1, D) → (B, 3, S, S), about −1 to 1."""
        return cast(Tensor, self.network(tokens[:, 0]))


def new_decoder(width: int, config: DecoderConfig) -> nn.Module:
    """An untrained decoder of tokens of `width` channels."""
    kinds = {"vqvae": VQVAEDecoder, "transposed_conv": TransposedConvDecoder}
    return kinds[config.kind](width, config)


def pictures(images: Tensor, side: int) -> Tensor:
    """Decoded images (..., 3, S, S), −1 to 1 → frames (..., side, side, 3) uint8."""
    lead = images.shape[:-3]
    flat = images.flatten(0, -4).float() if lead else images[None].float()
    if flat.shape[-1] != side:
        flat = F.interpolate(flat, size=(side, side), mode="bilinear", antialias=True)
    frames = ((flat.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return frames.reshape(*lead, side, side, 3)


def reference_state_dict(state: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """What of the public code's decoder ours has: no running averages, no codebook unused."""
    dropped = _RUNNING_AVERAGES if config.quantize else (*_RUNNING_AVERAGES, "quantize_b.embed")
    return {name: value for name, value in state.items() if name not in dropped}
