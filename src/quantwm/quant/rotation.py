"""Rotating the residual streams of pre-LayerNorm transformers; outputs stay what they are.

An orthogonal Q turns a stream x into Q x. RMSNorm commutes with it, LayerNorm does not, and a
factor a channel does neither, so a stream is prepared first. In this order, each step exact
(QuaRot, arXiv 2404.00456; the LayerNorm's mean as in SliceGPT, arXiv 2401.15024):

1. `open_boundaries`: a linear where tokens enter or leave the stream through none.
2. `absorb_layer_scales`: into the linears before them.
3. `absorb_norms`: each LayerNorm's weight and bias into the linears after it.
4. `remove_mean`: from all that is added to the stream; then LayerNorm is RMSNorm.
5. `rotate_stream`.

`rotate_values` and `rotate_hidden` need none of these. Everything is folded in float64; new
tensors take the place of old ones, none is written into, because copies share them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from quantwm.protocols import AttentionValues, ResidualStream, WorldModel
from quantwm.quant.fold import constant_parameter, norm_parameters
from quantwm.quant.hadamard import Hadamard
from quantwm.quant.modules import replace_module

Map: TypeAlias = Callable[[Tensor], Tensor]
"""A linear map of columns, (width, n) float64 → the same shape."""


@torch.no_grad()
def open_boundaries(world_model: WorldModel, stream: ResidualStream) -> ResidualStream:
    """Put a linear, an identity yet, behind the entry's tap and behind the exit's LayerNorm.

    Returns:
        the stream with both linears among its writers and readers, and without an entry.
    """
    writers, last = dict(stream.writers), world_model.get_submodule(stream.exit)
    like = norm_parameters(last)[0]
    replace_module(world_model, stream.exit, nn.Sequential(last, _identity(stream.width, like)))
    if stream.entry is not None:
        replace_module(world_model, stream.entry, _identity(stream.width, like))
        writers[stream.entry] = None
    readers = {**stream.readers, f"{stream.exit}.0": (f"{stream.exit}.1",)}
    return replace(stream, writers=writers, readers=readers, exit=f"{stream.exit}.0", entry=None)


@torch.no_grad()
def absorb_layer_scales(world_model: WorldModel, stream: ResidualStream) -> None:
    """γ ⊙ (W x + b) = (diag(γ) W) x + γ ⊙ b; the LayerScales become identities."""
    for writer, scale in stream.writers.items():
        if scale is not None:
            (gamma,) = world_model.get_submodule(scale).parameters()
            _map_outputs(world_model.get_submodule(writer), _diagonal(gamma))
            replace_module(world_model, scale, nn.Identity())


@torch.no_grad()
def absorb_norms(world_model: WorldModel, stream: ResidualStream) -> None:
    """W (g ⊙ x + β) + b = (W diag(g)) x + (b + W β); linears without a bias get one."""
    for name, layers in stream.readers.items():
        norm = world_model.get_submodule(name)
        gain, shift = norm_parameters(norm)
        for layer in (world_model.get_submodule(layer) for layer in layers):
            weight = layer.get_parameter("weight")
            if shift is not None:
                bias, added = layer.bias, weight.double() @ shift.double()
                total = added + bias.double() if isinstance(bias, Tensor) else added
                layer.bias = constant_parameter(total, weight)
            _map_inputs(layer, _diagonal(gain))
        norm.weight = constant_parameter(torch.ones_like(gain), gain)
        if shift is not None:
            norm.bias = constant_parameter(torch.zeros_like(shift), shift)


@torch.no_grad()
def remove_mean(world_model: WorldModel, stream: ResidualStream) -> None:
    """Take the mean over the width out of all that is added to the stream.

    LayerNorm does that anyway, and with nothing left of its own it is RMSNorm, which takes its
    place. Needs `open_boundaries` and `absorb_norms` before.
    """
    _map_stream(world_model, stream, lambda columns: columns - columns.mean(0))
    for name in stream.readers:
        norm = world_model.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm)
        weight = norm.weight
        rms = nn.RMSNorm(stream.width, norm.eps, device=weight.device, dtype=weight.dtype)
        replace_module(world_model, name, rms.requires_grad_(False).train(norm.training))


@torch.no_grad()
def rotate_stream(world_model: WorldModel, stream: ResidualStream, rotation: Tensor) -> None:
    """x → Q x for a stream that went through the steps before.

    Args:
        rotation: Q, orthogonal, (width, width) float64.
    """
    turn = _product(rotation)
    _map_stream(world_model, stream, turn)
    for layers in stream.readers.values():
        for layer in layers:
            _map_inputs(world_model.get_submodule(layer), turn)


@torch.no_grad()
def rotate_values(world_model: WorldModel, values: AttentionValues, rotations: Tensor) -> None:
    """Rotate each head's values; attention mixes tokens, not channels, so `proj` undoes it.

    Args:
        rotations: orthogonal, (heads, head_dim, head_dim) float64.
    """
    inner = values.heads * values.head_dim

    def turn(columns: Tensor) -> Tensor:
        heads = columns.reshape(values.heads, values.head_dim, -1)
        return (rotations.to(columns.device) @ heads).flatten(0, 1)

    def turn_values(columns: Tensor) -> Tensor:
        return torch.cat([columns[: 2 * inner], turn(columns[2 * inner :])])

    _map_outputs(world_model.get_submodule(values.qkv), turn_values)
    _map_inputs(world_model.get_submodule(values.proj), turn)


@torch.no_grad()
def rotate_hidden(world_model: WorldModel, tap: str, layer: str) -> None:
    """Put a Hadamard product into a tap, and its inverse into the linear that reads the tap.

    Raises:
        ValueError: no Hadamard matrix of that width is known.
    """
    linear = world_model.get_submodule(layer)
    weight = linear.get_parameter("weight")
    exact = Hadamard(weight.shape[1]).to(weight.device, torch.float64)
    _map_inputs(linear, lambda columns: exact(columns.T).T)
    hadamard = Hadamard(weight.shape[1]).to(weight.device, weight.dtype)
    replace_module(world_model, tap, hadamard.eval())


def stream_problems(world_model: WorldModel, stream: ResidualStream) -> list[str]:
    """Where a declaration does not fit the model, or the model is not what can be rotated."""
    width = (stream.width,)
    expected: list[tuple[str, tuple[type[nn.Module], ...], str, tuple[int, ...]]] = []
    for writer, scale in stream.writers.items():
        expected.append((writer, (nn.Linear, nn.Conv2d), "outputs", width))
        expected += [] if scale is None else [(scale, (nn.Module,), "parameter", width)]
    for norm, layers in {**stream.readers, stream.exit: ()}.items():
        expected.append((norm, (nn.LayerNorm,), "weight", width))
        expected += [(layer, (nn.Linear,), "inputs", width) for layer in layers]
    for path in stream.values:
        inner = path.heads * path.head_dim
        expected.append((path.qkv, (nn.Linear,), "outputs", (3 * inner,)))
        expected.append((path.proj, (nn.Linear,), "inputs", (inner,)))
    for tap in (*([stream.entry] if stream.entry is not None else []), *stream.hidden):
        expected.append((tap, (nn.Identity,), "type", ()))
    expected += [(layer, (nn.Linear,), "type", ()) for layer in stream.hidden.values()]
    problems = [problem for one in expected for problem in _misfit(world_model, *one)]
    parameters = dict(world_model.named_parameters())
    for name in stream.embeddings:
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape is None or shape[-1:] != width:
            problems.append(f"{name} should be a parameter (..., {stream.width}), got {shape}")
    return problems


def _misfit(
    world_model: WorldModel,
    name: str,
    types: tuple[type[nn.Module], ...],
    what: str,
    size: tuple[int, ...],
) -> Iterator[str]:
    try:
        module = world_model.get_submodule(name)
    except AttributeError:
        yield f"{name} is declared, but the model has no such module"
        return
    if not isinstance(module, types):
        known = " or ".join(one.__name__ for one in types)
        yield f"{name} must be of type {known} to be rotated, not {type(module).__name__}"
        return
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    if what == "parameter":
        found = shapes[0] if len(shapes) == 1 else None
    elif what == "type":
        found = ()
    elif not shapes:
        found = None
    else:
        found = {"outputs": shapes[0][:1], "inputs": shapes[0][1:], "weight": shapes[0]}[what]
    if found != size:
        yield f"{name}: {what} should be {size}, got {found}"


def _map_stream(world_model: WorldModel, stream: ResidualStream, change: Map) -> None:
    """Apply a map to all that is added to the stream."""
    for writer in stream.writers:
        _map_outputs(world_model.get_submodule(writer), change)
    for name in stream.embeddings:
        owner, _, own = name.rpartition(".")
        module = world_model.get_submodule(owner)
        old = module.get_parameter(own)
        columns = old.double().flatten(0, -2).T
        setattr(module, own, constant_parameter(change(columns).T.reshape(old.shape), old))


def _map_outputs(layer: nn.Module, change: Map) -> None:
    """W → M W and b → M b, of a linear or a convolution."""
    weight, bias = layer.get_parameter("weight"), layer.bias
    layer.weight = constant_parameter(
        change(weight.double().flatten(1)).reshape(weight.shape), weight
    )
    if isinstance(bias, Tensor):
        layer.bias = constant_parameter(change(bias.double()[:, None])[:, 0], bias)


def _map_inputs(layer: nn.Module, change: Map) -> None:
    """W → W Mᵀ, which undoes M on what a linear reads if M is orthogonal."""
    weight = layer.get_parameter("weight")
    layer.weight = constant_parameter(change(weight.double().T).T, weight)


def _diagonal(factors: Tensor) -> Map:
    return lambda columns: factors.double()[:, None] * columns


def _product(matrix: Tensor) -> Map:
    return lambda columns: matrix.to(columns.device) @ columns


def _identity(width: int, like: Tensor) -> nn.Linear:
    # On the meta device nothing is initialised at random.
    linear = nn.Linear(width, width, bias=False, device="meta")
    linear.weight = constant_parameter(torch.eye(width), like)
    return linear.eval()
