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

import torch
from torch import Tensor

from quantwm import storage
from quantwm.errors import CorruptFileError, UsageError
from quantwm.models.checkpoint import bundled_encoder_state, skeleton
from quantwm.models.config import DecoderConfig, DINOWMConfig
from quantwm.models.decoder import reference_state_dict as decoder_state_dict
from quantwm.models.dino_wm import DINOWM
from quantwm.models.hydra_settings import PROPRIO_WEIGHTS, HydraSettings, read_settings
from quantwm.models.predictor import reference_state_dict
from quantwm.models.safe_pickle import Inert, TensorRef
from quantwm.models.torch_archive import TorchArchive

logger = logging.getLogger(__name__)

SETTINGS_FILE = "hydra.yaml"
CHECKPOINTS = "checkpoints"
LATEST = "model_latest.pth"

_PARTS = {
    "predictor": "predictor",
    "action_encoder": "action_embed",
    "proprio_encoder": "proprio_embed",
}
_WEIGHTS = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
_MASK = re.compile(r"^(?:transformer\.)?layers\.\d+\.(?:0|attn)\.bias$")
_MAX_MODULES = 10_000

Tensors = dict[str, TensorRef]


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
        wanted = [*_PARTS, *(["encoder"] if settings.trained_encoder else [])]
        if missing := [name for name in wanted if name not in root]:
            raise CorruptFileError(
                f"{path} lacks {', '.join(missing)} (it holds {_listed(root)}): it is no complete "
                "DINO-WM checkpoint"
            )
        decoder = _decoder(root, settings, path)
        references = _references(root, path, settings, decoder)
        world_model = skeleton(_config(settings, references, decoder, path))
        _check_attention(archive, world_model.config, path)
        state = _read(archive, references, world_model, path)
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
    found: Tensors = {}
    for part, ours in _PARTS.items():
        tensors = _tensors(root[part], part, path)
        if part == "predictor":
            tensors = {k: v for k, v in tensors.items() if not _MASK.match(k)}
            try:
                tensors = reference_state_dict(tensors)
            except KeyError as error:
                raise CorruptFileError(f"{path}: {str(error.args[0])[:200]}") from error
        else:
            tensors = {k.removeprefix("patch_embed."): v for k, v in tensors.items()}
        found |= {f"{ours}.{name}": reference for name, reference in tensors.items()}
    if decoder is not None:
        tensors = decoder_state_dict(_tensors(root["decoder"], "decoder", path), decoder)
        found |= {f"decoder.{name}": reference for name, reference in tensors.items()}
    if settings.trained_encoder:
        encoder = _tensors(root["encoder"], "encoder", path)
        found |= {f"encoder.{k.removeprefix('base_model.')}": v for k, v in encoder.items()}
    return found


def _tensors(part: Any, name: str, path: Path) -> Tensors:
    """The state dict of a pickled module, or of a plain state dict."""
    if isinstance(part, dict):
        tensors = {k: v for k, v in part.items() if isinstance(k, str)}
    elif isinstance(part, Inert):
        tensors = {".".join(keys): value for keys, value in _walk(part, name, path)}
    else:
        raise CorruptFileError(f"{path}: its {name} is no module, but a {type(part).__name__}")
    if not tensors or not all(isinstance(value, TensorRef) for value in tensors.values()):
        raise CorruptFileError(f"{path}: its {name} holds no tensors, or not only tensors")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def _walk(part: Inert, name: str, path: Path) -> list[tuple[tuple[str, ...], Any]]:
    """Dotted names and tensors of a module and of all below it, as `state_dict` has them."""
    found: list[tuple[tuple[str, ...], Any]] = []
    open_modules: list[tuple[tuple[str, ...], Any]] = [((), part)]
    seen: set[int] = set()
    while open_modules:
        keys, module = open_modules.pop()
        if module is None:
            continue
        if isinstance(module, Inert) and id(module) in seen and _is_bare(module):
            continue
        if not isinstance(module, Inert) or id(module) in seen or len(seen) > _MAX_MODULES:
            raise CorruptFileError(f"{path}: its {name} is no tree of modules")
        seen.add(id(module))
        hidden = module.state.get("_non_persistent_buffers_set", ())
        if type(hidden) not in {set, tuple}:
            raise CorruptFileError(f"{path}: its {name} has no set of buffers")
        for group in ("_parameters", "_buffers", "_modules"):
            members = module.state.get(group, {})
            if type(members) is not dict or not all(isinstance(key, str) for key in members):
                raise CorruptFileError(f"{path}: its {name} has no {group} by name")
            for key, value in members.items():
                if group == "_modules":
                    open_modules.append(((*keys, key), value))
                elif value is not None and not (group == "_buffers" and key in hidden):
                    found.append(((*keys, key), value))
    return found


