"""Quantized models on disk: packed integer codes, scales and what stayed float.

A folder holds `model.safetensors` and `quantwm.json` (see `quantwm.storage`). Codes and zero
points are packed at their own width, scales are float32, and every other float tensor is in the
smallest float type that holds it exactly, so that loading gives the same model bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantwm import storage
from quantwm.errors import MismatchError, UsageError
from quantwm.protocols import WorldModel
from quantwm.quant.apply import (
    AnyModel,
    Quantization,
    attach_record,
    check_is_float,
    copy_sharing_tensors,
    quantization_of,
)
from quantwm.quant.modules import (
    InputQuantizer,
    QuantConv2d,
    QuantizedWeight,
    QuantLinear,
    QuantTap,
    assemble,
    replace_module,
)
from quantwm.quant.packing import pack_bits, unpack_bits
from quantwm.quant.plan import declared_layers
from quantwm.quant.scheme import LayerScheme, WeightScheme
from quantwm.quant.structure import restructure

FORMAT, FORMAT_VERSION = "quantwm-quantized", 2


def save_quantized(world_model: WorldModel, folder: str | Path) -> None:
    """Write a quantized model to a folder, complete or not at all.

    Raises:
        UsageError: the model is not quantized, or the folder holds other files.
        QuantWMError: the folder cannot be written.
    """
    record = quantization_of(world_model)
    if record is None:
        raise UsageError("this model is not quantized: quantize it first")
    tensors, dtypes = tensors_for_storage(world_model)
    config = getattr(world_model, "config", None)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "quantization": record.to_dict(),
        "layers": {name: _layer_facts(world_model, name) for name, _ in record.layers},
        "dtypes": dtypes,
        "derived_dtypes": _derived_dtypes(world_model),
        "config": config.to_dict() if config is not None and hasattr(config, "to_dict") else None,
    }
    storage.write_folder(folder, tensors, metadata)


def load_quantized(folder: str | Path, skeleton: AnyModel) -> AnyModel:
    """Read a quantized model.

    Args:
        folder: that `save_quantized` wrote.
        skeleton: a float32 model of the same architecture, its weights of no account; it is
            left as it is. The new model's tensors go to its devices.

    Returns:
        the model that was saved, bit for bit.

    Raises:
        CorruptFileError: a file is truncated or altered.
        MismatchError: the skeleton is of another architecture.
        UsageError: no quantized model there, or a skeleton that is quantized itself.
    """
    check_is_float(skeleton)
    stored, metadata = storage.read_folder(folder, FORMAT, FORMAT_VERSION)
    tensors = storage.restore(stored, metadata["dtypes"])
    record = Quantization.from_dict(metadata["quantization"])
    world_model = copy_sharing_tensors(skeleton)
    restructure(world_model, record.structure)
    declared = declared_layers(world_model)
    device = next(world_model.parameters()).device
    for name, scheme in record.layers:
        if name not in declared:
            raise MismatchError(f"{folder} holds a layer {name!r} that this model has not")
        facts, layer = metadata["layers"][name], declared[name][1]
        rebuilt = _rebuild(name, scheme, facts, layer, tensors)
        replace_module(world_model, name, rebuilt if device.type == "meta" else rebuilt.to(device))
    storage.assign(cast(nn.Module, world_model), tensors)
    _cast_derived(world_model, metadata["derived_dtypes"])
    attach_record(world_model, record)
    return world_model


def tensors_for_storage(world_model: WorldModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A float or quantized model's tensors as they are stored.

    Returns:
        the tensors by name, and the original type of each float tensor that was shrunk.
    """
    exact: dict[str, Tensor] = {}
    for prefix, module in world_model.named_modules():
        if isinstance(module, QuantizedWeight):
            exact |= {f"{prefix}.{name}": value for name, value in _packed(module).items()}
        elif isinstance(module, InputQuantizer) and module.scale is not None:
            exact |= {f"{prefix}.scale": module.scale}
    others = {
        name: tensor for name, tensor in world_model.state_dict().items() if name not in exact
    }
    shrunk, dtypes = storage.shrink(others)
    return {**shrunk, **exact}, dtypes


