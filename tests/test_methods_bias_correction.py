from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from dino_wm_support import observation, tiny_model
from quant_support import (
    LINEARS,
    PATCHES,
    TAPS,
    TinyCalibration,
    TinyWorldModel,
    actions,
    assert_unchanged,
    observations,
    run,
    snapshot,
)
from quantwm.errors import PlanError
from quantwm.fingerprint import model_hash
from quantwm.methods import quantize
from quantwm.methods.bias_correction import MeanInput, corrected_bias
from quantwm.quant import QuantPlan, load_quantized, quantization_of, save_quantized
from quantwm.quant.input_quantizer import InputQuantizer
from quantwm.quant.scheme import ActivationScheme


class OneStep(TinyCalibration):
    """Rollouts of a single step, in which no layer reads what a later one computed."""

    def roll_out(self, world_model, latents):
        with torch.no_grad():
            world_model.rollout(latents, actions()[:, :, :1])


def skewed_model():
    """Inputs far from mean zero, so that rounding weights shifts the mean output."""
    world_model = TinyWorldModel()
    with torch.no_grad():
        for block in (world_model.encoder.block, world_model.predictor):
            block.norm.bias += 1.5
            block.fc1.bias += 1
    return world_model


def both(world_model, plan, calibration):
    """The plan by round-to-nearest, without and with the correction."""
    corrected = QuantPlan.from_dict({**plan.to_dict(), "method": "bias_correction"})
    return [quantize(world_model, one, calibration) for one in (plan, corrected)]


def mean_errors(world_model, small, names, calibration):
    """Largest mean error of each layer's outputs, for what it reads in the quantized model."""
    seen = {name: [] for name in names}
    handles = [
        small.get_submodule(name).register_forward_hook(
            lambda layer, inputs, output, name=name: seen[name].append((inputs[0], output))
        )
        for name in names
    ]
    calibration.roll_out(small, calibration.encode(small))
    for handle in handles:
        handle.remove()
    errors = {}
    for name in names:
        layer, gaps = world_model.get_submodule(name), []
        for x, output in seen[name]:
            gap = output - layer(x)
            gaps.append((gap.movedim(1, -1) if gap.ndim == 4 else gap).flatten(0, -2))
        errors[name] = torch.cat(gaps).double().mean(0).abs().max().item()
    return errors


SCHEMES = ["w3", "w3a4", "w4a3-dynamic", "w2a4-token", "w3g5-w_asymmetric", "a3", "a3-dynamic"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_mean_error_of_every_layer_is_gone(scheme):
    world_model = skewed_model()
    calibration = OneStep.of(world_model)
    layers = {"*.fc*": scheme, "encoder.patch": scheme}
    plan = QuantPlan(layers, include=("patch_embedding",))
    plain, small = both(world_model, plan, calibration)
    names = ("encoder.patch", *LINEARS)
    before = mean_errors(world_model, plain, names, calibration)
    after = mean_errors(world_model, small, names, calibration)
    for name in names:
        assert before[name] > 1e-3
        assert after[name] < 2e-6


def test_a_scale_of_each_frame_is_found_on_whole_frames():
    scheme = ActivationScheme(3, granularity="per_tensor_dynamic")
    quantizer = InputQuantizer(scheme, PATCHES)
    x = torch.randn(2, 3 * PATCHES, 5, generator=torch.Generator().manual_seed(0))
    x[:, :PATCHES] *= 10
    mean = MeanInput("layer", quantizer)
    for batch in x:
        mean.update(batch[None])
    frames = x.view(-1, PATCHES, 5)
    alone = torch.stack([InputQuantizer(scheme).rounded(frame[None])[0] for frame in frames])
    exact, rounded = mean.value()
    torch.testing.assert_close(exact, x.double().mean((0, 1)))
    torch.testing.assert_close(rounded, alone.double().mean((0, 1)))


def test_the_new_bias_by_hand():
    weight, rounded = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]])
    mean, rounded_mean = torch.tensor([[4.0, 1.0], [3.0, 1.5]], dtype=torch.float64)
    # 6 of the float layer, 7.5 of the rounded one.
    assert corrected_bias(weight, None, rounded, mean, rounded_mean).tolist() == [-1.5]
    bias = corrected_bias(weight, torch.tensor([2.0]), rounded, mean, rounded_mean)
    assert bias.tolist() == [0.5]


