"""Models and calibration data that are small enough to learn blocks of in a test."""

import numpy as np
import torch

from dino_wm_support import tiny_model
from quantwm.fingerprint import model_hash


def small_model(seed=0, **changes):
    """A DINO-WM of one patch row, with channels that stand out after every normalisation."""
    model = tiny_model(seed, **changes)
    with torch.no_grad():
        for blocks in (model.encoder.blocks, model.predictor.blocks):
            for number, block in enumerate(blocks):
                for norm in (block.norm1, block.norm2):
                    norm.weight += 1
                    norm.weight[2 + number] *= 12
                    norm.bias[5] += 6
    return model


def small_observation(episodes, frames=1, seed=0):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (episodes, frames, 4, 4, 3), np.uint8)
    return {
        "visual": coarse.repeat(7, 2).repeat(7, 3),
        "proprio": generator.uniform(5, 60, (episodes, frames, 2)).astype(np.float32),
    }


class SmallReplayData:
    """Four candidates of five steps from each of a few observations; counts its replays."""

    def __init__(self, model, episodes=10, frames=1, observation=None, width=None):
        self.model_hash = model_hash(model)
        self.observation = observation or small_observation(episodes, frames)
        self.episodes = len(self.observation["visual"])
        generator = torch.Generator().manual_seed(1)
        width = model.action_spec.model_dim if width is None else width
        self.actions = torch.randn(self.episodes, 4, 5, width, generator=generator)
        self.encoded = self.rolled_out = 0

    def __len__(self):
        return self.episodes * 4

    @torch.no_grad()
    def encode(self, model):
        self.encoded += 1
        return model.encode(self.observation)

    @torch.no_grad()
    def roll_out(self, model, latents):
        self.rolled_out += 1
        model.rollout(latents, self.actions, last_only=True)
