"""Rounding with learned ranges and factors: its values, and where its gradients come from."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantwm.protocols import LinearGroup
from quantwm.quant.fold import scale_inputs
from quantwm.quant.input_quantizer import InputQuantizer
from quantwm.quant.learned import (
    LearnedClipping,
    LearnedInput,
    LearnedLinear,
    LearnedNorm,
    LearnedScaling,
    input_grid,
    round_to_grid,
    weight_grid,
)
from quantwm.quant.modules import QuantConv2d, QuantizedWeight, quantized_layer
from quantwm.quant.observers import MinMax
from quantwm.quant.scheme import LayerScheme

WEIGHTS = ["w4", "w3g7", "w2g5-w_asymmetric", "w4-w_asymmetric", "w4-w_study", "w3-w_tensor"]
INPUTS = ["a4", "a3-a_symmetric", "a4-dynamic", "a4-token", "a5-token-a_symmetric"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(rows=6, width=17, seed=0):
    """Heavy tails, as weights have."""
    return torch.randn(rows, width, generator=generator(seed)) ** 3


def clipping(text, weight, logits=None):
    learned = LearnedClipping(weight, LayerScheme.parse(text).weight)
    with torch.no_grad():
        if logits is None:
            learned.logit.copy_(torch.randn(learned.logit.shape, generator=generator(1)))
        else:
            learned.logit.fill_(logits)
    return learned


def straight_through(x):
    return x + (x.round() - x).detach()


@pytest.mark.parametrize("text", WEIGHTS)
def test_a_learned_weight_is_the_quantized_weight(text):
    weight = matrix()
    learned = clipping(text, weight)
    stored = QuantizedWeight.from_float(weight, learned.scheme, learned.extent(weight))
    assert torch.equal(learned(weight), stored.value)
    whole = QuantizedWeight.from_float(weight, learned.scheme)
    assert not torch.equal(stored.value, whole.value)
    full = clipping(text, weight, logits=40)
    assert torch.equal(full(weight), whole.value)


@pytest.mark.parametrize("text", WEIGHTS)
def test_gradients_are_those_of_the_textbook_formula(text):
    """Against autograd through x̂ = s (clamp(round(x / s) + z) - z), rounding as the identity."""
    scheme = LayerScheme.parse(text).weight
    weight = matrix().requires_grad_()
    learned = clipping(text, weight)
    probe = torch.randn(weight.shape, generator=generator(2))
    (learned(weight) * probe).sum().backward()
    ours = weight.grad.clone(), learned.logit.grad.clone()
    weight.grad = learned.logit.grad = None

    share, textbook = learned.logit.sigmoid(), torch.zeros(())
    size = getattr(scheme.granularity, "size", weight.shape[1])
    per_tensor = text.endswith("w_tensor")
    for row in range(len(weight)):
        for number, group in enumerate(weight[row].split(size)):
            values = weight if per_tensor else group
            low, high = values.min().clamp(max=0), values.max().clamp(min=0)
            own = share[:, 0 if per_tensor else row, number]
            if scheme.symmetric:
                steps = 2**scheme.bits - 1 if scheme.scale_rule == "study" else 2**scheme.bits - 2
                scale = torch.maximum(-low, high) * own[0] / (steps / 2)
                codes = straight_through(group / scale)
                ends = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
                rounded = scale * codes.clamp(*ends)
            else:
                top = 2**scheme.bits - 1
                scale = (high * own[1] - low * own[0]) / top
                zero_point = straight_through(-low * own[0] / scale)
                codes = (straight_through(group / scale) + zero_point).clamp(0, top)
                rounded = scale * (codes - zero_point)
            textbook = textbook + (rounded * probe[row].split(size)[number]).sum()
    textbook.backward()
    torch.testing.assert_close(ours[0], weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], learned.logit.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["w6-w_tensor", "w6-w_tensor-w_asymmetric"])
@pytest.mark.parametrize("logit", [-1.0, 0.0, 1.5, 4.0])
def test_gradients_of_clipping_are_slopes_of_the_error(text, logit):
    """Over many weights the error is smooth in the range, so finite differences can tell."""
    weight = torch.randn(400, 500, generator=generator())
    weight[weight > 2.5] *= 1.3
    learned = clipping(text, weight, logits=logit)

    def error():
        return (learned(weight) - weight).square().mean()

    error().backward()
    for end, found in enumerate(learned.logit.grad.flatten()):
        sides = []
        for step in (0.2, -0.2):
            with torch.no_grad():
                learned.logit[end] += step
                sides.append(error().item())
                learned.logit[end] -= step
        slope = (sides[0] - sides[1]) / 0.4
        assert found.item() == pytest.approx(slope, rel=0.15, abs=1e-6)


@pytest.mark.parametrize("text", ["w2", "w3", "w4", "w3-w_study"])
def test_descending_the_gradient_finds_the_ranges_that_a_search_finds(text):
    weight = torch.randn(32, 128, generator=generator())
    weight = weight * weight.abs()
    learned = clipping(text, weight, logits=4)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.1)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        error = (learned(weight) - weight).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    searched = [
        QuantizedWeight.from_float(weight, learned.scheme, (low * share, high * share)).value
        for share in torch.linspace(0.1, 1, 91)
    ]
    least = torch.stack([(w - weight).square().mean(1) for w in searched]).amin(0).mean().item()
    assert errors[-1] < 0.9 * errors[0]
    assert errors[-1] < 1.1 * least


@pytest.mark.parametrize("text", INPUTS)
@pytest.mark.parametrize("tokens_per_frame", [None, 4])
def test_a_learned_input_is_the_rounded_input(text, tokens_per_frame):
    scheme = LayerScheme.parse(text).activation
    x = torch.randn(3, 8, 10, generator=generator()) + 1
    extent = (x.min(), x.max() * 0.7) if scheme.static else None
    learned = LearnedInput(scheme, tokens_per_frame)
    if scheme.static:
        learned.cover(extent)
    expected = InputQuantizer.from_range(scheme, tokens_per_frame, extent)(x)
    assert torch.equal(learned(x), expected)
    assert torch.equal(learned(x.requires_grad_()), expected)


@pytest.mark.parametrize("text", INPUTS)
def test_gradients_reach_what_a_range_is_of(text):
    """Rounding commutes with a factor of all values, so the result must have that slope."""
    scheme = LayerScheme.parse(text).activation
    x = torch.randn(3, 8, 10, generator=generator())
    learned = LearnedInput(scheme, 4)
    if scheme.static:
        learned.cover((x.min(), x.max()))
    probe = torch.randn(x.shape, generator=generator(1))
    factor = torch.ones((), requires_grad=True)
    (learned(x * factor) * probe).sum().backward()
    expected = (learned(x) * probe).sum()
    assert factor.grad.item() == pytest.approx(expected.item(), rel=0.1, abs=0.3)


def test_while_an_observer_is_there_inputs_stay_as_they_are():
    learned = LearnedInput(LayerScheme.parse("a2").activation, None)
    learned.observer = MinMax("layer")
    x = torch.randn(2, 3, 4, generator=generator())
    assert learned(x) is x
    assert learned.observer.range() == (x.min(), x.max())


class Net(nn.Module):
    """A normalisation that feeds two linears."""

    def __init__(self, norm, *, bias=True):
        super().__init__()
        self.norm, self.a, self.b = norm, nn.Linear(12, 5, bias=bias), nn.Linear(12, 4)

    def forward(self, x):
        x = self.norm(x)
        return torch.cat([self.a(x), self.b(x)], -1)


def net(norm, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Net(norm(12), **changes)
        for parameter in made.parameters():
            nn.init.normal_(parameter)
    return made.requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_scaling_leaves_outputs_as_they_are_and_folds_into_what_it_was(norm, bias):
    model, x = net(norm, bias=bias), torch.randn(2, 7, 12, generator=generator())
    expected = model(x)
    reach = torch.rand(12, generator=generator(1)) + 0.5 if norm is nn.LayerNorm else None
    scaling = LearnedScaling(torch.rand(12, generator=generator(2)) + 0.2, reach)
    if reach is not None:
        nn.init.normal_(scaling.relative_shift, generator=generator(3))
    learned_norm = LearnedNorm(model.norm, scaling)
    linears = [LearnedLinear(one, LayerScheme(), None, scaling) for one in (model.a, model.b)]
    given = learned_norm(x)
    found = torch.cat([linear(given) for linear in linears], -1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(given, model.norm(x))
    found.square().sum().backward()
    with torch.no_grad():
        shift = scaling.shift()
        scale_inputs(model, LinearGroup(("a", "b"), "norm", ""), scaling.scale(), shift)
        assert torch.equal(model.norm(x), given)
        torch.testing.assert_close(model(x), found, rtol=1e-6, atol=1e-6)


def test_factors_are_pushed_towards_less_error():
    """A channel that stands out spoils the others' grid; its factor must grow beside theirs."""
    model = net(nn.LayerNorm)
    spike = torch.ones(12).index_fill(0, torch.tensor([3]), 40.0)
    model.norm.weight = nn.Parameter(spike, requires_grad=False)
    x = torch.randn(64, 5, 12, generator=generator())
    scheme = LayerScheme.parse("a4-token")
    scaling = LearnedScaling(torch.ones(12), None)
    norm, linear = LearnedNorm(model.norm, scaling), LearnedLinear(model.a, scheme, None, scaling)
    target = model.a(model.norm(x))
    errors = []
    optimizer = torch.optim.Adam(scaling.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        error = (linear(norm(x)) - target).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.3 * errors[0]
    factors = scaling.scale()
    assert factors.argmax() == 3
    assert factors[3] / factors.median() > 3


@pytest.mark.parametrize("text", ["w4", "w3g7a4-dynamic", "w4a4-token-w_asymmetric"])
def test_a_learned_patch_embedding_is_the_quantized_one(text):
    convolution = nn.Conv2d(3, 6, 4, 4).requires_grad_(False)
    images = torch.randn(2, 3, 13, 8, generator=generator())
    learned = LearnedLinear(convolution, LayerScheme.parse(text), None)
    weight = convolution.weight.flatten(1)
    stored = QuantizedWeight.from_float(
        weight, learned.clipping.scheme, learned.clipping.extent(weight)
    )
    quantized = quantized_layer(convolution, LayerScheme.parse(text), weight=stored)
    assert isinstance(quantized, QuantConv2d)
    torch.testing.assert_close(learned(images), quantized(images))


def test_asked_for_some_outputs_it_gives_those():
    layer = nn.Linear(9, 6).requires_grad_(False)
    learned = LearnedLinear(
        layer,
        LayerScheme.parse("w3g4"),
        None,
        LearnedScaling(torch.rand(9, generator=generator()) + 0.5, torch.ones(9)),
    )
    x = torch.randn(2, 3, 9, generator=generator(1))
    torch.testing.assert_close(learned(x, outputs=slice(2, None)), learned(x)[..., 2:])


def test_groups_of_zeros_have_no_gradient_and_no_error():
    weight = torch.zeros(3, 8)
    learned = clipping("w4g4-w_asymmetric", weight, logits=4)
    rounded = learned(weight)
    rounded.sum().backward()
    assert torch.equal(rounded, weight)
    assert learned.logit.grad.isfinite().all()


def test_grids_are_those_of_the_primitives():
    low, high = torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 3.0])
    scale, zero_point = input_grid(low, high, LayerScheme.parse("a4").activation)
    assert scale.tolist() == pytest.approx([3 / 15, 3 / 15])
    assert zero_point.tolist() == [5, 0]
    scheme = LayerScheme.parse("w4-w_asymmetric").weight
    assert torch.equal(weight_grid((low, high), scheme)[1], torch.tensor([5.0, 0.0]))
    x = torch.tensor([[-2.0, 0.0, 0.31, 9.0]])
    rounded = round_to_grid(x, scale[:1], zero_point[:1], 4, symmetric=False)
    assert rounded[0].tolist() == pytest.approx([-1.0, 0.0, 0.4, 2.0])
    assert F.mse_loss(rounded, x) > 0
