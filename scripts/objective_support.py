"""What the scripts about the planning objective share: models named by their views, and latents."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantwm.models.checkpoint import new_world_model
from quantwm.models.config import DINOWMConfig
from quantwm.models.dino_wm import DINOWM
from quantwm.protocols import FloatArray, Task

VIEW = "IMAGE_SIZE:TOKEN_POOL"
"""How these scripts name a model around the bundled encoder."""
_TOGETHER = 8


def model_of(view: str, task: Task, **settings: Any) -> DINOWM:
    """A model that sees a task as `view` says; its predictor is untrained."""
    size, _, pool = view.partition(":")
    config = DINOWMConfig(
        task.name,
        task.action_dim,
        task.proprio_dim,
        image_size=int(size),
        token_pool=int(pool or 1),
        **settings,
    )
    return new_world_model(config)


@torch.inference_mode()
def latents(world_model: DINOWM, task: Task, states: FloatArray) -> Tensor:
    """Tokens (B, P, D) of the frames of states (B, S), a few frames at a time."""
    parts = []
    for begin in range(0, len(states), _TOGETHER):
        visual = task.observe(states[begin : begin + _TOGETHER, None], {})["visual"][:, 0]
        parts.append(world_model.encode_images(world_model.preprocess(np.asarray(visual))))
    return torch.cat(parts)
