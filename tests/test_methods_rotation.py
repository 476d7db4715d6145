"""Rotation: outputs stay, outliers go, and what was folded in survives saving."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from dino_wm_support import observation, relative, tiny_config, tiny_model
from quant_support import TinyWorldModel, assert_unchanged, snapshot
from quantwm.bench.operations import added_operations
from quantwm.errors import PlanError, UsageError
from quantwm.fingerprint import model_hash
from quantwm.methods import get_method, quantize, transformed
from quantwm.methods.rotation import Rotation
from quantwm.models.checkpoint import new_world_model
from quantwm.models.config import DINOWMConfig, EncoderConfig, PredictorConfig
from quantwm.models.dino_wm import DINOWM
from quantwm.planning.objective import Objective
from quantwm.planning.rollout import Rollouts
from quantwm.protocols import HasResidualStreams, WorldModel
from quantwm.quant import QuantPlan, load_quantized, quantization_of, save_quantized
from quantwm.quant.fold import scale_inputs
from quantwm.quant.hadamard import Hadamard, random_orthogonal
from quantwm.quant.sampling import named_generator
from quantwm.quant.structure import added_multiply_adds
from rotation_support import (
    FOLD,
    Frames,
    actions,
    assert_same_outputs,
    inputs_of,
    outputs,
    plan,
    rolled,
)

# The method


@pytest.mark.parametrize("num_hist", [1, 3])
@pytest.mark.parametrize("concat_dim", [0, 1])
def test_the_rotated_model_computes_what_the_float_model_computes(concat_dim, num_hist):
    model = tiny_model(concat_dim=concat_dim, num_hist=num_hist)
    twin = transformed(model, plan())
    assert_same_outputs(model, twin, frames=min(2, num_hist))
    start, goal = observation(seed=1), observation(seed=2)
    costs = []
    for one in (model, twin):
        with torch.inference_mode():
            ends = [
                [one.encode({k: v[i : i + 1] for k, v in frames.items()}) for i in range(2)]
                for frames in (start, goal)
            ]
        rollouts = Rollouts(one, Objective(one.objective_weights))
        costs.append(rollouts.costs(*ends, actions(candidates=20)))
    assert relative(costs[1], costs[0]) < FOLD


def test_the_stream_is_turned_by_the_matrix_that_the_seed_names():
    model = tiny_model()
    twin = transformed(model, plan(seed=3))
    for part, width in (("encoder", 24), ("predictor", 44)):
        matrix = random_orthogonal(width, named_generator(f"3/{part}")).float()
        for block in range(2):
            plain, turned = (inputs_of(m, f"{part}.blocks.{block}.norm1") for m in (model, twin))
            centred = plain - plain.mean(-1, keepdim=True)
            assert relative(turned, centred @ matrix.T) < FOLD
            assert relative(turned, plain) > 0.5


def test_every_weight_of_a_stream_changes_and_nothing_else():
    model = tiny_model()
    twin = transformed(model, plan())
    mine, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    shared = {n for n in mine if n in theirs and mine[n].data_ptr() == theirs[n].data_ptr()}
    assert shared == {"encoder.mask_token"} | {
        f"{name}_embed.{kind}" for name in ("proprio", "action") for kind in ("weight", "bias")
    }
    for stream in model.residual_streams():
        layers = {*stream.writers, *(n for names in stream.readers.values() for n in names)}
        for name in (*(f"{layer}.weight" for layer in layers), *stream.embeddings):
            assert relative(theirs[name], mine[name]) > 0.5


@pytest.mark.parametrize("part", ["encoder", "predictor"])
def test_an_outlier_channel_is_spread(part):
    model = tiny_model(encoder=EncoderConfig(2, 96, 3, pretrained_grid=5))
    with torch.no_grad():
        name = "encoder.cls_token" if part == "encoder" else "predictor.pos_embedding"
        dict(model.named_parameters())[name][..., 5] += 60
    twin = transformed(model, plan())

    def peak(m):
        x = inputs_of(m, f"{part}.blocks.0.norm1")
        x = x[x.norm(dim=-1) > 30]
        assert len(x)
        return (x.abs().amax(-1) / x.square().mean(-1).sqrt()).max()

    assert peak(model) > 9
    assert peak(twin) < 4.5


def test_rotation_rounds_better_where_channels_stand_out():
    model = tiny_model(encoder=EncoderConfig(2, 96, 3, pretrained_grid=5))
    with torch.no_grad():
        for block in (*model.encoder.blocks, *model.predictor.blocks):
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[3] = 30
                layer.weight[:, 3] /= 30
    expected = outputs(model)
    errors = {}
    for method in ("rtn", "rotation"):
        found = outputs(quantize(model, QuantPlan({"*": "a4-token"}, method)))
        errors[method] = [relative(found[n], value) for n, value in expected.items()]
    for plain, turned in zip(errors["rtn"], errors["rotation"], strict=True):
        assert turned < 0.5 * plain


def test_the_argument_stays_as_it_is():
    model = tiny_model()
    before, digest, output = snapshot(model), model_hash(model), outputs(model)
    small = quantize(model, plan("w4a8"), Frames(digest))
    small.to(torch.bfloat16)
    outputs(small)
    assert_unchanged(model, before)
    assert model_hash(model) == digest
    for name, value in outputs(model).items():
        assert torch.equal(value, output[name])


def test_static_ranges_are_those_of_the_rotated_model():
    model = tiny_model()
    calibration = Frames(model_hash(model))
    small = quantize(model, plan("a8"), calibration)
    twin, seen = transformed(model, plan("a8"), calibration), []
    twin.predictor.blocks[0].mlp.fc2.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    calibration.roll_out(twin, calibration.encode(twin))
    low, high = torch.stack([torch.stack(x.aminmax()) for x in seen]).unbind(1)
    scale = (high.max() - low.min()) / 255
    found = small.predictor.blocks[0].mlp.fc2.input_quantizer.scale
    assert found.item() == pytest.approx(scale.item(), rel=1e-5)
    assert_same_outputs(model, small, 0.2)


def test_only_streams_of_the_plan_are_rotated():
    model = tiny_model()
    small = quantize(model, plan({"encoder.*": "w8"}))
    assert all(name.startswith("encoder.") for name in quantization_of(small).structure)
    theirs = dict(small.named_parameters())
    for name, parameter in model.predictor.named_parameters():
        assert theirs[f"predictor.{name}"].data_ptr() == parameter.data_ptr()
    assert type(small.predictor.entry) is nn.Identity
    # One layer is enough for a stream; Hadamard products come only where they are of use.
    one = quantize(model, plan({"predictor.blocks.1.mlp.fc2": "w8"})).predictor
    assert isinstance(one.blocks[0].norm1, nn.RMSNorm)
    assert type(one.blocks[0].mlp.hidden) is nn.Identity
    assert isinstance(one.blocks[1].mlp.hidden, Hadamard)


def test_options_leave_out_what_they_name():
    model = tiny_model()
    full, plain = transformed(model, plan()), transformed(model, plan(hidden=False, values=False))
    assert_same_outputs(model, plain)
    assert not any(isinstance(m, Hadamard) for m in plain.modules())
    values = [m.encoder.blocks[0].attn.qkv.weight[48:] for m in (full, plain)]
    queries = [m.encoder.blocks[0].attn.qkv.weight[:48] for m in (full, plain)]
    assert torch.equal(*queries)
    assert relative(*values) > 0.5
    # Three heads of eight: a rotation of one head keeps what it holds.
    torch.testing.assert_close(*(v.unflatten(0, (3, 8)).square().sum(1) for v in values))


def test_a_seed_gives_the_same_bits_and_the_global_state_has_no_part_in_it():
    model = tiny_model()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = quantize(model, plan())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert model_hash(quantize(model, plan())) == model_hash(first)
    other = quantize(model, plan(seed=1))
    assert not torch.equal(other.predictor.pos_embedding, first.predictor.pos_embedding)


# Together with the rest


@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", ["w4a4", "w3g16-w_asymmetric"])
def test_reloading_is_bit_identical(tmp_path, layers, dtype, meta):
    model = tiny_model()
    small = quantize(model, plan(layers), Frames(model_hash(model))).to(dtype)
    save_quantized(small, tmp_path / "model")
    if meta:
        with torch.device("meta"):
            skeleton = DINOWM(tiny_config()).eval()
    else:
        skeleton = tiny_model(seed=9)
    loaded = load_quantized(tmp_path / "model", skeleton)
    assert_unchanged(loaded, snapshot(small))
    assert model_hash(loaded) == model_hash(small)
    assert quantization_of(loaded) == quantization_of(small)
    for name, value in rolled(small).items():
        assert torch.equal(rolled(loaded)[name], value)
    again = rolled(loaded.to(torch.bfloat16))
    assert all(torch.equal(again[n], v) for n, v in rolled(small.to(torch.bfloat16)).items())


def test_in_place_gives_the_same_model(tmp_path):
    model, twin = tiny_model(), tiny_model()
    small = quantize(model, plan(), inplace=True)
    assert small is model
    assert model_hash(small) == model_hash(quantize(twin, plan()))


def test_factors_of_channels_can_still_be_folded_into_the_normalisations():
    model = tiny_model()
    twin = transformed(model, plan())
    generator = torch.Generator().manual_seed(0)
    before = snapshot(twin)
    for group in twin.quantizable_groups():
        if group.producer is not None:
            width = twin.get_submodule(group.producer).weight.shape
            scale_inputs(twin, group, torch.rand(width, generator=generator) * 3 + 0.2)
    assert not torch.equal(
        twin.encoder.blocks[0].norm1.weight, before["encoder.blocks.0.norm1.weight"]
    )
    assert_same_outputs(model, twin)


def test_smoothquant_after_rotation_keeps_the_outputs_and_is_loaded_again(tmp_path):
    model = tiny_model()
    both = QuantPlan({"*": "w4a4"}, "smoothquant+rotation")
    calibration = Frames(model_hash(model))
    twin = transformed(model, both, calibration)
    assert_same_outputs(model, twin)
    assert relative(twin.encoder.blocks[0].norm1.weight, torch.ones(24)) > 0.05
    small = quantize(model, both, calibration)
    save_quantized(small, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", tiny_model(seed=9))
    assert all(torch.equal(rolled(loaded)[n], v) for n, v in rolled(small).items())


def test_what_stays_as_a_product_is_counted(tmp_path):
    model = tiny_model(num_hist=2)
    small = quantize(model, plan("w8"))
    added = added_multiply_adds(quantization_of(small).structure)
    # 96 = 8 · 12 and 32 = 4 · 8: what the two factors of a Hadamard product cost.
    expected = {"encoder.norm": 24 * 24, "predictor.entry": 44 * 44, "predictor.norm": 44 * 44}
    expected |= {f"encoder.blocks.{i}.mlp.hidden": 96 * 20 for i in range(2)}
    expected |= {f"predictor.blocks.{i}.mlp.hidden": 32 * 12 for i in range(2)}
    assert added == expected
    counted = 0

    def count(name, _, inputs):
        nonlocal counted
        counted += added[name] * inputs[0].shape[:-1].numel()

    for name in added:
        small.get_submodule(name).register_forward_pre_hook(partial(count, name))
    with torch.inference_mode():
        small.rollout(small.encode(observation(batch=2)), actions(2, 3, 5), last_only=True)
    assert added_operations(model.config, added, 3, 5, episodes=2).multiply_adds == counted
    assert added_multiply_adds(quantization_of(quantize(model, "w8")).structure) == {}


# Refusals


def test_a_model_that_declares_no_streams_is_refused():
    world_model = TinyWorldModel()
    assert isinstance(world_model, WorldModel)
    assert not isinstance(world_model, HasResidualStreams)
    assert isinstance(tiny_model(), HasResidualStreams)
    with pytest.raises(PlanError, match=r"TinyWorldModel declares no residual streams.*another"):
        quantize(world_model, plan("w4"))


def test_a_width_without_a_hadamard_matrix_is_refused_until_told_to_leave_it():
    model = tiny_model(predictor=PredictorConfig(2, 2, 8, 40))
    with pytest.raises(PlanError, match=r"order 40 .*predictor\.blocks\.0\.mlp\.fc2, .*hidden to"):
        quantize(model, plan())
    assert_same_outputs(model, transformed(model, plan(hidden=False)))
    # The encoder's width has one.
    quantize(model, plan({"encoder.*": "w4"}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"writers": {"predictor.blocks.7.mlp.fc2": None}},
            r"blocks\.7\.mlp\.fc2 is declared, but",
        ),
        (
            {"writers": {"predictor.blocks.0.mlp.fc1": None}},
            r"outputs should be \(44,\), got \(32,\)",
        ),
        (
            {"readers": {"predictor.blocks.0.attn.qkv": ()}},
            r"must be of type LayerNorm .* not Projection",
        ),
        ({"embeddings": ("predictor.position",)}, r"predictor\.position should be a parameter"),
        ({"entry": "predictor.norm"}, r"predictor\.norm must be of type Identity to"),
    ],
    ids=["missing", "width", "norm", "embedding", "tap"],
)
def test_a_declaration_that_does_not_fit_is_refused(monkeypatch, change, reason):
    model = tiny_model()
    encoder, predictor = model.residual_streams()
    wrong = {
        k: {**getattr(predictor, k), **v} if isinstance(v, dict) else v for k, v in change.items()
    }
    streams = (encoder, replace(predictor, **wrong))
    monkeypatch.setattr(DINOWM, "residual_streams", lambda self: streams)
    with pytest.raises(PlanError, match=reason):
        quantize(model, plan())


def test_layers_that_no_stream_holds_are_refused(monkeypatch):
    model = tiny_model()
    (encoder, _) = model.residual_streams()
    monkeypatch.setattr(DINOWM, "residual_streams", lambda self: (encoder,))
    with pytest.raises(
        PlanError, match=r"no residual stream holds predictor\.blocks\.0\.attn\.qkv"
    ):
        quantize(model, plan())
    taps = QuantPlan({"encoder.*q_input": "a8-token"}, "rotation", include=("attention_matmul",))
    with pytest.raises(PlanError, match="nothing to rotate"):
        quantize(model, taps)


def test_a_rotated_model_is_not_rotated_again():
    twin = transformed(tiny_model(), plan())
    with pytest.raises(PlanError, match="must be of type LayerNorm to be rotated, not RMSNorm"):
        quantize(twin, plan())


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": True}, {"hidden": 1}, {"values": None}])
def test_options_are_checked(options):
    (name,) = options
    with pytest.raises(UsageError, match=f"{name} is"):
        Rotation(**options)
    assert get_method("rotation").options() == {
        "rotation.hidden": True,
        "rotation.values": True,
        "rotation.seed": 0,
    }


# Paper scale


@pytest.mark.slow
def test_at_paper_scale_the_rotated_model_computes_the_same():
    torch.manual_seed(0)
    model = new_world_model(DINOWMConfig(task="wall", action_dim=2, proprio_dim=2))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(1 + 0.3 * torch.randn_like(module.weight))
                module.bias.add_(0.3 * torch.randn_like(module.bias))
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        nn.init.normal_(model.predictor.pos_embedding, std=0.5)
    twin = transformed(model, plan())
    assert model.config.token_width == 404
    with torch.inference_mode():
        latents = [m.encode(observation(batch=1)) for m in (model, twin)]
        assert relative(latents[1]["visual"], latents[0]["visual"]) < 1e-4
        chosen = actions(1, 1, 2)
        ends = [
            m.rollout(one, chosen, last_only=True)
            for m, one in zip((model, twin), latents, strict=True)
        ]
    for name, part in ends[0].items():
        assert relative(ends[1][name], part) < 1e-4
