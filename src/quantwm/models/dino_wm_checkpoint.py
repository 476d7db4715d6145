"""World models that DINO-WM's public code saved: a folder with `hydra.yaml` and `checkpoints/`.

A checkpoint holds whole modules. They are read as data (`safe_pickle`), their tensors are matched
with what `hydra.yaml` describes, and only then read. Optimizers stay in the file.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantwm import storage
from quantwm.errors import CorruptFileError, UsageError
from quantwm.models.checkpoint import bundled_encoder_state, skeleton
from quantwm.models.config import DecoderConfig, DINOWMConfig
from quantwm.models.decoder import reference_state_dict as decoder_state_dict
from quantwm.models.dino_wm import DINOWM
from quantwm.models.hydra_settings import PROPRIO_WEIGHTS, HydraSettings, read_settings
from quantwm.models.saved_tensors import (
    Tensors,
    check_attention,
    predictor_tensors,
    read_tensors,
    tensors_of,
)
from quantwm.models.torch_archive import TorchArchive

logger = logging.getLogger(__name__)

SETTINGS_FILE = "hydra.yaml"
CHECKPOINTS = "checkpoints"
LATEST = "model_latest.pth"

_EMBEDDINGS = {"action_encoder": "action_embed", "proprio_encoder": "proprio_embed"}


@dataclass(frozen=True)
class Checkpoint:
    """A model that the public code saved.

    Attributes:
        world_model: without statistics, which such a folder never holds.
        settings: those of its training run.
        file: that the weights came from.
        epoch: after which it was saved; None if the file does not say.
    """

    world_model: DINOWM
    settings: HydraSettings
    file: Path
    epoch: int | None


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is, or is meant to be, one of DINO-WM's."""
    return (folder / SETTINGS_FILE).is_file() or (folder / CHECKPOINTS).is_dir()


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder that DINO-WM's `train.py` wrote; float32, in evaluation mode.

    Nothing that the files hold is executed. `model_latest.pth` is taken, or else the
    `model_<epoch>.pth` of the highest epoch.

    Raises:
        UsageError: something is missing from the folder, or it holds a model that quantwm has not.
        CorruptFileError: a file is damaged, holds what it may not, or contradicts `hydra.yaml`.
    """
    path = _weights_file(folder)
    settings = read_settings(folder / SETTINGS_FILE)
    with TorchArchive(path) as archive:
        root = archive.root
        if not isinstance(root, dict):
            raise CorruptFileError(f"{path} holds no parts by name: it is no DINO-WM checkpoint")
        wanted = ["predictor", *_EMBEDDINGS, *(["encoder"] if settings.trained_encoder else [])]
        if missing := [name for name in wanted if name not in root]:
            raise CorruptFileError(
                f"{path} lacks {', '.join(missing)} (it holds {_listed(root)}): it is no complete "
                "DINO-WM checkpoint"
            )
        decoder = _decoder(root, settings, path)
        references = _references(root, path, settings, decoder)
        world_model = skeleton(_config(settings, references, decoder, path))
        check_attention(archive, root["predictor"], world_model.config, path, SETTINGS_FILE)
        state = read_tensors(archive, references, world_model, path, SETTINGS_FILE)
    if not settings.trained_encoder:
        state |= {f"encoder.{name}": value for name, value in bundled_encoder_state().items()}
    storage.assign(world_model, state)
    epoch = root.get("epoch")
    return Checkpoint(world_model.eval(), settings, path, epoch if type(epoch) is int else None)


def _weights_file(folder: Path) -> Path:
    saved = folder / CHECKPOINTS
    missing = []
    if not (folder / SETTINGS_FILE).is_file():
        missing.append(SETTINGS_FILE)
    found = {
        int(match[1]): path
        for path in sorted(saved.glob("model_*.pth"))
        if (match := re.fullmatch(r"model_([0-9]{1,9})\.pth", path.name))
    }
    if not found and not (saved / LATEST).is_file():
        missing.append(f"{CHECKPOINTS}/{LATEST}")
    if missing:
        raise UsageError(
            f"{folder} is no complete DINO-WM checkpoint, it lacks {' and '.join(missing)}: copy "
            "the whole output folder of the training run"
        )
    return saved / LATEST if (saved / LATEST).is_file() else found[max(found)]


def _decoder(root: Mapping[Any, Any], settings: HydraSettings, path: Path) -> DecoderConfig | None:
    """That of the file, where it has one that its model's latents fit."""
    config = settings.decoder
    if config is None or "decoder" not in root:
        return None
    if config.kind == "transposed_conv" and settings.tokens > 1:
        # The public code saves such a pair all the same, and fails when it draws a picture.
        logger.warning(
            "%s: its decoder takes one token a frame, its latents have %d; it is left out",
            path,
            settings.tokens,
        )
        return None
    return config