def stored_bytes(world_model: WorldModel) -> int:
    """Bytes of a float or quantized model's tensors as they would be stored."""
    return storage.stored_size(tensors_for_storage(world_model)[0])


def _packed(weight: QuantizedWeight) -> dict[str, Tensor]:
    bits, symmetric = weight.scheme.bits, weight.scheme.symmetric
    tensors = {"codes": pack_bits(weight.codes, bits, symmetric=symmetric), "scale": weight.scale}
    if weight.zero_point is not None:
        tensors["zero_point"] = pack_bits(weight.zero_point, bits, symmetric=False)
    return tensors


def _layer_facts(world_model: WorldModel, name: str) -> dict[str, Any]:
    """What a reader needs, besides the scheme, to make sense of a layer's tensors."""
    layer = world_model.get_submodule(name)
    facts: dict[str, Any] = {}
    quantizer = layer if isinstance(layer, InputQuantizer) else None
    if isinstance(layer, QuantLinear | QuantConv2d):
        facts["shape"] = list(layer.weight.shape)
        quantizer = layer.input_quantizer
    facts["tokens_per_frame"] = None if quantizer is None else quantizer.tokens_per_frame
    return facts


def _rebuild(
    name: str,
    scheme: LayerScheme,
    facts: Mapping[str, Any],
    layer: nn.Module,
    tensors: dict[str, Tensor],
) -> nn.Module:
    """The quantized layer called `name`; its packed tensors are unpacked within `tensors`."""
    weight = quantizer = None
    if not isinstance(layer, nn.Identity):
        shape = tuple(layer.get_parameter("weight").flatten(1).shape)
        if list(shape) != facts.get("shape"):
            raise MismatchError(
                f"{name}: the saved weight is {facts.get('shape')}, the model's is {list(shape)}"
            )
        if scheme.weight is not None:
            weight = _unpacked(f"{name}.stored_weight", scheme.weight, shape, tensors)
    if scheme.activation is not None:
        tap = isinstance(layer, nn.Identity)
        prefix = name if tap else f"{name}.input_quantizer"
        quantizer = (QuantTap if tap else InputQuantizer)(
            scheme.activation,
            facts["tokens_per_frame"],
            tensors.get(f"{prefix}.scale"),
            tensors.get(f"{prefix}.zero_point"),
        )
    return assemble(layer, scheme, quantizer, weight)


def _unpacked(
    prefix: str, scheme: WeightScheme, shape: tuple[int, ...], tensors: dict[str, Tensor]
) -> QuantizedWeight:
    codes, scale = f"{prefix}.codes", tensors[f"{prefix}.scale"]
    tensors[codes] = unpack_bits(tensors[codes], scheme.bits, shape, symmetric=scheme.symmetric)
    zero_point = None
    if not scheme.symmetric:
        packed = tensors[f"{prefix}.zero_point"]
        zero_point = unpack_bits(packed, scheme.bits, scale.shape, symmetric=False)
        tensors[f"{prefix}.zero_point"] = zero_point
    return QuantizedWeight(tensors[codes], scale, zero_point, scheme, torch.float32)


def _derived_buffers(world_model: WorldModel) -> dict[str, Tensor]:
    """Float buffers that are not stored, because the model computes them."""
    stored = world_model.state_dict()
    return {
        name: buffer
        for name, buffer in world_model.named_buffers()
        if name not in stored and buffer.is_floating_point()
    }


def _derived_dtypes(world_model: WorldModel) -> dict[str, str]:
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in _derived_buffers(world_model).items()
        if buffer.dtype != torch.float32
    }


def _cast_derived(world_model: WorldModel, dtypes: Mapping[str, str]) -> None:
    for name, buffer in _derived_buffers(world_model).items():
        parent, _, child = name.rpartition(".")
        dtype = getattr(torch, dtypes.get(name, "float32"))
        setattr(world_model.get_submodule(parent), child, buffer.to(dtype))
