"""What counts as a number in a setting: True is none, and neither is NaN or infinity."""

import math
from typing import Any, TypeGuard


def is_integer(value: Any, least: int | None = None) -> TypeGuard[int]:
    """Whether a value is an integer, and at least `least`; 1.0 is none."""
    right = isinstance(value, int) and not isinstance(value, bool)
    return right and (least is None or value >= least)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
