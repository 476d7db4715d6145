"""Arithmetic against values computed by hand, NumPy's definition and torch's own kernels."""

import numpy as np
import pytest
import torch

from quantwm.quant import PerChannel, PerGroup, PerTensor, WeightScheme
from quantwm.quant.primitives import (
    affine_parameters,
    code_range,
    dequantize_weight,
    fake_quantize,
    fake_quantize_rows,
    fake_quantize_static,
    from_groups,
    quantize,
    quantize_weight,
    symmetric_scale,
    to_groups,
    weight_parameters,
    weight_range,
    within_grid,
)

BITS = range(2, 9)


def rounded(weight, scheme):
    """Codes, scale, zero point and values of a weight rounded to nearest."""
    weight = torch.tensor(weight)
    scale, zero_point = weight_parameters(weight_range(weight, scheme.granularity), scheme)
    codes = quantize_weight(weight, scale, zero_point, scheme)
    values = dequantize_weight(codes, scale, zero_point, scheme)
    return codes.tolist(), scale.tolist(), zero_point, values.tolist()


def test_code_ranges():
    assert code_range(2, symmetric=True) == (-2, 1)
    assert code_range(8, symmetric=True) == (-128, 127)
    assert code_range(2, symmetric=False) == (0, 3)
    assert code_range(8, symmetric=False) == (0, 255)


def test_per_channel_by_hand():
    codes, scale, zero_point, values = rounded(
        [[1.0, -3.0, 0.4, 2.5], [6.0, 1.0, -3.0, 0.0]], WeightScheme(3)
    )
    assert scale == [[1.0], [2.0]]
    assert zero_point is None
    # 2.5 and 1.0 / 2 = 0.5 lie half-way and go to the even neighbour, -3 / 2 = -1.5 to -2.
    assert codes == [[1, -3, 0, 2], [3, 0, -2, 0]]
    assert values == [[1.0, -3.0, 0.0, 2.0], [6.0, 0.0, -4.0, 0.0]]


def test_per_tensor_by_hand():
    codes, scale, _, values = rounded(
        [[1.0, -3.0], [6.0, 0.5]], WeightScheme(3, granularity=PerTensor())
    )
    assert scale == [[2.0]]
    assert codes == [[0, -2], [3, 0]]
    assert values == [[0.0, -4.0], [6.0, 0.0]]


def test_ragged_groups_by_hand():
    codes, scale, _, values = rounded(
        [[3.0, 1.0, 0.3, -0.2, 30.0], [0.0, 0.0, -6.0, 3.0, -0.75]],
        WeightScheme(3, granularity=PerGroup(2)),
    )
    assert np.allclose(scale, [[1.0, 0.1, 10.0], [1.0, 2.0, 0.25]])
    assert codes == [[3, 1, 3, -2, 3], [0, 0, -3, 2, -3]]
    assert np.allclose(values, [[3.0, 1.0, 0.3, -0.2, 30.0], [0.0, 0.0, -6.0, 4.0, -0.75]])


def test_study_rule_by_hand():
    scheme = WeightScheme(3, scale_rule="study")
    codes, scale, _, values = rounded([[3.5, -3.5, 1.5, 0.5]], scheme)
    assert scale == [[1.0]]
    # 3.5 rounds to 4 and is clamped to the top code; -3.5 reaches -4, the lowest.
    assert codes == [[3, -4, 2, 0]]
    assert values == [[3.0, -4.0, 2.0, 0.0]]


@pytest.mark.parametrize(
    ("granularity", "scales", "codes"),
    [
        (PerTensor(), [[2.0]], [[0, -4, 2, 0], [0, -1, 3, -2]]),
        (PerChannel(), [[2.0], [2.0]], [[0, -4, 2, 0], [0, -1, 3, -2]]),
        (PerGroup(2), [[2.0, 1.0], [0.5, 2.0]], [[0, -4, 3, 1], [2, -4, 3, -2]]),
        (PerGroup(3), [[2.0, 1 / 3.5], [2.0, 1.0]], [[0, -4, 2, 3], [0, -1, 3, -4]]),
    ],
    ids=str,
)
def test_study_rule_at_every_granularity(granularity, scales, codes):
    weight = [[1.0, -7.0, 3.5, 1.0], [1.0, -1.75, 7.0, -3.5]]
    scheme = WeightScheme(3, granularity=granularity, scale_rule="study")
    found = rounded(weight, scheme)
    assert np.allclose(found[1], scales)
    assert found[0] == codes


