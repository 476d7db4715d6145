"""The benchmark of methods: block errors, weight errors, and what its command prints."""

import io

import pytest
import torch
from rich.console import Console

from dino_wm_support import tiny_model
from quant_support import TinyCalibration, TinyWorldModel
from quantwm import console
from quantwm.bench.methods import MethodRow, bench_methods, weight_error
from quantwm.cli import bench_output
from quantwm.diagnostics.block_error import block_errors
from quantwm.errors import UsageError
from quantwm.fingerprint import model_hash
from quantwm.methods import quantize, transformed
from quantwm.quant import QuantPlan
from quantwm.quant.apply import copy_sharing_tensors
from test_methods_equivalence import calibration_of


def test_a_model_has_no_block_error_against_itself():
    model = tiny_model(num_hist=3)
    errors = block_errors(model, copy_sharing_tensors(model), calibration_of(model))
    assert set(errors.by_block) == {
        *(f"encoder.blocks.{i}" for i in range(2)),
        *(f"predictor.blocks.{i}" for i in range(2)),
    }
    assert all(error == 0 for error in errors.by_block.values())


def test_block_errors_are_those_of_the_blocks_alone():
    model = tiny_model(num_hist=2)
    calibration = calibration_of(model)
    small = quantize(model, {"encoder.blocks.0.*": "w3", "predictor.blocks.1.*": "w3"})
    errors = block_errors(model, small, calibration).by_block
    # A float block of the quantized model reads what the float model's block reads: no error.
    assert errors["encoder.blocks.1"] == errors["predictor.blocks.0"] == 0
    seen = []
    handle = model.encoder.blocks[0].register_forward_hook(
        lambda _module, inputs, output: seen.append((inputs[0], output))
    )
    calibration.encode(model)
    handle.remove()
    with torch.no_grad():
        (x, y), wrong = seen[0], small.encoder.blocks[0](seen[0][0])
    expected = (wrong - y).norm() / (y - x).norm()
    assert errors["encoder.blocks.0"] == pytest.approx(float(expected), rel=1e-4)


def test_more_bits_mean_less_error_and_parts_are_told_apart():
    model = tiny_model(num_hist=1)
    calibration = calibration_of(model)
    by_bits = []
    for plan in ("w8", "w4", "w2"):
        found = block_errors(model, quantize(model, plan), calibration)
        by_bits.append((found.of("encoder"), found.of("predictor")))
    assert by_bits == sorted(by_bits)
    only = block_errors(model, quantize(model, {"encoder.*": "w2"}), calibration)
    assert only.of("encoder") > 0
    assert only.of("predictor") == 0
    with pytest.raises(UsageError, match="no block's name starts with 'decoder'"):
        only.of("decoder")


def test_a_rotated_model_is_compared_with_its_own_float_twin():
    model = tiny_model(num_hist=2)
    calibration = calibration_of(model)
    plan = QuantPlan({"*": "w8"}, "rotation", options={"hidden": False})
    twin, small = transformed(model, plan), quantize(model, plan)
    errors = block_errors(twin, small, calibration)
    assert 0 < errors.of("encoder") < 0.05
    assert 0 < errors.of("predictor") < 0.05


def test_a_foreign_models_blocks_are_compared_too():
    model = TinyWorldModel()
    errors = block_errors(model, quantize(model, "w3"), TinyCalibration.of(model))
    assert errors.by_block
    assert all(error > 0 for error in errors.by_block.values())
    assert model_hash(model) == model_hash(TinyWorldModel())


def test_weight_error_is_that_of_the_quantized_weights_alone():
    model = tiny_model()
    small = quantize(model, {"predictor.blocks.0.mlp.fc1": "w3"})
    old = model.predictor.blocks[0].mlp.fc1.weight.detach()
    new = small.predictor.blocks[0].mlp.fc1.weight
    expected = float((new - old).norm() / old.norm())
    assert weight_error(model, small, "predictor") == pytest.approx(expected, rel=1e-5)
    assert weight_error(model, small, "encoder") is None


def test_bad_requests_are_refused_before_anything_is_measured():
    with pytest.raises(UsageError, match="did you mean 'gptq'"):
        bench_methods("wall", methods=["gptp"])
    with pytest.raises(UsageError, match="quantwm calibrate"):
        bench_methods("wall")


def test_a_refused_row_is_told_below_the_table(monkeypatch):
    to = Console(width=60, file=io.StringIO())
    for module in (console, bench_output):
        monkeypatch.setattr(module, "out", to)
    rows = [
        MethodRow("rtn", "w4", None, 1.5, 600.0, 0.25, 0.125, 0.1, 0.2),
        MethodRow("percentile", "w4", refused="no layer of the plan has static activations"),
    ]
    bench_output.print_methods_bench(rows)
    printed = to.file.getvalue()
    assert "0.2500" in printed
    assert "0.1250" in printed
    assert "percentile at w4: no layer of the plan has static" in printed
