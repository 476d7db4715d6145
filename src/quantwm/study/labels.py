"""What an arm is, in the terms that tables, filters and findings choose by."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantwm.errors import UsageError
from quantwm.methods import get_method
from quantwm.quant import LayerScheme, QuantPlan
from quantwm.quant.scheme import PerGroup, PerTensor
from quantwm.study.arms import Arm
from quantwm.study.cells import ArmKind

_GRANULARITIES = {
    "per_tensor_static": "tensor",
    "per_tensor_dynamic": "frame",
    "per_token": "token",
}
_RARER = ("a_symmetric", "w_asymmetric", "w_study")


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
        variant: what else makes it another quantization, as its short form has it: a scheme's
            rarer suffixes, options of the method that are not its defaults, and kinds of layers
            besides linears, such as "-w_study (gptq.damping=0.1, with attention_matmul)".
    """

    kind: ArmKind
    part: str = ""
    weight_bits: int | None = None
    weights: str = ""
    activation_bits: int | None = None
    activations: str = ""
    method: str = ""
    budget: tuple[tuple[str, Any], ...] = ()
    variant: str = ""

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
    pattern, scheme = arm.plan.layers[0]
    alike = len({scheme for _, scheme in arm.plan.layers}) == 1
    return ArmLabels(
        arm.kind,
        part="mixed" if len(arm.plan.layers) > 1 else _part(pattern),
        method=arm.plan.method,
        budget=budget,
        variant=(_rarer_suffixes(scheme) if alike else "") + _besides(arm.plan),
        **(_scheme_labels(scheme) if alike else {}),
    )


def _part(pattern: str) -> str:
    if pattern == "*":
        return "all"
    side = re.fullmatch(r"(\w+)\.\*", pattern)
    return side[1] if side else pattern


def _rarer_suffixes(scheme: LayerScheme) -> str:
    return "".join(f"-{suffix}" for suffix in str(scheme).split("-") if suffix in _RARER)


def _besides(plan: QuantPlan) -> str:
    """Options and kinds of layers, which a short form cannot say, in brackets."""
    options = [f"{name}={value}" for name, value in sorted(_own_options(plan).items())]
    told = ", ".join(options + [f"with {kind}" for kind in plan.include])
    return f" ({told})" if told else ""


def _own_options(plan: QuantPlan) -> dict[str, Any]:
    """Options that are not the method's defaults, or as written where it is not known here."""
    written = dict(plan.options)
    try:
        defaults = get_method(plan.method).options()
        options = get_method(plan.method, written).options()
    except UsageError:
        return written
    return {name: value for name, value in options.items() if value != defaults[name]}


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
