"""OmniQuant: what it learns, and that the quantized model is what was learned."""

import pytest
import torch

from block_support import SmallReplayData, small_model, small_observation
from dino_wm_support import relative
from foreign import PointWorld
from quant_support import TinyWorldModel, assert_unchanged, observations, snapshot
from quantwm.errors import PlanError, UsageError
from quantwm.methods import get_method, omniquant, quantize, resolve_plan
from quantwm.methods.bias_correction import BiasCorrection
from quantwm.methods.learned_block import LearnedBlock
from quantwm.methods.omniquant import OmniQuant
from quantwm.methods.work import Work
from quantwm.protocols import LinearGroup
from quantwm.quant import (
    QuantLinear,
    QuantPlan,
    QuantTap,
    load_quantized,
    quantization_of,
    save_quantized,
)
from quantwm.quant.apply import copy_sharing_tensors
from quantwm.quant.block_inputs import block_calls
from quantwm.quant.observers import MinMax, Replay

FAST = {"epochs": 4, "lr_clip": 0.1, "lr_transform": 0.02, "batch_rows": 10, "tokens": 400}
BLOCKS = [f"{part}.blocks.{number}" for part in ("encoder", "predictor") for number in range(2)]
EVERYTHING = QuantPlan(
    {"*": "w4g5a8", "*_input": "a8", "*.patch_embed.proj": "w4a8-token"},
    "omniquant",
    include=("attention_matmul", "patch_embedding"),
    options=FAST | {"epochs": 1, "tokens": 1000},
)


def plan(layers, **options):
    layers = {"*": layers} if isinstance(layers, str) else layers
    return QuantPlan(layers, "omniquant", options=FAST | options)


def learned_of(small):
    return quantization_of(small).report["omniquant"]


def work_of(model, scheme, include=()):
    """Everything that a part needs, on a copy of `model`."""
    layers = {"*": scheme} if isinstance(scheme, str) else scheme
    schemes = QuantPlan(layers, include=include).resolve(model)
    data = SmallReplayData(model)
    return Work(copy_sharing_tensors(model), schemes, tuple(model.quantizable_groups()), data)


def perturbed(learned, size=0.3):
    """As if trained: every parameter somewhere else."""
    generator = torch.Generator().manual_seed(0)
    learned.restore(
        [value + size * torch.randn(value.shape, generator=generator) for value in learned.state()]
    )


@pytest.mark.parametrize("num_hist", [1, 3])
@pytest.mark.parametrize("scheme", ["w3", "w4a4"])
def test_training_lowers_the_error_on_both_parts_of_every_block(scheme, num_hist):
    model = small_model(num_hist=num_hist)
    data = SmallReplayData(model, episodes=20)
    found = learned_of(quantize(model, plan(scheme), data))
    assert list(found) == BLOCKS
    for block, report in found.items():
        assert report["held_out_after"] < report["held_out_before"], block
        assert report["training_after"] < report["training_before"], block
        assert 1 <= report["best_epoch"] <= report["epochs"] <= FAST["epochs"]


def test_a_model_learned_is_nearer_to_the_float_model_than_one_rounded():
    model = small_model(num_hist=3)
    data, fresh = SmallReplayData(model, episodes=20), small_observation(4, seed=5)
    actions = torch.randn(4, 3, 5, 10, generator=torch.Generator().manual_seed(9))

    @torch.no_grad()
    def frames(one):
        return one.rollout(one.encode(fresh), actions)["visual"]

    for scheme in ("w3", "w4a4-token"):
        errors = [
            relative(frames(quantize(model, one, data)), frames(model))
            for one in (plan(scheme), scheme)
        ]
        assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("scheme", ["w3", "w4a4", "w3-w_asymmetric"])
def test_every_parameter_moves(monkeypatch, scheme):
    kept = []

    class Spy(LearnedBlock):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append((self, self.state()))

        def restore(self, state):
            kept[-1] += (self.state(),)
            super().restore(state)

    monkeypatch.setattr(omniquant, "LearnedBlock", Spy)
    model = small_model()
    quantize(model, plan(scheme), SmallReplayData(model))
    for learned, before, after in kept:
        names = [n for n, p in learned.module.named_parameters() if p.requires_grad]
        assert sum(name.endswith("logit") for name in names) == 4
        assert sum(name.endswith("log_scale") for name in names) == 2
        assert sum(name.endswith("relative_shift") for name in names) == 2
        for name, old, new in zip(names, before, after, strict=True):
            assert (old != new).float().mean() > 0.9, name


