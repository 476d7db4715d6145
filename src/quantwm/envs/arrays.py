"""Refusing states and actions that a simulator would take silently."""

import numpy as np

from quantwm.errors import UsageError
from quantwm.protocols import FloatArray


def check_actions(task: str, actions: FloatArray, width: int) -> None:
    """Refuse actions (..., A) of another width, or that are not finite."""
    _check(f"{task} actions", actions, width)


def check_states(task: str, states: FloatArray, width: int) -> None:
    """Refuse states (..., S) of another width, or that are not finite."""
    _check(f"{task} states", states, width)


def check_places(task: str, places: FloatArray, low: float, high: float, unit: str) -> None:
    """Refuse episodes that start outside of a board.

    Args:
        task: for the message.
        places: coordinates (B, P) that must lie within the board.
        low, high: the board, the same in every coordinate.
        unit: of the coordinates.
    """
    outside = ((places < low) | (places > high)).any(axis=1)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise UsageError(
            f"{task}'s places are {low:g} to {high:g}{unit}, and episode {first} starts at "
            f"{places[first].round(3).tolist()}"
        )


def _check(what: str, values: FloatArray, width: int) -> None:
    if values.shape[-1] != width:
        raise UsageError(f"{what} have width {width}, got {values.shape[-1]}")
    if not np.isfinite(values).all():
        raise UsageError(f"{what} must be finite, got NaN or infinity")
