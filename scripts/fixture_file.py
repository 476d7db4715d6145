"""Arrays in an .npz file that `np.load` reads and that is as small as its compression makes it."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

COMPRESSIONS = (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)


def save_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays by name, each with the compression that makes it smallest; no time is kept."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(values), allow_pickle=False)
            data = buffer.getvalue()
            sizes = {kind: _size(data, kind) for kind in COMPRESSIONS}
            best = min(sizes, key=lambda kind: sizes[kind])
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), data, compress_type=best)


def _size(data: bytes, kind: int) -> int:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        archive.writestr("x", data)
    return buffer.tell()
