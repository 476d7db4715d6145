"""Codes of any width, packed densely into bytes for storage."""

import numpy as np
import torch
from torch import Tensor

from quantwm.errors import CorruptFileError
from quantwm.quant.primitives import code_dtype, code_range


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """Pack integer codes into bytes, without a gap between codes.

    Args:
        codes: whole numbers of any shape within `code_range(bits, symmetric=...)`.
        bits: 1 to 8; code i takes bits i·b to (i+1)·b - 1 of the stream, lowest bit first.
        symmetric: signed codes; they are stored as their distance from the lowest code.

    Returns:
        uint8 (packed_bytes(codes.numel(), bits),), on the CPU.

    Raises:
        ValueError: a code out of range.
    """
    lowest, highest = code_range(bits, symmetric=symmetric)
    values = codes.detach().cpu().reshape(-1).to(torch.int16).numpy()
    if values.size and (values.min() < lowest or values.max() > highest):
        raise ValueError(
            f"codes from {values.min()} to {values.max()} do not fit {bits} bits "
            f"({lowest} to {highest})"
        )
    unsigned = (values - lowest).astype(np.uint8)
    planes = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack_bits(
    packed: Tensor, bits: int, shape: tuple[int, ...] | torch.Size, *, symmetric: bool
) -> Tensor:
    """Undo `pack_bits`.

    Args:
        packed: uint8 (bytes,).
        bits, symmetric: as they were packed.
        shape: of the codes.

    Returns:
        int8 (symmetric) or uint8 codes of `shape`.

    Raises:
        CorruptFileError: the bytes do not hold codes of that shape.
    """
    count = int(np.prod(shape, dtype=np.int64))
    expected = packed_bytes(count, bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (expected,):
        raise CorruptFileError(
            f"{count} codes of {bits} bits take {expected} bytes, "
            f"found {packed.dtype} {tuple(packed.shape)}"
        )
    stream = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little")
    unsigned = np.packbits(stream.reshape(count, bits), axis=1, bitorder="little").reshape(-1)
    lowest, _ = code_range(bits, symmetric=symmetric)
    codes = unsigned.astype(np.int16) + lowest
    return torch.from_numpy(codes).to(code_dtype(symmetric=symmetric)).reshape(tuple(shape))
