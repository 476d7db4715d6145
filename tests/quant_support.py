"""A world model small enough to quantize in a test, with a layer of every quantizable kind."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from quantwm.fingerprint import model_hash
from quantwm.protocols import ActionSpec, LinearGroup, WorldModel

PATCHES, WIDTH, HIDDEN = 4, 12, 20


class Block(nn.Module):
    """Two linears behind a LayerNorm, and an attention product with taps."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.q_input, self.p_input = nn.Identity(), nn.Identity()

    def forward(self, x):
        q = self.q_input(x.unsqueeze(1))
        if type(self.p_input) is nn.Identity:
            mixed = nn.functional.scaled_dot_product_attention(q, q, q)
        else:
            mixed = self.p_input((q @ q.transpose(-1, -2) * WIDTH**-0.5).softmax(-1)) @ q
        x = x + mixed.squeeze(1)
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.block = Block()

    def forward(self, images):
        return self.block(self.patch(images).flatten(2).transpose(1, 2))


class TinyWorldModel(nn.Module):
    """Frames of 8 x 8 pixels, 4 tokens a frame, a window of two frames."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = Encoder()
            self.predictor = Block()
            self.action_embed = nn.Linear(2, WIDTH)
        self.register_buffer("gain", torch.tensor(1.5), persistent=False)
        self.action_spec = ActionSpec(dim=2, frameskip=1, mean=(0.0, 0.0), std=(1.0, 1.0))
        self.objective_weights = {"": 1.0}

    def encode(self, observation):
        frames = torch.from_numpy(observation["visual"]).to(self.gain.dtype) / 255
        batch, time = frames.shape[:2]
        tokens = self.encoder(frames.flatten(0, 1).permute(0, 3, 1, 2) * self.gain)
        return tokens.view(batch, time, PATCHES, WIDTH)

    def rollout(self, latent, actions, *, last_only=False):
        batch, candidates, horizon = actions.shape[:3]
        frames = latent[:, None].expand(-1, candidates, -1, -1, -1).flatten(0, 1)
        moves = self.action_embed(actions.to(latent.dtype)).flatten(0, 1)
        for step in range(horizon):
            window = frames[:, -2:] + moves[:, step, None, None]
            tokens = self.predictor(window.flatten(1, 2)).unflatten(1, (-1, PATCHES))
            frames = torch.cat([frames, tokens[:, -1:]], 1)
        frames = frames.unflatten(0, (batch, candidates))
        return frames[:, :, -1:] if last_only else frames

    def quantizable_groups(self):
        groups = [LinearGroup(("encoder.patch",), None, "encoder", "patch_embedding")]
        for part, tokens in (("encoder", None), ("predictor", PATCHES)):
            block = "encoder.block" if part == "encoder" else "predictor"
            for name, producer in (("fc1", f"{block}.norm"), ("fc2", None)):
                layer = f"{block}.{name}"
                groups.append(LinearGroup((layer,), producer, block, "linear", tokens))
            taps = (f"{block}.q_input", f"{block}.p_input")
            groups.append(LinearGroup(taps, None, block, "attention_matmul", tokens))
        return groups


LINEARS = ("encoder.block.fc1", "encoder.block.fc2", "predictor.fc1", "predictor.fc2")
TAPS = ("encoder.block.q_input", "encoder.block.p_input", "predictor.q_input", "predictor.p_input")


def observations(batch=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "visual": rng.integers(0, 256, (batch, 1, 8, 8, 3), dtype=np.uint8),
        "proprio": np.zeros((batch, 1, 2), np.float32),
    }


def actions(batch=3, candidates=2, horizon=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, candidates, horizon, 2, generator=generator)


def run(world_model: WorldModel) -> torch.Tensor:
    """A rollout from encoded observations, in the model's compute type."""
    with torch.no_grad():
        return world_model.rollout(world_model.encode(observations()), actions())


@dataclass
class TinyCalibration:
    """Three frames, and two candidates of each; `seen` keeps what every replay gave."""

    model_hash: str
    seen: list = field(default_factory=list)
    encoded: int = 0

    def __len__(self):
        return 6

    def encode(self, world_model):
        self.encoded += 1
        with torch.no_grad():
            return world_model.encode(observations())

    def roll_out(self, world_model, latents):
        with torch.no_grad():
            self.seen.append(world_model.rollout(latents, actions()))

    @classmethod
    def of(cls, world_model):
        return cls(model_hash(world_model))


def snapshot(world_model):
    """Bytes of every tensor, to show that a model did not change."""
    return {name: tensor.clone() for name, tensor in world_model.state_dict().items()}


def assert_unchanged(world_model, before):
    after = world_model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
