"""Planner settings by task: DINO-WM's own, and lighter ones for the bundled compact models."""

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from quantwm.errors import unknown_name
from quantwm.planning.cem import CEM
from quantwm.planning.gradient import GradientDescent
from quantwm.planning.icem import ICEM
from quantwm.planning.mppi import MPPI
from quantwm.planning.planners import AnyPlanner, planner_class

Scale: TypeAlias = Literal["compact", "paper"]

# The compact settings were chosen on tuning seeds with the oracle-state arm: noise correlated in
# time reaches with 64 samples and 5 steps what white noise needs 300 samples and 10 steps for.
# iCEM and MPPI were given as many rollouts a plan as CEM, gradient descent about as much time; the
# comparison is in docs/planning.md. PushT takes a finer search, which the oracle-state arm asks
# for there too: the disc must be where it pushes, and end where it should.
_FALLBACK: Mapping[Scale, tuple[AnyPlanner, ...]] = {
    "compact": (
        CEM(samples=64, elites=8, steps=5, noise_correlation=0.8),
        ICEM(samples=64, elites=4, steps=5, decay=1.0),
        MPPI(samples=64, steps=5, refit_deviation=True, noise_correlation=0.8),
        GradientDescent(
            samples=16,
            steps=10,
            optimizer="adam",
            learning_rate=0.1,
            step_noise=0.0,
            noise_correlation=0.8,
        ),
    ),
    "paper": (CEM(), ICEM(), MPPI(), GradientDescent()),
}
_BY_TASK: Mapping[tuple[Scale, str], tuple[AnyPlanner, ...]] = {
    ("compact", "pusht"): (
        CEM(samples=128, elites=16, steps=10, noise_correlation=0.8),
        ICEM(samples=128, elites=8, steps=10, decay=1.0),
        MPPI(samples=128, steps=10, refit_deviation=True, noise_correlation=0.8),
    ),
    ("paper", "pusht"): (CEM(steps=30), ICEM(steps=30), MPPI(steps=30)),
}
# Far from the goal PointMaze's objective says little, so that replans go on helping for long, with
# the true dynamics too (docs/point_maze.md).
_ITERATIONS: Mapping[Scale, int] = {"compact": 6, "paper": 50}
_ITERATIONS_BY_TASK: Mapping[tuple[Scale, str], int] = {("compact", "point_maze"): 20}


def default_planner(task_name: str, scale: Scale = "compact", name: str = CEM.name) -> AnyPlanner:
    """The settings of a planner for a task.

    Args:
        task_name: the task's.
        scale: "compact" for the bundled models, "paper" for models of DINO-WM's size.
        name: the planner's; studies take CEM unless they say otherwise.

    Raises:
        UsageError: an unknown scale or planner.
    """
    if scale not in get_args(Scale):
        raise unknown_name("planner scale", scale, get_args(Scale))
    wanted = planner_class(name)
    choices = (*_BY_TASK.get((scale, task_name), ()), *_FALLBACK[scale])
    return next(planner for planner in choices if isinstance(planner, wanted))


def default_iterations(task_name: str, scale: Scale = "compact") -> int:
    """Receding-horizon iterations after which an episode counts as failed.

    Raises:
        UsageError: an unknown scale.
    """
    if scale not in get_args(Scale):
        raise unknown_name("planner scale", scale, get_args(Scale))
    return _ITERATIONS_BY_TASK.get((scale, task_name), _ITERATIONS[scale])
