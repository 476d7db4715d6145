"""The algebra of rotation: every step leaves a model's outputs alone."""

import pytest
import torch
from torch import nn

from dino_wm_support import tiny_model
from quant_support import snapshot
from quantwm.quant import rotation
from quantwm.quant.hadamard import Hadamard, random_orthogonal
from quantwm.quant.sampling import named_generator
from rotation_support import assert_same_outputs, inputs_of


@pytest.mark.parametrize("width", [32, 96, 512, 1024, 1536, 2048])
def test_the_hadamard_product_is_orthogonal_and_spreads_an_outlier_and_a_constant(width):
    hadamard = Hadamard(width)
    matrix = hadamard(torch.eye(width)).T
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix, hadamard.matrix().float())
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, width**-0.5))
    constant = hadamard(torch.ones(width))
    assert constant.abs().max() <= 2 + 1e-4
    assert constant.square().mean() == pytest.approx(1, rel=1e-4)


def rotate(model, stream):
    rotation.rotate_stream(model, stream, random_orthogonal(stream.width, named_generator("0/a")))


STEPS = (rotation.absorb_layer_scales, rotation.absorb_norms, rotation.remove_mean, rotate)


@pytest.mark.parametrize("count", range(len(STEPS) + 1))
@pytest.mark.parametrize("part", [0, 1], ids=["encoder", "predictor"])
def test_every_step_leaves_the_outputs_alone(count, part):
    expected, model = tiny_model(), tiny_model()
    stream = rotation.open_boundaries(model, model.residual_streams()[part])
    for step in STEPS[:count]:
        before = snapshot(model)
        step(model, stream)
        # The predictor has no LayerScale; every other step changes weights.
        unchanged = before.keys() == model.state_dict().keys() and all(
            torch.equal(value, before[name]) for name, value in model.state_dict().items()
        )
        assert unchanged == (step is rotation.absorb_layer_scales and part == 1)
    assert_same_outputs(expected, model)


def test_normalisations_lose_their_factors_to_what_reads_them():
    model = tiny_model()
    for stream in model.residual_streams():
        complete = rotation.open_boundaries(model, stream)
        for step in STEPS[:3]:
            step(model, complete)
    norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm)]
    assert len(norms) == 2 * 2 * 2 + 2
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms)
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert not any("gamma" in name for name, _ in model.named_parameters())
    assert model.predictor.blocks[0].attn.qkv.bias is not None
    # The encoder's epsilon is not the predictor's.
    assert {norm.eps for norm in norms} == {1e-6, 1e-5}
    assert model.predictor.norm[0].eps == 1e-5
    for name in ("blocks.1.norm1", "blocks.1.norm2", "norm.0"):
        assert inputs_of(model, f"encoder.{name}").mean(-1).abs().max() < 1e-6


def test_values_alone_and_hidden_alone_leave_the_outputs_alone():
    expected, model = tiny_model(), tiny_model()
    for stream in model.residual_streams():
        for path in stream.values:
            generator = named_generator(f"1/{path.qkv}")
            heads = [random_orthogonal(path.head_dim, generator) for _ in range(path.heads)]
            before = model.get_submodule(path.qkv).weight.clone()
            rotation.rotate_values(model, path, torch.stack(heads))
            after = model.get_submodule(path.qkv).weight
            inner = path.heads * path.head_dim
            assert torch.equal(after[: 2 * inner], before[: 2 * inner])
            assert not torch.isclose(after[2 * inner :], before[2 * inner :]).any(1).all()
    assert_same_outputs(expected, model)
    for stream in model.residual_streams():
        for tap, layer in stream.hidden.items():
            rotation.rotate_hidden(model, tap, layer)
    assert_same_outputs(expected, model)
    assert isinstance(model.encoder.blocks[0].mlp.hidden, Hadamard)
