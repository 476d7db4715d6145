import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from quant_support import TinyCalibration, TinyWorldModel, assert_unchanged, run, snapshot
from quantwm.errors import CorruptFileError, MismatchError, UsageError
from quantwm.fingerprint import model_hash
from quantwm.methods import quantize
from quantwm.quant import (
    QuantPlan,
    load_quantized,
    quantization_of,
    save_quantized,
    stored_bytes,
)
from quantwm.storage import METADATA_FILE, TENSORS_FILE

PLANS = [
    "w8",
    "w3g5",
    "w2g7-w_asymmetric",
    "w5-w_tensor-w_study",
    "w8a8",
    "w4a4-token",
    "a6-dynamic-a_symmetric",
    "float",
    QuantPlan(
        {"*": "w4g5a8", "*_input": "a8-a_symmetric", "encoder.patch": "w8a8"},
        include=("attention_matmul", "patch_embedding"),
    ),
    QuantPlan({"encoder.patch": "a8-token"}, include=("patch_embedding",)),
]


def quantized(plan, seed=0):
    world_model = TinyWorldModel(seed)
    return quantize(world_model, plan, TinyCalibration.of(world_model))


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reloading_is_bit_identical(tmp_path, plan, dtype):
    small = quantized(plan).to(dtype)
    before = snapshot(small)
    save_quantized(small, tmp_path / "model")
    assert_unchanged(small, before)
    skeleton = TinyWorldModel(seed=9)
    untouched = snapshot(skeleton)
    loaded = load_quantized(tmp_path / "model", skeleton)
    assert_unchanged(loaded, before)
    assert torch.equal(run(loaded), run(small))
    assert quantization_of(loaded) == quantization_of(small)
    assert model_hash(loaded) == model_hash(small)
    assert_unchanged(skeleton, untouched)
    assert torch.equal(run(loaded.to(torch.bfloat16)), run(small.to(torch.bfloat16)))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_counted_bytes_are_those_of_the_file(tmp_path, plan):
    small = quantized(plan)
    save_quantized(small, tmp_path / "model")
    content = (tmp_path / "model" / TENSORS_FILE).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert stored_bytes(small) == len(content) - header


def test_bytes_by_hand():
    world_model = TinyWorldModel()
    weights = {name: p.numel() for name, p in world_model.named_parameters()}
    saved = stored_bytes(world_model) - stored_bytes(quantize(world_model, {"predictor.fc2": "w3"}))
    # 240 float32 weights become 240 * 3 / 8 bytes of codes and 12 float32 scales.
    assert weights["predictor.fc2.weight"] == 240
    assert saved == 240 * 4 - 90 - 12 * 4
    grouped = quantize(world_model, {"predictor.fc2": "w4g8-w_asymmetric"})
    # Three groups a row: 36 scales and 36 zero points of 4 bits.
    assert stored_bytes(world_model) - stored_bytes(grouped) == 240 * 4 - 120 - 36 * 4 - 18


def test_float_weights_that_fit_float16_count_as_such():
    world_model = TinyWorldModel()
    full = stored_bytes(world_model)
    world_model.load_state_dict({k: v.half() for k, v in world_model.state_dict().items()})
    assert world_model.predictor.fc1.weight.dtype == torch.float32
    # LayerNorm's ones and zeros fitted before: two norms of two vectors of 12.
    assert stored_bytes(world_model) == (full + 48 * 2) // 2
    assert stored_bytes(world_model) == stored_bytes(TinyWorldModel().half())


def test_codes_on_disk_are_packed_and_scales_are_float32(tmp_path):
    small = quantized("w4g8a8")
    small.predictor.fc1.input_quantizer.scale.fill_(0.5)
    small.predictor.fc1.stored_weight.scale.fill_(0.25)
    save_quantized(small, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / TENSORS_FILE)
    assert "predictor.fc1.weight" not in tensors
    codes = tensors["predictor.fc1.stored_weight.codes"]
    assert (codes.dtype, codes.numel()) == (torch.uint8, 240 * 4 // 8)
    assert tensors["predictor.fc1.stored_weight.scale"].dtype == torch.float32
    assert tensors["predictor.fc1.input_quantizer.scale"].dtype == torch.float32
    document = json.loads((tmp_path / "model" / METADATA_FILE).read_text())
    assert document["quantization"]["plan"]["layers"] == {"*": "w4g8a8"}
    assert document["layers"]["predictor.fc1"] == {"shape": [20, 12], "tokens_per_frame": 4}


@pytest.mark.parametrize("name", [TENSORS_FILE, METADATA_FILE])
def test_a_truncated_model_is_refused(tmp_path, name):
    save_quantized(quantized("w4"), tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorruptFileError, match=name):
        load_quantized(tmp_path / "model", TinyWorldModel())


def test_another_architecture_is_refused(tmp_path):
    save_quantized(quantized("w4"), tmp_path / "model")
    wider = TinyWorldModel()
    wider.predictor.fc1 = nn.Linear(12, 24)
    with pytest.raises(MismatchError, match=r"predictor\.fc1: the saved weight is \[20, 12\]"):
        load_quantized(tmp_path / "model", wider)
    other = TinyWorldModel()
    other.action_embed = nn.Linear(3, 12)
    with pytest.raises(MismatchError, match=r"action_embed\.weight: shape \(12, 2\)"):
        load_quantized(tmp_path / "model", other)

    class Fewer(TinyWorldModel):
        def quantizable_groups(self):
            return super().quantizable_groups()[:-3]

    with pytest.raises(MismatchError, match=r"a layer 'predictor\.fc1'"):
        load_quantized(tmp_path / "model", Fewer())


def test_only_quantized_models_are_saved_and_only_float_ones_filled(tmp_path):
    with pytest.raises(UsageError, match="not quantized"):
        save_quantized(TinyWorldModel(), tmp_path / "model")
    save_quantized(quantized("w4"), tmp_path / "model")
    with pytest.raises(UsageError, match="quantized already"):
        load_quantized(tmp_path / "model", quantized("w8"))
    with pytest.raises(UsageError, match="no saved model"):
        load_quantized(tmp_path, TinyWorldModel())


def test_the_configuration_travels_with_the_model(tmp_path):
    class Config:
        def to_dict(self):
            return {"depth": 2}

    world_model = TinyWorldModel()
    world_model.config = Config()
    save_quantized(quantize(world_model, "w4"), tmp_path / "model")
    document = json.loads((tmp_path / "model" / METADATA_FILE).read_text())
    assert document["config"] == {"depth": 2}
