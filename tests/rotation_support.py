"""What tests of rotation share."""

from dataclasses import dataclass

import torch

from dino_wm_support import observation, relative
from quantwm.quant import QuantPlan

FOLD = 2e-6
"""Relative error of folding float32 weights."""


def plan(layers="w4a4-token", **options):
    layers = {"*": layers} if isinstance(layers, str) else layers
    return QuantPlan(layers, "rotation", options=options)


def actions(batch=2, candidates=3, horizon=5):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, candidates, horizon, 10, generator=generator)


@torch.inference_mode()
def outputs(model, frames=1):
    """Encoder features, predictions of a whole window, and rollouts."""
    latent = model.encode(observation(frames=frames))
    rolled = model.rollout(latent, actions())
    generator = torch.Generator().manual_seed(3)
    c = model.config
    window = torch.randn(2, c.num_hist, c.frame_tokens, c.token_width, generator=generator).to(
        model.dtype
    )
    found = {"features": latent["visual"], "predicted": model.predict(window)}
    return found | {f"rollout {name}": part for name, part in rolled.items()}


def assert_same_outputs(model, other, tolerance=FOLD, frames=1):
    expected, found = outputs(model, frames), outputs(other, frames)
    for name, value in expected.items():
        assert relative(found[name], value) < tolerance, name


@dataclass
class Frames:
    """Calibration data of a tiny DINO-WM."""

    model_hash: str

    def __len__(self):
        return 6

    def encode(self, world_model):
        with torch.no_grad():
            return world_model.encode(observation(seed=5))

    def roll_out(self, world_model, latents):
        with torch.no_grad():
            world_model.rollout(latents, actions())


def inputs_of(model, name):
    """All that a module reads while frames are encoded and rolled out."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    outputs(model)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


@torch.inference_mode()
def rolled(model):
    return model.rollout(model.encode(observation()), actions())
