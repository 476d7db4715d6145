"""SmoothQuant: its scales, what they leave unchanged, and what they are good for."""

import numpy as np
import pytest
import torch

from dino_wm_support import relative, tiny_model
from quant_support import TinyCalibration, TinyWorldModel, assert_unchanged, run, snapshot
from quantwm.errors import NonFiniteError, PlanError, UsageError
from quantwm.methods import get_method, quantize, transformed
from quantwm.methods.omse import least_error_range
from quantwm.quant import QuantPlan, load_quantized, save_quantized
from scale_support import (
    FED,
    GatedWorldModel,
    calibration_of,
    folded_scale,
    greatest_change,
    inputs_of,
    outlier_model,
    outlier_world_model,
    output_error,
    rounded,
    scaled_error,
    tiny_inputs,
)


def smoothing(layers="*", scheme="w8a8", **options):
    return QuantPlan({layers: scheme}, "smoothquant", options=options)


def smoothed(model, plan):
    return transformed(model, plan, TinyCalibration.of(model))


def formula(x, weights, alpha):
    """Equation 4 of arXiv 2211.10438."""
    inputs = np.abs(x).reshape(-1, x.shape[-1]).max(0)
    outputs = np.max([np.abs(weight).max(0) for weight in weights], 0)
    return inputs**alpha / outputs ** (1 - alpha)


def weight_of(model, layer):
    return model.get_submodule(layer).weight.detach().double().numpy()


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_scales_are_those_of_the_formula(alpha):
    model = outlier_world_model()
    changed = smoothed(model, smoothing(alpha=alpha))
    for layer, x in tiny_inputs(model).items():
        expected = formula(x, [weight_of(model, layer)], alpha)
        np.testing.assert_allclose(folded_scale(model, changed, FED[layer]), expected, rtol=1e-5)
        np.testing.assert_allclose(
            weight_of(changed, layer), weight_of(model, layer) * expected, rtol=1e-5
        )


def test_all_readers_of_a_normalisation_count_in_the_plan_or_not():
    model = GatedWorldModel()
    model.predictor.gate.weight.data *= 10
    calibration = TinyCalibration.of(model)
    changed = transformed(model, smoothing("predictor.fc1"), calibration)
    x = np.concatenate(
        [
            one.flatten(0, 1)
            for one in inputs_of(model, calibration, ["predictor.gate"]).popitem()[1]
        ]
    )
    weights = [weight_of(model, f"predictor.{name}") for name in ("fc1", "gate")]
    found = folded_scale(model, changed, "predictor.norm")
    np.testing.assert_allclose(found, formula(x, weights, 0.5), rtol=1e-5)
    assert relative(run(changed), run(model)) < 1e-5


def test_the_ends_of_alpha_even_out_weights_or_inputs():
    model = outlier_world_model()
    even_weights, even_inputs = (smoothed(model, smoothing(alpha=alpha)) for alpha in (0, 1))
    for layer in FED:
        np.testing.assert_allclose(np.abs(weight_of(even_weights, layer)).max(0), 1, rtol=1e-5)
    for x in tiny_inputs(even_inputs).values():
        np.testing.assert_allclose(np.abs(x).max((0, 1)), 1, rtol=1e-5)


def test_dead_channels_are_left_alone():
    model = outlier_world_model()
    for norm in FED.values():
        model.get_submodule(norm).weight.data[3] = model.get_submodule(norm).bias.data[3] = 0
    model.predictor.fc1.weight.data[:, 5] = 0
    changed = smoothed(model, smoothing(alpha="search", scheme="w4a4"))
    for layer in FED:
        assert torch.equal(
            changed.get_submodule(layer).weight[:, 3], model.get_submodule(layer).weight[:, 3]
        )
    assert changed.predictor.norm.weight[5] == model.predictor.norm.weight[5]
    assert run(changed).isfinite().all()
    assert relative(run(changed), run(model)) < 1e-5


@pytest.mark.parametrize("concat_dim", [0, 1])
@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"alpha": 1}, {"alpha": "search", "grid": 4}])
def test_the_float_model_computes_what_it_did(concat_dim, options):
    model = tiny_model(concat_dim=concat_dim)
    calibration = calibration_of(model)
    before = snapshot(model)
    changed = transformed(model, smoothing(**options), calibration)
    assert_unchanged(model, before)
    assert greatest_change(model, changed) < 1e-5
    norms = [g.producer for g in model.quantizable_groups() if g.producer is not None]
    assert len(norms) == 8
    assert all((folded_scale(model, changed, norm) != 1).any() for norm in norms)


def test_layers_that_nothing_normalises_for_keep_their_tensors():
    model = outlier_world_model()
    changed = smoothed(model, smoothing())
    before = dict(model.named_parameters())
    touched = {
        name for name, p in changed.named_parameters() if p.data_ptr() != before[name].data_ptr()
    }
    fed = {f"{layer}.weight" for layer in FED}
    assert touched == fed | {
        f"{norm}.{part}" for norm in FED.values() for part in ("weight", "bias")
    }


