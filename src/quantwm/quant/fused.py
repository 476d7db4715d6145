"""Activation rounding by compiled loops, where numba is installed (`pip install quantwm[fast]`).

Bit for bit what `primitives` computes with torch, which stays the reference and runs wherever
these loops do not: on other devices, for other types, while a compiler traces, without numba.
"""

import functools
import importlib
import logging
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from quantwm.quant.kernels import Bits, Kernels

logger = logging.getLogger(__name__)

_INTEGER = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
_ByDtype: TypeAlias = "dict[torch.dtype, Kernels]"


def kernels_for(x: Tensor) -> "Kernels | None":
    """The loops that round `x`: a plain CPU tensor of float32 or bfloat16, and numba at hand."""
    plain = type(x) in {Tensor, nn.Parameter} and x.device.type == "cpu" and x.dtype in _INTEGER
    if not plain or torch.compiler.is_compiling():
        return None
    return _kernels().get(x.dtype)


def round_rows(kernels: "Kernels", x: Tensor, top: int, *, symmetric: bool) -> Tensor:
    """See `primitives.fake_quantize_rows`; `top` is the highest code."""
    source = x.detach().contiguous()
    out = torch.empty_like(source)
    kernels.rows(_bits(source), _bits(out), np.float32(top), symmetric)
    return out


def round_static(
    kernels: "Kernels", x: Tensor, scale: Tensor, lowest: float, highest: float
) -> Tensor:
    """See `primitives.fake_quantize_static`."""
    source = x.detach().contiguous()
    out = torch.empty_like(source)
    # As one row: a loop over a short row spends its time starting and ending.
    row, out_row = source.view(1, x.numel()), out.view(1, x.numel())
    grid = np.float32(scale.item()), np.float32(lowest), np.float32(highest)
    kernels.static(_bits(row), _bits(out_row), *grid)
    return out


def _bits(x: Tensor) -> "Bits":
    """The memory of a contiguous tensor as an array of integers."""
    return x.view(_INTEGER[x.dtype]).numpy()


@functools.cache
def _kernels() -> _ByDtype:
    """The loops by type; none where numba is missing, broken or told not to compile."""
    try:
        if not importlib.import_module("numba").config.DISABLE_JIT:
            module = importlib.import_module("quantwm.quant.kernels")
            return {torch.bfloat16: module.BFLOAT16, torch.float32: module.FLOAT32}
    except ModuleNotFoundError:
        logger.debug("numba is not installed: torch rounds activations")
    except (ImportError, OSError) as error:
        logger.warning("numba cannot be used, torch rounds activations: %s", error)
    return {}
