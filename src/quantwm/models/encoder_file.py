"""One file of DINOv2 weights, Meta's or Hugging Face's, as tensors under Meta's names.

Meta's release is a pickle (`dinov2_vits14_pretrain.pth`) that holds the encoder's `state_dict`.
Hugging Face's `Dinov2Model` (`facebook/dinov2-small`) names its tensors differently and keeps
query, key and value apart. Either layout is read from either container, safetensors or pickle.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from quantwm.errors import CorruptFileError, MismatchError, QuantWMError, UsageError
from quantwm.models.config import EncoderConfig
from quantwm.models.dinov2 import DINOv2
from quantwm.storage import differences

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names that weights have in a folder of Hugging Face's, the preferred one first."""
SIZE_NAMES = {
    (384, 12): "dinov2_vits14",
    (768, 12): "dinov2_vitb14",
    (1024, 24): "dinov2_vitl14",
    (1536, 40): "dinov2_vitg14",
}
"""What the released sizes are called, by width and number of blocks."""
_HEAD_DIM = 64
"""Of every released size, so that the width tells the number of heads."""

_HF_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_HF_BLOCK = re.compile(r"^encoder\.layer\.(\d+)\.(.+)\.(weight|bias|lambda1)$")
_HF_IN_BLOCK = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HF_QKV = {
    "attention.attention.query": 0,
    "attention.attention.key": 1,
    "attention.attention.value": 2,
    "attention.q_proj": 0,
    "attention.k_proj": 1,
    "attention.v_proj": 2,
}
"""Their places in `qkv`, under the names of released files and of transformers 5."""


def read_encoder(
    file: str | Path, config: EncoderConfig | None = None, *, whole_size: int | None = None
) -> dict[str, Tensor]:
    """The encoder's tensors: float32, on the CPU, under Meta's names, all finite.

    The mask token, which only pretraining uses, is zero, as in the bundled file; so the same
    weights give the same tensors whatever layout they come in.

    Args:
        file: official file, safetensors file, or a folder that holds `model.safetensors`.
        config: the size that is wanted; None takes the size that the file has.
        whole_size: bytes that the official file has, for the message about a cut-off one.

    Raises:
        UsageError: no such file, or no DINOv2 encoder in it: with registers, with something else
            than tensors (which is never executed), or with other tensors.
        MismatchError: an encoder of another size than `config`.
        CorruptFileError: the file is cut off or damaged.
    """
    path = _file_of(Path(file))
    tensors = to_meta_names(_tensors_of(path, whole_size))
    if "register_tokens" in tensors:
        count = tensors["register_tokens"].shape[1]
        raise UsageError(
            f"{path} holds a DINOv2 with {count} register tokens (its released names end in _reg), "
            "which is another encoder with other position arithmetic; DINO-WM uses the one "
            "without: take dinov2_vits14_pretrain.pth or facebook/dinov2-small"
        )
    found = _size_in(path, tensors)
    if config is not None and found != (config.width, config.depth):
        raise MismatchError(
            f"{path} holds {_size_name(*found)}, but {_size_name(config.width, config.depth)} is "
            "wanted: give that size's file, or ask for the size that the file has"
        )
    tensors["mask_token"] = torch.zeros(1, found[0])
    _check_complete(path, tensors, config or _config_of_size(path, *found))
    state = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise CorruptFileError(f"{path} holds NaN or infinite values in {broken[0]}: it is damaged")
    return state


