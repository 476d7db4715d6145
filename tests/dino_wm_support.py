"""A DINO-WM of a few thousand parameters, and its rollout in the literal order."""

import numpy as np
import torch

from quantwm.models.config import DINOWMConfig, EncoderConfig, PredictorConfig
from quantwm.models.dino_wm import DINOWM


def tiny_config(**changes):
    settings = {
        "task": "wall",
        "action_dim": 2,
        "proprio_dim": 2,
        "encoder": EncoderConfig(2, 24, 3, patch_size=14, pretrained_grid=5),
        "predictor": PredictorConfig(2, 2, 8, 32),
        "image_size": 28,
        "num_hist": 2,
        "action_mean": (0.0, 0.1),
        "action_std": (0.5, 0.6),
        "proprio_mean": (32.0, 32.0),
        "proprio_std": (15.0, 15.0),
    }
    settings |= changes
    if settings.get("concat_dim") == 0:
        settings |= {"action_emb_dim": 24, "proprio_emb_dim": 24}
    return DINOWMConfig(**settings)


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = DINOWM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def observation(batch=2, frames=1, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "visual": generator.integers(0, 256, (batch, frames, 224, 224, 3), np.uint8),
        "proprio": generator.uniform(5, 60, (batch, frames, 2)).astype(np.float32),
    }


def literal_predictor(model, window):
    """All frames (rows, T, P, width) at once under an explicit mask, through the model's layers."""
    predictor = model.predictor
    rows, frames, patches, width = window.shape
    x = window.flatten(1, 2) + predictor.pos_embedding[:, : frames * patches]
    frame = torch.arange(frames * patches) // patches
    hidden = frame[:, None] < frame[None, :]
    for block in predictor.blocks:
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).view(rows, frames * patches, 3, attn.heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = attn.q_input(q), attn.k_input(k), attn.v_input(v)
        logits = (q @ k.transpose(-1, -2) * attn.head_dim**-0.5).masked_fill(hidden, -torch.inf)
        mixed = attn.p_input(logits.softmax(-1)) @ v
        x = x + attn.proj(mixed.transpose(1, 2).reshape(rows, frames * patches, -1))
        x = x + block.mlp(block.norm2(x))
    return predictor.norm(x).view(rows, frames, patches, width)


def literal_rollout(model, latent, actions):
    """Every frame of every window computed anew, as DINO-WM's code does; frames (B, N, H + 1)."""
    batch, candidates, horizon, _ = actions.shape
    action = model.embed_actions(actions.flatten(0, 1))
    parts = {name: part.repeat_interleave(candidates, 0) for name, part in latent.items()}
    observed = latent["visual"].shape[1]
    frames = [
        model.tokens(parts["visual"][:, t], parts["proprio"][:, t], action[:, t])
        for t in range(observed)
    ]
    for t in range(observed, horizon + 1):
        window = torch.stack(frames[-model.config.num_hist :], 1)
        newest = literal_predictor(model, window)[:, -1]
        if t < horizon:
            newest = model.replace_action(newest.clone(), action[:, t])
        frames.append(newest)
    stacked = torch.stack(frames, 1)
    return model.split_tokens(stacked.view(batch, candidates, *stacked.shape[1:]))


def relative(actual, expected):
    """Relative L2 distance."""
    return ((actual - expected).norm() / expected.norm()).item()
