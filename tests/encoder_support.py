"""Encoder weights and images that a seed tells, for tests and for the recording of fixtures.

They are made of the raw bits of PCG64, whose stream is fixed, times powers of two: the same on
every machine and library version, and exact in float32. So a fixture of a ViT-B need hold no more
than what comes out.
"""

import zlib

import numpy as np
import safetensors.torch
import torch

from quantwm.models.config import EncoderConfig
from quantwm.models.dinov2 import DINOv2

ENCODER_SIDES = (98, 196, 224)
ENCODER_EVERY = 149
"""Which values of the released sizes' tokens are recorded; no width is a multiple."""
TINY = EncoderConfig(depth=2, width=24, heads=3)


def seeded_bytes(shape, *seed):
    """int8, uniform over all its values."""
    count = int(np.prod(shape))
    raw = np.random.PCG64(list(seed)).random_raw(-(-count // 8))
    return raw.astype("<u8").view(np.int8)[:count].reshape(shape)


def seeded_values(shape, *seed):
    """float32 in [-1, 1)."""
    return torch.from_numpy(seeded_bytes(shape, *seed).copy()) / 128.0


def seeded_images(side, seed=0):
    """One image (1, 3, side, side) of normalised values in [-1, 1), constant on 7-pixel squares."""
    squares = seeded_values((1, 3, side // 7, side // 7), seed)
    return squares.repeat_interleave(7, 2).repeat_interleave(7, 3)


def seeded_state(shapes, seed=0, gain=1, period=None):
    """Weights for names and shapes, each from a stream of its own; none of them is neutral.

    The larger the gain of the matrices, the more what goes in matters beside the biases. With a
    period, each weight repeats its first so many values: then it packs well.
    """
    state = {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        drawn = seeded_values((min(count, period or count),), seed, zlib.crc32(name.encode()))
        unit = torch.from_numpy(np.resize(drawn.numpy(), tuple(shape)))
        if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
            state[name] = 1 + 0.5 * unit
        elif len(shape) == 1:
            state[name] = 0.25 * unit
        elif "pos_embed" in name or "token" in name:
            state[name] = unit
        else:  # A variance of about gain² / fan-in, as a power of two.
            fan_in = int(np.prod(shape[1:]))
            state[name] = gain * unit * 2.0 ** round(np.log2(1.7 / fan_in**0.5))
    return state


def shapes_of(module):
    return {name: value.shape for name, value in module.state_dict().items()}


def to_hugging_face(state):
    """Meta's names → those of Hugging Face's Dinov2Model, query, key and value apart."""
    outside = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    renamed = {}
    for name, tensor in state.items():
        if name in outside:
            renamed[outside[name]] = tensor.clone()
            continue
        _, index, rest = name.split(".", 2)
        layer = f"encoder.layer.{index}"
        kind = rest.rpartition(".")[2]
        if rest.startswith("attn.qkv"):
            width = len(tensor) // 3
            for i, part in enumerate(("query", "key", "value")):
                rows = tensor[i * width : (i + 1) * width].clone()
                renamed[f"{layer}.attention.attention.{part}.{kind}"] = rows
        elif rest.startswith("attn.proj"):
            renamed[f"{layer}.attention.output.dense.{kind}"] = tensor.clone()
        elif rest.startswith("ls"):
            renamed[f"{layer}.layer_scale{rest[2]}.lambda1"] = tensor.clone()
        else:
            renamed[f"{layer}.{rest}"] = tensor.clone()
    return renamed


def tiny_state(seed=0):
    """Of an encoder of size `TINY`."""
    encoder = DINOv2(TINY.depth, TINY.width, TINY.heads)
    return seeded_state(shapes_of(encoder), seed) | {"mask_token": torch.zeros(1, TINY.width)}


def hollow_state(module):
    """Real names and shapes in a file of a few hundred KB: every tensor repeats one number."""
    shapes = shapes_of(module)
    return {name: torch.full((1,), 0.5).expand(shape) for name, shape in shapes.items()}


def write(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == torch.float32
