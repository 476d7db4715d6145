"""The errors that quantwm raises on purpose; all derive from `QuantWMError`."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Self


class QuantWMError(Exception):
    """Base class: something that the user can mend. The command line prints it and exits 1."""


class UsageError(QuantWMError, ValueError):
    """An argument, a name or a configuration is wrong. The command line exits 2.

    Attributes:
        name: the unknown name that the error is about, if it is about one.
    """

    name: str | None = None


class PlanError(UsageError):
    """A quantization plan cannot be applied; the message lists every problem."""


class MissingStatisticsError(QuantWMError):
    """A model without normalisation statistics was asked to plan."""


class CorruptFileError(QuantWMError):
    """A file's content does not match its checksum or its format."""


class MismatchError(QuantWMError):
    """Two things that must belong together do not (model and calibration, folder and study)."""


class NonFiniteError(QuantWMError):
    """Latents or costs became NaN or infinite."""


class CellsFailedError(QuantWMError):
    """Some cells of a study could not be computed; the others are finished."""


class GateError(QuantWMError):
    """The float reference itself fails, so that nothing can be compared with it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """An error that lists what exists and suggests the nearest name."""
    names: Sequence[str] = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    error = UsageError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")
    error.name = name
    return error


class MissingExtraError(QuantWMError):
    """An optional dependency is needed and not installed.

    Args:
        what: needs it.
        package: the one that is missing.
        extra: of quantwm that installs it.
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'quantwm[{extra}]'")
        self._arguments = what, package, extra

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, str]]:
        # An exception is made anew from its message alone, unless told otherwise: what a process
        # that raises it cannot send, ends the process instead.
        return type(self), self._arguments