@pytest.mark.parametrize("method", ["w3", "w2g5", "w3a4"])
def test_outputs_of_a_model_with_skewed_inputs_come_nearer(method):
    world_model = skewed_model()
    calibration = TinyCalibration.of(world_model)
    plain, small = both(world_model, QuantPlan({"*.fc*": method}), calibration)
    exact_latent, exact = world_model.encode(observations()), run(world_model)
    latents, rollouts = (
        [(value - reference).norm().item() for value in values]
        for values, reference in (
            ([m.encode(observations()) for m in (plain, small)], exact_latent),
            ([run(m) for m in (plain, small)], exact),
        )
    )
    assert latents[1] < 0.9 * latents[0]
    assert rollouts[1] < 0.9 * rollouts[0]


def test_layers_are_corrected_for_what_they_read_after_earlier_corrections():
    world_model = skewed_model()
    calibration = OneStep.of(world_model)
    plan = QuantPlan({"predictor.fc*": "w2"}, "bias_correction")
    small = quantize(world_model, plan, calibration)
    first = quantize(
        world_model, QuantPlan({"predictor.fc1": "w2"}, "bias_correction"), calibration
    )
    assert torch.equal(first.predictor.fc1.bias, small.predictor.fc1.bias)
    seen = []
    first.predictor.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    calibration.roll_out(first, calibration.encode(first))
    mean = torch.cat(seen).flatten(0, 1).double().mean(0)
    weights = world_model.predictor.fc2.weight, small.predictor.fc2.weight
    error = (weights[0].double() - weights[1].double()) @ mean
    torch.testing.assert_close(small.predictor.fc2.bias, error.float())


def test_the_float_model_and_the_codes_stay_as_they_are():
    world_model = skewed_model()
    before, calibration = snapshot(world_model), TinyCalibration.of(world_model)
    plain, small = both(world_model, QuantPlan({"*.fc*": "w3a8"}), calibration)
    assert_unchanged(world_model, before)
    assert world_model.predictor.fc2.bias is None
    for name in LINEARS:
        one, other = (m.get_submodule(name) for m in (plain, small))
        assert torch.equal(one.stored_weight.codes, other.stored_weight.codes)
        assert torch.equal(one.input_quantizer.scale, other.input_quantizer.scale)
        assert not other.bias.requires_grad


def test_only_layers_of_the_plan_are_corrected():
    world_model = skewed_model()
    layers = {"predictor.fc1": "w3", "*_input": "a8-token"}
    small = quantize(
        world_model,
        QuantPlan(layers, "bias_correction", ("attention_matmul",)),
        TinyCalibration.of(world_model),
    )
    changed = {
        name
        for name, tensor in snapshot(small).items()
        if name not in world_model.state_dict()
        or not torch.equal(tensor, world_model.state_dict()[name])
    }
    assert {name.removeprefix("predictor.fc1.") for name in changed} == {
        "bias",
        "stored_weight.codes",
        "stored_weight.scale",
    }


def test_a_replay_is_spent_on_each_group_and_no_more():
    world_model = skewed_model()
    calibration = TinyCalibration.of(world_model)
    plan = QuantPlan({"*.fc*": "w3"}, "bias_correction")
    quantize(world_model, plan, calibration)
    # The first replay runs both parts; then one encoding or one rollout a layer. What the encoder
    # became is encoded once more, for the predictor.
    assert (calibration.encoded, len(calibration.seen)) == (3, 3)


def test_a_plan_without_biases_is_refused():
    world_model = TinyWorldModel()
    plan = QuantPlan({"*_input": "a8-token"}, "bias_correction", ("attention_matmul",))
    with pytest.raises(PlanError, match="bias_correction: the plan quantizes no linear"):
        quantize(world_model, plan, TinyCalibration.of(world_model))
    with pytest.raises(PlanError, match="'bias_correction' needs calibration data"):
        quantize(world_model, QuantPlan({"*": "w4"}, "bias_correction"))


