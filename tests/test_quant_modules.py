import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantwm.errors import NonFiniteError, UsageError
from quantwm.quant import LayerScheme, QuantConv2d, QuantLinear, QuantTap
from quantwm.quant.modules import InputQuantizer, QuantizedWeight, quantized_layer
from quantwm.quant.primitives import fake_quantize_rows
from quantwm.quant.scheme import ActivationScheme


def linear(inputs=12, outputs=5, seed=0, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, bias=bias)


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(name, tokens_per_frame=None, extent=None):
    scheme = LayerScheme.parse(name).activation
    return InputQuantizer.from_range(scheme, tokens_per_frame, extent)


EXTENT = (torch.tensor(-2.0), torch.tensor(3.0))
WEIGHTS = ["w4", "w3g5", "w4-w_tensor", "w5-w_asymmetric", "w2g4-w_asymmetric", "w3-w_study"]


@pytest.mark.parametrize("name", WEIGHTS)
def test_linear_multiplies_by_what_its_codes_stand_for(name):
    layer, x = linear(), values(2, 3, 12)
    quantized = quantized_layer(layer, LayerScheme.parse(name))
    assert isinstance(quantized, QuantLinear)
    stored = quantized.stored_weight
    assert stored.codes.dtype == (torch.uint8 if "asymmetric" in name else torch.int8)
    assert stored.codes.shape == (5, 12)
    assert not torch.equal(quantized.weight, layer.weight)
    error = (quantized.weight - layer.weight).abs().max()
    assert error < layer.weight.abs().max()
    assert torch.equal(quantized(x), F.linear(x, quantized.weight, layer.bias))
    assert (quantized.in_features, quantized.out_features) == (12, 5)


def test_the_weight_is_computed_once_and_not_stored():
    quantized = quantized_layer(linear(), LayerScheme.parse("w4"))
    first = quantized.weight
    quantized(values(2, 12))
    assert quantized.weight is first
    assert set(quantized.state_dict()) == {"stored_weight.codes", "stored_weight.scale", "bias"}


