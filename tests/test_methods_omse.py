"""OMSE against a brute-force search written in numpy."""

import itertools

import numpy as np
import pytest
import torch

from quant_support import LINEARS, TinyCalibration, TinyWorldModel, assert_unchanged, snapshot
from quantwm.errors import PlanError, UsageError
from quantwm.methods import get_method, quantize
from quantwm.methods.omse import OMSE, least_error_range
from quantwm.quant import QuantPlan
from quantwm.quant.primitives import weight_range
from quantwm.quant.reconstruction import rounded_weight
from quantwm.quant.scheme import PerChannel, PerGroup, PerTensor, WeightScheme

RATIOS = OMSE(ratios=27).candidates
GRANULARITIES = {
    "tensor": PerTensor(),
    "channel": PerChannel(),
    "g4": PerGroup(4),
    "g5": PerGroup(5),
}
GRIDS = {
    "symmetric": {"symmetric": True},
    "study": {"symmetric": True, "scale_rule": "study"},
    "asymmetric": {"symmetric": False},
}
CASES = [
    pytest.param(WeightScheme(bits, granularity=granularity, **grid), id=f"w{bits}-{size}-{name}")
    for bits, (size, granularity), (name, grid) in itertools.product(
        (2, 3, 4, 8), GRANULARITIES.items(), GRIDS.items()
    )
]


def weights(rows=6, width=12, seed=0, *, heavy=False):
    rng = np.random.default_rng(seed)
    values = rng.standard_t(4, (rows, width)) if heavy else rng.normal(0.1, 1, (rows, width))
    return torch.from_numpy(values.astype(np.float32))


def groups(weight, granularity):
    """What shares a scale, as flat float64 arrays, in the order of (rows, groups)."""
    matrix = weight.double().numpy()
    if isinstance(granularity, PerTensor):
        return [matrix.ravel()]
    size = granularity.size if isinstance(granularity, PerGroup) else matrix.shape[1]
    return [row[i : i + size] for row in matrix for i in range(0, matrix.shape[1], size)]


def rounded(values, low, high, scheme):
    """Numpy's own rounding of a group to the grid from low to high."""
    if scheme.symmetric:
        steps = 2 ** (scheme.bits - 1) - 1
        steps = (2**scheme.bits - 1) / 2 if scheme.scale_rule == "study" else steps
        scale, zero = max(-low, high) / steps, 0
        bottom, top = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    else:
        bottom, top = 0, 2**scheme.bits - 1
        scale = (high - low) / top
        zero = np.clip(np.rint(-low / scale), bottom, top)
    return (np.clip(np.rint(values / scale) + zero, bottom, top) - zero) * scale


def squared_error(values, low, high, scheme):
    return np.square(rounded(values, low, high, scheme) - values).sum()


def full_range(values):
    return min(values.min(), 0.0), max(values.max(), 0.0)


@pytest.mark.parametrize("scheme", CASES)
def test_every_group_has_the_least_error_of_a_brute_force_search(scheme):
    weight = weights()
    low, high = (
        end.double().flatten().numpy() for end in least_error_range(weight, scheme, RATIOS)
    )
    for number, values in enumerate(groups(weight, scheme.granularity)):
        bottom, top = full_range(values)
        errors = [squared_error(values, bottom * r, top * r, scheme) for r in RATIOS]
        own = squared_error(values, low[number], high[number], scheme)
        assert own == pytest.approx(min(errors), rel=1e-4, abs=1e-10)
        # The range is one of those that were to be tried, both ends shrunk alike.
        ratio = high[number] / top if top else low[number] / bottom
        assert min(abs(ratio - r) for r in RATIOS) < 1e-6
        assert low[number] == pytest.approx(bottom * ratio, rel=1e-6)


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy_tailed"])
@pytest.mark.parametrize("scheme", CASES)
def test_the_error_is_never_above_that_of_round_to_nearest(scheme, heavy):
    weight = weights(8, 400, seed=1, heavy=heavy)
    plain = rounded_weight(weight, scheme, None)
    clipped = rounded_weight(weight, scheme, least_error_range(weight, scheme, RATIOS))
    before, after = (
        np.array([np.square(g).sum() for g in groups(weight - new, scheme.granularity)])
        for new in (plain, clipped)
    )
    assert np.all(after <= before * (1 + 1e-5))
    if heavy and scheme.bits in (3, 4) and not isinstance(scheme.granularity, PerGroup):
        assert np.all(after < before * 0.95)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_padding_of_a_ragged_group_adds_no_error(grid):
    # All positive, so that zero is at the very end of an asymmetric grid.
    for weight in (weights(), weights().abs() + 0.5):
        grouped = WeightScheme(3, granularity=PerGroup(5), **grid)
        last = least_error_range(weight, grouped, RATIOS)
        alone = least_error_range(weight[:, 10:], WeightScheme(3, **grid), RATIOS)
        for end, own in zip(last, alone, strict=True):
            torch.testing.assert_close(end[:, 2:], own)


