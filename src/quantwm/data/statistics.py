"""Normalisation statistics of a data set."""

from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from quantwm.data.trajectories import Trajectories
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


def of_trajectories(task: Task, trajectories: Trajectories) -> Statistics:
    """Statistics of some trajectories' actions and states."""
    return Statistics.of(trajectories.actions, task.proprio(trajectories.states))