@dataclass
class TinyDINOWMCalibration:
    """Rollouts longer than the window, so that it slides."""

    model_hash: str
    model: object = field(repr=False)

    def __len__(self):
        return 6

    def encode(self, world_model):
        with torch.no_grad():
            return world_model.encode(observation())

    def roll_out(self, world_model, latents):
        with torch.no_grad():
            world_model.rollout(latents, self.actions())

    def actions(self):
        generator = torch.Generator().manual_seed(0)
        width = self.model.action_spec.model_dim
        return torch.randn(2, 3, 4, width, generator=generator)


@pytest.fixture(scope="module")
def dino_wm():
    model = tiny_model()
    calibration = TinyDINOWMCalibration(model_hash(model), model)
    layers = {"*": "w3a8", "encoder.patch_embed.proj": "w4", "*_input": "a8-token"}
    plan = QuantPlan(layers, "bias_correction", ("patch_embedding", "attention_matmul"))
    return model, calibration, quantize(model, plan, calibration)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_added_biases_are_saved_and_loaded_bit_for_bit(tmp_path, dino_wm, dtype):
    _, calibration, small = dino_wm
    small = quantize(dino_wm[0], quantization_of(small).plan, calibration).to(dtype)
    added = {f"predictor.blocks.{number}.attn.qkv" for number in range(2)}
    structure = quantization_of(small).structure
    assert structure == {name: {"kind": "added_bias"} for name in added}
    save_quantized(small, tmp_path / "model")
    skeleton = tiny_model(seed=5)
    untouched = snapshot(skeleton)
    loaded = load_quantized(tmp_path / "model", skeleton)
    assert_unchanged(loaded, snapshot(small))
    assert_unchanged(skeleton, untouched)
    assert skeleton.predictor.blocks[0].attn.qkv.bias is None
    with torch.no_grad():
        rollouts = [
            m.rollout(m.encode(observation()), calibration.actions())["visual"]
            for m in (small, loaded)
        ]
    assert torch.equal(*rollouts)


def test_added_biases_are_loaded_into_a_model_that_has_no_tensors_yet(tmp_path, dino_wm):
    save_quantized(dino_wm[2], tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", tiny_model(seed=5).to("meta"))
    assert_unchanged(loaded, snapshot(dino_wm[2]))


def test_some_outputs_of_a_layer_come_with_their_part_of_an_added_bias(dino_wm):
    model, _, small = dino_wm
    layer = small.predictor.blocks[1].attn.qkv
    x = torch.randn(2, 4, layer.in_features, generator=torch.Generator().manual_seed(1))
    part = slice(layer.out_features // 3, None)
    torch.testing.assert_close(layer(x, outputs=part), layer(x)[..., part])
    assert layer.bias[part].abs().max() > 0
    assert model.predictor.blocks[1].attn.qkv.bias is None


def test_a_patch_embedding_without_a_bias_gets_one_that_is_saved(tmp_path):
    def make():
        world_model = TinyWorldModel()
        world_model.encoder.patch = nn.Conv2d(3, 12, 4, 4, bias=False)
        nn.init.constant_(world_model.encoder.patch.weight, 0.1)
        with torch.no_grad():
            world_model.encoder.patch.weight[:, 1] = 0.03
        return world_model

    world_model = make()
    calibration = OneStep.of(world_model)
    plan = QuantPlan({"encoder.patch": "w2a4"}, include=("patch_embedding",))
    plain, small = both(world_model, plan, calibration)
    before, after = (
        mean_errors(world_model, m, ["encoder.patch"], calibration) for m in (plain, small)
    )
    assert before["encoder.patch"] > 1e-3
    assert after["encoder.patch"] < 1e-6
    assert quantization_of(small).structure == {"encoder.patch": {"kind": "added_bias"}}
    save_quantized(small, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", make())
    assert_unchanged(loaded, snapshot(small))
    assert torch.equal(run(loaded), run(small))


def test_taps_are_left_alone():
    world_model = skewed_model()
    layers = {"*.fc*": "w3", "*_input": "a4"}
    plain, small = both(
        world_model, QuantPlan(layers, include=("attention_matmul",)), OneStep.of(world_model)
    )
    for name in TAPS:
        assert_unchanged(small.get_submodule(name), snapshot(plain.get_submodule(name)))
