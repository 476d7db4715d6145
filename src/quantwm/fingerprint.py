"""What makes two world models the same: a hash of their content."""

import hashlib
import json
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import Tensor

from quantwm.protocols import WorldModel


def model_hash(world_model: WorldModel) -> str:
    """SHA-256 of everything in a world model that planning with it depends on.

    It covers names, types, shapes and bytes of all parameters and persistent buffers, the action
    and objective settings, and the model's `config` and `quantization` records where it has them.
    It does not depend on the device. A model cast to another type is another model: gather
    calibration data with, and name studies after, the model as it was loaded, and cast it for
    computing afterwards.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    settings: dict[str, Any] = {"objective_weights": dict(world_model.objective_weights)}
    if is_dataclass(world_model.action_spec):
        settings["action_spec"] = asdict(world_model.action_spec)
    for name in ("config", "quantization"):
        record = getattr(world_model, name, None)
        if record is not None and hasattr(record, "to_dict"):
            settings[name] = record.to_dict()
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(world_model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
