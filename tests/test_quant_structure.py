import json

import pytest
import torch
from torch import nn

from quant_support import TinyCalibration, TinyWorldModel, assert_unchanged, snapshot
from quantwm.errors import CorruptFileError, MismatchError, UsageError
from quantwm.methods import quantize
from quantwm.quant import QuantPlan
from quantwm.quant.apply import copy_sharing_tensors
from quantwm.quant.hadamard import Hadamard
from quantwm.quant.modules import replace_module
from quantwm.quant.structure import build, changes, describe, restructure

MODULES = {
    "linear": lambda: nn.Linear(12, 5),
    "linear_without_bias": lambda: nn.Linear(12, 12, bias=False),
    "rms_norm": lambda: nn.RMSNorm(12, eps=1e-6),
    "rms_norm_of_default_eps": lambda: nn.RMSNorm(12),
    "hadamard": lambda: Hadamard(24),
    "identity": nn.Identity,
    "sequential": lambda: nn.Sequential(nn.RMSNorm(12, eps=1e-5), nn.Linear(12, 24), Hadamard(24)),
    "nested": lambda: nn.Sequential(nn.Sequential(Hadamard(12)), nn.Linear(12, 3, bias=False)),
}
BIAS = {"kind": "added_bias"}


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def with_bias(layer):
    layer.bias = nn.Parameter(torch.ones(len(layer.weight)))


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_described_module_is_built_again(make):
    module = make()
    description = json.loads(json.dumps(describe(module)))
    built = build(description)
    assert str(built) == str(module)
    assert shapes(built) == shapes(module)
    assert describe(built) == description
    built.load_state_dict(module.state_dict())
    x = torch.randn(2, 24 if isinstance(module, Hadamard) else 12)
    assert torch.equal(built(x), module(x))


@pytest.mark.parametrize("module", [nn.GELU(), nn.LayerNorm(4), nn.Sequential(nn.GELU())], ids=str)
def test_other_modules_may_not_be_put_into_a_model(module):
    with pytest.raises(UsageError, match=r"a method put a \w+ into the model, which is not known"):
        describe(module)


@pytest.mark.parametrize(
    "description",
    [
        {"kind": "gelu"},
        {},
        {"kind": "linear", "inputs": 3},
        {"kind": "linear", "inputs": "many", "outputs": 3, "bias": True},
        {"kind": "hadamard", "width": 404},
        {"kind": "sequential", "parts": [{"kind": "gelu"}]},
        {"kind": "sequential"},
        "linear",
    ],
    ids=str,
)
def test_unknown_descriptions_are_corrupt(description):
    with pytest.raises(CorruptFileError, match="a saved model holds"):
        build(description)


def test_an_untouched_copy_has_no_changes():
    world_model = TinyWorldModel()
    assert changes(world_model, copy_sharing_tensors(world_model), set()) == {}


def changed_copy(world_model):
    """A tap, a normalisation and two biases, and what `changes` is to say of them."""
    twin = copy_sharing_tensors(world_model)
    norm = nn.Sequential(nn.RMSNorm(12, eps=1e-5), nn.Linear(12, 12))
    replace_module(twin, "predictor.norm", norm)
    replace_module(twin, "encoder.block.q_input", Hadamard(12))
    with_bias(twin.predictor.fc2)
    with_bias(twin.encoder.block.fc2)
    return twin, {
        "predictor.norm": describe(norm),
        "encoder.block.q_input": {"kind": "hadamard", "width": 12},
        "predictor.fc2": BIAS,
        "encoder.block.fc2": BIAS,
    }


def test_replaced_taps_and_norms_and_added_biases_are_found():
    world_model = TinyWorldModel()
    before = snapshot(world_model)
    twin, expected = changed_copy(world_model)
    assert changes(world_model, twin, set()) == expected
    assert_unchanged(world_model, before)


@pytest.mark.parametrize("plan", ["w4", "w3a8-token", "a8-dynamic"])
def test_quantized_layers_are_no_change_of_structure(plan):
    world_model = TinyWorldModel()
    full = QuantPlan(
        {"*.fc*": plan, "encoder.patch": "w4", "*_input": "a8-token"},
        include=("attention_matmul", "patch_embedding"),
    )
    small = quantize(world_model, full, TinyCalibration.of(world_model))
    quantized = set(full.resolve(world_model))
    assert changes(world_model, small, quantized) == {}
    assert small.quantization.structure == {}
    with_bias(small.predictor.fc2)
    assert changes(world_model, small, quantized) == {"predictor.fc2": BIAS}


def test_a_new_bias_of_a_layer_that_had_one_is_no_change_of_structure():
    world_model = TinyWorldModel()
    twin = copy_sharing_tensors(world_model)
    with_bias(twin.predictor.fc1)
    assert changes(world_model, twin, set()) == {}


def test_an_unknown_replacement_is_refused():
    world_model = TinyWorldModel()
    twin = copy_sharing_tensors(world_model)
    replace_module(twin, "predictor.norm", nn.GELU())
    with pytest.raises(UsageError, match="a method put a GELU into the model"):
        changes(world_model, twin, set())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_fresh_model_is_given_the_recorded_structure(device):
    twin, structure = changed_copy(TinyWorldModel())
    fresh = TinyWorldModel(seed=3).to(device)
    restructure(fresh, json.loads(json.dumps(structure)))
    assert shapes(fresh) == shapes(twin)
    assert changes(TinyWorldModel(), fresh, set()) == structure
    assert not fresh.predictor.norm.training
    # What no file holds must have its values even in a skeleton without any.
    assert torch.equal(fresh.encoder.block.q_input.left, twin.encoder.block.q_input.left)
    fresh.load_state_dict(twin.state_dict(), assign=True)
    assert_unchanged(fresh, snapshot(twin))


def test_a_patch_embedding_can_be_given_a_bias():
    world_model = TinyWorldModel()
    world_model.encoder.patch = nn.Conv2d(3, 12, 4, 4, bias=False)
    twin = copy_sharing_tensors(world_model)
    with_bias(twin.encoder.patch)
    structure = changes(world_model, twin, set())
    assert structure == {"encoder.patch": BIAS}
    restructure(world_model, structure)
    assert shapes(world_model) == shapes(twin)


@pytest.mark.parametrize(
    ("structure", "error", "message"),
    [
        ({"predictor.ls1": {"kind": "hadamard", "width": 12}}, MismatchError, "'predictor.ls1'"),
        ({"predictor.norm": BIAS}, MismatchError, r"predictor\.norm was saved with a bias"),
        ({"predictor.norm": {"kind": "gelu"}}, CorruptFileError, "unknown kind of module: 'gelu'"),
    ],
    ids=["no_such_module", "no_linear", "unknown_kind"],
)
def test_a_structure_of_another_model_is_refused(structure, error, message):
    with pytest.raises(error, match=message):
        restructure(TinyWorldModel(), structure)
