"""Modules that a method put into a model, described so that a saved model can be built again.

Methods may replace an `nn.Identity` tap, a normalisation or a LayerScale by one of the modules
that `describe` knows, and give a linear or a patch embedding a bias that it had not. Nothing else
about a model's structure changes.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from quantwm.errors import CorruptFileError, MismatchError, UsageError
from quantwm.protocols import WorldModel
from quantwm.quant.hadamard import Hadamard
from quantwm.quant.modules import replace_module

Structure: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Dotted module name → description, JSON values."""

_ADDED_BIAS: Mapping[str, Any] = {"kind": "added_bias"}


def describe(module: nn.Module) -> dict[str, Any]:
    """What `build` needs to make a module of the same shape.

    Raises:
        UsageError: a module that a method may not put into a model.
    """
    if isinstance(module, nn.Sequential):
        return {"kind": "sequential", "parts": [describe(part) for part in module]}
    if isinstance(module, nn.Linear):
        return {
            "kind": "linear",
            "inputs": module.in_features,
            "outputs": module.out_features,
            "bias": module.bias is not None,
        }
    if isinstance(module, nn.RMSNorm):
        (width,) = module.normalized_shape
        return {"kind": "rms_norm", "width": width, "eps": module.eps}
    if isinstance(module, Hadamard):
        return {"kind": "hadamard", "width": module.width}
    if type(module) is nn.Identity:
        return {"kind": "identity"}
    raise UsageError(f"a method put a {type(module).__name__} into the model, which is not known")


def build(description: Mapping[str, Any]) -> nn.Module:
    """A module of that shape, its tensors of no account.

    Raises:
        CorruptFileError: a description that `describe` cannot have written.
    """
    try:
        match description["kind"]:
            case "sequential":
                return nn.Sequential(*(build(part) for part in description["parts"]))
            case "linear":
                inputs, outputs = int(description["inputs"]), int(description["outputs"])
                return nn.Linear(inputs, outputs, bias=bool(description["bias"]))
            case "rms_norm":
                eps = description["eps"]
                return nn.RMSNorm(int(description["width"]), None if eps is None else float(eps))
            case "hadamard":
                return Hadamard(int(description["width"]))
            case "identity":
                return nn.Identity()
            case kind:
                raise CorruptFileError(f"a saved model holds an unknown kind of module: {kind!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"a saved model holds no module like {description}") from error


def changes(before: WorldModel, after: WorldModel, quantized: set[str]) -> dict[str, Any]:
    """How the structure of `after` differs from that of `before`.

    Args:
        before, after: a float model, and what a method made of a copy of it.
        quantized: names of layers that are replaced by quantized ones, which are not counted.
    """
    old: dict[str, nn.Module] = dict(before.named_modules())
    found: dict[str, Any] = {}
    for name, module in after.named_modules():
        own = old.get(name)
        if own is None or any(name.startswith(f"{other}.") for other in found):
            continue
        if name not in quantized and type(module) is not type(own):
            found[name] = describe(module)
        elif _bias(own) is None and _bias(module) is not None:
            found[name] = dict(_ADDED_BIAS)
    return found


def restructure(world_model: WorldModel, structure: Structure) -> None:
    """Make a freshly built float model look as `changes` found it; tensors of no account.

    Raises:
        MismatchError: the model has no module of such a name.
        CorruptFileError: an unknown description.
    """
    for name, description in structure.items():
        try:
            module = world_model.get_submodule(name)
        except AttributeError as error:
            raise MismatchError(f"the saved model has a module {name!r}, this one not") from error
        device = next((p.device for p in world_model.parameters()), torch.device("cpu"))
        if description == _ADDED_BIAS:
            if not isinstance(module, nn.Linear | nn.Conv2d):
                raise MismatchError(f"{name} was saved with a bias, but is no linear here")
            module.bias = nn.Parameter(torch.zeros(len(module.weight), device=device))
        else:
            added = build(description).eval()
            # Buffers that are not stored would lose their values on the meta device for good.
            added = added if device.type == "meta" else added.to(device)
            replace_module(world_model, name, added)


def added_multiply_adds(structure: Structure) -> dict[str, int]:
    """Multiply-adds a token of the products that a method added, by module name.

    Args:
        structure: of a quantized model's record, `quantization_of(world_model).structure`.
    """
    counts = {name: _multiply_adds(description) for name, description in structure.items()}
    return {name: count for name, count in counts.items() if count}


def _multiply_adds(description: Mapping[str, Any]) -> int:
    match description["kind"]:
        case "sequential":
            return sum(_multiply_adds(part) for part in description["parts"])
        case "linear":
            return int(description["inputs"]) * int(description["outputs"])
        case "hadamard":
            return Hadamard(int(description["width"])).multiply_adds
        case _:
            return 0


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None
