"""From what a file saved of modules to the tensors of a world model of ours.

Names and shapes are matched before any tensor is read, so that a file decides nothing about what
is built and how much memory it takes.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantwm import storage
from quantwm.errors import CorruptFileError
from quantwm.models.config import DINOWMConfig
from quantwm.models.dino_wm import DINOWM
from quantwm.models.predictor import reference_state_dict
from quantwm.models.safe_pickle import Inert, TensorRef
from quantwm.models.torch_archive import TorchArchive

Tensors = dict[str, TensorRef]
SETTINGS_MAKE = "{}, the settings make {}"
"""How a file's shape contradicts its settings, for `storage.differences`."""

_WEIGHTS = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
_MASK = re.compile(r"^(?:transformer\.)?layers\.\d+\.(?:0|attn)\.bias$")
_MAX_MODULES = 10_000


def tensors_of(part: Any, name: str, path: Path) -> Tensors:
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


def predictor_tensors(part: Any, path: Path) -> Tensors:
    """A predictor's under our names, its masks left out."""
    tensors = {k: v for k, v in tensors_of(part, "predictor", path).items() if not _MASK.match(k)}
    try:
        return reference_state_dict(tensors)
    except KeyError as error:
        raise CorruptFileError(f"{path}: {str(error.args[0])[:200]}") from error


def check_attention(
    archive: TorchArchive, part: Any, config: DINOWMConfig, path: Path, settings: str
) -> None:
    """What no parameter's shape tells: heads and masks of the attentions are the settings'."""
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
                f"{path}: its attention has {shown} heads, {settings} says "
                f"predictor.heads = {config.predictor.heads}"
            )
        masks.append(module.state.get("bias", module.state.get("_buffers", {}).get("bias")))
    if not all(_is_frame_causal(archive, mask, config) for mask in masks if mask is not None):
        raise CorruptFileError(
            f"{path}: its attention mask is not the one of {config.num_hist} frames of "
            f"{config.frame_tokens} tokens that {settings} describes"
        )


def read_tensors(
    archive: TorchArchive, references: Tensors, world_model: DINOWM, path: Path, settings: str
) -> dict[str, Tensor]:
    """The tensors, once their names and shapes are known to be the model's."""
    expected: dict[str, Tensor] = world_model.state_dict()
    if not any(name.startswith("encoder.") for name in references):
        expected = {k: v for k, v in expected.items() if not k.startswith("encoder.")}
    problems = storage.differences(expected, references, SETTINGS_MAKE)
    problems += [
        f"{name[:100]}: weights of type {reference.storage.dtype}"
        for name, reference in references.items()
        if reference.storage.dtype not in _WEIGHTS
    ]
    if problems:
        raise CorruptFileError(
            f"{path} contradicts {settings} ({len(problems)} differences):\n"
            f"{storage.listed(problems)}"
        )
    state = {name: archive.tensor(reference).float() for name, reference in references.items()}
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise CorruptFileError(f"{path}: {', '.join(broken[:5])} hold NaN or infinite weights")
    return state


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


def _is_frame_causal(archive: TorchArchive, mask: Any, config: DINOWMConfig) -> bool:
    size = config.num_hist * config.frame_tokens
    if not isinstance(mask, TensorRef) or mask.shape != (1, 1, size, size):
        return False
    frame = torch.arange(size) // config.frame_tokens
    return torch.equal(archive.tensor(mask)[0, 0] != 0, frame[:, None] >= frame[None, :])
