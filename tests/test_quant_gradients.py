"""Gradients through quantized layers: straight through the rounding, none where a grid clips."""

import pytest
import torch
from torch import nn

from quantwm.quant import LayerScheme
from quantwm.quant.modules import quantized_layer

INPUTS = ["a3-token", "a3-dynamic", "a3-dynamic-a_symmetric", "a3", "a3-a_symmetric"]


def tap(name, low=-1.0, high=2.0, tokens_per_frame=None):
    scheme = LayerScheme.parse(name)
    extent = (torch.tensor(low), torch.tensor(high))
    return quantized_layer(
        nn.Identity(), scheme, tokens_per_frame=tokens_per_frame, input_range=extent
    )


def gradient(module, x, upstream):
    """(output, gradient of the input) for a gradient `upstream` of the output."""
    x = x.clone().requires_grad_()
    output = module(x)
    output.backward(upstream)
    return output.detach(), x.grad


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_static_asymmetric_grid_by_hand():
    # Two bits over [-1, 2]: scale 1, values -1, 0, 1, 2; what rounds beyond them is clipped.
    x = torch.tensor([[-1.6, -1.4, -0.2, 0.6, 2.4, 2.6]])
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    output, found = gradient(tap("a2"), x, upstream)
    assert output.tolist() == [[-1.0, -1.0, 0.0, 1.0, 2.0, 2.0]]
    assert found.tolist() == [[0.0, 2.0, 3.0, 4.0, 5.0, 0.0]]


def test_a_static_symmetric_grid_by_hand():
    # Two bits for a magnitude of 2: scale 2, values -4, -2, 0, 2.
    x = torch.tensor([[-5.1, -4.9, 0.3, 2.9, 3.1, float("inf")]])
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, float("inf")]])
    output, found = gradient(tap("a2-a_symmetric"), x, upstream)
    assert output.tolist() == [[-4.0, -4.0, 0.0, 2.0, 2.0, 2.0]]
    assert found.tolist() == [[0.0, 2.0, 3.0, 4.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", ["a2-token", "a2-dynamic", "a2-token-a_symmetric"])
def test_a_grid_that_follows_its_values_passes_all(name):
    x, upstream = noise(3, 4, 6), noise(3, 4, 6, seed=1)
    assert torch.equal(gradient(tap(name, tokens_per_frame=2), x, upstream)[1], upstream)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_is_the_one_without_a_gradient(name, dtype):
    module, x = tap(name, tokens_per_frame=2), noise(2, 4, 10, dtype=dtype)
    output, found = gradient(module, x, torch.ones_like(x))
    assert torch.equal(output, module(x))
    assert found.dtype == dtype
    with torch.no_grad():
        assert not module(x.clone().requires_grad_()).requires_grad
    assert not module(x).requires_grad


def test_heads_that_share_a_scale_keep_their_gradients():
    x, upstream = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1)
    output, found = gradient(tap("a4-dynamic", tokens_per_frame=2), x, upstream)
    assert output.shape == x.shape
    assert torch.equal(found, upstream)


@pytest.mark.parametrize("name", ["w4a2", "w4a8-token", "w4"])
def test_a_layer_passes_the_gradient_of_its_rounded_weight(name):
    layer = nn.Linear(7, 3).requires_grad_(False)
    extent = (torch.tensor(-1.0), torch.tensor(2.0))
    quantized = quantized_layer(layer, LayerScheme.parse(name), input_range=extent)
    x, upstream = noise(5, 7) * 2, noise(5, 3, seed=1)
    _, found = gradient(quantized, x, upstream)
    through = upstream @ quantized.weight
    clipped = (x.round() < -1) | (x.round() > 2) if name == "w4a2" else torch.zeros(5, 7).bool()
    assert clipped.any() == (name == "w4a2")
    assert torch.allclose(found, through.masked_fill(clipped, 0.0))
    assert not quantized.weight.requires_grad
    assert all(buffer.grad is None for buffer in quantized.buffers())


def test_descending_the_gradient_reaches_a_target_through_two_layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(6, 16), nn.Linear(16, 4)]
    scheme = LayerScheme.parse("w8a8-token")
    model = nn.Sequential(*(quantized_layer(layer, scheme) for layer in layers))
    model.requires_grad_(False)
    target, action = model(noise(1, 6)), torch.zeros(1, 6, requires_grad=True)
    optimizer = torch.optim.Adam([action], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(action) - target).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3 * target.square().sum()
