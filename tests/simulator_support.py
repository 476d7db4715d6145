"""Recordings of the public simulators."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

FIXTURES = Path(__file__).parent / "fixtures"


def load(name: str) -> dict[str, npt.NDArray]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return dict(arrays)


def angle_between(a: npt.NDArray, b: npt.NDArray) -> npt.NDArray:
    """Smallest angle between two directions, through cosines and sines."""
    return np.abs(np.angle(np.exp(1j * (a - b))))


def off_pixels(ours: npt.NDArray, theirs: npt.NDArray) -> float:
    """Share of the pixels that differ by more than 8 of 255 in some colour."""
    return float((np.abs(ours.astype(int) - theirs).max(axis=-1) > 8).mean())
