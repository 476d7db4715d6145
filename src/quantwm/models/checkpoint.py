"""Float world models on disk.

A folder with `model.safetensors` and `quantwm.json`, see `quantwm.storage`. The JSON holds
everything planning needs besides the weights, statistics among it. A model whose encoder is the
bundled DINOv2 names it instead of storing it again.
"""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from quantwm import storage
from quantwm.errors import CorruptFileError, MismatchError, NonFiniteError, UsageError
from quantwm.models.config import DINOWMConfig, EncoderConfig
from quantwm.models.dino_wm import DINOWM

FORMAT = "quantwm-world-model"
FORMAT_VERSION = 1
BUNDLED_FOLDER = Path(__file__).parent / "weights"
BUNDLED_ENCODER = "dinov2_vits14"
ENCODER_SHA256 = "09c7a2bf0ed6aa77b72a84e50832a1542bb97ff82409142d9bfa3b2e9cfdddaf"


@functools.cache
def _bundled_encoder() -> dict[str, Tensor]:
    path = BUNDLED_FOLDER / f"{BUNDLED_ENCODER}.safetensors"
    if not path.is_file():
        raise CorruptFileError(f"the package's encoder weights {path} are missing; reinstall it")
    payload = path.read_bytes()
    if hashlib.sha256(payload).hexdigest() != ENCODER_SHA256:
        raise CorruptFileError(
            f"the package's encoder weights {path} ({len(payload)} bytes) do not match their "
            "checksum: the file is cut off or altered; reinstall the package"
        )
    return safetensors.torch.load(payload)


def bundled_encoder_state() -> dict[str, Tensor]:
    """The bundled DINOv2 ViT-S/14, float32, under the names of Meta's release.

    Raises:
        CorruptFileError: the file in the package is missing or damaged.
    """
    return {name: tensor.float() for name, tensor in _bundled_encoder().items()}


def new_world_model(config: DINOWMConfig, encoder: Mapping[str, Tensor] | None = None) -> DINOWM:
    """An untrained model around a pretrained encoder.

    Args:
        config: `config.encoder` is the encoder's size.
        encoder: its weights, see `quantwm.models.encoder_weights`; None takes the bundled ones.

    Raises:
        UsageError: no weights are given and the size is not that of the bundled ones.
        MismatchError: the weights given are of another size.
    """
    if encoder is None and config.encoder != EncoderConfig():
        raise UsageError(
            f"the bundled encoder is DINOv2 ViT-S/14, not {config.encoder}: give the weights, "
            "new_world_model(config, find_encoder('dinov2_vitb14'))"
        )
    world_model = DINOWM(config)
    try:
        world_model.encoder.load_state_dict(bundled_encoder_state() if encoder is None else encoder)
    except RuntimeError as error:
        raise MismatchError(
            f"the encoder's weights do not fit the configuration's {config.encoder}: {error}"
        ) from error
    return world_model.eval()


def skeleton(config: DINOWMConfig) -> DINOWM:
    """A model without weights, for tensors to be put in: no memory, no random numbers."""
    with torch.device("meta"):
        return DINOWM(config).eval()


def save_world_model(world_model: DINOWM, folder: str | Path, *, half: bool = False) -> None:
    """Write a float model; an interruption leaves nothing half-written.

    Args:
        folder: to make, or a saved model's to replace.
        half: round everything but the encoder to float16 first.

    Raises:
        UsageError: the folder holds something else.
        NonFiniteError: with `half`, a value that float16 does not hold as a finite one.
        QuantWMError: it cannot be written.
    """
    state = dict(world_model.state_dict())
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    bundled = (
        world_model.config.encoder == EncoderConfig()
        and all(tensor.dtype == torch.float32 for tensor in encoder.values())
        and same_tensors(encoder, bundled_encoder_state())
    )
    if half:
        state = {k: v if k.startswith("encoder.") else _rounded(k, v) for k, v in state.items()}
    if bundled:
        state = {k: v for k, v in state.items() if not k.startswith("encoder.")}
    tensors, dtypes = storage.shrink(state)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": world_model.config.to_dict(),
        "encoder": BUNDLED_ENCODER if bundled else None,
        "dtypes": dtypes,
    }
    storage.write_folder(folder, tensors, metadata)


def _rounded(name: str, tensor: Tensor) -> Tensor:
    rounded = tensor.half().float()
    if not rounded.isfinite().all():
        raise NonFiniteError(f"{name} holds values that are not finite in float16")
    return rounded


def load_world_model(folder: str | Path) -> DINOWM:
    """Read a folder that `save_world_model` wrote; float32, in evaluation mode.

    Raises:
        UsageError: the folder holds no float world model, or one of another format version.
        CorruptFileError: a file is damaged or does not fit the configuration.
    """
    tensors, metadata = storage.read_folder(folder, FORMAT, FORMAT_VERSION)
    world_model = skeleton(DINOWMConfig.from_dict(metadata["config"]))
    state = storage.restore(tensors, metadata["dtypes"])
    if metadata["encoder"] is not None:
        state |= {f"encoder.{name}": value for name, value in bundled_encoder_state().items()}
    try:
        storage.assign(world_model, state)
    except MismatchError as error:
        raise CorruptFileError(f"{folder} does not fit its own configuration: {error}") from error
    return world_model.eval()


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names and values."""
    return a.keys() == b.keys() and all(torch.equal(a[k].cpu().float(), b[k]) for k in a)
