"""Compiled rounding against the torch reference, bit by bit; skipped where numba is missing."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantwm.quant import fused
from quantwm.quant.primitives import affine_parameters, fake_quantize_rows, fake_quantize_static

numba = pytest.importorskip("numba")

INTEGER = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
DTYPES = pytest.mark.parametrize("dtype", list(INTEGER), ids=str)
SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
MAX, TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def by_torch(function, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "kernels_for", lambda x: None)
        return function(*args, **kwargs)


def assert_same_bits(function, x, *args, **kwargs):
    """The compiled result is the torch result, -0 and infinities included; NaN is NaN."""
    assert fused.kernels_for(x) is not None
    before = x.clone()
    found, expected = function(x, *args, **kwargs), by_torch(function, x, *args, **kwargs)
    assert found.dtype == expected.dtype == x.dtype
    assert found.shape == x.shape
    assert found.is_contiguous()
    assert torch.equal(found.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(bits(found)[kept], bits(expected)[kept])
    assert torch.equal(bits(x), bits(before))
    return found


def bits(x):
    return x.contiguous().view(INTEGER[x.dtype])


def patterns(dtype, count=2**16):
    """Every bfloat16, or float32 with every upper half and all kinds of lower halves."""
    upper = torch.arange(count, dtype=torch.int32)
    if dtype == torch.bfloat16:
        return upper.to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    lower = torch.randint(0, 2**16, (count,), generator=generator, dtype=torch.int32)
    lower[::3], lower[1::3] = 0, 2**15
    return (upper << 16 | lower).view(dtype)


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@pytest.mark.parametrize(
    ("scale", "lowest", "highest"),
    [
        (0.03, -120.0, 135.0),
        (1.0, 0.0, 255.0),
        (3.7e-5, -255.0, 0.0),
        (TINY, -8.0, 7.0),
        (MAX / 3, -1.0, 2.0),
        (1e-42, -100.0, 27.0),
        (float("inf"), -2.0, 1.0),
        (float("nan"), -2.0, 1.0),
    ],
)
def test_static_on_every_kind_of_value(dtype, scale, lowest, highest):
    x = patterns(dtype).view(64, -1)
    found = assert_same_bits(fake_quantize_static, x, torch.tensor(scale), lowest, highest)
    assert found[x.isnan()].isnan().all()


@DTYPES
def test_the_carry_of_rounding_does_not_make_a_nan_a_number(dtype):
    scale = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)
    assert (
        assert_same_bits(fake_quantize_static, noise(3, 70, dtype=dtype), scale, -2.0, 1.0)
        .isnan()
        .all()
    )


@DTYPES
def test_static_by_hand(dtype):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[-9.0, -0.25, -0.0, 0.75, 1.25, 9.0], [nan, inf, -inf, 1e-40, -1e-40, 0.3]])
    found = fake_quantize_static(x.to(dtype), torch.tensor(0.5), -3.0, 4.0)
    expected = torch.tensor([[-1.5, -0.0, -0.0, 1.0, 1.0, 2.0], [nan, 2.0, -1.5, 0.0, -0.0, 0.5]])
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num().float(), expected.nan_to_num())
    assert torch.equal(found.signbit()[~found.isnan()], expected.signbit()[~expected.isnan()])


@DTYPES
@SYMMETRIES
@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_of_noise(bits, symmetric, dtype):
    x = noise(301, 77, dtype=dtype, seed=bits) * torch.logspace(-30, 30, 301)[:, None].to(dtype)
    x[0::7] = x[0::7].abs()
    x[1::7] = -x[1::7].abs()
    assert_same_bits(fake_quantize_rows, x, bits, symmetric=symmetric)


@DTYPES
@SYMMETRIES
def test_rows_of_neighbouring_bit_patterns(symmetric, dtype):
    x = patterns(dtype).view(-1, 32)
    assert_same_bits(fake_quantize_rows, x, 8, symmetric=symmetric)
    x = torch.cat([x, x.roll(1024, dims=0)], dim=1)  # of both signs
    assert_same_bits(fake_quantize_rows, x, 8, symmetric=symmetric)


@DTYPES
@SYMMETRIES
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 1e-44, -1e-39, TINY, 200 * TINY, MAX])
def test_constant_rows(value, symmetric, dtype):
    x = torch.full((3, 40), value).to(dtype)
    x[1, 17] = 0.0
    x[2, 5] = -value
    assert_same_bits(fake_quantize_rows, x, 8, symmetric=symmetric)


@DTYPES
@SYMMETRIES
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_row_only(bad, symmetric, dtype):
    x = noise(5, 33, dtype=dtype)
    x[1, 3] = x[3, 32] = bad
    x[3, 0] = -bad
    found = assert_same_bits(fake_quantize_rows, x, 8, symmetric=symmetric)
    assert found[[1, 3]].isnan().all()
    assert found[[0, 2, 4]].isfinite().all()


@DTYPES
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bits(dtype, data):
    width, rows = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 4))
    size = torch.iinfo(INTEGER[dtype])
    integers = st.lists(
        st.integers(size.min, size.max), min_size=rows * width, max_size=rows * width
    )
    x = torch.tensor(data.draw(integers), dtype=INTEGER[dtype]).view(dtype).view(rows, width)
    depth, symmetric = data.draw(st.integers(2, 8)), data.draw(st.booleans())
    assert_same_bits(fake_quantize_rows, x, depth, symmetric=symmetric)
    low, high = (data.draw(st.floats(-1e4, 1e4, width=32)) for _ in range(2))
    scale, zero_point = affine_parameters(torch.tensor(low), torch.tensor(high), depth)
    ends = -zero_point.item(), 2**depth - 1 - zero_point.item()
    assert_same_bits(fake_quantize_static, x, scale, *ends)


@DTYPES
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[1, :, 5:37], id="slice"),
        pytest.param(lambda x: x[1].T, id="transposed"),
        pytest.param(lambda x: x[:, 0, ::3], id="strided"),
        pytest.param(lambda x: x[:1, 0].expand(7, -1), id="expanded"),
        pytest.param(lambda x: x[0, :0], id="no rows"),
        pytest.param(lambda x: x[0, :, :0], id="no columns"),
        pytest.param(lambda x: x[2, 3:4, 1:2], id="one value"),
        pytest.param(lambda x: x[0].requires_grad_(), id="with gradient"),
        pytest.param(lambda x: torch.nn.Parameter(x[0]), id="parameter"),
    ],
)
def test_any_layout(view, dtype):
    x = noise(4, 9, 50, dtype=dtype)
    with torch.no_grad():
        x = view(x)
        assert_same_bits(fake_quantize_rows, x, 5, symmetric=False)
        assert_same_bits(fake_quantize_static, x, torch.tensor(0.1), -10.0, 21.0)


def test_inference_tensors():
    with torch.inference_mode():
        assert_same_bits(fake_quantize_rows, noise(3, 8), 8, symmetric=True)


def test_other_tensors_are_left_to_torch():
    assert fused.kernels_for(noise(2, 3)) is not None
    assert fused.kernels_for(noise(2, 3, dtype=torch.float16)) is None
    assert fused.kernels_for(noise(2, 3, dtype=torch.float64)) is None
    assert fused.kernels_for(torch.empty(2, 3, device="meta")) is None


def test_without_numba_torch_rounds(monkeypatch, caplog):
    load = fused._kernels.__wrapped__
    assert set(load()) == set(INTEGER)
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    assert load() == {}
    monkeypatch.setitem(sys.modules, "numba", None)
    assert load() == {}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]

    def broken(name):
        raise ImportError("Numba needs another NumPy")

    monkeypatch.setattr(fused.importlib, "import_module", broken)
    assert load() == {}
    assert "Numba needs another NumPy" in caplog.text


FIRST_USE = """
import threading, torch
from quantwm.quant.primitives import fake_quantize_rows, fake_quantize_static

inputs = [torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
          for dtype in (torch.bfloat16, torch.float32)]
barrier, found = threading.Barrier(8), {}

def work(number):
    x = inputs[number % 2]
    barrier.wait()
    found[number] = (fake_quantize_rows(x, 8, symmetric=False),
                     fake_quantize_static(x, torch.tensor(0.1), -9.0, 6.0))

threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 8
assert all(torch.equal(one, other)
           for n in found for one, other in zip(found[n], found[n % 2]))
"""


def test_threads_may_all_be_first():
    """In a new process, where nothing is imported or compiled yet."""
    command = [sys.executable, "-W", "error", "-c", FIRST_USE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
