"""Which code wrote the model that a folder holds."""

from pathlib import Path
from typing import Literal

from quantwm import storage
from quantwm.models.dino_wm_checkpoint import is_checkpoint
from quantwm.models.prejepa_checkpoint import is_prejepa

Format = Literal["quantwm", "dino_wm", "prejepa"]


def stored_format(folder: Path) -> Format | None:
    """quantwm's own, DINO-WM's `train.py`, stable-worldmodel's `PreJEPA`; None for no model."""
    if (folder / storage.METADATA_FILE).is_file():
        return "quantwm"
    if is_checkpoint(folder):
        return "dino_wm"
    return "prejepa" if is_prejepa(folder) else None
