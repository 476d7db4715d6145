"""Refusing states and actions that a simulator would take silently."""

from collections.abc import Callable

import numpy as np

from quantwm.errors import UsageError
from quantwm.protocols import BoolArray, Episodes, FloatArray


def check_actions(task: str, actions: FloatArray, width: int) -> None:
    """Refuse actions (..., A) of another width, or that are not finite."""
    _check(f"{task} actions", actions, width)


def check_states(task: str, states: FloatArray, width: int) -> None:
    """Refuse states (..., S) of another width, or that are not finite."""
    _check(f"{task} states", states, width)


def check_episodes(
    task: str,
    episodes: Episodes,
    width: int,
    is_free: Callable[[FloatArray], BoolArray],
    places: str,
) -> None:
    """Refuse episodes whose starts or goals are no states of the task.

    Args:
        task: for the message.
        episodes: of starts and goals (B, width).
        width: of a state.
        is_free: which of the states (B, width) are at places where something can be.
        places: where those are, in words.
    """
    for states, what in ((episodes.start, "starts"), (episodes.goal, "has its goal")):
        check_states(task, states, width)
        wrong = np.flatnonzero(~is_free(states))
        if len(wrong):
            raise UsageError(
                f"{task}'s places are {places}, and episode {wrong[0]} {what} at "
                f"{states[wrong[0]].round(3).tolist()}"
            )


def within(places: FloatArray, low: float, high: float) -> BoolArray:
    """Which places (B, P) have all coordinates from `low` to `high`."""
    return np.asarray(((places >= low) & (places <= high)).all(axis=1))


def check_width(what: str, values: FloatArray, width: int) -> None:
    """Refuse values (..., W) of another width; NaN is let pass."""
    if values.shape[-1] != width:
        raise UsageError(f"{what} have width {width}, got {values.shape[-1]}")


def _check(what: str, values: FloatArray, width: int) -> None:
    check_width(what, values, width)
    if not np.isfinite(values).all():
        raise UsageError(f"{what} must be finite, got NaN or infinity")