SCHEMES = [
    "w3",
    "w4a4",
    "w4a4-dynamic",
    "w4a4-token-w_asymmetric",
    "w3g7",
    "w2g5a8-w_asymmetric",
    "w3a5-a_symmetric-w_study",
    "w4a8-token-w_tensor",
    "a4-dynamic",
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("block", ["encoder.blocks.0", "predictor.blocks.1"])
def test_the_quantized_block_is_what_was_trained(block, scheme):
    work = work_of(small_model(num_hist=3), scheme)
    calls = block_calls(work.replay, [block], 10**6)[block]
    learned = LearnedBlock(work, block, calls, MinMax)
    perturbed(learned)
    targets = learned.float_outputs()
    expected = [call.run(learned.module).detach() for call in calls]
    learned.quantize()
    module = work.world_model.get_submodule(block)
    assert isinstance(module.attn.qkv, QuantLinear)
    for call, wanted, target in zip(calls, expected, targets, strict=True):
        apart = (call.run(module) - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        # Folding rounds in another order; in a few rows that tips a value between two codes.
        assert apart.median() < 1e-5
        assert apart.max() < 0.02
        assert relative(wanted, target) > 1e-3


@pytest.mark.parametrize("block", ["encoder.patch_embed", "encoder.blocks.1", "predictor.blocks.0"])
def test_taps_and_the_patch_embedding_are_rounded_in_training_as_afterwards(block):
    layers = {"*": "w4a4", "*_input": "a4-dynamic", "*.[kv]_input": "a4"}
    work = work_of(small_model(), layers, ("attention_matmul", "patch_embedding"))
    calls = block_calls(work.replay, [block], 10**6)[block]
    learned = LearnedBlock(work, block, calls, MinMax)
    perturbed(learned)
    expected = [call.run(learned.module).detach() for call in calls]
    learned.quantize()
    module = work.world_model.get_submodule(block)
    for call, wanted in zip(calls, expected, strict=True):
        apart = (call.run(module) - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        assert apart.median() < 1e-5
    if block.endswith("0"):
        assert isinstance(module.attn.p_input, QuantTap)


def test_before_training_factors_are_smoothquants_and_ranges_nearly_whole():
    work = work_of(small_model(), {"*.qkv": "w4a4", "*.fc1": "w4"})
    block = "predictor.blocks.0"
    calls = block_calls(work.replay, [block], 10**6)[block]
    learned = LearnedBlock(work, block, calls, MinMax)
    module = work.world_model.get_submodule(block)
    x = torch.cat([module.norm1(call.arguments[0]).flatten(0, 1) for call in calls]).detach()
    expected = (x.abs().amax(0) / module.attn.qkv.weight.abs().amax(0)).sqrt()
    scaling = learned.module.norm1.scaling
    torch.testing.assert_close(scaling.scale(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert not scaling.shift().any()
    # Inputs that stay float have no outliers to move.
    assert torch.equal(learned.module.norm2.scaling.scale(), torch.ones(module.mlp.fc1.in_features))
    share = learned.module.attn.qkv.clipping.logit.detach().sigmoid()
    assert share.min() == share.max() == pytest.approx(0.982, abs=1e-3)


def test_blocks_are_learned_from_what_quantized_blocks_before_them_give(monkeypatch):
    seen = {}

    def spy(replay, blocks, tokens):
        found = block_calls(replay, blocks, tokens)
        for block in blocks:
            seen[block] = torch.cat([call.arguments[0] for call in found[block]])
        return found

    monkeypatch.setattr(omniquant, "block_calls", spy)
    model = small_model(num_hist=1)
    data = SmallReplayData(model)
    small = quantize(model, plan("w3a8", epochs=1), data)

    def inputs(one, block):
        read = []
        handle = one.get_submodule(block).register_forward_pre_hook(
            lambda _, args: read.append(args[0])
        )
        data.encode(one)
        handle.remove()
        return torch.cat(read)

    torch.testing.assert_close(seen["encoder.blocks.0"], inputs(model, "encoder.blocks.0"))
    torch.testing.assert_close(seen["encoder.blocks.1"], inputs(small, "encoder.blocks.1"))
    assert relative(seen["encoder.blocks.1"], inputs(model, "encoder.blocks.1")) > 0.01
    # The first step of a rollout reads nothing but what the quantized encoder gave.
    latents = data.encode(small)
    visual = latents["visual"][:, 0].repeat_interleave(4, 0)
    first = seen["predictor.blocks.0"][:, :, : visual.shape[-1]]
    wanted = visual + model.predictor.pos_embedding[:, : visual.shape[1], : visual.shape[-1]]
    close = (first[:, None] - wanted[None]).flatten(2).norm(dim=2).amin(0)
    assert close.max() < 1e-4


@pytest.mark.parametrize("target", ["float_path", "same_inputs"])
def test_targets_are_those_of_the_float_path_where_nothing_is_rolled_out(monkeypatch, target):
    seen, split = {}, omniquant._examples

    def spy(calls, targets, block):
        seen[block] = calls, torch.cat(targets)
        return split(calls, targets, block)

    monkeypatch.setattr(omniquant, "_examples", spy)
    model = small_model(num_hist=1)
    quantize(model, plan("w3", epochs=1, target=target), SmallReplayData(model))
    float_path = {}
    for block in BLOCKS[:2]:
        module = model.get_submodule(block)
        (call,) = block_calls(Replay(model, SmallReplayData(model)), [block], 10**6)[block]
        float_path[block] = call.run(module).detach()
    for block, (calls, targets) in seen.items():
        with torch.no_grad():
            same_inputs = torch.cat([call.run(model.get_submodule(block)) for call in calls])
        expected = float_path.get(block, same_inputs) if target == "float_path" else same_inputs
        torch.testing.assert_close(targets, expected)
        if block == "encoder.blocks.1":
            assert relative(float_path[block], same_inputs) > 0.01


def test_the_result_depends_on_nothing_but_its_arguments():
    model = small_model(num_hist=3)
    before = snapshot(model)
    data = SmallReplayData(model)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        results.append(quantize(model, plan("w3g7a8-token", epochs=2), data))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert_unchanged(results[1], snapshot(results[0]))
    assert_unchanged(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.inference_mode():
        again = quantize(model, plan("w3g7a8-token", epochs=2), data)
    assert_unchanged(again, snapshot(results[0]))


@pytest.mark.parametrize("wanted", ["w3g7a4", "w4-w_asymmetric", EVERYTHING], ids=str)
def test_reloading_is_bit_identical(tmp_path, wanted):
    model = small_model(num_hist=3)
    data = SmallReplayData(model)
    wanted = plan(wanted, epochs=1) if isinstance(wanted, str) else wanted
    small = quantize(model, wanted, data)
    # A shift leaves something for a bias, which the predictor's qkv had not.
    assert model.predictor.blocks[0].attn.qkv.bias is None
    assert small.predictor.blocks[0].attn.qkv.bias is not None
    save_quantized(small, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", small_model(seed=3, num_hist=3))
    assert_unchanged(loaded, snapshot(small))
    assert quantization_of(loaded) == quantization_of(small)
    with torch.no_grad():
        latent = data.encode(small)
        ours, theirs = (one.rollout(latent, data.actions)["visual"] for one in (small, loaded))
    assert torch.equal(ours, theirs)


def test_no_progress_leaves_the_state_before_training():
    """Steps far too large: what is kept is where it started, and patience ends the rest."""
    model = small_model()
    data = SmallReplayData(model)
    wild = {"lr_clip": 0.99, "lr_transform": 0.99, "epochs": 9, "patience": 2}
    found = learned_of(quantize(model, plan("w8a8", **wild), data))
    assert any(report["best_epoch"] == 0 for report in found.values())
    for report in found.values():
        assert report["held_out_after"] <= report["held_out_before"]
        assert report["epochs"] <= report["best_epoch"] + 2
        if report["best_epoch"] == 0:
            assert report["training_after"] == report["training_before"]


@pytest.mark.parametrize("include", [(), ("attention_matmul", "patch_embedding")])
def test_a_foreign_model_is_learned(include):
    world_model = TinyWorldModel()
    before = snapshot(world_model)
    data = SmallReplayData(world_model, observation=observations(20))
    layers = {"*": "w3a8"} | ({"*_input": "a8", "encoder.patch": "w3g7"} if include else {})
    wanted = QuantPlan(layers, "omniquant", include, FAST)
    small = quantize(world_model, wanted, data)
    patches = ["encoder"] if include else []
    assert list(learned_of(small)) == [*patches, "encoder.block", "predictor"]
    reports = learned_of(small).values()
    assert sum(report["held_out_after"] < report["held_out_before"] for report in reports) >= 2
    assert_unchanged(world_model, before)


def test_layers_that_are_their_own_block_are_learned():
    world_model = PointWorld()
    data = SmallReplayData(world_model, width=world_model.action_spec.model_dim)
    small = quantize(world_model, plan("w3", batch_rows=3), data)
    assert list(learned_of(small)) == ["look", "move"]
    assert isinstance(small.look, QuantLinear)
    assert isinstance(small.move, QuantLinear)


def test_what_corrects_layers_gets_float_ones_with_the_transform_folded_in(monkeypatch):
    seen = {}
    monkeypatch.setattr(BiasCorrection, "correct", lambda self, work, floats: seen.update(floats))
    model = small_model()
    wanted = QuantPlan({"*.blocks.1.*": "w4"}, "omniquant+bias_correction", options=FAST)
    small = quantize(model, wanted, SmallReplayData(model))
    x = torch.randn(3, 4, model.predictor.width, generator=torch.Generator().manual_seed(0))
    before, after = model.predictor.blocks[1], small.predictor.blocks[1]
    with torch.no_grad():
        given = after.norm1(x)
        folded = seen["predictor.blocks.1.attn.qkv"](given)
        torch.testing.assert_close(folded, before.attn.qkv(before.norm1(x)), rtol=1e-4, atol=1e-4)
    assert relative(given, before.norm1(x)) > 0.1


def test_too_few_samples_are_refused():
    model = small_model()
    with pytest.raises(
        UsageError, match=r"too few calibration samples: of encoder\.blocks\.0 inputs from 4"
    ):
        quantize(model, plan("w4"), SmallReplayData(model, episodes=4))


def test_blocks_without_anything_to_learn_get_ranges_alone():
    model = small_model()
    layers = {"encoder.blocks.0.mlp.fc2": "a8", "encoder.blocks.1.*": "w4"}
    small = quantize(model, plan(layers, epochs=1), SmallReplayData(model))
    assert list(learned_of(small)) == ["encoder.blocks.1"]
    assert small.encoder.blocks[0].mlp.fc2.input_quantizer.scale is not None


def test_plans_that_leave_nothing_to_learn_are_refused():
    layers = {"*.fc2": "a8-token", "*.proj": "a8-token", "*.patch_embed.proj": "float"}
    with pytest.raises(PlanError, match=r"nothing to learn for .*mlp\.fc2.*use rtn"):
        resolve_plan(plan(layers), small_model())
    resolve_plan(plan({"*.qkv": "a8"}), small_model())
    with pytest.raises(PlanError, match="needs calibration data"):
        quantize(small_model(), plan("w4"))


def test_layers_outside_their_block_are_named():
    class Odd(TinyWorldModel):
        def quantizable_groups(self):
            return [
                *super().quantizable_groups(),
                LinearGroup(("action_embed",), None, "predictor"),
            ]

    with pytest.raises(PlanError, match=r"action_embed: not in the block .*LinearGroup\.block"):
        resolve_plan(plan("w4"), Odd())


def test_a_normalisation_outside_the_block_takes_nothing_in():
    class Odd(TinyWorldModel):
        def quantizable_groups(self):
            groups = super().quantizable_groups()
            return [
                LinearGroup(g.layers, g.producer, g.layers[0], g.kind, g.tokens_per_frame)
                if g.kind == "linear"
                else g
                for g in groups
            ]

    world_model = Odd()
    data = SmallReplayData(world_model, observation=observations(10))
    small = quantize(world_model, plan("w3", epochs=1), data)
    assert list(learned_of(small))[:2] == ["encoder.block.fc1", "encoder.block.fc2"]
    assert torch.equal(small.predictor.norm.weight, world_model.predictor.norm.weight)


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("epochs", 0, "integer of at least 1, got 0"),
        ("patience", True, "integer of at least 1, got True"),
        ("tokens", 2.5, "integer of at least 1, got 2.5"),
        ("lr_clip", 0, "between 0 and 1, got 0"),
        ("lr_transform", "high", "between 0 and 1, got 'high'"),
        ("target", "float_pth", "did you mean 'float_path'"),
    ],
)
def test_options_out_of_range_are_refused(option, value, problem):
    with pytest.raises(UsageError, match=f"omniquant:? {option}.*{problem}"):
        get_method("omniquant", {option: value})


def test_it_is_one_method_among_others():
    assert get_method("omniquant").parts == (OmniQuant(),)
    assert get_method("omniquant").needs_calibration
    with pytest.raises(UsageError, match="scale the same channels"):
        get_method("smoothquant+omniquant")
    with pytest.raises(UsageError, match=r"omniquant learns ranges and rounds by itself"):
        get_method("gptq+omniquant")
