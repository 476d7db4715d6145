"""Files that `torch.save` wrote, opened without torch's unpickler and without trusting the zip.

Such a file is a zip of uncompressed entries: `<name>/data.pkl`, and `<name>/data/<key>` for each
tensor storage. Tensors are read when they are asked for, so that what is not needed (a decoder, an
optimizer's state) is never in memory.
"""

import io
import lzma
import struct
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from quantwm.errors import CorruptFileError, QuantWMError
from quantwm.models.safe_pickle import MAX_BYTES, StorageRef, TensorRef, parse

_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
_CHUNK = 4 * 2**20
_MAX_ENTRIES = 50_000
_DAMAGE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
)
"""What Python's zipfile raises at damaged files."""


class TorchArchive:
    """A saved file: `root` is what its pickle holds, `tensor` reads one of its tensors.

    Use it as a context manager.

    Args:
        path: of the file.

    Raises:
        CorruptFileError: it is damaged, not torch's, or holds what it may not; says what.
        QuantWMError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = _BoundedFile(path)
        except OSError as error:
            raise QuantWMError(f"cannot read {path}: {error}") from error
        try:
            self._check_kind()
            self._zip = zipfile.ZipFile(self._file)
            self._entries = self._checked_entries()
            self.root: Any = parse(self._pickle(), self._check_storage, str(path))
        except _DAMAGE as error:
            self._file.close()
            raise self._corrupt(f"is truncated or damaged: {str(error)[:200]}") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def tensor(self, reference: TensorRef) -> Tensor:
        """Read a tensor; contiguous, of its own memory, on the CPU.

        Raises:
            CorruptFileError: its bytes do not match their checksum, or end too early.
        """
        storage = reference.storage
        try:
            content = self._read(f"data/{storage.key}")
        except _DAMAGE as error:
            raise self._corrupt(f"is truncated or damaged: {str(error)[:200]}") from error
        if not content:
            return torch.empty(reference.shape, dtype=storage.dtype)
        flat = torch.frombuffer(content, dtype=storage.dtype)
        view = flat.as_strided(reference.shape, reference.stride, reference.offset)
        return view.clone(memory_format=torch.contiguous_format)

    def _corrupt(self, what: str) -> CorruptFileError:
        return CorruptFileError(f"{self._path} {what}")

    def _check_kind(self) -> None:
        start = self._file.read(len(_LEGACY_MAGIC))
        if start == _LEGACY_MAGIC:
            raise self._corrupt(
                "is of the format that torch wrote before version 1.6, which is not read here; "
                "open it with the code that made it and save it again"
            )
        if not start.startswith(b"PK\x03\x04"):
            raise self._corrupt("is no file of torch.save: it is no zip archive")
        self._file.seek(0)

    def _checked_entries(self) -> dict[str, zipfile.ZipInfo]:
        infos = self._zip.infolist()
        if len(infos) > _MAX_ENTRIES:
            raise self._corrupt(f"holds {len(infos)} entries, a model has no more than a thousand")
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            folder, _, name = info.filename.partition("/")
            odd = {"", ".", ".."} & set(info.filename.split("/")) or "\\" in info.filename
            if odd or not name or ":" in folder:
                raise self._corrupt(f"holds an entry of the name {info.filename[:100]!r}")
            if name in entries:
                raise self._corrupt(f"holds two entries of the name {name[:100]!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise self._corrupt(
                    f"has a compressed entry {name[:100]!r}, torch.save writes none"
                )
            if info.flag_bits & 1:
                raise self._corrupt("is encrypted, torch.save writes no such file")
            entries[name] = info
        size = self._path.stat().st_size
        if sum(info.file_size for info in infos) > size:
            raise self._corrupt(f"has {size} bytes and declares entries of more than that")
        if len({info.filename.partition("/")[0] for info in infos}) > 1:
            raise self._corrupt("holds entries of more than one archive")
        return entries

    def _pickle(self) -> bytes:
        if "constants.pkl" in self._entries or any(n.startswith("code/") for n in self._entries):
            raise self._corrupt("is a TorchScript program, not a file of torch.save")
        if "data.pkl" not in self._entries:
            raise self._corrupt("has no entry data.pkl: it is no file of torch.save")
        if self._entries["data.pkl"].file_size > MAX_BYTES:
            raise self._corrupt(f"has a pickle of more than {MAX_BYTES} bytes")
        if "byteorder" in self._entries and self._read("byteorder") != b"little":
            raise self._corrupt("was written on a big-endian machine, which is not read here")
        return bytes(self._read("data.pkl"))

    def _check_storage(self, storage: StorageRef) -> None:
        info = self._entries.get(f"data/{storage.key}")
        if info is None:
            raise self._corrupt(f"lacks the tensor storage data/{storage.key}")
        if info.file_size != storage.numel * storage.dtype.itemsize:
            raise self._corrupt(
                f"declares {storage.numel} elements of {storage.dtype} in data/{storage.key}, "
                f"which has {info.file_size} bytes"
            )

    def _read(self, name: str) -> bytearray:
        info = self._entries[name]
        content = bytearray(info.file_size)
        view, filled = memoryview(content), 0
        with self._zip.open(info) as entry:
            while filled < len(content):
                piece = entry.read(min(_CHUNK, len(content) - filled))
                if not piece:
                    raise EOFError(f"{name} ends after {filled} of {len(content)} bytes")
                view[filled : filled + len(piece)] = piece
                filled += len(piece)
            if entry.read(1):
                raise EOFError(f"{name} is longer than it says")
        return content


class _BoundedFile(io.FileIO):
    """A file of which no read takes more than a bounded piece, whatever sizes the zip declares."""

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = -1 if size is None else size
        if wanted < 0:
            position = self.tell()
            wanted = self.seek(0, io.SEEK_END) - position
            self.seek(position)
        if wanted > 2 * MAX_BYTES:
            raise zipfile.BadZipFile(f"it asks for {wanted} bytes at once")
        return super().read(max(wanted, 0)) or b""
