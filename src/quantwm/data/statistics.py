"""Normalisation statistics of a data set."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from quantwm.data.trajectories import Trajectories
from quantwm.errors import CorruptFileError, UsageError
from quantwm.protocols import Task

Numbers: TypeAlias = npt.NDArray[np.floating[Any]]
Values: TypeAlias = tuple[float, ...]


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of raw actions and of proprioception, one a component."""

    action_mean: Values
    action_std: Values
    proprio_mean: Values
    proprio_std: Values

    @classmethod
    def of(cls, actions: Numbers, proprio: Numbers, *, unbiased: bool = False) -> "Statistics":
        """Of all actions (N, A) and proprioception (M, P).

        Args:
            unbiased: divide by one less than the number of samples.
        """
        ddof = int(unbiased)
        actions, proprio = actions.astype(np.float64), proprio.astype(np.float64)
        return cls(
            tuple(actions.mean(0).tolist()),
            tuple(actions.std(0, ddof=ddof).tolist()),
            tuple(proprio.mean(0).tolist()),
            tuple(proprio.std(0, ddof=ddof).tolist()),
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings of `DINOWMConfig` that these are."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """From a JSON file: `to_dict`'s four names, each with one number a component.

        Raises:
            UsageError: there is no such file.
            CorruptFileError: it does not hold exactly these four, or numbers that cannot be.
        """
        names = [f.name for f in fields(cls)]
        form = f'{{"{names[0]}": [...], ...}} with {", ".join(names)}'
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read the statistics file {path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{path} is no JSON: {error}; it must be {form}") from error
        if not isinstance(values, dict) or set(values) != set(names):
            found = ", ".join(map(str, values)) if isinstance(values, dict) else "no names"
            raise CorruptFileError(f"{path} holds {found[:200]}; it must be {form}")
        for name, numbers in values.items():
            if not isinstance(numbers, list) or not all(map(_is_number, numbers)):
                raise CorruptFileError(f"{path}: {name} must be a list of finite numbers")
            if name.endswith("std") and not all(number > 0 for number in numbers):
                raise CorruptFileError(f"{path}: {name} must be positive, not {numbers[:8]}")
        return cls(**{name: tuple(map(float, values[name])) for name in names})


def _is_number(value: Any) -> bool:
    if type(value) not in {int, float}:
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def of_trajectories(task: Task, trajectories: Trajectories) -> Statistics:
    """Statistics of some trajectories' actions and states."""
    return Statistics.of(trajectories.actions, task.proprio(trajectories.states))
