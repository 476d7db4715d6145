"""Methods by name. A method's module registers its class; importing the package finds them all."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from quantwm.errors import UsageError, unknown_name
from quantwm.quant.apply import Method

_METHODS: dict[str, type[Method]] = {}
AnyMethod = TypeVar("AnyMethod", bound=type[Method])


def register(method: AnyMethod) -> AnyMethod:
    """Class decorator: make a method known by its `name`.

    Raises:
        ValueError: another class has that name.
    """
    if _METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"two methods are called {method.name!r}")
    return method


def method_names() -> tuple[str, ...]:
    """Names of all methods, sorted."""
    return tuple(sorted(_METHODS))


def get_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method with its options set.

    Raises:
        UsageError: unknown method or option (with the nearest name), or a value that the method
            refuses.
    """
    if name not in _METHODS:
        raise unknown_name("method", name, _METHODS)
    known = set(inspect.signature(_METHODS[name]).parameters)
    for option in options or {}:
        if not known:
            raise UsageError(f"the method {name!r} has no options, got {option!r}")
        if option not in known:
            raise unknown_name(f"option of {name}:", option, known)
    return _METHODS[name](**(options or {}))
