"""A world model that is no ViT and a task that is not quantwm's, to go through the whole path."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from quantwm.protocols import ActionSpec, Episodes, LinearGroup
from quantwm.seeds import keyed_generator


class PointWorld(nn.Module):
    """The latent is a linear picture of the position, and an action moves it linearly.

    In float it is exact. The weights differ in size from row to row, so rounding them hurts.
    """

    def __init__(self, width: int = 16, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(width, 2, generator=generator))[0]
        self.action_spec = ActionSpec(2, 2, mean=(0.0, 0.0), std=(0.5, 0.5))
        self.objective_weights = {"": 1.0}
        self.look = nn.Linear(2, width, bias=False)
        self.move = nn.Linear(width + self.action_spec.model_dim, width, bias=False)
        with torch.no_grad():
            self.look.weight.copy_(basis)
            step = torch.cat([basis, basis], dim=1) * 0.5
            self.move.weight.copy_(torch.cat([torch.eye(width), step], dim=1))

    def encode(self, observation):
        proprio = torch.as_tensor(observation["proprio"])
        return self.look(proprio.to(self.look.weight.dtype))

    def rollout(self, latent, actions, *, last_only=False):
        batch, candidates, horizon, _ = actions.shape
        frames = [latent[:, -1:].expand(batch, candidates, -1)]
        for step in range(horizon):
            both = torch.cat([frames[-1], actions[:, :, step].to(frames[-1].dtype)], dim=-1)
            frames.append(self.move(both))
        kept = frames[-1:] if last_only else frames
        return torch.stack(kept, dim=2)

    def quantizable_groups(self):
        return (
            LinearGroup(("look",), None, "look", tokens_per_frame=1),
            LinearGroup(("move",), None, "move", tokens_per_frame=1),
        )


@dataclass
class FieldSimulation:
    task: "Field"
    states: np.ndarray

    def step(self, index, actions):
        visited = self.task.rollout(self.states[index], {}, actions)
        self.states[index] = visited[:, -1]
        return visited


@dataclass(frozen=True)
class Field:
    """An open plane; an action is a displacement."""

    name = "field"
    action_dim = 2
    proprio_dim = 2

    def settings(self):
        return {"name": self.name, "version": 1}

    def episodes(self, seeds):
        drawn = np.stack([keyed_generator(seed, 99).uniform(-4, 4, 4) for seed in seeds])
        layout = {"ground": np.zeros(len(seeds), np.int64)}
        return Episodes(np.asarray(seeds, np.int64), drawn[:, :2], drawn[:, 2:], layout)

    def start(self, episodes):
        return FieldSimulation(self, episodes.start.copy())

    def rollout(self, states, layout, actions):
        return states[:, None] + np.cumsum(actions, axis=1)

    def observe(self, states, layout):
        visual = np.zeros((*states.shape[:2], 8, 8, 3), np.uint8)
        return {"visual": visual, "proprio": self.proprio(states)}

    def proprio(self, states):
        return states.astype(np.float32)

    def distance(self, states, goals):
        return np.linalg.norm(states - goals, axis=-1)

    def success(self, states, goals):
        return self.distance(states, goals) < 0.5
