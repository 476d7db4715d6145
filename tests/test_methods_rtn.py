"""`quantize` with round-to-nearest, on a whole world model."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from quant_support import (
    LINEARS,
    TAPS,
    TinyCalibration,
    TinyWorldModel,
    actions,
    assert_unchanged,
    observations,
    run,
    snapshot,
)
from quantwm.errors import MismatchError, NonFiniteError, PlanError, UsageError
from quantwm.fingerprint import model_hash
from quantwm.methods import get_method, method_names, quantize, register, resolve_plan
from quantwm.methods.rtn import RTN
from quantwm.protocols import WorldModel
from quantwm.quant import QuantLinear, QuantPlan, QuantTap, quantization_of
from quantwm.quant.primitives import weight_range

EVERYTHING = QuantPlan(
    {"*": "w4g5a8", "*_input": "a8", "encoder.patch": "w8a8-token"},
    include=("attention_matmul", "patch_embedding"),
)


def test_the_tiny_model_is_a_world_model():
    assert isinstance(TinyWorldModel(), WorldModel)


@pytest.mark.parametrize("plan", ["w8", "w4g8-w_asymmetric", "w8a8-token", EVERYTHING], ids=str)
def test_the_argument_stays_as_it_is(plan):
    world_model = TinyWorldModel()
    before, output = snapshot(world_model), run(world_model)
    digest = model_hash(world_model)
    small = quantize(world_model, plan, TinyCalibration.of(world_model))
    small.to(torch.bfloat16)
    run(small)
    assert_unchanged(world_model, before)
    assert model_hash(world_model) == digest
    assert torch.equal(run(world_model), output)
    assert quantization_of(world_model) is None
    assert isinstance(world_model.predictor.fc1, nn.Linear)


def test_untouched_tensors_are_shared():
    world_model = TinyWorldModel()
    small = quantize(world_model, {"predictor.fc1": "w4"})
    theirs = {name: p.data_ptr() for name, p in world_model.named_parameters()}
    shared = {name for name, p in small.named_parameters() if theirs[name] == p.data_ptr()}
    assert shared == set(theirs) - {"predictor.fc1.weight"}
    assert small.gain.data_ptr() == world_model.gain.data_ptr()
    assert small.encoder is not world_model.encoder


def test_eight_bits_stay_close_and_two_do_not():
    world_model = TinyWorldModel()
    exact = run(world_model)
    errors = [
        ((run(quantize(world_model, name)) - exact).norm() / exact.norm()).item()
        for name in ("w8", "w6", "w4", "w2")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.01
    assert errors[-1] > 0.05


def test_weights_are_rounded_to_nearest_per_channel():
    world_model = TinyWorldModel()
    small = quantize(world_model, "w4")
    for name in LINEARS:
        weight = world_model.get_submodule(name).weight.detach().numpy()
        scale = np.abs(weight).max(1, keepdims=True) / np.float32(7)
        codes = np.clip(np.rint(weight / scale), -8, 7)
        layer = small.get_submodule(name)
        assert np.array_equal(layer.stored_weight.codes.numpy(), codes)
        assert np.array_equal(layer.weight.numpy(), codes.astype(np.float32) * scale)


def test_static_ranges_are_those_of_the_float_model():
    world_model, seen = TinyWorldModel(), []
    handle = world_model.predictor.fc2.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    run(world_model)
    handle.remove()
    small = quantize(world_model, "w2a8", TinyCalibration.of(world_model))
    inputs = torch.cat([x.flatten() for x in seen])
    scale = (inputs.max() - inputs.min()) / torch.tensor(255.0)
    found = small.predictor.fc2.input_quantizer
    assert torch.equal(found.scale, scale)
    assert found.zero_point == torch.round(-inputs.min() / scale)


def test_granularities_of_activations_give_different_results():
    world_model = TinyWorldModel()
    calibration = TinyCalibration.of(world_model)
    names = ("w8a4", "w8a4-dynamic", "w8a4-token", "w8a4-token-a_symmetric", "w8")
    outputs = [run(quantize(world_model, name, calibration)) for name in names]
    for i, one in enumerate(outputs):
        for other in outputs[i + 1 :]:
            assert not torch.allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("plan", ["w8a4", "w8a4-dynamic", "w8a4-token"])
def test_a_candidates_rollout_does_not_depend_on_its_neighbours(plan):
    world_model = TinyWorldModel()
    small = quantize(world_model, plan, TinyCalibration.of(world_model))
    plain, wild = actions(candidates=2), actions(candidates=2, seed=1) * 100
    with torch.no_grad():
        latent = small.encode(observations())
        alone = small.rollout(latent, plain)
        beside = small.rollout(latent, torch.cat([wild, plain], 1))[:, 2:]
    assert torch.allclose(alone, beside, rtol=1e-5, atol=1e-5)


def test_every_kind_of_layer_can_be_quantized():
    world_model = TinyWorldModel()
    small = quantize(world_model, EVERYTHING, TinyCalibration.of(world_model))
    assert all(isinstance(small.get_submodule(name), QuantTap) for name in TAPS)
    assert all(isinstance(small.get_submodule(name), QuantLinear) for name in LINEARS)
    assert small.predictor.q_input.tokens_per_frame == 4
    exact = run(world_model)
    assert 1e-4 < (run(small) - exact).norm() / exact.norm() < 0.3
    run(small.to(torch.bfloat16))


def test_the_record_says_what_was_done():
    world_model = TinyWorldModel()
    plan = QuantPlan({"*": "w4", "encoder.*": "float"})
    record = quantization_of(quantize(world_model, plan))
    assert record.plan == plan
    assert record.method == "rtn"
    assert record.source_model_hash == model_hash(world_model)
    assert [(name, str(scheme)) for name, scheme in record.layers] == [
        ("predictor.fc1", "w4"),
        ("predictor.fc2", "w4"),
    ]
    assert type(record).from_dict(record.to_dict()) == record


def test_a_plan_of_floats_gives_the_same_model():
    world_model = TinyWorldModel()
    same = quantize(world_model, "float")
    assert same is not world_model
    assert torch.equal(run(same), run(world_model))
    assert quantization_of(same).layers == ()


def test_in_place_changes_the_argument():
    world_model, twin = TinyWorldModel(), TinyWorldModel()
    assert quantize(world_model, "w4", inplace=True) is world_model
    assert torch.equal(run(world_model), run(quantize(twin, "w4")))
    assert quantization_of(world_model).source_model_hash == model_hash(twin)


def test_quantizing_twice_is_an_error():
    small = quantize(TinyWorldModel(), "w8")
    with pytest.raises(UsageError, match=r"quantized already \('w8' by rtn\)"):
        quantize(small, "w4")
    with pytest.raises(UsageError, match="quantized already"):
        resolve_plan("w4", copy.deepcopy(small))


def test_all_problems_come_together_and_before_any_replay():
    world_model = TinyWorldModel()
    plan = QuantPlan({"encodr.*": "w8", "predictor.fc1": "w4g99", "*.fc2": "w8a8"}, "rtm")
    with pytest.raises(PlanError) as caught:
        quantize(world_model, plan)
    assert "did you mean 'encoder.*'" in str(caught.value)
    assert "group size 99 is larger" in str(caught.value)
    assert "unknown method 'rtm'; did you mean 'rtn'?" in str(caught.value)
    with pytest.raises(PlanError) as caught:
        quantize(world_model, QuantPlan({"*.fc2": "w8a8", "predictor.fc1": "w4g99"}))
    assert "2 layers: encoder.block.fc2, predictor.fc2" in str(caught.value)
    assert "group size 99" in str(caught.value)


def test_resolving_checks_the_method_but_needs_no_calibration():
    assert set(resolve_plan("w8a8", TinyWorldModel())) == set(LINEARS)
    with pytest.raises(PlanError, match="unknown method"):
        resolve_plan(QuantPlan({"*": "w8"}, "nonesuch"), TinyWorldModel())


def test_calibration_of_another_model_is_refused():
    calibration = TinyCalibration.of(TinyWorldModel(seed=1))
    with pytest.raises(MismatchError, match="gathered with model"):
        quantize(TinyWorldModel(), "w8a8", calibration)
    assert calibration.seen == []


def test_bad_weights_name_their_layers():
    world_model = TinyWorldModel()
    world_model.predictor.fc1.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"predictor\.fc1"):
        quantize(world_model, "w8")


def test_progress_counts_every_block():
    steps = []
    quantize(TinyWorldModel(), "w8", progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]


def test_methods_are_found_by_name():
    assert "rtn" in method_names()
    assert get_method("rtn").parts == (RTN(),)
    with pytest.raises(UsageError, match="did you mean 'rtn'"):
        get_method("rnt")
    with pytest.raises(UsageError, match="has no options, got 'alpha'"):
        get_method("rtn", {"alpha": 1})
    with pytest.raises(PlanError, match="has no options"):
        quantize(TinyWorldModel(), QuantPlan({"*": "w8"}, options={"alpha": 1}))


def test_a_new_method_needs_a_class_and_nothing_else(monkeypatch):
    monkeypatch.setattr("quantwm.methods.registry.PARTS", {"rtn": RTN})

    @register
    @dataclass(frozen=True)
    class Halving:
        strength: float = 0.5
        name: ClassVar[str] = "halving"
        needs_calibration: ClassVar[bool] = True

        def extents(self, work, weights, schemes):
            ranges = {n: weight_range(w, schemes[n].granularity) for n, w in weights.items()}
            return {
                n: (self.strength * low, self.strength * high) for n, (low, high) in ranges.items()
            }

    world_model = TinyWorldModel()
    before = snapshot(world_model)
    plan = QuantPlan({"predictor.fc2": "w8"}, "halving", options={"strength": 0.25})
    with pytest.raises(PlanError, match="'halving' needs calibration data"):
        quantize(world_model, plan)
    small = quantize(world_model, plan, TinyCalibration.of(world_model))
    plain = quantize(world_model, "w8")
    own, usual = (m.predictor.fc2.stored_weight.scale for m in (small, plain))
    torch.testing.assert_close(own, usual * 0.25)
    assert_unchanged(world_model, before)
    with pytest.raises(UsageError, match="did you mean 'strength'"):
        get_method("halving", {"strenth": 1})
    with pytest.raises(ValueError, match="two methods are called 'halving'"):
        register(type("Other", (Halving,), {}))