def _is_bare(module: Inert) -> bool:
    """Whether it holds nothing, as an activation that stands in several places."""
    return not any(module.state.get(group) for group in ("_parameters", "_buffers", "_modules"))


def _check_attention(archive: TorchArchive, config: DINOWMConfig, path: Path) -> None:
    """What no parameter's shape tells: heads and masks of the attentions are the settings'."""
    part = archive.root["predictor"]
    masks: list[Any] = []
    if isinstance(part, dict):
        masks = [value for key, value in part.items() if isinstance(key, str) and _MASK.match(key)]
    layers = [part] if isinstance(part, Inert) else []
    while layers:
        module = layers.pop()
        layers += [m for m in module.state.get("_modules", {}).values() if isinstance(m, Inert)]
        if "heads" not in module.state:
            continue
        heads = module.state["heads"]
        if heads != config.predictor.heads:
            shown = heads if type(heads) is int and abs(heads) < 10**9 else type(heads).__name__
            raise CorruptFileError(
                f"{path}: its attention has {shown} heads, {SETTINGS_FILE} says "
                f"predictor.heads = {config.predictor.heads}"
            )
        masks.append(module.state.get("bias", module.state.get("_buffers", {}).get("bias")))
    if not all(_is_frame_causal(archive, mask, config) for mask in masks if mask is not None):
        raise CorruptFileError(
            f"{path}: its attention mask is not the one of {config.num_hist} frames of "
            f"{config.frame_tokens} tokens that {SETTINGS_FILE} describes"
        )


def _is_frame_causal(archive: TorchArchive, mask: Any, config: DINOWMConfig) -> bool:
    size = config.num_hist * config.frame_tokens
    if not isinstance(mask, TensorRef) or mask.shape != (1, 1, size, size):
        return False
    frame = torch.arange(size) // config.frame_tokens
    return torch.equal(archive.tensor(mask)[0, 0] != 0, frame[:, None] >= frame[None, :])


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


def _read(
    archive: TorchArchive, references: Tensors, world_model: DINOWM, path: Path
) -> dict[str, Tensor]:
    """The tensors, once their names and shapes are known to be the model's."""
    expected = {name: tuple(value.shape) for name, value in world_model.state_dict().items()}
    if not any(name.startswith("encoder.") for name in references):
        expected = {k: v for k, v in expected.items() if not k.startswith("encoder.")}
    problems = [f"missing: {name}" for name in expected if name not in references]
    problems += [f"unexpected: {name[:100]}" for name in references if name not in expected]
    for name, reference in references.items():
        if reference.shape != expected.get(name, reference.shape):
            problems.append(f"{name}: {reference.shape}, the settings make {expected[name]}")
        if reference.storage.dtype not in _WEIGHTS:
            problems.append(f"{name[:100]}: weights of type {reference.storage.dtype}")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems[:20])
        raise CorruptFileError(
            f"{path} contradicts {SETTINGS_FILE} ({len(problems)} differences):\n{listed}"
        )
    state = {name: archive.tensor(reference).float() for name, reference in references.items()}
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise CorruptFileError(f"{path}: {', '.join(broken[:5])} hold NaN or infinite weights")
    return state


def _listed(root: Mapping[Any, Any]) -> str:
    names = [key[:40] for key in root if isinstance(key, str)]
    return ", ".join(names[:10]) or "nothing by name"