def config_of(state: Mapping[str, Tensor]) -> EncoderConfig:
    """The size of an encoder that `read_encoder` gave."""
    width = state["cls_token"].shape[-1]
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    patch = state["patch_embed.proj.weight"].shape[-1]
    return EncoderConfig(_depth_of(state), width, width // _HEAD_DIM, patch, grid)


def to_meta_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's `Dinov2Model` under Meta's names; tensors under other names stay.

    Args:
        tensors: by name; `query`, `key` and `value` of a layer are stacked to one `qkv`, in that
            order along the rows.
    """
    named: dict[str, Tensor] = {}
    stacked: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _HF_BLOCK.match(name)
        part = match[2] if match else ""
        if match and part in _HF_QKV:
            stacked.setdefault(f"blocks.{match[1]}.attn.qkv.{match[3]}", {})[_HF_QKV[part]] = tensor
        elif match and part in _HF_IN_BLOCK:
            parameter = "gamma" if match[3] == "lambda1" else match[3]
            named[f"blocks.{match[1]}.{_HF_IN_BLOCK[part]}.{parameter}"] = tensor
        else:
            named[_HF_OUTSIDE.get(name, name)] = tensor
    for name, parts in stacked.items():
        if len(parts) == 3:
            named[name] = torch.cat([parts[place] for place in range(3)])
    return named


def _file_of(path: Path) -> Path:
    if path.is_dir():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                return path / name
        raise UsageError(f"the folder {path} holds no {' or '.join(FOLDER_FILES)}")
    if not path.is_file():
        raise UsageError(f"there is no encoder file {path}")
    return path


def _tensors_of(path: Path, whole_size: int | None) -> dict[str, Tensor]:
    """Every tensor of a file, recognised by its first bytes rather than by its name."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise QuantWMError(f"cannot read {path}: {error.strerror or error}") from error
    size = path.stat().st_size
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _from_safetensors(path, start, size)
    if start[:1] in (b"P", b"\x80"):
        return _from_pickle(path, start, size, whole_size)
    what = "is empty" if size == 0 else f"begins with {start!r}"
    raise CorruptFileError(
        f"{path} ({size} bytes) {what}: neither safetensors nor a PyTorch file. A download that "
        "failed can leave a web page or a Git LFS pointer under that name; fetch it again"
    )


def _from_safetensors(path: Path, start: bytes, size: int) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        whole = _safetensors_size(path, start)
        if whole is not None and whole != size:
            raise CorruptFileError(
                f"{path} has {size} bytes, but its header tells of {whole}: the download or copy "
                "stopped early; fetch it again"
            ) from error
        raise CorruptFileError(
            f"{path} ({size} bytes) is no readable safetensors file ({error}); fetch it again"
        ) from error


def _safetensors_size(path: Path, start: bytes) -> int | None:
    """Bytes that a safetensors file should have, as far as what is there of it tells."""
    if len(start) < 8:
        return None
    header_size = int.from_bytes(start[:8], "little")
    if header_size > 100_000_000:
        return None
    with path.open("rb") as file:
        file.seek(8)
        header = file.read(header_size)
    ends = [int(end) for end in re.findall(rb'"data_offsets":\[\d+,(\d+)\]', header)]
    return 8 + header_size + max(ends, default=0)


def _from_pickle(path: Path, start: bytes, size: int, whole_size: int | None) -> dict[str, Tensor]:
    expected = "" if whole_size in (None, size) else f" of the official file's {whole_size}"
    if start[:1] == b"P":
        _check_archive(path, size, expected)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only" not in str(error):
            raise _cut_off(path, size, expected, error) from error
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        thing = f", such as {named[1]}" if named else ""
        raise UsageError(
            f"{path} holds more than tensors{thing}. It was not executed, and is not used: take "
            "the official file, or one that holds a plain state_dict"
        ) from None
    except Exception as error:  # PyTorch raises whatever its reader meets in damaged bytes
        raise _cut_off(path, size, expected, error) from error
    return _only_tensors(path, content)


def _check_archive(path: Path, size: int, expected: str) -> None:
    """PyTorch's reader skips the checksums that its own files carry."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise _cut_off(path, size, expected, error) from error
    if bad is not None:
        raise CorruptFileError(
            f"{path} ({size} bytes{expected}): its part {bad} does not match its checksum, the "
            "file was altered or damaged; fetch it again"
        )


def _cut_off(path: Path, size: int, expected: str, error: Exception) -> CorruptFileError:
    reason = str(error).partition("\n")[0][:200] or type(error).__name__
    return CorruptFileError(
        f"{path} has {size} bytes{expected} and cannot be read ({reason}): the download or copy "
        "stopped early, or the file is damaged; fetch it again"
    )


def _only_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a state_dict")
    others = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if others:
        raise UsageError(
            f"{path} is no plain state_dict: {', '.join(others[:3])} hold no tensors. Files of "
            "DINOv2's training and DINO-WM's checkpoints nest theirs; take the official file"
        )
    return {str(name): tensor for name, tensor in content.items()}


def _size_in(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Width and number of blocks."""
    depth = _depth_of(tensors)
    if "cls_token" not in tensors or not depth:
        listed = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise UsageError(
            f"{path} holds no DINOv2 encoder, neither in Meta's layout nor in Hugging Face's: "
            f"{len(tensors)} tensors ({listed}, ...)"
        )
    return tensors["cls_token"].shape[-1], depth


def _depth_of(tensors: Mapping[str, Tensor]) -> int:
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    blocks |= {match[1] for name in tensors if (match := _HF_BLOCK.match(name))}
    return len(blocks)


def _size_name(width: int, depth: int) -> str:
    name = SIZE_NAMES.get((width, depth), "a DINOv2")
    return f"{name} (width {width}, {depth} blocks)"


def _config_of_size(path: Path, width: int, depth: int) -> EncoderConfig:
    if (width, depth) not in SIZE_NAMES:
        raise UsageError(
            f"{path} holds an encoder of width {width} and {depth} blocks, which is no released "
            "DINOv2: its number of heads cannot be told"
        )
    return EncoderConfig(depth, width, width // _HEAD_DIM)


def _check_complete(path: Path, tensors: Mapping[str, Tensor], config: EncoderConfig) -> None:
    """Every name and shape that the encoder has, and no other."""
    with torch.device("meta"):
        own = DINOv2(
            config.depth,
            config.width,
            config.heads,
            patch_size=config.patch_size,
            pretrained_grid=config.pretrained_grid,
        ).state_dict()
    problems = differences(own, tensors)
    if problems:
        listed = "; ".join(problems[:5])
        size = _size_name(config.width, config.depth)
        raise MismatchError(f"{path} does not hold {size} ({len(problems)} differences): {listed}")
