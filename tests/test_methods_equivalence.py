"""Before any rounding, a transformed model computes what the float model computes."""

import numpy as np
import pytest
import torch

from dino_wm_support import relative
from quantwm.calibration import Calibration
from quantwm.fingerprint import model_hash
from quantwm.methods import transformed
from quantwm.models.checkpoint import new_world_model
from quantwm.models.config import DINOWMConfig, PredictorConfig
from quantwm.quant import QuantPlan

COMPACT = {
    "image_size": 98,
    "num_hist": 1,
    "predictor": PredictorConfig(depth=3, heads=4, head_dim=64, mlp_width=512),
}
POOLED = {**COMPACT, "image_size": 112, "token_pool": 2}
PAPER = {}
EXTRA = {0: {"action_emb_dim": 384, "proprio_emb_dim": 384}, 1: {}}


def model_of(settings, concat_dim):
    """DINOv2 with a random predictor whose norms are no identities."""
    config = DINOWMConfig(
        task="wall",
        action_dim=2,
        proprio_dim=2,
        concat_dim=concat_dim,
        **settings,
        **EXTRA[concat_dim],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        world_model = new_world_model(config)
        for block in world_model.predictor.blocks:
            for norm in (block.norm1, block.norm2):
                torch.nn.init.normal_(norm.weight, 1.0, 0.3)
                torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    return world_model


def calibration_of(world_model, samples=2, horizon=5):
    rng = np.random.default_rng(0)
    width = world_model.action_spec.model_dim
    return Calibration(
        rng.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8),
        rng.standard_normal((1, 2)).astype(np.float32),
        rng.standard_normal((samples, horizon, width)).astype(np.float32),
        np.zeros(samples, np.int64),
        model_hash(world_model),
        {},
    )


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("concat_dim", [0, 1])
@pytest.mark.parametrize("settings", [COMPACT, POOLED, PAPER], ids=["compact", "pooled", "paper"])
def test_transforms_leave_features_predictions_and_rollouts_as_they_are(settings, concat_dim):
    world_model = model_of(settings, concat_dim)
    calibration = calibration_of(world_model)
    actions = torch.from_numpy(calibration.actions)[None]
    images = {
        "visual": calibration.visual[:, None],
        "proprio": calibration.proprio[:, None],
    }
    latent = world_model.encode(images)
    tokens = world_model.tokens(
        latent["visual"][:, 0],
        latent["proprio"][:, 0],
        torch.randn(1, world_model.config.action_emb_dim),
    )
    predicted, frames = world_model.predictor(tokens), world_model.rollout(latent, actions)
    for method in ("rotation", "smoothquant", "awq", "rotation+smoothquant"):
        twin = transformed(world_model, QuantPlan({"*": "w4a8"}, method), calibration)
        assert relative(twin.encode(images)["visual"], latent["visual"]) < 1e-4
        assert relative(twin.predictor(tokens), predicted) < 1e-4
        for name, part in twin.rollout(latent, actions).items():
            assert relative(part, frames[name]) < 1e-4
        before = world_model.encoder.blocks[3].mlp.fc1.weight
        assert relative(twin.encoder.blocks[3].mlp.fc1.weight, before) > 1e-3, method
