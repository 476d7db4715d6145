"""Methods by name. A part's module registers its class; importing the package finds them all."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from quantwm.errors import UsageError, unknown_name
from quantwm.methods.roles import Part

PARTS: dict[str, type[Part]] = {}
AnyPart = TypeVar("AnyPart", bound=type[Part])


def register(part: AnyPart) -> AnyPart:
    """Class decorator: make a part known by its `name`.

    Raises:
        ValueError: another class has that name.
    """
    if PARTS.setdefault(part.name, part) is not part:
        raise ValueError(f"two methods are called {part.name!r}")
    return part


def method_names() -> tuple[str, ...]:
    """Names of all parts, sorted; each is a method by itself."""
    return tuple(sorted(PARTS))


def build_parts(method: str, options: Mapping[str, Any] | None = None) -> tuple[Part, ...]:
    """The parts of a method, their options set.

    Args:
        method: names joined by "+".
        options: by name, or by `part.option` where several parts have one of that name.

    Raises:
        UsageError: an unknown part or option (with the nearest name), an option that several
            parts have or that is given twice, or a value that a part refuses.
    """
    names = [name.strip() for name in method.split("+")]
    for name in names:
        if name not in PARTS:
            raise unknown_name("method", name, PARTS)
    known = {name: set(inspect.signature(PARTS[name]).parameters) for name in names}
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option, value in (options or {}).items():
        owner, plain = _owner(method, option, known), option.rpartition(".")[2]
        if plain in chosen[owner]:
            raise UsageError(f"the option {owner}.{plain} is given twice: drop one of them")
        chosen[owner][plain] = value
    return tuple(PARTS[name](**chosen[name]) for name in names)


def _owner(method: str, option: str, known: Mapping[str, set[str]]) -> str:
    part, _, plain = option.rpartition(".")
    if part and part not in known:
        raise unknown_name(f"part of {method!r}:", part, known)
    asked = {part: known[part]} if part else known
    owners = [name for name in asked if plain in asked[name]]
    if len(owners) == 1:
        return owners[0]
    if owners:
        written = " or ".join(repr(f"{name}.{plain}") for name in owners)
        raise UsageError(f"{' and '.join(owners)} both have an option {plain!r}; write {written}")
    everything = set().union(*asked.values())
    if not everything:
        raise UsageError(f"the method {part or method!r} has no options, got {option!r}")
    raise unknown_name(f"option of {part or method}:", plain, everything)
