"""Compiled loops that round activations; imported by `fused` alone, where numba is installed.

A value is read, rounded in float32 and written once, where the same steps in torch pass over
memory five to eight times. Loops are serial and release the interpreter lock, so that callers run
one a thread. They see bits: bfloat16 as int16 and float32 as int32, since numba knows no bfloat16.

They are compiled in every process (a few tenths of a second each) and never stored on disk:
numba's cache lets processes that compile different types or processors at once overwrite one
another's files, and a study starts many processes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numba
import numpy as np
from numpy import float32, int16, int32, uint32
from numpy.typing import NDArray

Bits: TypeAlias = NDArray[np.int16] | NDArray[np.int32]
"""Floating-point numbers as signed integers of the same width."""

_SMALLEST_SCALE = np.finfo(np.float32).tiny
# "numpy": a division by zero gives an infinity, as it does in torch, instead of an exception.
_compiled: Callable[..., Any] = numba.njit(nogil=True, error_model="numpy")


class Kernels(NamedTuple):
    """The loops for one type.

    Attributes:
        static: (x, out, scale, lowest, highest) round to one grid; the ends are in steps.
        rows: (x, out, top, symmetric) round each row to its own grid, whose highest code is `top`.
    """

    static: Callable[[Bits, Bits, np.float32, np.float32, np.float32], None]
    rows: Callable[[Bits, Bits, np.float32, bool], None]


@_compiled
def _from_bfloat16(bits):  # type: ignore[no-untyped-def]
    return uint32(uint32(bits) << uint32(16)).view(float32)


@_compiled
def _to_bfloat16(value):  # type: ignore[no-untyped-def]
    """To the nearest, ties to even; carries out of a NaN's bits would make it a number."""
    bits = float32(value).view(uint32)
    rounded = (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
    is_nan = (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000)
    return int16(uint32(0x7FC0) if is_nan else rounded)


@_compiled
def _from_float32(bits):  # type: ignore[no-untyped-def]
    return int32(bits).view(float32)


@_compiled
def _to_float32(value):  # type: ignore[no-untyped-def]
    return float32(value).view(int32)


def _kernels(
    read: Callable[..., Any], write: Callable[..., Any], integer: type[np.signedinteger[Any]]
) -> Kernels:
    """Loops over arrays of `integer`, made numbers by `read` and bits again by `write`.

    Every step is torch's, in torch's order. Comparisons are written so that a NaN stays and
    -0 is not above or below 0.
    """
    sign = integer(np.iinfo(integer).min)

    @_compiled
    def static(x, out, scale, lowest, highest):  # type: ignore[no-untyped-def]
        for row in range(x.shape[0]):
            for column in range(x.shape[1]):
                steps = np.rint(read(x[row, column]) / scale)
                steps = lowest if steps < lowest else steps
                steps = highest if steps > highest else steps
                out[row, column] = write(steps * scale)

    @_compiled
    def extremes(x):  # type: ignore[no-untyped-def]
        """Highest value and greatest magnitude below zero, as bits; at least +0, NaN on top.

        Bits of positive floats are ordered like the floats, as are those of negative ones
        without their sign; comparing integers is what compiles to vector instructions.
        """
        highest, deepest = integer(0), integer(0)
        for column in range(x.shape[0]):
            highest = max(highest, x[column])
            deepest = max(deepest, integer(x[column] ^ sign))
        return highest, deepest

    @_compiled
    def grid(highest, deepest, top, symmetric):  # type: ignore[no-untyped-def]
        """Scale, and the top code's distance from zero in steps."""
        if symmetric:
            scale = read(max(highest, deepest)) / top
        else:
            scale = (read(highest) + read(deepest)) / top
        if scale < _SMALLEST_SCALE:
            scale = float32(1)
        if symmetric:
            return scale, top
        # Code 0 is the lowest value's; only rounding both ends up can pass the top.
        zero_point = np.rint(read(deepest) / scale)
        return scale, top - (top if zero_point > top else zero_point)

    @_compiled
    def rows(x, out, top, symmetric):  # type: ignore[no-untyped-def]
        for row in range(x.shape[0]):
            highest, deepest = extremes(x[row])
            scale, limit = grid(highest, deepest, top, symmetric)
            for column in range(x.shape[1]):
                steps = np.rint(read(x[row, column]) / scale)
                steps = limit if steps > limit else steps
                out[row, column] = write(steps * scale)

    return Kernels(static, rows)


BFLOAT16 = _kernels(_from_bfloat16, _to_bfloat16, np.int16)
FLOAT32 = _kernels(_from_float32, _to_float32, np.int32)