@pytest.mark.parametrize(
    ("granularity", "scale", "zero_point", "codes", "values"),
    [
        (
            PerChannel(),
            [[1.0], [2.0]],
            [[1], [0]],
            [[0, 3, 1, 3], [0, 3, 2, 2]],
            [[-1.0, 2.0, 0.0, 2.0], [0.0, 6.0, 4.0, 4.0]],
        ),
        (
            PerTensor(),
            [[7 / 3]],
            [[0]],
            [[0, 1, 0, 1], [0, 3, 2, 1]],
            np.array([[0, 1, 0, 1], [0, 3, 2, 1]]) * 7 / 3,
        ),
        (
            PerGroup(3),
            [[1.0, 0.5], [2.0, 1.0]],
            [[1, 0], [0, 0]],
            [[0, 3, 1, 3], [0, 3, 2, 3]],
            [[-1.0, 2.0, 0.0, 1.5], [0.0, 6.0, 4.0, 3.0]],
        ),
    ],
    ids=str,
)
def test_asymmetric_by_hand(granularity, scale, zero_point, codes, values):
    found = rounded(
        [[-1.0, 2.0, 0.5, 1.5], [0.0, 6.0, 4.0, 3.0]], WeightScheme(2, False, granularity)
    )
    assert np.allclose(found[1], scale)
    assert found[2].tolist() == zero_point
    assert found[0] == codes
    assert np.allclose(found[3], values)


def test_groups_are_row_aligned_and_the_last_is_shorter():
    weight = torch.arange(2 * 404.0).reshape(2, 404)
    grouped = to_groups(weight, PerGroup(128))
    assert grouped.shape == (2, 4, 128)
    assert torch.equal(grouped[1, 3, :20], weight[1, 384:])
    assert not grouped[1, 3, 20:].any()
    assert torch.equal(from_groups(grouped, weight.shape), weight)
    low, high = weight_range(weight, PerGroup(128))
    assert high.tolist() == [[127.0, 255.0, 383.0, 403.0], [531.0, 659.0, 787.0, 807.0]]
    assert not low.any()


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(), PerGroup(5), PerGroup(12)], ids=str
)
@pytest.mark.parametrize("shape", [(7, 12), (1, 12), (12, 1)], ids=str)
def test_splitting_into_groups_loses_nothing(granularity, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(from_groups(to_groups(weight, granularity), weight.shape), weight)


def test_a_group_does_not_see_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 404, generator=generator)
    changed = weight.clone()
    changed[2, 130] = 50.0
    scheme = WeightScheme(4, granularity=PerGroup(128))
    before, after = (torch.tensor(rounded(w.tolist(), scheme)[3]) for w in (weight, changed))
    differing = (before != after).nonzero()
    assert {tuple(index) for index in differing.tolist()} <= {(2, c) for c in range(128, 256)}
    assert len(differing) > 100


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_all_zero_rows_get_scale_one(bits, symmetric):
    scheme = WeightScheme(bits, symmetric)
    codes, scale, zero_point, values = rounded([[0.0] * 4, [5.0, -5.0, 0.5, 0.25]], scheme)
    assert scale[0] == [1.0]
    assert scale[1] != [1.0]
    assert codes[0] == values[0] == [0, 0, 0, 0]
    assert symmetric or zero_point[0].tolist() == [0.0]


@pytest.mark.parametrize("value", [1e-44, 1e-37])
def test_a_range_too_narrow_for_a_scale_counts_as_zero(value):
    tiny = torch.tensor([[value, -value, 0.0]])
    assert symmetric_scale(tiny.abs().amax(-1), 8).tolist() == [1.0]
    assert not fake_quantize_rows(tiny, 8, symmetric=False).any()
    assert not fake_quantize_rows(tiny, 8, symmetric=True).any()


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [(2.0, 3.0, 1.0, 0.0), (-3.0, -2.0, 1.0, 3.0), (-1.0, 2.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.0)],
)
def test_zero_is_always_on_the_grid(low, high, scale, zero_point):
    found = affine_parameters(torch.tensor(low), torch.tensor(high), bits=2)
    assert [value.item() for value in found] == [scale, zero_point]


def test_values_outside_a_given_range_are_clamped():
    scale, zero_point = affine_parameters(torch.tensor(-1.0), torch.tensor(2.0), bits=2)
    x = torch.tensor([-9.0, -1.0, 0.4, 2.0, 9.0])
    codes = quantize(x, scale, zero_point, 2, symmetric=False)
    assert codes.tolist() == [0.0, 0.0, 1.0, 3.0, 3.0]


def test_half_goes_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    codes = quantize(x, torch.tensor(1.0), None, 8, symmetric=True)
    assert codes.tolist() == [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 4.0]


