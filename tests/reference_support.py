"""What goes into recorded models, and what is kept of what comes out.

For the scripts that record the public models and for the tests that compare ours: fixtures hold
outputs, a sample of them where they are large; inputs and weights follow from seeds.
"""

import json

import numpy as np
import torch

from encoder_support import seeded_bytes, seeded_state, seeded_values

TOLERANCE = 1e-5
EPISODES, CANDIDATES, HORIZON = 2, 3, 5
"""Of world models: a model action is five raw actions of width two."""
STATISTICS = {
    "action_mean": (0.01, -0.02),
    "action_std": (0.75, 0.5),
    "proprio_mean": (31.5, 28.25),
    "proprio_std": (14.5, 12.75),
}


def noise_images(*shape):
    """uint8 images in which every pixel differs from its neighbours."""
    return seeded_bytes(shape, 0).view(np.uint8)


def blocky_frames():
    """What checkpoints are shown: one episode of two 224-px frames, constant on 7-px squares."""
    return noise_images(1, 2, 32, 32, 3).repeat(7, axis=2).repeat(7, axis=3)


def drawn_latents(tokens):
    """What decoders are given: two frames of latents of width 384."""
    return 2 * seeded_values((1, 2, tokens, 384), 0)


def world_model_inputs(frames):
    """Proprioception of so many frames, the candidates' normalised actions."""
    return {
        "proprio": 32 + 27 * seeded_values((EPISODES, frames, 2), 1),
        "actions": 2 * seeded_values((EPISODES, CANDIDATES, HORIZON, 10), 2),
    }


def prejepa_inputs():
    """28-px frames, proprioception and the candidates' actions, both normalised."""
    return {
        "frames": noise_images(1, 2, 28, 28, 3),
        "proprio": 2 * seeded_values((1, 2, 4), 1),
        "actions": 2 * seeded_values((1, 2, 4, 10), 2),
    }


def described(**modules):
    """Names and shapes of modules' parameters below the modules' own names, as text."""
    shapes = {
        f"{part}/{name}": list(parameter.shape)
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    return json.dumps(shapes)


def seeded_parts(text):
    """Part → state, for names and shapes as `described` writes them."""
    parts = {}
    for key, value in seeded_state(json.loads(text), gain=2).items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    return parts


def sampled(tokens, every=13):
    """Every thirteenth value of tokens (..., count, width), and the norm of every token.

    13 divides no width that is recorded, so each token gives other channels. Pictures pass as rows.
    """
    return {"values": tokens.flatten(-2)[..., ::every], "norms": tokens.norm(dim=-1)}


def read_arrays(path):
    """A fixture's tensors, and as text its names and shapes of weights."""
    with np.load(path) as stored:
        arrays = dict(stored)
    return {
        key: str(value) if value.dtype.kind == "U" else torch.from_numpy(value)
        for key, value in arrays.items()
    }


def assert_close(ours, theirs, what):
    """Within 1e-5 relative L2, in float32."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    assert ours.dtype == torch.float32
    error = ((ours - theirs).double().norm() / theirs.double().norm()).item()
    assert error <= TOLERANCE, f"{what}: relative L2 {error:.2e}"


def assert_sample_close(ours, arrays, name, every=13):
    """Tokens against what `sampled` kept of the public ones under a name."""
    for kind, kept in sampled(ours, every).items():
        assert_close(kept, arrays[f"{name}/{kind}"], f"{kind} of {name}")
