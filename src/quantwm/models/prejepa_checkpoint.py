"""DINO-WM models that stable-worldmodel saved (`PreJEPA`): a folder with `config.json` and a `.pt`.

The file is one state dict, encoder included, and is read as data (`safe_pickle`). Next to DINO-WM's
own code, pictures are normalised as in ImageNet, and the encoder is Hugging Face's, which scales
its position embedding to the image's grid without Meta's offset. Neither the task nor the frameskip
is stored: the task has to be named, and its action's width tells the frameskip.

Source: github.com/galilai-group/stable-worldmodel, `stable_worldmodel/wm/prejepa`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from typing import Any

from torch import Tensor

from quantwm import storage
from quantwm.errors import CorruptFileError, MismatchError, QuantWMError, UsageError
from quantwm.models.checkpoint import skeleton
from quantwm.models.config import DINOWMConfig, EncoderConfig, PredictorConfig
from quantwm.models.dino_wm import DINOWM
from quantwm.models.encoder_file import to_meta_names
from quantwm.models.hydra_settings import PROPRIO_WEIGHTS
from quantwm.models.saved_tensors import (
    SETTINGS_MAKE,
    Tensors,
    check_attention,
    predictor_tensors,
    read_tensors,
    tensors_of,
)
from quantwm.models.torch_archive import TorchArchive

SETTINGS_FILE = "config.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_MAX_BYTES = 256 * 1024
_MAX_COUNT = 10_000
_CLASSES = {
    "": "stable_worldmodel.wm.PreJEPA",
    "encoder": "stable_worldmodel.wm.prejepa.module.create_backbone",
    "predictor": "stable_worldmodel.wm.prejepa.module.CausalPredictor",
}
_EMBEDDER = "stable_worldmodel.wm.prejepa.module.Embedder"
_ENCODERS = {
    "dinov2_small": EncoderConfig(),
    "dinov2_base": EncoderConfig(12, 768, 12),
}
_EMBEDDINGS = ("proprio", "action")
"""In the order in which they follow a patch's features in a token."""
_PARTS = {"backbone": "encoder", "predictor": "predictor"} | {
    f"extra_encoders.{name}.patch_embed": f"{name}_embed" for name in _EMBEDDINGS
}


@dataclass(frozen=True)
class _Settings:
    """What `config.json` says of the model."""

    encoder: EncoderConfig
    predictor: PredictorConfig
    patches: int
    num_hist: int
    proprio_dim: int
    model_action_dim: int
    proprio_emb_dim: int
    action_emb_dim: int


def is_prejepa(folder: Path) -> bool:
    """Whether a folder is one of stable-worldmodel's DINO-WM models."""
    path = folder / SETTINGS_FILE
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return False
    return _CLASSES[""].rpartition(".")[2].encode() in path.read_bytes()


def read_prejepa(folder: Path, task: str, action_dim: int, proprio_dim: int) -> DINOWM:
    """The model of a folder: float32, in evaluation mode, without statistics.

    `weights.pt` is taken, or else the `weights_epoch_<n>.pt` of the highest epoch. Nothing that the
    files hold is executed.

    Args:
        task: that the model was trained in.
        action_dim, proprio_dim: the task's raw widths.

    Raises:
        UsageError: there are no weights, or it is a model that quantwm has not.
        MismatchError: its widths are not the task's.
        CorruptFileError: a file is damaged, holds what it may not, or contradicts `config.json`.
    """
    settings = _Reader(folder / SETTINGS_FILE).settings()
    config = _config(settings, folder, task, action_dim, proprio_dim)
    path = _weights_file(folder)
    world_model = skeleton(config)
    with TorchArchive(path) as archive:
        parts = _split(tensors_of(archive.root, "state dict", path), path)
        predictor = {k.removeprefix("predictor."): v for k, v in parts["predictor"].items()}
        check_attention(archive, predictor, config, path, SETTINGS_FILE)
        references: Tensors = {
            f"predictor.{name}": tensor
            for name, tensor in predictor_tensors(predictor, path).items()
        }
        for name in _EMBEDDINGS:
            references |= parts[f"{name}_embed"]
        state = read_tensors(archive, references, world_model, path, SETTINGS_FILE)
        state |= _encoder(archive, parts["encoder"], world_model, path)
    storage.assign(world_model, state)
    return world_model.eval()