def test_only_groups_of_the_plan_are_scaled():
    model = outlier_world_model()
    changed = smoothed(model, smoothing("predictor.*"))
    assert torch.equal(changed.encoder.block.norm.weight, model.encoder.block.norm.weight)
    assert not torch.equal(changed.predictor.norm.weight, model.predictor.norm.weight)


SEARCHED = ["w8a8", "w4a4", "w4a4-dynamic", "w3a5-token-a_symmetric", "w3g5-w_asymmetric", "a4"]


@pytest.mark.parametrize("scheme", SEARCHED)
def test_the_search_finds_the_least_error_of_its_grid(scheme):
    model = outlier_world_model()
    changed = smoothed(model, smoothing(alpha="search", grid=10, scheme=scheme))
    for layer, x in tiny_inputs(model).items():
        weight = weight_of(model, layer)
        scales = [formula(x, [weight], step / 10) for step in range(11)]
        errors = [scaled_error(x, weight, scale, scheme) for scale in scales]
        found = folded_scale(model, changed, FED[layer])
        assert any(np.allclose(found, scale, rtol=1e-5) for scale in scales)
        assert scaled_error(x, weight, found, scheme) <= min(errors) * (1 + 1e-4)
        assert max(errors) > 1.2 * min(errors)


def test_the_search_clips_as_the_method_does():
    model = outlier_world_model()

    def clipped(weight, scheme):
        low, high = least_error_range(torch.from_numpy(weight), scheme, OMSE_RATIOS)
        return rounded(weight, low.numpy(), high.numpy(), scheme)

    plan = QuantPlan({"*": "w2a6"}, "smoothquant+omse", options={"alpha": "search", "grid": 10})
    changed = smoothed(model, plan)
    plain = smoothed(model, smoothing(alpha="search", grid=10, scheme="w2a6"))
    differ = 0
    for layer, x in tiny_inputs(model).items():
        weight = weight_of(model, layer)
        errors = [
            scaled_error(x, weight, formula(x, [weight], step / 10), "w2a6", round_weight=clipped)
            for step in range(11)
        ]
        own, other = (folded_scale(model, m, FED[layer]) for m in (changed, plain))
        found = scaled_error(x, weight, own, "w2a6", round_weight=clipped)
        assert found <= min(errors) * (1 + 1e-4)
        differ += not np.allclose(own, other, rtol=1e-3)
    assert differ  # else clipping would not matter here, and this test would show nothing


OMSE_RATIOS = get_method("omse").parts[0].candidates


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
def test_outliers_hurt_less_than_without(scheme):
    model = outlier_model()
    calibration, held_out = calibration_of(model), calibration_of(model, seed=1)
    plain = output_error(model, quantize(model, scheme, calibration), held_out)
    half, searched = (
        output_error(
            model, quantize(model, smoothing(scheme=scheme, alpha=a), calibration), held_out
        )
        for a in (0.5, "search")
    )
    assert half < 0.7 * plain
    assert searched < 0.7 * plain


@pytest.mark.parametrize(
    "scheme",
    ["w2-w_tensor-w_asymmetric", "w5a3-w_tensor-w_study", "w4g7a8-a_symmetric", "w8a8-token", "a8"],
)
@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"alpha": "search", "grid": 3}])
def test_every_scheme_and_kind_of_layer_goes_with_it(scheme, options, tmp_path):
    model = outlier_world_model()
    layers = {"*": scheme, "*_input": "a8-token"}
    include = ("attention_matmul", "patch_embedding")
    plan = QuantPlan(layers, "smoothquant", include=include, options=options)
    before = snapshot(model)
    small = quantize(model, plan, TinyCalibration.of(model))
    assert_unchanged(model, before)
    assert run(small).isfinite().all()
    save_quantized(small, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", TinyWorldModel(seed=9))
    assert_unchanged(loaded, snapshot(small))
    assert torch.equal(run(loaded), run(small))


def test_inputs_that_are_not_finite_name_their_layer():
    model = TinyWorldModel()
    model.action_embed.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"input of predictor\.fc1 holds NaN"):
        quantize(model, smoothing("predictor.fc1"), TinyCalibration.of(model))


def test_a_plan_without_anything_to_smooth_is_refused_before_computing():
    model = TinyWorldModel()
    calibration = TinyCalibration.of(model)
    with pytest.raises(PlanError, match=r"fed by one: encoder\.block\.fc2, pre"):
        quantize(model, smoothing("*.fc2"), calibration)
    assert calibration.encoded == 0
    with pytest.raises(PlanError, match="'smoothquant' needs calibration data"):
        quantize(model, smoothing())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "a number from 0 to 1 or 'search', got 1.5"),
        ({"alpha": "serch"}, "or 'search', got 'serch'"),
        ({"alpha": True}, "got True"),
        ({"alpha": float("nan")}, "got nan"),
        ({"grid": 0}, "grid is an integer of at least 1"),
        ({"grid": 2.0}, "grid is an integer of at least 1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        get_method("smoothquant", options)


def test_steps_of_a_search_that_is_not_made_are_refused():
    get_method("smoothquant", {"alpha": "search", "grid": 7})
    with pytest.raises(UsageError, match=r"smoothquant\.grid changes nothing, because alpha is"):
        get_method("smoothquant", {"alpha": 0.7, "grid": 7})
