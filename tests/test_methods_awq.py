"""AWQ: its scales, its clipping, what they leave unchanged, and what they are good for."""

import math

import numpy as np
import pytest
import torch

from dino_wm_support import relative, tiny_model
from quant_support import (
    LINEARS,
    TinyCalibration,
    TinyWorldModel,
    assert_unchanged,
    run,
    snapshot,
)
from quantwm.errors import NonFiniteError, PlanError, UsageError
from quantwm.methods import get_method, quantize, transformed
from quantwm.methods.awq import importance_scale, least_output_error_range
from quantwm.methods.omse import least_error_range
from quantwm.quant import QuantPlan, load_quantized, save_quantized
from quantwm.quant.primitives import weight_range
from quantwm.quant.scheme import LayerScheme
from scale_support import (
    FED,
    GatedWorldModel,
    calibration_of,
    folded_scale,
    greatest_change,
    outlier_model,
    outlier_world_model,
    output_error,
    rounded_weight,
    scaled_error,
    segments,
    tiny_inputs,
)


def awq(layers="*", scheme="w3", method="awq", **options):
    return QuantPlan({layers: scheme}, method, options=options)


def scaled(model, plan):
    return transformed(model, plan, TinyCalibration.of(model))


def weight_of(model, layer):
    return model.get_submodule(layer).weight.detach().double().numpy()


def grid_of_scales(x, grid):
    """mean|X|^r over √(max · min), r = 0, 1/grid, …"""
    mean = np.abs(x).mean((0, 1))
    powers = [mean ** (step / grid) for step in range(grid)]
    return [power / np.sqrt(power.max() * power.min()) for power in powers]


def test_scales_by_hand():
    magnitude = torch.tensor([1.0, 4.0, 0.0, 16.0])
    assert importance_scale(magnitude, 0.5).tolist() == [0.5, 1, 1, 2]
    assert importance_scale(magnitude, 0).tolist() == [1, 1, 1, 1]
    assert importance_scale(torch.zeros(3), 0.5).tolist() == [1, 1, 1]


SEARCHED = ["w2", "w3", "w3g5", "w3-w_asymmetric", "w2-w_tensor-w_study", "w3a4", "w3a4-dynamic"]


@pytest.mark.parametrize("scheme", SEARCHED)
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
def test_the_search_finds_the_least_error_of_its_grid(scheme, clip):
    model = outlier_world_model()
    changed = scaled(model, awq(scheme=scheme, grid=10, clip=clip))
    for layer, x in tiny_inputs(model).items():
        weight = weight_of(model, layer)
        scales = grid_of_scales(x, 10)
        errors = [scaled_error(x, weight, scale, scheme) for scale in scales]
        found = folded_scale(model, changed, FED[layer])
        assert any(np.allclose(found, scale, rtol=1e-5) for scale in scales)
        error = scaled_error(x, weight, found, scheme)
        assert error <= min(errors) * (1 + 1e-4)
        assert error <= scaled_error(x, weight, np.ones(len(scales[0])), scheme)


def test_quantization_scales_are_never_those_of_the_unscaled_weights():
    """The published study's code kept them while AWQ changed the weights."""
    model = outlier_world_model()
    changed = scaled(model, awq(grid=10))
    misled = 0
    for layer, x in tiny_inputs(model).items():
        weight, scales = weight_of(model, layer), grid_of_scales(x, 10)
        stale = [scaled_error(x, weight, scale, "w3", stale=True) for scale in scales]
        chosen_by_stale = scaled_error(x, weight, scales[int(np.argmin(stale))], "w3")
        found = scaled_error(x, weight, folded_scale(model, changed, FED[layer]), "w3")
        assert found <= chosen_by_stale * (1 + 1e-4)
        misled += found < 0.95 * chosen_by_stale
    assert misled  # else stale scales would have found the same
    small = quantize(model, awq(grid=10, clip=False), TinyCalibration.of(model))
    for layer in FED:
        expected = rounded_weight(weight_of(changed, layer), LayerScheme.parse("w3").weight)
        np.testing.assert_allclose(small.get_submodule(layer).weight, expected, rtol=1e-5)


def test_all_readers_of_a_normalisation_are_scaled_by_one_search():
    model = GatedWorldModel()
    changed = scaled(model, awq("predictor.fc1"))
    found = torch.from_numpy(
        weight_of(changed, "predictor.gate") / weight_of(model, "predictor.gate")
    )
    assert (found != 1).any()
    torch.testing.assert_close(
        found, folded_scale(model, changed, "predictor.norm").expand_as(found), rtol=1e-5, atol=0
    )
    assert relative(run(changed), run(model)) < 1e-5


