"""Where a study ran: versions, processor and commit, for its configuration and its report."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from quantwm.compute import package_version, source_commit

PACKAGES = ("torch", "numpy", "scipy")


def environment(device: str, *, here: bool = True) -> dict[str, Any]:
    """Versions, machine and commit as JSON values; what cannot be found out is None.

    Args:
        device: kind of device, "cpu" or "cuda"; a GPU is named.
        here: this machine computes; nothing is said of it where others do.
    """
    return {
        "python": platform.python_version(),
        "quantwm": package_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform() if here else None,
        "processor": _processor() if here else None,
        "cores": os.cpu_count() if here else None,
        "gpu": torch.cuda.get_device_name() if here and device == "cuda" else None,
        "commit": source_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    """The processor's name; `platform.processor` knows it only on some systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None
