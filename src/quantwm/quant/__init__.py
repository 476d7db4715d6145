"""Quantization: schemes and plans, arithmetic, layers, and quantized models on disk.

Methods live in `quantwm.methods`, which also holds `quantize`.
"""

from quantwm.quant.apply import Method, Progress, Quantization, quantization_of
from quantwm.quant.artifact import load_quantized, save_quantized, stored_bytes
from quantwm.quant.modules import QuantConv2d, QuantLinear, QuantTap
from quantwm.quant.observers import CalibrationData
from quantwm.quant.plan import QuantPlan
from quantwm.quant.scheme import (
    ActivationScheme,
    LayerScheme,
    PerChannel,
    PerGroup,
    PerTensor,
    WeightScheme,
)

__all__ = [
    "ActivationScheme",
    "CalibrationData",
    "LayerScheme",
    "Method",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Progress",
    "QuantConv2d",
    "QuantLinear",
    "QuantPlan",
    "QuantTap",
    "Quantization",
    "WeightScheme",
    "load_quantized",
    "quantization_of",
    "save_quantized",
    "stored_bytes",
]