@pytest.mark.parametrize("concat_dim", [0, 1])
@pytest.mark.parametrize("scheme", ["w3", "w4g10a8-dynamic"])
def test_the_float_model_computes_what_it_did(concat_dim, scheme):
    model = tiny_model(concat_dim=concat_dim)
    calibration = calibration_of(model)
    before = snapshot(model)
    changed = transformed(model, awq(scheme=scheme), calibration)
    assert_unchanged(model, before)
    assert greatest_change(model, changed) < 1e-5
    norms = [g.producer for g in model.quantizable_groups() if g.producer is not None]
    assert any((folded_scale(model, changed, norm) != 1).any() for norm in norms)


def test_dead_channels_are_left_alone():
    model = outlier_world_model()
    for norm in FED.values():
        model.get_submodule(norm).weight.data[3] = model.get_submodule(norm).bias.data[3] = 0
    changed = scaled(model, awq(scheme="w2"))
    for layer in FED:
        assert (weight_of(changed, layer)[:, 3] == weight_of(model, layer)[:, 3]).all()
    assert relative(run(changed), run(model)) < 1e-5
    assert run(quantize(model, awq(), TinyCalibration.of(model))).isfinite().all()


CLIPPED = [
    "w2",
    "w3",
    "w3-w_asymmetric",
    "w3g5",
    "w3g5-w_asymmetric",
    "w4g12-w_study",
    "w3-w_tensor",
]
RATIOS = tuple(np.linspace(1, 0.4, 7))


@pytest.mark.parametrize("tokens", [8, 50], ids=["fewer tokens than inputs", "more"])
@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_is_the_best_of_all_ratios_for_every_row_and_group(name, tokens):
    scheme = LayerScheme.parse(name).weight
    generator = np.random.default_rng(3)
    weight = generator.standard_t(3, (6, 12)).astype(np.float32)
    x = (generator.standard_normal((tokens, 12)) * generator.uniform(0.1, 3, 12)).astype(np.float32)
    low, high = least_output_error_range(
        torch.from_numpy(weight), scheme, torch.from_numpy(x[None]), RATIOS
    )
    full_low, full_high = weight_range(torch.from_numpy(weight), scheme.granularity)
    found = torch.where(full_high > 0, high / full_high, low / full_low)
    torch.testing.assert_close(low, full_low * found)
    parts = segments(scheme, 12)
    errors = np.array(
        [
            [
                np.square(
                    x[:, part] @ (rounded_weight(weight, scheme, ratio) - weight)[:, part].T
                ).sum(0)
                for part in parts
            ]
            for ratio in RATIOS
        ]
    ).transpose(0, 2, 1)  # ratios, rows, groups
    if low.shape == (1, 1):
        errors = errors.sum((1, 2), keepdims=True)
    assert found.shape == errors.shape[1:]
    index = np.abs(np.array(RATIOS)[:, None, None] - found.numpy()).argmin(0)
    assert np.allclose(np.array(RATIOS)[index], found, rtol=1e-5)
    chosen = np.take_along_axis(errors, index[None], 0)[0]
    assert (chosen <= errors.min(0) * (1 + 1e-3)).all()
    assert len(set(index.flatten())) > 1 or low.shape == (1, 1)


def test_every_quantized_weight_is_clipped_with_the_inputs_it_will_read():
    model = outlier_world_model()
    changed = scaled(model, awq())
    small = quantize(model, awq(), TinyCalibration.of(model))
    inputs = tiny_inputs(changed)
    for layer in LINEARS:
        weight = changed.get_submodule(layer).weight.detach()
        scheme = LayerScheme.parse("w3").weight
        steps = weight_range(weight, scheme.granularity)
        ratio = (
            small.get_submodule(layer).stored_weight.scale * 3 / torch.maximum(-steps[0], steps[1])
        )
        assert ((ratio > 0.49) & (ratio < 1 + 1e-5)).all()
        assert len(ratio.unique()) > 2
        if layer in inputs:
            x = torch.from_numpy(inputs[layer]).float()
            low, high = least_output_error_range(
                weight, scheme, x, np.linspace(1, 0.5, 20).tolist()
            )
            torch.testing.assert_close(
                small.get_submodule(layer).stored_weight.scale, torch.maximum(-low, high) / 3
            )


def test_without_clip_ranges_are_min_max():
    model = outlier_world_model()
    small = quantize(model, awq(clip=False), TinyCalibration.of(model))
    plain = quantize(model, "w3")
    for layer in set(LINEARS) - set(FED):
        assert torch.equal(small.get_submodule(layer).weight, plain.get_submodule(layer).weight)


