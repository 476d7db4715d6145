"""Loading and saving world models, float or quantized, by name or folder."""

from pathlib import Path
from typing import Any

import torch

from quantwm import storage
from quantwm.compute import resolve_device, resolve_dtype
from quantwm.errors import UsageError, unknown_name
from quantwm.models import checkpoint
from quantwm.models.bundled import bundled_folder, bundled_names
from quantwm.models.dino_wm import DINOWM, DINOWMConfig
from quantwm.quant import artifact
from quantwm.quant.apply import quantization_of


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
) -> DINOWM:
    """A world model in evaluation mode.

    Args:
        source: the name of a bundled model, or a folder that `save` or `quantwm train` wrote.
        device: where to put it; "auto" takes a GPU where there is one.
        dtype: cast to this type. Default: float32, the type to quantize from; `evaluate` casts a
            copy to its own compute type.

    Raises:
        UsageError: neither a bundled model's name nor a model's folder.
        CorruptFileError: a file is damaged.
    """
    folder = _folder_of(source)
    kind = storage.read_metadata(folder).get("format")
    if kind == artifact.FORMAT:
        world_model = _load_quantized(folder)
    else:
        world_model = checkpoint.load_world_model(folder)
    resolved = resolve_device(device)
    world_model = world_model.to(resolved)
    return world_model if dtype is None else world_model.to(resolve_dtype(dtype, resolved))


def save(world_model: DINOWM, folder: str | Path) -> None:
    """Write a world model, float or quantized; `load` gives it back bit for bit.

    Raises:
        UsageError: the folder holds something else than a saved model.
        QuantWMError: it cannot be written.
    """
    if quantization_of(world_model) is None:
        checkpoint.save_world_model(world_model, folder)
    else:
        artifact.save_quantized(world_model, folder)


def _folder_of(source: str | Path) -> Path:
    folder = Path(source)
    if isinstance(source, str) and source in bundled_names():
        return bundled_folder(source)
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or "/" in source:
        raise UsageError(f"there is no folder {source}")
    raise unknown_name("world model", source, bundled_names())


def _load_quantized(folder: Path) -> DINOWM:
    metadata: dict[str, Any] = storage.read_metadata(folder)
    if metadata.get("config") is None:
        raise UsageError(
            f"{folder} holds a quantized model of a class that is not quantwm's; "
            "use quantwm.quant.artifact.load_quantized with a model of that class"
        )
    config = DINOWMConfig.from_dict(metadata["config"])
    return artifact.load_quantized(folder, checkpoint.skeleton(config))
