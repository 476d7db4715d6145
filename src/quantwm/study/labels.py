"""What an arm is, in the terms that tables, filters and findings choose by."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantwm.quant import LayerScheme
from quantwm.quant.scheme import PerGroup, PerTensor
from quantwm.study.arms import Arm
from quantwm.study.cells import ArmKind

_GRANULARITIES = {
    "per_tensor_static": "tensor",
    "per_tensor_dynamic": "frame",
    "per_token": "token",
}


@dataclass(frozen=True)
class ArmLabels:
    """What an arm is.

    Attributes:
        kind: a reference, the float model or a quantized one.
        part: what is quantized: "all", "encoder", "predictor", a layer pattern such as
            "encoder.blocks.3.*", "mixed" where parts differ, "saved" for a model from a folder;
            "" where nothing is.
        weight_bits: None where weights stay in float.
        weights: "channel", "tensor" or "g128", the inputs that share a scale; "" without bits.
        activation_bits: None where inputs stay in float.
        activations: "tensor" (static), "frame" (one a candidate and frame) or "token"; "" without
            bits.
        method: "" where nothing is quantized.
        budget: planner settings and MPC iterations in which the arm differs from its study, as
            sorted (name, value) pairs.
    """

    kind: ArmKind
    part: str = ""
    weight_bits: int | None = None
    weights: str = ""
    activation_bits: int | None = None
    activations: str = ""
    method: str = ""
    budget: tuple[tuple[str, Any], ...] = ()

    @property
    def width(self) -> str:
        """ "W4", "W8A8", "A8"; "float" where nothing is quantized, "mixed" where parts differ."""
        if self.part in ("mixed", "saved"):
            return self.part
        weight = "" if self.weight_bits is None else f"W{self.weight_bits}"
        activation = "" if self.activation_bits is None else f"A{self.activation_bits}"
        return weight + activation or "float"


def labels_of(arm: Arm) -> ArmLabels:
    """The labels of an arm, from what its study says of it."""
    budget = tuple(sorted(arm.budget().items()))
    if arm.folder is not None:
        return ArmLabels(arm.kind, part="saved", method="saved", budget=budget)
    if arm.plan is None:
        return ArmLabels(arm.kind, budget=budget)
    schemes = {scheme for _, scheme in arm.plan.layers}
    if len(arm.plan.layers) > 1 and len(schemes) > 1:
        return ArmLabels(arm.kind, part="mixed", method=arm.plan.method, budget=budget)
    pattern, scheme = arm.plan.layers[0]
    part = "mixed" if len(arm.plan.layers) > 1 else _part(pattern)
    return ArmLabels(
        arm.kind, part=part, method=arm.plan.method, budget=budget, **_scheme_labels(scheme)
    )


def _part(pattern: str) -> str:
    if pattern == "*":
        return "all"
    side = re.fullmatch(r"(\w+)\.\*", pattern)
    return side[1] if side else pattern


def _scheme_labels(scheme: LayerScheme) -> Mapping[str, Any]:
    labels: dict[str, Any] = {}
    if (weight := scheme.weight) is not None:
        shared = weight.granularity
        name = f"g{shared.size}" if isinstance(shared, PerGroup) else "channel"
        labels["weight_bits"] = weight.bits
        labels["weights"] = "tensor" if isinstance(shared, PerTensor) else name
    if (activation := scheme.activation) is not None:
        labels["activation_bits"] = activation.bits
        labels["activations"] = _GRANULARITIES[activation.granularity]
    return labels
