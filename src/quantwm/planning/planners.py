"""Planners by name."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from quantwm.errors import unknown_name
from quantwm.planning.cem import CEM
from quantwm.planning.gradient import GradientDescent
from quantwm.planning.icem import ICEM
from quantwm.planning.mppi import MPPI

AnyPlanner: TypeAlias = CEM | ICEM | MPPI | GradientDescent
PLANNERS: Mapping[str, type[AnyPlanner]] = {
    planner.name: planner for planner in (CEM, ICEM, MPPI, GradientDescent)
}


def planner_class(name: str) -> type[AnyPlanner]:
    """The planner of a name.

    Raises:
        UsageError: no such planner; suggests the nearest.
    """
    if name not in PLANNERS:
        raise unknown_name("planner", name, PLANNERS)
    return PLANNERS[name]


def planner_from_settings(settings: Mapping[str, Any]) -> AnyPlanner:
    """The planner that `settings()` describes; the name defaults to CEM, fields to the class's.

    Raises:
        UsageError: an unknown planner, unknown fields or values out of range.
    """
    return planner_class(str(settings.get("name", CEM.name))).from_settings(settings)