def _split(tensors: Tensors, path: Path) -> dict[str, Tensors]:
    """The file's tensors by our part, names after ours; a decoder is left out."""
    parts: dict[str, Tensors] = {ours: {} for ours in _PARTS.values()}
    unknown = []
    for name, reference in tensors.items():
        for theirs, ours in _PARTS.items():
            if name.startswith(f"{theirs}."):
                parts[ours][f"{ours}.{name.removeprefix(f'{theirs}.')}"] = reference
                break
        else:
            if not name.startswith("decoder."):
                unknown.append(name[:100])
    missing = [ours for ours, found in parts.items() if not found]
    if missing or unknown:
        raise CorruptFileError(
            f"{path} is no PreJEPA model's state dict: nothing of {', '.join(missing) or 'none'} "
            f"is there; unknown: {', '.join(unknown[:5]) or 'none'}"
        )
    return parts


def _encoder(
    archive: TorchArchive, references: Tensors, world_model: DINOWM, path: Path
) -> dict[str, Tensor]:
    """Hugging Face's tensors under Meta's names; none is read that is larger than ours."""
    expected = {
        name.removeprefix("encoder."): value
        for name, value in world_model.state_dict().items()
        if name.startswith("encoder.")
    }
    most = max(value.numel() for value in expected.values())
    if len(references) > 4 * len(expected) or any(
        prod(reference.shape) > most for reference in references.values()
    ):
        raise CorruptFileError(f"{path}: its backbone is larger than {SETTINGS_FILE}'s encoder")
    stored = {
        name.removeprefix("encoder."): archive.tensor(reference).float()
        for name, reference in references.items()
    }
    named = to_meta_names(stored)
    problems = storage.differences(expected, named, SETTINGS_MAKE)
    problems += [f"{name}: NaN or infinite" for name, v in named.items() if not v.isfinite().all()]
    if problems:
        raise CorruptFileError(
            f"{path}: its backbone is not {SETTINGS_FILE}'s encoder:\n{storage.listed(problems)}"
        )
    return {f"encoder.{name}": value for name, value in named.items()}


def _config(
    settings: _Settings, folder: Path, task: str, action_dim: int, proprio_dim: int
) -> DINOWMConfig:
    frameskip, remainder = divmod(settings.model_action_dim, action_dim)
    if remainder or settings.proprio_dim != proprio_dim:
        raise MismatchError(
            f"{folder} takes actions of {settings.model_action_dim} values and proprioception of "
            f"{settings.proprio_dim}; {task} has actions of {action_dim} (times the frameskip) and "
            f"proprioception of {proprio_dim}"
        )
    return DINOWMConfig(
        task=task,
        action_dim=action_dim,
        proprio_dim=proprio_dim,
        encoder=settings.encoder,
        predictor=settings.predictor,
        image_size=isqrt(settings.patches) * settings.encoder.patch_size,
        pixel_mean=IMAGENET_MEAN,
        pixel_std=IMAGENET_STD,
        position_offset=0.0,
        num_hist=settings.num_hist,
        frameskip=frameskip,
        action_emb_dim=settings.action_emb_dim,
        proprio_emb_dim=settings.proprio_emb_dim,
        proprio_weight=PROPRIO_WEIGHTS.get(task, 1.0),
    )


def _weights_file(folder: Path) -> Path:
    if (folder / "weights.pt").is_file():
        return folder / "weights.pt"
    found = {
        int(match[1]): path
        for path in folder.glob("*.pt")
        if (match := re.fullmatch(r"weights_epoch_([0-9]{1,9})\.pt", path.name))
    }
    if found:
        return found[max(found)]
    raise UsageError(f"{folder} has a PreJEPA's {SETTINGS_FILE}, but no weights.pt beside it")


