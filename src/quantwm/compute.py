"""Where and in which type a model computes, and what that says about its numbers."""

import copy
import functools
import json
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from quantwm.errors import UsageError, unknown_name
from quantwm.protocols import WorldModel

NUMERICS_VERSION = 4
"""Raised whenever a change of this package moves the rows of an unchanged configuration."""

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Model = TypeVar("Model", bound=WorldModel)


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Compute with so many CPU threads while the context lasts; None changes nothing.

    One is best for long loops over small tensors: threads that wait for each other after every
    operation cost more than they save, and many times as much beside other work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_device(device: str | torch.device, *, here: bool = True) -> torch.device:
    """ "auto" is a CUDA device where there is one, else the CPU.

    Args:
        device: its name.
        here: this machine must have it; otherwise another one computes.

    Raises:
        UsageError: a device that torch does not know or that is not there.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}: {error}") from error
    if resolved.type not in ("cpu", "cuda"):
        raise UsageError(f"device {str(device)!r}: quantwm computes on cpu and cuda")
    if not here:
        return resolved
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' was asked for, but torch sees no CUDA device")
    count = torch.cuda.device_count() if resolved.type == "cuda" else 1
    if (resolved.index or 0) >= count:
        raise UsageError(f"device {str(device)!r} is not there: this machine has {count}")
    return resolved


def resolve_dtype(
    dtype: str | torch.dtype, device: torch.device, *, here: bool = True
) -> torch.dtype:
    """ "auto" is bfloat16 where the device multiplies it natively, else float32.

    Args:
        dtype: its name.
        device: that computes.
        here: this machine has the device; of another one's GPU, as recent as its kind are
            since 2020, native bfloat16 is supposed.

    Raises:
        UsageError: a type other than float32 and bfloat16.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        supposed = device.type == "cuda" and not here
        return torch.bfloat16 if supposed or _native_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, [*DTYPES, "auto"])
    return DTYPES[dtype]


def fast_products(device: torch.device) -> torch.autocast:
    """A context whose matrix products are bfloat16 where the device multiplies it natively.

    Elsewhere it does nothing: a CPU that lacks the instructions multiplies bfloat16 a hundred
    times slower than float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=_native_bfloat16(device))


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" or "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def placed(world_model: Model, device: torch.device, dtype: torch.dtype) -> Model:
    """The model in evaluation mode on `device` computing in `dtype`; the argument is unchanged.

    A quantized model keeps its integer codes and float32 scales; only what it computes with is
    cast.
    """
    return copy.deepcopy(world_model).to(device=device, dtype=dtype).eval()


def device_of(world_model: WorldModel) -> torch.device:
    """Where a model's tensors are; a model that is quantized throughout has only buffers.

    Raises:
        UsageError: it has no tensors at all.
    """
    for _, tensor in (*world_model.named_parameters(), *world_model.named_buffers()):
        return tensor.device
    raise UsageError("the world model has neither parameters nor buffers")


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def cpu_arithmetic() -> str:
    """The widest units that products use, "amx" or such as "avx512": other ones round otherwise."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    bfloat16 = "_bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return torch.backends.cpu.get_cpu_capability().lower() + bfloat16


@functools.cache
def package_version() -> str:
    """The installed version, "unknown" in a tree that was never installed."""
    try:
        return version("quantwm")
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def source_commit() -> str | None:
    """The git commit of the source tree that is running, "-dirty" with local changes, or None."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
        dirty = git("status", "--porcelain", "--untracked-files=no", str(here))
    except (OSError, subprocess.CalledProcessError):
        return None
    return (f"{commit}-dirty" if dirty else commit) if tracked else None


def provenance(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What produced a row: versions, commit, device, type, threads."""
    return {
        "quantwm": package_version(),
        "commit": source_commit(),
        "torch": torch.__version__,
        "device": device.type,
        **({"arithmetic": cpu_arithmetic()} if device.type == "cpu" else {}),
        "dtype": dtype_name(dtype),
        "threads": torch.get_num_threads(),
        "numerics": NUMERICS_VERSION,
    }


def provenance_json(device: torch.device, dtype: torch.dtype) -> str:
    """`provenance` as JSON."""
    return json.dumps(provenance(device, dtype))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of the CUDA device, or of this process so far, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, as its system reports them."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_number(r"^MemAvailable:\s+(\d+) kB", _MEMINFO, 1024)]
    limit = _number(r"^(\d+)$", _CGROUP / "memory.max")
    used = _number(r"^(\d+)$", _CGROUP / "memory.current")
    if limit is not None and used is not None:
        limits.append(max(0, limit - used))
    known = [value for value in limits if value is not None]
    return min(known) if known else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _number(pattern: str, path: Path, unit: int = 1) -> int | None:
    try:
        match = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match.group(1)) * unit if match else None


def parse_bytes(text: str | int) -> int:
    """Bytes of "500MB", "2 GB", "1.5GiB" or a plain number.

    Raises:
        UsageError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)(i?)B?\s*", str(text))
    size = 0
    if match is not None:
        number, prefix, binary = match.groups()
        power = " kMG".index(prefix or " ")
        size = int(float(number) * (1024 if binary else 1000) ** power)
    if match is None or size < 1:
        raise UsageError(f"a memory budget is a number of bytes such as 2GB or 500MB, got {text!r}")
    return size


def shown_bytes(size: int) -> str:
    """A size for a reader, such as "1.2 GB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"
