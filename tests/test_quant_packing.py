import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantwm.errors import CorruptFileError
from quantwm.quant.packing import pack_bits, packed_bytes, unpack_bits
from quantwm.quant.primitives import code_range


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_packing_is_exact_and_dense_for_every_width(data):
    bits, symmetric = data.draw(st.integers(2, 8)), data.draw(st.booleans())
    lowest, highest = code_range(bits, symmetric=symmetric)
    shape = data.draw(st.lists(st.integers(0, 7), min_size=0, max_size=3))
    count = int(np.prod(shape, dtype=int))
    values = data.draw(st.lists(st.integers(lowest, highest), min_size=count, max_size=count))
    dtype = torch.int8 if symmetric else torch.uint8
    codes = torch.tensor(values, dtype=dtype).reshape(shape)
    packed = pack_bits(codes, bits, symmetric=symmetric)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(count, bits) == -(-count * bits // 8)
    unpacked = unpack_bits(packed, bits, tuple(shape), symmetric=symmetric)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize(
    ("codes", "bits", "symmetric", "stream"),
    [
        ([1, 2, 3, 0], 2, False, [0b00111001]),
        ([-2, 1, 0, -1], 2, True, [0b01101100]),
        ([5, 2, 7], 3, False, [0b11010101, 0b1]),
        ([255, 1], 8, False, [255, 1]),
        ([-128, 127], 8, True, [0, 255]),
    ],
)
def test_bytes_by_hand(codes, bits, symmetric, stream):
    assert pack_bits(torch.tensor(codes), bits, symmetric=symmetric).tolist() == stream


@pytest.mark.parametrize(("codes", "symmetric"), [([4], True), ([-5], True), ([8], False)])
def test_codes_out_of_range_are_refused(codes, symmetric):
    with pytest.raises(ValueError, match="do not fit 3 bits"):
        pack_bits(torch.tensor(codes), 3, symmetric=symmetric)


def test_bytes_of_another_length_are_refused():
    packed = pack_bits(torch.zeros(10), 4, symmetric=True)
    with pytest.raises(CorruptFileError, match="11 codes of 4 bits take 6 bytes"):
        unpack_bits(packed, 4, (11,), symmetric=True)
