"""Settings that people write: what counts as a number, and values in text."""

import math
from typing import Any, TypeGuard

import yaml

from quantwm.errors import UsageError


def parsed(value: str, text: str) -> Any:
    """A setting's value, written as in YAML: a number, a word, a list.

    Args:
        value: to be read.
        text: the whole of which it is a part, for the message.

    Raises:
        UsageError: it is no YAML.
    """
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:  # the second one for 2024-13-45, no date
        raise UsageError(f"{text!r}: the value {value!r} cannot be read as YAML") from error


def is_integer(value: Any, least: int | None = None) -> TypeGuard[int]:
    """Whether a value is an integer, and at least `least`; True and 1.0 are none."""
    right = isinstance(value, int) and not isinstance(value, bool)
    return right and (least is None or value >= least)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; True, NaN and infinities are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
