"""The world models that ship with the package."""

from pathlib import Path

from quantwm.models.checkpoint import BUNDLED_FOLDER
from quantwm.storage import METADATA_FILE


def bundled_names() -> list[str]:
    """Names of the bundled world models."""
    return sorted(path.parent.name for path in BUNDLED_FOLDER.glob(f"*/{METADATA_FILE}"))


def bundled_folder(name: str) -> Path:
    """The folder of a bundled world model."""
    return BUNDLED_FOLDER / name