def _references(
    root: Mapping[Any, Any], path: Path, settings: HydraSettings, decoder: DecoderConfig | None
) -> Tensors:
    """Tensors of the file under our model's names."""
    predictor = predictor_tensors(root["predictor"], path)
    found: Tensors = {f"predictor.{name}": reference for name, reference in predictor.items()}
    for part, ours in _EMBEDDINGS.items():
        for name, reference in tensors_of(root[part], part, path).items():
            found[f"{ours}.{name.removeprefix('patch_embed.')}"] = reference
    if decoder is not None:
        tensors = decoder_state_dict(tensors_of(root["decoder"], "decoder", path), decoder)
        found |= {f"decoder.{name}": reference for name, reference in tensors.items()}
    if settings.trained_encoder:
        encoder = tensors_of(root["encoder"], "encoder", path)
        found |= {f"encoder.{k.removeprefix('base_model.')}": v for k, v in encoder.items()}
    return found


def _config(
    settings: HydraSettings, references: Tensors, decoder: DecoderConfig | None, path: Path
) -> DINOWMConfig:
    """Raw widths are in no setting: they follow from the embeddings' weights."""
    layers = {name.split(".")[2] for name in references if name.startswith("predictor.blocks.")}
    if len(layers) != settings.predictor.depth:
        raise CorruptFileError(
            f"{path}: its predictor has {len(layers)} layers, {SETTINGS_FILE} says "
            f"predictor.depth = {settings.predictor.depth}"
        )
    widths = {}
    for name in ("action_embed", "proprio_embed"):
        weight = references.get(f"{name}.weight")
        if weight is None or len(weight.shape) != 3 or not 1 <= weight.shape[1] <= 10_000:
            raise CorruptFileError(f"{path}: its {name.replace('embed', 'encoder')} is no Conv1d")
        widths[name] = weight.shape[1]
    action, remainder = divmod(widths["action_embed"], settings.frameskip)
    if remainder:
        raise CorruptFileError(
            f"{path}: its action encoder takes {widths['action_embed']} values, no multiple of "
            f"{SETTINGS_FILE}'s frameskip {settings.frameskip}"
        )
    return DINOWMConfig(
        task=settings.task,
        action_dim=action,
        proprio_dim=widths["proprio_embed"],
        predictor=settings.predictor,
        image_size=settings.image_size,
        frame_size=settings.frame_size,
        feature=settings.feature,
        num_hist=settings.num_hist,
        concat_dim=settings.concat_dim,
        frameskip=settings.frameskip,
        action_emb_dim=settings.action_emb_dim,
        proprio_emb_dim=settings.proprio_emb_dim,
        num_action_repeat=settings.num_action_repeat,
        num_proprio_repeat=settings.num_proprio_repeat,
        proprio_weight=PROPRIO_WEIGHTS[settings.task],
        decoder=decoder,
    )


def _listed(root: Mapping[Any, Any]) -> str:
    names = [key[:40] for key in root if isinstance(key, str)]
    return ", ".join(names[:10]) or "nothing by name"