@pytest.mark.parametrize("name", ["w4", "w8a8", "w8a8-token", "a8-dynamic"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "outputs", [slice(2, None), slice(1, 4), slice(0, 0), slice(None)], ids=str
)
def test_some_outputs_are_those_of_all(name, bias, outputs):
    layer, x = linear(outputs=6, bias=bias), values(2, 3, 12)
    quantized = quantized_layer(layer, LayerScheme.parse(name), input_range=EXTENT)
    expected = quantized(x)[..., outputs]
    found = quantized(x, outputs=outputs)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*WEIGHTS, "w8a8", "w8a8-a_symmetric"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_degrades_neither_scales_nor_codes(name, dtype):
    layer = linear(bias=False)
    quantized = quantized_layer(layer, LayerScheme.parse(name), input_range=EXTENT)
    before = copy.deepcopy(quantized.state_dict())
    x = values(4, 12)
    output, weight = quantized(x), quantized.weight
    quantized.to(dtype)
    assert quantized.weight.dtype == dtype
    assert torch.equal(quantized.weight, weight.to(dtype))
    assert quantized(x.to(dtype)).dtype == dtype
    for key, tensor in before.items():
        assert quantized.state_dict()[key].dtype == tensor.dtype
        assert torch.equal(quantized.state_dict()[key], tensor)
    quantized.to(torch.float32)
    assert torch.equal(quantized.weight, weight)
    assert torch.equal(quantized(x), output)


def test_loading_a_state_dict_changes_what_is_computed():
    scheme = LayerScheme.parse("w4a8")
    one = quantized_layer(linear(seed=1), scheme, input_range=EXTENT)
    other = quantized_layer(
        linear(seed=2), scheme, input_range=(torch.tensor(-0.1), torch.tensor(0.9))
    )
    x = values(4, 12)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_activation_only_keeps_the_float_weight():
    layer, x = linear(), values(3, 12)
    quantized = quantized_layer(layer, LayerScheme.parse("a8-token"))
    assert quantized.weight is layer.weight
    expected = layer(fake_quantize_rows(x, 8, symmetric=False))
    assert torch.equal(quantized(x), expected)


def test_a_layer_in_bfloat16_is_quantized_in_float32():
    layer = linear()
    exact = nn.Linear(12, 5)
    exact.load_state_dict({k: v.bfloat16().float() for k, v in layer.state_dict().items()})
    low = quantized_layer(layer.bfloat16(), LayerScheme.parse("w8"))
    high = quantized_layer(exact, LayerScheme.parse("w8"))
    assert torch.equal(low.stored_weight.codes, high.stored_weight.codes)
    assert torch.equal(low.stored_weight.scale, high.stored_weight.scale)
    assert low.weight.dtype == torch.bfloat16


def test_a_clipped_range_gives_other_codes():
    weight = torch.tensor([[0.1, -0.2, 0.3, 7.0]])
    scheme = LayerScheme.parse("w4").weight
    clipped = QuantizedWeight.from_float(
        weight, scheme, (torch.tensor([[-0.7]]), torch.tensor([[0.7]]))
    )
    assert clipped.codes.tolist() == [[1, -2, 3, 7]]


def test_non_finite_weights_are_refused():
    layer = linear()
    layer.weight.data[1, 1] = float("nan")
    with pytest.raises(NonFiniteError):
        quantized_layer(layer, LayerScheme.parse("w4"))


def test_token_dynamic_and_static_scales_differ():
    x = values(2, 6, 16) * torch.tensor([1.0, 5.0, 0.2, 2.0, 9.0, 0.5])[:, None]
    extent = (x.min(), x.max())
    found = {name: quantizer(name, 3, extent)(x) for name in ("a4-token", "a4-dynamic", "a4")}
    errors = {name: (value - x).square().mean().item() for name, value in found.items()}
    assert errors["a4-token"] < errors["a4-dynamic"] < errors["a4"]


def test_one_token_a_frame_makes_dynamic_the_same_as_per_token():
    x = values(3, 5, 8)
    assert torch.equal(quantizer("a4-dynamic", 1)(x), quantizer("a4-token")(x))
    assert not torch.equal(quantizer("a4-dynamic", 5)(x), quantizer("a4-token")(x))


def test_static_is_dynamic_where_there_is_one_frame():
    x = values(1, 5, 8)
    static = quantizer("a5", extent=(x.min(), x.max()))
    assert torch.equal(static(x), quantizer("a5-dynamic")(x))


@pytest.mark.parametrize("name", ["a4-token", "a4-dynamic", "a8-dynamic-a_symmetric"])
def test_a_candidate_does_not_depend_on_the_others(name):
    x, outlier = values(4, 6, 16), values(1, 6, 16) * 1000
    quantize = quantizer(name, 3)
    together = quantize(torch.cat([x[:2], outlier, x[2:]]))
    assert torch.equal(together[[0, 1, 3, 4]], quantize(x))
    assert torch.equal(torch.cat([quantize(row[None]) for row in x]), quantize(x))


def test_a_frame_does_not_depend_on_the_others():
    x = values(2, 6, 16)
    louder = x.clone()
    louder[:, 3:] *= 1000
    quantize = quantizer("a4-dynamic", 3)
    assert torch.equal(quantize(louder)[:, :3], quantize(x)[:, :3])
    assert not torch.equal(quantizer("a4-dynamic")(louder)[:, :3], quantize(x)[:, :3])


def test_leading_dimensions_are_all_rows():
    x = values(2, 3, 4, 8)
    quantize = quantizer("a4-dynamic")
    assert torch.equal(quantize(x), quantize(x.flatten(0, 1)).view_as(x))
    flat = values(5, 8)
    assert torch.equal(quantize(flat), quantizer("a4-token")(flat))


def test_tokens_that_make_no_whole_frames_are_an_error():
    with pytest.raises(UsageError, match="5 tokens a row does not divide into frames of 3"):
        quantizer("a4-dynamic", 3)(values(2, 5, 8))


@pytest.mark.parametrize("name", ["a8-token", "a8-dynamic", "a8"])
def test_the_input_is_left_alone(name):
    x = values(3, 4, 8).requires_grad_()
    before = x.detach().clone()
    output = quantizer(name, 2, EXTENT)(x)
    assert torch.equal(x, before)
    assert not torch.equal(output, before)


def test_static_needs_a_range():
    with pytest.raises(UsageError, match="calibrated range"):
        InputQuantizer.from_range(ActivationScheme(8), None, None)


@pytest.mark.parametrize("name", ["w8", "w8a8-token", "w8a8-dynamic", "a8-token", "w8a8"])
def test_patch_embedding_follows_the_convolution(name):
    layer = nn.Conv2d(3, 6, (4, 2), (4, 2))
    images = values(2, 3, 9, 8)
    extent = (images.min(), images.max())
    quantized = quantized_layer(layer, LayerScheme.parse(name), input_range=extent)
    assert isinstance(quantized, QuantConv2d)
    with torch.no_grad():
        expected = layer(images)
        assert quantized(images).shape == expected.shape == (2, 6, 2, 4)
        error = (quantized(images) - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.02


def test_patches_are_the_tokens_of_a_patch_embedding():
    layer = nn.Conv2d(1, 1, 2, 2, bias=False)
    layer.weight.data.fill_(1.0)
    images = torch.tensor([[0.0, 1.0, 0.0, 3.0], [0.0, 0.4, 0.0, 3.0]]).reshape(1, 1, 2, 4)
    token = quantized_layer(layer, LayerScheme.parse("a2-token"))(images)
    frame = quantized_layer(layer, LayerScheme.parse("a2-dynamic"))(images)
    assert token.flatten().tolist() == pytest.approx([1 + 1 / 3, 6.0])
    assert frame.flatten().tolist() == [1.0, 6.0]


def test_tap_shares_a_dynamic_scale_between_heads_but_not_frames_or_rows():
    tap = quantized_layer(nn.Identity(), LayerScheme.parse("a4-dynamic"), tokens_per_frame=2)
    assert isinstance(tap, QuantTap)
    # The model hands over a view: (rows, tokens, heads, width) with tokens and heads swapped.
    x = values(3, 4, 2, 5).transpose(1, 2)
    found = tap(x)
    for row in range(3):
        for frame in (slice(0, 2), slice(2, 4)):
            part = x[row, :, frame].reshape(1, -1)
            expected = fake_quantize_rows(part, 4, symmetric=False)
            assert torch.equal(found[row, :, frame].reshape(1, -1), expected)


def test_tap_per_token_has_a_scale_a_head():
    tap = quantized_layer(nn.Identity(), LayerScheme.parse("a4-token"))
    x = values(3, 2, 4, 5)
    expected = fake_quantize_rows(x.reshape(-1, 5), 4, symmetric=False).view_as(x)
    assert torch.equal(tap(x), expected)


def test_other_layers_cannot_be_quantized():
    with pytest.raises(UsageError, match="a LayerNorm cannot be quantized"):
        quantized_layer(nn.LayerNorm(3), LayerScheme.parse("w4"))