class _Reader:
    """Looks settings up and collects what is wrong with them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_BYTES + 1)
            self._values = json.loads(text) if len(text) <= _MAX_BYTES else None
        except OSError as error:
            raise QuantWMError(f"cannot read {path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{path} is no JSON: {str(error)[:200]}") from error
        if not isinstance(self._values, dict):
            raise CorruptFileError(f"{path} holds no settings by name")
        self._problems: list[str] = []

    def settings(self) -> _Settings:
        for group, expected in _CLASSES.items():
            self._check(f"{group}._target_".lstrip("."), expected)
        encoder, width = self._encoder(), self._count("predictor.dim")
        embeddings = self._embeddings()
        patches = self._count("predictor.num_patches")
        if isqrt(patches) ** 2 != patches:
            self._problems.append(f"predictor.num_patches {patches} is no square")
        num_hist = self._count("history_size")
        if self._count("predictor.num_frames") != num_hist:
            self._problems.append(f"predictor.num_frames contradicts history_size {num_hist}")
        if self._count("num_pred", 1) != 1:
            self._problems.append("num_pred must be 1")
        token = encoder.width + sum(emb for _, emb in embeddings.values())
        if width != token:
            self._problems.append(
                f"predictor.dim {width} is not the {token} of encoder and extra_encoders"
            )
        predictor = PredictorConfig(
            depth=self._count("predictor.depth"),
            heads=self._count("predictor.heads"),
            head_dim=self._count("predictor.dim_head", 64),
            mlp_width=self._count("predictor.mlp_dim"),
        )
        if self._problems:
            listed = "\n".join(f"  - {problem}" for problem in self._problems)
            raise UsageError(f"{self._path} describes no model that quantwm can load:\n{listed}")
        (proprio, proprio_emb), (action, action_emb) = (embeddings[n] for n in _EMBEDDINGS)
        return _Settings(
            encoder, predictor, patches, num_hist, proprio, action, proprio_emb, action_emb
        )

    def _encoder(self) -> EncoderConfig:
        name = self._get("encoder.name")
        short = name.removeprefix("facebook/").replace("-", "_") if isinstance(name, str) else ""
        if short not in _ENCODERS:
            self._problems.append(
                f"the encoder is {str(name)[:80]!r}; quantwm has {', '.join(_ENCODERS)}"
            )
        return _ENCODERS.get(short, EncoderConfig())

    def _embeddings(self) -> dict[str, tuple[int, int]]:
        """Input and embedding widths by name."""
        modules = self._get("extra_encoders.modules")
        names = tuple(modules) if isinstance(modules, Mapping) else ()
        if names != _EMBEDDINGS:
            self._problems.append(
                f"extra_encoders are {', '.join(map(str, names))[:80] or 'none'}; DINO-WM has "
                f"{' and '.join(_EMBEDDINGS)}, in this order"
            )
        found = {}
        for name in _EMBEDDINGS:
            group = f"extra_encoders.modules.{name}"
            if name in names:
                self._check(f"{group}._target_", _EMBEDDER)
                if self._count(f"{group}.tubelet_size", 1) != 1:
                    self._problems.append(f"{group}.tubelet_size must be 1")
            found[name] = (self._count(f"{group}.in_chans"), self._count(f"{group}.emb_dim"))
        return found

    def _check(self, name: str, expected: str) -> None:
        found = self._get(name)
        if found != expected:
            self._problems.append(f"{name} is {str(found)[:80]!r}; quantwm has {expected}")

    def _count(self, name: str, default: int | None = None) -> int:
        value = self._get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= _MAX_COUNT:
            shown = str(value)[:80] if isinstance(value, str | float | bool) else "what it is"
            self._problems.append(
                f"{name} must be a whole number of 1 to {_MAX_COUNT}, not {shown}"
                if value is not None
                else f"{name} is missing"
            )
            return 1
        return value

    def _get(self, name: str) -> Any:
        value: Any = self._values
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                return None
            value = value[key]
        return value