def test_another_part_that_clips_takes_its_place():
    model = outlier_world_model()
    plan = awq(scheme="w2", method="awq+omse", grid=10)
    changed, small = scaled(model, plan), quantize(model, plan, TinyCalibration.of(model))
    omse = get_method("omse").parts[0]
    for layer in LINEARS:
        weight = changed.get_submodule(layer).weight.detach()
        low, high = least_error_range(weight, LayerScheme.parse("w2").weight, omse.candidates)
        torch.testing.assert_close(
            small.get_submodule(layer).stored_weight.scale, torch.maximum(-low, high)
        )
    own = scaled(model, awq(scheme="w2", grid=10))
    norms = FED.values()
    assert any(
        not torch.allclose(folded_scale(model, changed, n), folded_scale(model, own, n))
        for n in norms
    )


def test_one_replay_serves_the_whole_model():
    model = outlier_world_model()
    calibration = TinyCalibration.of(model)
    quantize(model, awq(), calibration)
    assert calibration.encoded == len(calibration.seen) == 1


def test_its_inputs_are_those_of_the_float_model_whatever_changes_meanwhile():
    model = outlier_world_model()
    calibration = TinyCalibration.of(model)
    alone, corrected = (
        quantize(model, awq(scheme="w2", method=method), calibration)
        for method in ("awq", "awq+bias_correction")
    )
    for layer in LINEARS:
        one, other = (m.get_submodule(layer).stored_weight for m in (alone, corrected))
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("scheme", ["w4", "w3", "w3g8", "w4-w_asymmetric"])
def test_outliers_hurt_less_than_without(scheme):
    model = outlier_model()
    calibration, held_out = calibration_of(model), calibration_of(model, seed=1)
    plain, scales, both = (
        output_error(model, quantize(model, plan, calibration), held_out)
        for plan in (scheme, awq(scheme=scheme, clip=False), awq(scheme=scheme))
    )
    assert scales < 0.7 * plain
    assert both < 0.7 * plain


@pytest.mark.parametrize(
    "scheme", ["w2-w_tensor-w_asymmetric", "w5a3-w_study", "w4g7a8-a_symmetric", "w8a8-token"]
)
def test_every_scheme_and_kind_of_layer_goes_with_it(scheme, tmp_path):
    model = outlier_world_model()
    layers = {"*": scheme, "*_input": "a8-token", "predictor.fc1": "a8"}
    include = ("attention_matmul", "patch_embedding")
    plan = QuantPlan(layers, "awq", include=include, options={"grid": 3, "clip_ratios": 3})
    before = snapshot(model)
    small = quantize(model, plan, TinyCalibration.of(model))
    assert_unchanged(model, before)
    assert torch.equal(small.predictor.norm.weight, model.predictor.norm.weight)
    assert run(small).isfinite().all()
    save_quantized(small, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", TinyWorldModel(seed=9))
    assert_unchanged(loaded, snapshot(small))
    assert torch.equal(run(loaded), run(small))


def test_inputs_that_are_not_finite_name_their_layer():
    model = TinyWorldModel()
    model.action_embed.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"input of predictor\.fc1 holds NaN"):
        quantize(model, awq("predictor.fc1"), TinyCalibration.of(model))


def test_errors_that_overflow_name_their_layer():
    model = TinyWorldModel()
    model.predictor.norm.weight.data *= 1e30
    with pytest.raises(NonFiniteError, match=r"output error of predictor\.fc1 is"):
        quantize(model, awq("predictor.fc1"), TinyCalibration.of(model))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (awq("*.fc2", "a8"), "no layer of the plan has quantized weights: encoder.block.fc2, pre"),
        (awq("*.fc2", clip=False), "is fed by one: encoder.block.fc2, predictor.fc2; add layers"),
    ],
    ids=["inputs only", "nothing to scale"],
)
def test_a_plan_without_anything_to_do_is_refused_before_computing(plan, message):
    model = TinyWorldModel()
    calibration = TinyCalibration.of(model)
    with pytest.raises(PlanError, match=message):
        quantize(model, plan, calibration)
    assert calibration.encoded == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 0}, "awq.grid is an integer of at least 1, got 0"),
        ({"clip_ratios": True}, "awq.clip_ratios is an integer of at least 1, got True"),
        ({"clip": 1}, "awq.clip is true or false, got 1"),
        ({"lowest": 0}, "awq.lowest is above 0 and at most 1, got 0"),
        ({"lowest": math.nan}, "awq.lowest is above 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        get_method("awq", options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("awq+omse", {"awq.lowest": 0.9}, r"awq\.lowest changes nothing, because another part"),
        ("awq", {"clip": False, "clip_ratios": 5}, r"clip_ratios changes .* because clip is false"),
    ],
    ids=str,
)
def test_options_of_its_clipping_are_refused_where_it_does_not_clip(method, options, message):
    get_method("awq", {"lowest": 0.9, "clip_ratios": 5})
    with pytest.raises(UsageError, match=message):
        get_method(method, options)
