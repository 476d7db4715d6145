"""What the planners' settings have in common: validation, and the way to and from plain values."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, ClassVar, Self

from quantwm.checks import is_integer, is_number
from quantwm.errors import UsageError, unknown_name


class PlannerSettings:
    """Base of the planners, which are frozen dataclasses that name their settings' problems.

    Attributes:
        name: under which a study's `planner.name` finds the planner.
        needs_gradients: whether it plans only with a `DifferentiableCost`.
        rollouts: candidate rollouts that one plan asks for, a gradient counted as three.
    """

    name: ClassVar[str]
    needs_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise UsageError(f"invalid {type(self).__name__} settings: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        raise NotImplementedError

    @property
    def rollouts(self) -> int:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The fields and the planner's name, as JSON values."""
        assert is_dataclass(self)
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Build from `settings()`; missing fields take their defaults.

        Raises:
            UsageError: another planner's name; or unknown fields and values out of range, all of
                them in one message.
        """
        values = dict(settings)
        if (name := values.pop("name", cls.name)) != cls.name:
            raise unknown_name("planner", str(name), [cls.name])
        assert is_dataclass(cls)
        known = [one.name for one in fields(cls)]
        problems = [
            str(unknown_name(f"{cls.name} setting", str(key), known))
            for key in values
            if key not in known
        ]
        try:
            planner = cls(**{key: values[key] for key in known if key in values})
        except UsageError as error:
            problems.append(str(error))
        if problems:
            raise UsageError("; ".join(problems))
        return planner


def counts(**values: Any) -> list[str]:
    """Problems of values that must be positive integers."""
    return [
        f"{name} must be a positive integer, got {value!r}"
        for name, value in values.items()
        if not is_integer(value, 1)
    ]


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> list[str]:
    """The problem, if any, of a value that must be a finite number within bounds.

    Args:
        name, value: of the setting.
        above, below: bounds that are excluded.
        least, most: bounds that are included.
    """
    if (
        is_number(value)
        and (above is None or value > above)
        and (least is None or value >= least)
        and (below is None or value < below)
        and (most is None or value <= most)
    ):
        return []
    bounds = [
        f"{words} {bound:g}"
        for words, bound in (
            ("above", above),
            ("at least", least),
            ("below", below),
            ("at most", most),
        )
        if bound is not None
    ]
    return [f"{name} must be a number {' and '.join(bounds)}, got {value!r}"]
