"""GPTQ against the textbook update: one column at a time, the remaining Hessian inverted anew."""

import itertools
import logging

import numpy as np
import pytest
import torch

from quant_support import (
    LINEARS,
    TinyCalibration,
    TinyWorldModel,
    actions,
    assert_unchanged,
    observations,
    run,
    snapshot,
)
from quantwm.errors import NonFiniteError, PlanError, UsageError
from quantwm.methods import quantize, resolve_plan
from quantwm.methods.gptq import GPTQ, column_order, inverse_factor, rounded_columns
from quantwm.quant import QuantConv2d, QuantPlan, load_quantized, save_quantized
from quantwm.quant.modules import QuantizedWeight
from quantwm.quant.primitives import weight_parameters, weight_range
from quantwm.quant.scheme import PerChannel, PerGroup, PerTensor, WeightScheme

ROWS, WIDTH = 12, 20
SIZES = {"tensor": PerTensor(), "channel": PerChannel(), "g8": PerGroup(8)}
GRIDS = {
    "symmetric": {"symmetric": True},
    "study": {"symmetric": True, "scale_rule": "study"},
    "asymmetric": {"symmetric": False},
}
SCHEMES = [
    pytest.param(WeightScheme(bits, granularity=granularity, **grid), id=f"w{bits}-{size}-{name}")
    for bits, (size, granularity), (name, grid) in itertools.product(
        (2, 4), SIZES.items(), GRIDS.items()
    )
]


class ManyFrames(TinyCalibration):
    """Forty frames, so that layers read more tokens than they are wide."""

    def encode(self, world_model):
        self.encoded += 1
        with torch.no_grad():
            return world_model.encode(observations(40))

    def roll_out(self, world_model, latents):
        with torch.no_grad():
            world_model.rollout(latents, actions(40))


