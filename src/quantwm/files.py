"""Writing files so that an interruption never leaves half of one."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from quantwm.errors import QuantWMError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed onto it when the block ends without an error.

    Raises:
        QuantWMError: the folder cannot be written (read-only, full disk).
    """
    # Unique among the workers of all machines that share the folder.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise QuantWMError(_unwritable(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell a file or folder that cannot be written from other errors.

    Raises:
        QuantWMError: `path` cannot be written (read-only, full disk, a file in a folder's place).
    """
    try:
        yield
    except OSError as error:
        raise QuantWMError(_unwritable(path, error)) from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there yet.

    Raises:
        QuantWMError: it cannot be made, or is a file.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the given order."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def write_new(path: Path, text: str) -> bool:
    """Write a file that must not be there yet, whole or not at all.

    Returns:
        False if another one, perhaps of another machine, was faster; its file is left alone.

    Raises:
        QuantWMError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        # A link appears whole, and only where there was nothing: also on network drives.
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise QuantWMError(_unwritable(path, error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return True


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _unwritable(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return (
        f"cannot write {path}: {reason}; check that the folder is writable and the disk has room, "
        "then run the same command again"
    )
