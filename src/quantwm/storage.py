"""Folders that hold a model: tensors in safetensors, everything else in JSON, both checked."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from quantwm.errors import CorruptFileError, MismatchError, QuantWMError, UsageError

logger = logging.getLogger(__name__)

TENSORS_FILE = "model.safetensors"
METADATA_FILE = "quantwm.json"
_OUR_FILES = {TENSORS_FILE, METADATA_FILE}


def smallest_float(tensor: Tensor) -> Tensor:
    """The tensor in the smallest float type that holds every value exactly.

    float16 where that loses nothing, else bfloat16 where that loses nothing, else the tensor's
    own type; NaN keeps the type, and other than float tensors stay as they are.
    """
    if tensor.dtype not in {torch.float32, torch.float64}:
        return tensor
    for dtype in (torch.float16, torch.bfloat16):
        smaller = tensor.to(dtype)
        if torch.equal(smaller.to(tensor.dtype), tensor):
            return smaller
    return tensor


def shrink(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`smallest_float` of each tensor.

    Returns:
        the tensors, and the original type's name of each one that changed, for `restore`.
    """
    stored = {name: smallest_float(tensor.detach()) for name, tensor in tensors.items()}
    changed = {
        name: str(tensor.dtype).removeprefix("torch.")
        for name, tensor in tensors.items()
        if stored[name].dtype != tensor.dtype
    }
    return stored, changed


def restore(stored: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """Undo `shrink`, bit for bit."""
    return {
        name: tensor.to(getattr(torch, dtypes[name])) if name in dtypes else tensor
        for name, tensor in stored.items()
    }


class Shaped(Protocol):
    """A tensor, or what stands for one that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        ...


def differences(
    own: Mapping[str, Shaped],
    tensors: Mapping[str, Shaped],
    wording: str = "shape {}, the model has {}",
) -> list[str]:
    """Names and shapes in which tensors differ from a model's own, a line each.

    Args:
        wording: of a shape that differs, and the model's own.
    """
    problems = [f"missing: {name}" for name in own if name not in tensors]
    problems += [f"unexpected: {name[:100]}" for name in tensors if name not in own]
    return problems + [
        f"{name}: {wording.format(tuple(tensors[name].shape), tuple(value.shape))}"
        for name, value in own.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(value.shape)
    ]


def listed(problems: Sequence[str]) -> str:
    """The first twenty, a line each."""
    return "\n".join(f"  - {problem}" for problem in problems[:20])


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of a module's parameters and persistent buffers.

    They keep their own type and go to the device of the tensor they replace; nothing is written
    into the old tensors.

    Raises:
        MismatchError: names or shapes differ from the module's; the message lists them.
    """
    own = module.state_dict()
    problems = differences(own, tensors)
    if problems:
        raise MismatchError(
            f"the stored tensors do not belong to this model ({len(problems)} differences):\n"
            f"{listed(problems)}"
        )
    moved = {
        name: tensors[name] if value.is_meta else tensors[name].to(value.device)
        for name, value in own.items()
    }
    module.load_state_dict(moved, strict=True, assign=True)


def stored_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors as they are stored, without the file's header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_folder(
    folder: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a model folder so that it is complete or not there at all.

    Args:
        folder: to make; a model folder in its place is replaced, any other content is refused.
        tensors: stored as they are; two names of one tensor are stored twice.
        metadata: JSON values; "format" and "format_version" say what the folder holds.

    Raises:
        UsageError: `folder` is a file, or holds files that are not a saved model's.
        QuantWMError: it cannot be written (full disk, no permission).
    """
    target = Path(folder).absolute()
    check_replaceable(target)
    content = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    payload = safetensors.torch.save(content)
    document = {**metadata, "sha256": hashlib.sha256(payload).hexdigest()}
    document["metadata_sha256"] = _metadata_checksum(document)
    text = json.dumps(document, indent=1)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            temporary.chmod(0o755)
            _write_synced(temporary / TENSORS_FILE, payload)
            _write_synced(temporary / METADATA_FILE, text.encode())
            _move_into_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise QuantWMError(f"cannot write {target}: {error}") from error
    logger.info("wrote %s (%d bytes of tensors)", target, stored_size(content))


def read_folder(
    folder: str | Path, format_name: str, version: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata that `write_folder` wrote.

    Args:
        folder: to read.
        format_name, version: what the metadata must say.

    Raises:
        UsageError: no saved model there, or one of another format or version.
        CorruptFileError: a file is missing, truncated or altered.
    """
    metadata = read_metadata(folder)
    found = (metadata.get("format"), metadata.get("format_version"))
    if found != (format_name, version):
        raise UsageError(
            f"{folder} holds format {found[0]!r} version {found[1]!r}; "
            f"expected {format_name!r} version {version}"
        )
    path = Path(folder) / TENSORS_FILE
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        raise CorruptFileError(f"{path} is missing: copy the whole folder again") from None
    except OSError as error:
        raise QuantWMError(f"cannot read {path}: {error}") from error
    if hashlib.sha256(payload).hexdigest() != metadata.get("sha256"):
        raise CorruptFileError(
            f"{path} ({len(payload)} bytes) does not match its checksum: it is truncated or "
            "altered; copy or make it again"
        )
    try:
        return safetensors.torch.load(payload), metadata
    except SafetensorError as error:
        raise CorruptFileError(f"{path} is no safetensors file: {error}") from error


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """The metadata of a model folder, checked against its own checksum.

    Raises:
        UsageError: no saved model there.
        CorruptFileError: the file is truncated or altered.
    """
    path = Path(folder) / METADATA_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{folder} holds no {METADATA_FILE}: it is no saved model") from None
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is no text: {error}") from error
    except OSError as error:
        raise QuantWMError(f"cannot read {path}: {error}") from error
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise CorruptFileError(f"{path} is truncated or no JSON: {error}") from error
    if not isinstance(document, dict) or document.get("metadata_sha256") != _metadata_checksum(
        document
    ):
        raise CorruptFileError(f"{path} does not match its own checksum: it was altered")
    return document


def _metadata_checksum(document: Mapping[str, Any]) -> str:
    covered = {key: value for key, value in document.items() if key != "metadata_sha256"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def check_replaceable(target: Path) -> None:
    """Refuse a folder that `write_folder` would not write to.

    Raises:
        UsageError: it is a file, or holds files that are not a saved model's.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file; a model is saved as a folder: name another")
    foreign = sorted({entry.name for entry in target.iterdir()} - _OUR_FILES)
    if foreign:
        raise UsageError(
            f"{target} holds files that are no saved model's ({', '.join(foreign[:3])}): "
            "name an empty or new folder"
        )


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename a finished folder; the one it replaces leaves only after that is possible."""
    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f"{temporary.name}.old")
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
