"""Names that a saved model's pickle may hold, and which of them stand for an inert record."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Name:
    """A global that the pickle names; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def _names(module: str, *names: str) -> frozenset[Name]:
    return frozenset(Name(module, name) for name in names)


STORAGES: Mapping[Name, torch.dtype] = {
    Name("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
DATA = _names("builtins", "dict", "list", "tuple", "int", "float", "bool", "str") | _names(
    "torch", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"
)
"""Names that are written as values, such as the default of a dictionary."""

_INERT_CLASSES = (
    _names("models.vit", "ViTPredictor", "Transformer", "Attention", "FeedForward")
    | _names("models.proprio", "ProprioceptiveEmbedding")
    | _names("models.dino", "DinoV2Encoder")
    | _names("models.dummy", "DummyModel", "DummyRepeatActionEncoder")
    | _names("models.vqvae", "VQVAE", "Encoder", "Decoder", "Quantize", "ResBlock")
    | _names("models.decoder.transposed_conv", "TransposedConvDecoder", "ReshapeDecoder", "Decoder")
    | _names("models.encoder.resnet", "ResNet", "resnet18", "resnet34", "resnet50")
    | _names("dinov2.models.vision_transformer", "DinoVisionTransformer")
    | _names("dinov2.layers.block", "Block", "NestedTensorBlock")
    | _names("dinov2.layers.attention", "Attention", "MemEffAttention")
    | _names("dinov2.layers.layer_scale", "LayerScale")
    | _names("dinov2.layers.mlp", "Mlp")
    | _names("dinov2.layers.patch_embed", "PatchEmbed")
    | _names("dinov2.layers.drop_path", "DropPath")
    | _names("torch.cuda.amp.grad_scaler", "GradScaler")
    | _names("torch.amp.grad_scaler", "GradScaler")
)
_INERT_MODULES = re.compile(
    r"torch\.nn\.modules\.[a-z_0-9]+|torch\.optim\.[a-z_0-9]+"
    r"|accelerate\.(optimizer|scheduler|state|utils\.dataclasses)"
)
"""Where a training run's layers and optimizers are defined; any class of theirs may stand inert."""
_CLASS = re.compile(r"[A-Z][A-Za-z0-9_]*")


def is_inert(name: Name) -> bool:
    """Whether objects of a class are read as records of their attributes."""
    if name in _INERT_CLASSES:
        return True
    return bool(_INERT_MODULES.fullmatch(name.module) and _CLASS.fullmatch(name.name))
