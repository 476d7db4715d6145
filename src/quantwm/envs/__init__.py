"""Tasks to plan in, by name. A new task is one new module and one line here."""

from collections.abc import Callable
from typing import Any

from quantwm.envs.point_maze import PointMaze
from quantwm.envs.pusht import PushT
from quantwm.envs.wall import Wall
from quantwm.errors import UsageError, unknown_name
from quantwm.protocols import Task

TASKS: dict[str, Callable[..., Task]] = {"wall": Wall, "pusht": PushT, "point_maze": PointMaze}


def get_task(name: str, /, **settings: Any) -> Task:
    """Build a task by name.

    Raises:
        UsageError: the name is unknown, or the task has no such setting.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    try:
        return TASKS[name](**settings)
    except TypeError as error:
        raise UsageError(f"task {name!r}: {error}") from error


__all__ = ["TASKS", "PointMaze", "PushT", "Wall", "get_task"]