def problem(seed=0, rows=ROWS, width=WIDTH):
    """A weight, and the Hessian of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    few, noise, mixing = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((500, 6), (500, width), (6, width))
    )
    x = (few @ mixing + 0.3 * noise) * torch.linspace(0.5, 2, width)
    return weight, x.T @ x


def gptq(weight, hessian, scheme, extent=None, **options):
    extent = weight_range(weight, scheme.granularity) if extent is None else extent
    return GPTQ(**options).quantized("layer", weight, hessian, extent, scheme)


def output_error(weight, quantized, hessian):
    """tr((W - Ŵ) H (W - Ŵ)ᵀ)."""
    difference = (weight - quantized.value).double()
    return torch.trace(difference @ hessian @ difference.T).item()


def grids(weight, scheme):
    """Scale and zero point of every single weight, (out, in)."""
    rows, width = weight.shape
    size = {PerTensor: None, PerChannel: width}.get(type(scheme.granularity), 8)
    scale, zero = np.empty_like(weight), np.zeros_like(weight)
    parts = [np.s_[:, :]] if size is None else []
    for row, start in itertools.product(range(rows), range(0, width, size or width)):
        parts += [] if size is None else [np.s_[row, start : start + size]]
    levels = 2**scheme.bits - 1
    for part in parts:
        low, high = min(weight[part].min(), 0), max(weight[part].max(), 0)
        if scheme.symmetric:
            steps = levels / 2 if scheme.scale_rule == "study" else 2 ** (scheme.bits - 1) - 1
            scale[part] = np.float32(max(-low, high)) / np.float32(steps)
        else:
            scale[part] = (high - low) / np.float32(levels)
            zero[part] = np.rint(-low / scale[part])
    return scale, zero


def textbook(weight, hessian, scheme, *, act_order, damping=0.01):
    """Optimal Brain Surgeon: round a column, move the others by -e/[F⁻¹]₀₀ · F⁻¹[:, 0].

    F is the Hessian of the columns that are not rounded yet, inverted at each step.
    """
    w, untouched, hessian = weight.double().numpy().copy(), weight.numpy(), hessian.numpy()
    scale, zero = grids(untouched, scheme)
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    low = -(2 ** (scheme.bits - 1)) if scheme.symmetric else 0
    high = low + 2**scheme.bits - 1
    left = list(np.argsort(-np.diag(hessian))) if act_order else list(range(len(hessian)))
    codes = np.empty_like(w)
    while left:
        column = left[0]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        # The study's rule puts the largest weight on a tie: hence float32, as quantwm divides.
        steps = w[:, column].astype(np.float32) / scale[:, column]
        moved = steps[w[:, column] != untouched[:, column]]
        assert np.all(np.abs(moved - np.floor(moved) - 0.5) > 1e-6), "a tie: take another seed"
        codes[:, column] = np.clip(np.rint(steps) + zero[:, column], low, high)
        rounded = scale[:, column] * (codes[:, column] - zero[:, column]).astype(np.float32)
        error = w[:, column] - rounded
        w[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    return codes


@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in_order"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_those_of_the_textbook(scheme, act_order):
    weight, hessian = problem()
    expected = textbook(weight, hessian, scheme, act_order=act_order)
    found = gptq(weight, hessian, scheme, act_order=act_order, block_size=7)
    assert np.array_equal(found.codes.numpy(), expected)
    assert not torch.equal(found.codes, QuantizedWeight.from_float(weight, scheme).codes)


def test_the_order_of_columns_matters():
    weight, hessian = problem()
    ordered, plain = (gptq(weight, hessian, WeightScheme(3), act_order=a) for a in (True, False))
    assert not torch.equal(ordered.codes, plain.codes)


def test_columns_are_ordered_by_their_inputs_size():
    hessian = torch.diag(torch.tensor([1.0, 0.0, 5.0, 1.0, 7.0], dtype=torch.float64))
    assert column_order(hessian, act_order=True).tolist() == [4, 2, 0, 3, 1]
    assert column_order(hessian, act_order=False).tolist() == [0, 1, 2, 3, 4]


def test_the_factor_is_that_of_the_inverse():
    _, hessian = problem()
    upper = inverse_factor(hessian, 0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(
        upper.T @ upper @ damped, torch.eye(WIDTH, dtype=torch.float64), atol=1e-10
    )


@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in_order"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_block_size_changes_no_code(scheme, act_order):
    weight, hessian = problem(1)
    one, *others = (
        gptq(weight, hessian, scheme, act_order=act_order, block_size=size).codes
        for size in (1, 3, 20, 128)
    )
    for other in others:
        assert torch.equal(one, other)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_uncorrelated_inputs_give_rounding_to_nearest(scheme):
    weight, _ = problem()
    nearest = QuantizedWeight.from_float(weight, scheme)
    uneven = torch.diag(torch.rand(WIDTH, dtype=torch.float64) + 0.1)
    for hessian in (torch.eye(WIDTH, dtype=torch.float64), uneven):
        found = gptq(weight, hessian, scheme)
        assert torch.equal(found.codes, nearest.codes)
        assert torch.equal(found.value, nearest.value)


@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in_order"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_output_error_is_below_that_of_rounding_to_nearest(scheme, act_order):
    ratios = []
    for seed in range(8):
        weight, hessian = problem(seed, rows=32)
        nearest = QuantizedWeight.from_float(weight, scheme)
        found = gptq(weight, hessian, scheme, act_order=act_order)
        ratios.append(output_error(weight, found, hessian) / output_error(weight, nearest, hessian))
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.75


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reported_error_is_the_damped_output_error(scheme):
    weight, hessian = problem(2)
    scale, zero_point = weight_parameters(weight_range(weight, scheme.granularity), scheme)
    order, factor = torch.arange(WIDTH), inverse_factor(hessian, 0.01)
    codes, error = rounded_columns(weight, order, factor, scale, zero_point, scheme, 6)
    stored = None if zero_point is None else zero_point.to(torch.uint8)
    found = QuantizedWeight(codes, scale, stored, scheme, torch.float32)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    assert error.item() == pytest.approx(output_error(weight, found, damped), rel=1e-6)


@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in_order"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_dead_channel_is_rounded_to_nearest_and_influences_nothing(scheme, act_order):
    weight, hessian = problem(3)
    dead = [5, 19]
    hessian[dead] = 0
    hessian[:, dead] = 0
    nearest = QuantizedWeight.from_float(weight, scheme)
    extent = weight_range(weight, scheme.granularity)
    found = gptq(weight, hessian, scheme, act_order=act_order)
    assert torch.equal(found.codes[:, dead], nearest.codes[:, dead])
    changed = weight.clone()
    changed[:, dead] *= -0.5
    live = [column for column in range(WIDTH) if column not in dead]
    beside = gptq(changed, hessian, scheme, extent, act_order=act_order)
    assert torch.equal(beside.codes[:, live], found.codes[:, live])
    if not isinstance(scheme.granularity, PerGroup):
        smaller = hessian[live][:, live]
        alone = gptq(weight[:, live], smaller, scheme, extent, act_order=act_order)
        assert torch.equal(alone.codes, found.codes[:, live])


def test_a_layer_that_reads_only_zeros_is_rounded_to_nearest():
    weight, hessian = problem()
    found = gptq(weight, hessian * 0, WeightScheme(3))
    assert torch.equal(found.codes, QuantizedWeight.from_float(weight, WeightScheme(3)).codes)


def test_damping_is_relative_and_fades_the_method_out():
    weight, hessian = problem()
    scheme = WeightScheme(3, granularity=PerGroup(8))
    found = gptq(weight, hessian, scheme)
    assert torch.equal(gptq(weight, hessian * 1024, scheme).codes, found.codes)
    nearest = QuantizedWeight.from_float(weight, scheme)
    assert torch.equal(gptq(weight, hessian, scheme, damping=1e9).codes, nearest.codes)


def test_ranges_are_those_that_clipping_chose():
    weight, hessian = problem()
    scheme = WeightScheme(4, symmetric=False, granularity=PerGroup(8))
    low, high = weight_range(weight, scheme.granularity)
    extent = low * 0.7, high * 0.6
    found = gptq(weight, hessian, scheme, extent)
    scale, zero_point = weight_parameters(extent, scheme)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.zero_point, zero_point.to(torch.uint8))
    nearest = QuantizedWeight.from_float(weight, scheme, extent)
    assert output_error(weight, found, hessian) < output_error(weight, nearest, hessian)


def test_an_indefinite_hessian_is_damped_more_with_a_warning(caplog):
    weight, hessian = problem(width=2)
    hessian = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        found = gptq(weight, hessian, WeightScheme(4))
    assert len(caplog.messages) == 3
    assert all("Hessian of layer " in message for message in caplog.messages)
    assert torch.equal(found.codes, gptq(weight, hessian, WeightScheme(4), damping=10.0).codes)


def test_a_hopeless_hessian_is_an_error_that_names_the_layer():
    weight, _ = problem(width=2)
    hessian = torch.tensor([[1.0, 99.0], [99.0, 1.0]], dtype=torch.float64)
    with pytest.raises(UsageError, match="Hessian of layer is not positive definite"):
        gptq(weight, hessian, WeightScheme(4))


def test_overflow_is_an_error_that_names_the_layer():
    weight, hessian = problem()
    weight[0, :2] = torch.tensor([3e38, -3e38])
    with pytest.raises(NonFiniteError, match="update of layer"):
        gptq(weight, hessian, WeightScheme(4, symmetric=False))
    hessian[3, 3] = float("inf")
    with pytest.raises(NonFiniteError, match="input of layer"):
        gptq(weight, hessian, WeightScheme(4))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("act_order", 1),
        ("damping", 0),
        ("damping", -0.01),
        ("damping", float("nan")),
        ("damping", float("inf")),
        ("damping", True),
        ("damping", "1%"),
        ("block_size", 0),
        ("block_size", 2.0),
        ("block_size", True),
    ],
)
def test_options_are_validated(option, value):
    with pytest.raises(UsageError, match=option):
        GPTQ(**{option: value})
    with pytest.raises(PlanError, match=option):
        quantize(TinyWorldModel(), QuantPlan({"*": "w4"}, method="gptq", options={option: value}))


# Whole models.

MODELS = [
    "w3",
    "w4g8",
    "w4-w_tensor-w_asymmetric",
    "w3g8a8",
    "w4a4-token",
    "w8-w_study",
]


def quantized(world_model, layers, **options):
    layers = {"*": layers} if isinstance(layers, str) else layers
    plan = QuantPlan(layers, **{"method": "gptq", **options})
    return quantize(world_model, plan, ManyFrames.of(world_model))


def moment_of(world_model, layer):
    """XᵀX of what a layer reads while calibration data are replayed."""
    seen = []
    hook = world_model.get_submodule(layer).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2).double())
    )
    calibration = ManyFrames.of(world_model)
    calibration.roll_out(world_model, calibration.encode(world_model))
    hook.remove()
    x = torch.cat(seen)
    return x.T @ x


@pytest.mark.parametrize("plan", MODELS)
def test_the_float_model_stays_and_a_saved_one_comes_back(tmp_path, plan):
    world_model = TinyWorldModel()
    before = snapshot(world_model)
    small = quantized(world_model, plan)
    assert_unchanged(world_model, before)
    save_quantized(small, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", TinyWorldModel(seed=9))
    assert_unchanged(loaded, snapshot(small))
    assert torch.equal(run(loaded), run(small))


@pytest.mark.parametrize("first", ["w2", "w4a3-token"])
def test_a_block_learns_from_what_it_reads_once_earlier_blocks_are_quantized(first):
    world_model = TinyWorldModel()
    small = quantized(world_model, {"encoder.*": first, "predictor.*": "w3"})
    halfway = quantized(world_model, {"encoder.*": first})
    for layer in ("predictor.fc1", "predictor.fc2"):
        weight = world_model.get_submodule(layer).weight.detach()
        there, apart = (
            gptq(weight, moment_of(model, layer), WeightScheme(3)).codes
            for model in (halfway, world_model)
        )
        codes = small.get_submodule(layer).stored_weight.codes
        assert torch.equal(codes, there)
        assert not torch.equal(codes, apart)


def test_it_brings_each_layers_outputs_closer():
    world_model = TinyWorldModel()
    plans = [quantized(world_model, "w3", method=method) for method in ("gptq", "rtn")]
    for layer in ("encoder.block.fc1", "encoder.block.fc2"):
        weight, hessian = (
            world_model.get_submodule(layer).weight.detach(),
            moment_of(world_model, layer),
        )
        better, nearest = (
            output_error(weight, small.get_submodule(layer).stored_weight, hessian)
            for small in plans
        )
        assert better < 0.6 * nearest


def test_with_omse_the_ranges_are_those_of_omse():
    world_model = TinyWorldModel()
    both, omse, rtn = (
        quantized(world_model, "w3g8", method=method) for method in ("gptq+omse", "omse", "rtn")
    )
    for layer in LINEARS:
        one, other, widest = (
            model.get_submodule(layer).stored_weight for model in (both, omse, rtn)
        )
        assert torch.equal(one.scale, other.scale)
        assert not torch.equal(one.codes, other.codes)
        assert (one.scale < widest.scale).any()


def test_options_of_a_plan_are_used():
    world_model = TinyWorldModel()
    found = quantized(world_model, "w3", options={"act_order": False, "damping": 0.5})
    layer = "encoder.block.fc2"
    weight, hessian = world_model.encoder.block.fc2.weight.detach(), moment_of(world_model, layer)
    codes = found.encoder.block.fc2.stored_weight.codes
    expected = gptq(weight, hessian, WeightScheme(3), act_order=False, damping=0.5)
    assert torch.equal(codes, expected.codes)
    assert not torch.equal(codes, gptq(weight, hessian, WeightScheme(3)).codes)


def test_a_patch_embedding_is_quantized_too():
    world_model = TinyWorldModel()
    plan = QuantPlan(
        {"encoder.patch": "w3", "*_input": "a8-token"},
        method="gptq",
        include=("patch_embedding", "attention_matmul"),
    )
    small = quantize(world_model, plan, ManyFrames.of(world_model))
    patch = small.encoder.patch
    assert isinstance(patch, QuantConv2d)
    images = torch.from_numpy(observations(40)["visual"]).squeeze(1) / 255 * 1.5
    x = images.unfold(1, 4, 4).unfold(2, 4, 4).flatten(0, 2).flatten(1).double()
    weight = world_model.encoder.patch.weight.detach().flatten(1)
    assert torch.equal(patch.stored_weight.codes, gptq(weight, x.T @ x, WeightScheme(3)).codes)


def test_half_precision_models_keep_their_compute_type():
    world_model = TinyWorldModel().to(torch.bfloat16)
    small = quantized(world_model, "w4g8")
    assert small.predictor.fc1.weight.dtype == torch.bfloat16
    assert small.predictor.fc1.stored_weight.scale.dtype == torch.float32
    assert run(small).isfinite().all()


def test_too_few_tokens_are_refused_with_both_numbers(monkeypatch):
    world_model = TinyWorldModel()
    plan = QuantPlan({"*": "w4"}, method="gptq")
    # Fewer tokens than inputs are not yet too few: damping makes up for the rank.
    assert run(quantize(world_model, plan, TinyCalibration.of(world_model))).isfinite().all()
    monkeypatch.setattr("quantwm.methods.gptq._LEAST_SHARE", 1)
    told = r"too few calibration samples.*encoder\.block\.fc2 read 12 tokens and is 20 wide"
    with pytest.raises(UsageError, match=told) as error:
        quantize(world_model, plan, TinyCalibration.of(world_model))
    assert "encoder.block.fc1" not in str(error.value)


def test_calibration_data_are_asked_for_beforehand():
    with pytest.raises(PlanError, match="'gptq' needs calibration data"):
        quantize(TinyWorldModel(), QuantPlan({"*": "w4"}, method="gptq"))


def test_a_plan_without_weights_is_refused():
    with pytest.raises(PlanError, match="gptq: no layer of the plan has quantized weights"):
        resolve_plan(QuantPlan({"*": "a8-token"}, "gptq"), TinyWorldModel())
    resolve_plan(QuantPlan({"*": "a8-token", "predictor.fc2": "w3"}, "gptq"), TinyWorldModel())