def numpy_definition(x, bits, symmetric):
    """The definition, row by row, in NumPy's float32."""
    x = np.asarray(x, np.float32)
    if symmetric:
        qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = np.abs(x).max(-1, keepdims=True) / np.float32(qmax)
        zero_point = np.float32(0)
    else:
        qmin, qmax = 0, 2**bits - 1
        low = np.minimum(x.min(-1, keepdims=True), np.float32(0))
        high = np.maximum(x.max(-1, keepdims=True), np.float32(0))
        scale = (high - low) / np.float32(qmax)
        zero_point = np.clip(np.rint(-low / np.where(scale == 0, 1, scale)), qmin, qmax)
    scale = np.where(scale == 0, np.float32(1), scale)
    codes = np.clip(np.rint(x / scale) + zero_point, qmin, qmax)
    return scale * (codes - zero_point).astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_rows_follow_the_definition_in_float32(bits, symmetric, dtype):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3000, 41, generator=generator).to(dtype)
    x[1] = 0
    x[2] = x[2].abs() + 1
    x[3] = -x[3].abs() - 1
    expected = numpy_definition(x.float().numpy(), bits, symmetric)
    found = fake_quantize_rows(x, bits, symmetric=symmetric)
    assert found.dtype == dtype
    assert torch.equal(found, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("bits", BITS)
def test_the_top_code_is_not_passed_where_both_ends_round_up(bits):
    top = 2**bits - 1
    # With scale 1 and low = -1.5 the zero point is 2 and high = top - 1.5 would get top + 1.
    x = torch.tensor([[-1.5, top - 1.5, 0.0, 1.0]])
    found = fake_quantize_rows(x, bits, symmetric=False)
    assert np.array_equal(found.numpy(), numpy_definition(x.numpy(), bits, symmetric=False))
    assert found[0, 1].item() == top - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [-0.01, -0.0])
def test_the_sign_of_a_zero_does_not_depend_on_its_column(value, dtype):
    x = torch.full((1, 37), value, dtype=dtype)
    x[0, 5] = -1.0
    zeros = fake_quantize_rows(x, 4, symmetric=False)[x == x[0, 0]]
    assert not zeros.any()
    assert zeros.signbit().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_static_follows_the_definition(bits, dtype):
    x = torch.randn(9, 20000, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, zero_point = affine_parameters(torch.tensor(-1.7), torch.tensor(2.9), bits)
    expected = fake_quantize(x, scale, zero_point, bits, symmetric=False)
    lowest, highest = (end - zero_point.item() for end in code_range(bits, symmetric=False))
    found = fake_quantize_static(x, scale, lowest, highest)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_torch_per_tensor(bits):
    # torch multiplies by the reciprocal, which is exact for a power of two.
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 4
    for symmetric, zero_point in ((True, 0), (False, 1)):
        qmin, qmax = code_range(bits, symmetric=symmetric)
        theirs = torch.fake_quantize_per_tensor_affine(x, 0.125, zero_point, qmin, qmax)
        ours = fake_quantize(
            x, torch.tensor(0.125), torch.tensor(float(zero_point)), bits, symmetric=symmetric
        )
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_torch_per_channel(bits):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 4
    scale = torch.tensor([0.5, 0.25, 1.0, 0.125, 2.0])
    qmin, qmax = code_range(bits, symmetric=True)
    zeros = torch.zeros(5, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zeros, 0, qmin, qmax)
    assert torch.equal(fake_quantize(x, scale[:, None], None, bits, symmetric=True), theirs)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", [(True, "absmax"), (False, "absmax"), (True, "study")], ids=str)
def test_rounding_error_is_at_most_half_a_step(bits, scheme):
    symmetric, rule = scheme
    scheme = WeightScheme(bits, symmetric, PerGroup(16), rule)
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(bits))
    scale, zero_point = weight_parameters(weight_range(weight, PerGroup(16)), scheme)
    codes = quantize_weight(weight, scale, zero_point, scheme)
    error = (dequantize_weight(codes, scale, zero_point, scheme) - weight).abs()
    # The study's rule clamps its top end by another half step; a rounded zero point moves the
    # asymmetric grid's ends by half a step.
    steps = 0.5 if symmetric and rule == "absmax" else 1.0
    limit = to_groups(torch.ones_like(weight), PerGroup(16)) * scale[..., None] * (steps + 1e-5)
    assert (error <= from_groups(limit, weight.shape)).all()
    qmin, qmax = code_range(bits, symmetric=symmetric)
    assert codes.min() >= qmin
    assert codes.max() <= qmax


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_own_row_visibly(symmetric, bad):
    x = torch.ones(4, 8)
    x[1, 3] = bad
    found = fake_quantize_rows(x, 8, symmetric=symmetric)
    assert found[1].isnan().all()
    assert found[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_nothing_to_round(shape, dtype):
    x = torch.empty(shape, dtype=dtype)
    assert fake_quantize_rows(x, 8, symmetric=False).shape == shape
    assert fake_quantize_static(x, torch.tensor(0.5), -2.0, 1.0).shape == shape


def test_within_grid_is_where_static_rounding_does_not_clip():
    x = torch.tensor([-1.3, -1.2, 0.0, 0.7, 0.8, float("nan"), float("inf")])
    inside = within_grid(x, torch.tensor(0.5), -2.0, 1.0)
    assert inside.tolist() == [False, True, True, True, False, False, False]


def test_static_keeps_nan():
    x = torch.tensor([[float("nan"), 1.0]])
    assert fake_quantize_static(x, torch.tensor(0.5), -2.0, 1.0).isnan().tolist() == [[True, False]]