def test_equally_good_ratios_give_the_largest():
    # On a two-bit grid of -2, -1, 0 and 1 steps, -1 is met by one step of 1 and two of a half.
    weight = torch.tensor([[-1.0, 0.0, -1.0]])
    for ratios in ([0.5, 1.0], [1.0, 0.5]):
        low, high = least_error_range(weight, WeightScheme(2), ratios)
        assert (low.item(), high.item()) == (-1, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_groups_of_zeros_and_of_bad_values_keep_their_range(bad):
    weight = weights(3, 10)
    weight[0] = 0
    clean = least_error_range(weight, WeightScheme(3), RATIOS)
    weight[1, 4] = bad
    low, high = least_error_range(weight, WeightScheme(3), RATIOS)
    assert (low[0].item(), high[0].item()) == (0, 0)
    assert torch.equal(low[2], clean[0][2])
    assert torch.equal(high[2], clean[1][2])
    expected = weight_range(weight, PerChannel())
    assert torch.equal(low[1].nan_to_num(), expected[0][1].nan_to_num())
    assert torch.equal(high[1].nan_to_num(), expected[1][1].nan_to_num())


def test_rows_do_not_depend_on_how_many_are_searched_at_once(monkeypatch):
    weight, scheme = weights(40, 30), WeightScheme(3, granularity=PerGroup(8))
    whole = least_error_range(weight, scheme, RATIOS)
    monkeypatch.setattr("quantwm.methods.omse._CACHE_ELEMENTS", 100)
    parts = least_error_range(weight, scheme, RATIOS)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_the_search_is_in_float32_whatever_the_weights_type():
    weight = weights().bfloat16()
    own = least_error_range(weight, WeightScheme(4), RATIOS)
    exact = least_error_range(weight.float(), WeightScheme(4), RATIOS)
    assert all(torch.equal(one, other) for one, other in zip(own, exact, strict=True))
    assert own[0].dtype == torch.float32


def test_a_quantized_model_holds_the_codes_of_the_search():
    world_model = TinyWorldModel()
    before = snapshot(world_model)
    small = quantize(world_model, QuantPlan({"*": "w3"}, "omse"))
    ratios = np.linspace(1, 0.35, 101)
    clipped = 0
    for name in LINEARS:
        layer = small.get_submodule(name)
        for row, codes, scale in zip(
            world_model.get_submodule(name).weight.detach().double().numpy(),
            layer.stored_weight.codes.numpy(),
            layer.stored_weight.scale.flatten().tolist(),
            strict=True,
        ):
            bottom, top = full_range(row)
            errors = [
                squared_error(row, bottom * r, top * r, WeightScheme(3)) for r in ratios.tolist()
            ]
            ratio = ratios[np.argmin(errors)]
            step = np.abs(row).max() * ratio / 3
            assert scale == pytest.approx(step, rel=1e-6)
            assert np.array_equal(codes, np.clip(np.rint(row / step), -4, 3))
            clipped += ratio < 1
    assert clipped > len(LINEARS)
    assert_unchanged(world_model, before)


EVERYTHING = QuantPlan(
    {"*": "w3g5a8", "predictor.fc*": "w4-w_asymmetric", "*_input": "a8", "encoder.patch": "w2g7"},
    include=("attention_matmul", "patch_embedding"),
)


def test_ratio_one_alone_is_round_to_nearest():
    world_model = TinyWorldModel()
    calibration = TinyCalibration.of(world_model)
    form = EVERYTHING.to_dict()
    alone = QuantPlan.from_dict({**form, "method": "omse", "options": {"ratios": 1}})
    plain = quantize(world_model, EVERYTHING, calibration)
    assert_unchanged(quantize(world_model, alone, calibration), snapshot(plain))


def test_every_kind_of_layer_with_weights_is_clipped():
    world_model = TinyWorldModel()
    calibration = TinyCalibration.of(world_model)
    plain = quantize(world_model, EVERYTHING, calibration)
    small = quantize(
        world_model, QuantPlan.from_dict({**EVERYTHING.to_dict(), "method": "omse"}), calibration
    )
    for name in (*LINEARS, "encoder.patch"):
        weight = world_model.get_submodule(name).weight.detach().flatten(1)
        before, after = (
            (weight - m.get_submodule(name).weight).square().sum() for m in (plain, small)
        )
        assert after < before * 0.99
    assert torch.equal(small.predictor.q_input.scale, plain.predictor.q_input.scale)


def test_the_candidates_are_those_of_the_study():
    assert OMSE().candidates == pytest.approx(np.linspace(1, 0.35, 101))
    assert OMSE(lowest=1).candidates == (1.0,) * 101
    assert OMSE(ratios=1).candidates == (1.0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": 0}, "omse.ratios must be an integer of at least 1, got 0"),
        ({"ratios": 10.0}, "got 10.0"),
        ({"ratios": True}, "got True"),
        ({"lowest": 0}, "omse.lowest must be above 0 and at most 1, got 0"),
        ({"lowest": 1.1}, "got 1.1"),
        ({"lowest": "0.5"}, "got '0.5'"),
        ({"lowest": float("nan")}, "got nan"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        get_method("omse", options)


def test_a_plan_without_weights_is_refused():
    with pytest.raises(PlanError, match="omse: no layer of the plan has quantized weights to clip"):
        quantize(TinyWorldModel(), QuantPlan({"*": "a8-token"}, "omse"))
    quantize(TinyWorldModel(), QuantPlan({"*": "a8-token", "predictor.fc2": "w3"}, "omse"))
