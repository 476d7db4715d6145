"""Planner settings by task: DINO-WM's own, and lighter ones for the bundled compact models."""

from typing import Literal, TypeAlias, get_args

from quantwm.errors import unknown_name
from quantwm.planning.cem import CEM

Scale: TypeAlias = Literal["compact", "paper"]

# The compact settings were chosen on tuning seeds with the oracle-state arm: noise correlated in
# time reaches with 64 samples and 5 steps what white noise needs 300 samples and 10 steps for.
_COMPACT = CEM(samples=64, elites=8, steps=5, noise_correlation=0.8)
_PAPER = CEM()
_BY_TASK: dict[Scale, dict[str, CEM]] = {"compact": {}, "paper": {"pusht": CEM(steps=30)}}
_FALLBACK: dict[Scale, CEM] = {"compact": _COMPACT, "paper": _PAPER}
_ITERATIONS: dict[Scale, int] = {"compact": 6, "paper": 50}


def default_planner(task_name: str, scale: Scale = "compact") -> CEM:
    """The planner settings for a task.

    Raises:
        UsageError: an unknown scale.
    """
    if scale not in get_args(Scale):
        raise unknown_name("planner scale", scale, get_args(Scale))
    return _BY_TASK[scale].get(task_name, _FALLBACK[scale])


def default_iterations(scale: Scale = "compact") -> int:
    """Receding-horizon iterations after which an episode counts as failed."""
    return _ITERATIONS[scale]
