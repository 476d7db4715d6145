"""Where training starts."""

import numpy as np
import torch
from torch import nn

from quantwm.models.dino_wm import DINOWM
from quantwm.training.batches import Windows
from quantwm.training.loss import embedded_frames


def trainable(world_model: DINOWM) -> dict[str, nn.Parameter]:
    """The parameters that training changes: all but the encoder's and a decoder's."""
    fixed = ("encoder.", "decoder.")
    return {n: p for n, p in world_model.named_parameters() if not n.startswith(fixed)}


@torch.no_grad()
def initialize(world_model: DINOWM, windows: Windows, seed: int, samples: int = 256) -> None:
    """Start as a model that repeats its last frame, so that no step is spent on learning that.

    The final LayerNorm's weight and bias are the least-squares fit from normalised to raw tokens,
    and the residual branches' output projections start at a tenth of their usual size.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainable(world_model).items():
        # Drawn on the CPU, so that a seed means the same weights on every device.
        value = torch.empty(parameter.shape)
        if name.endswith("pos_embedding"):
            parameter.copy_(nn.init.normal_(value, std=0.02, generator=generator))
        elif parameter.ndim >= 2:
            std = parameter[0].numel() ** -0.5
            parameter.copy_(nn.init.trunc_normal_(value, std=std, generator=generator))
            if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                parameter.mul_(0.1)
        elif ".norm" in name or name.endswith("norm.weight"):
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.zero_()
    rows = np.linspace(0, len(windows) - 1, min(samples, len(windows))).astype(np.int64)
    frames, _ = embedded_frames(world_model, windows.batch(rows))
    tokens = frames[:, 0].reshape(-1, frames.shape[-1]).float()
    normalized = nn.functional.layer_norm(tokens, tokens.shape[-1:])
    centred = normalized - normalized.mean(0)
    slope = (centred * tokens).mean(0) / (centred**2).mean(0).clamp_min(1e-6)
    world_model.predictor.norm.weight.copy_(slope)
    world_model.predictor.norm.bias.copy_(tokens.mean(0) - slope * normalized.mean(0))


@torch.no_grad()
def copy_trainable(source: DINOWM, world_model: DINOWM) -> None:
    """Start as another model of the same configuration is."""
    own = trainable(source)
    for name, parameter in trainable(world_model).items():
        parameter.copy_(own[name])
