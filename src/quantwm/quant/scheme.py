"""What one layer is quantized to: frozen, validated, with a short name and a full form.

Short names are `float`, or `w<bits>` and/or `a<bits>` followed by suffixes:

| written | means |
| --- | --- |
| `w4` | weights in 4 bits, symmetric, one scale an output channel |
| `w4g128` | weights in 4 bits, one scale for every 128 inputs of an output channel |
| `a8` | inputs in 8 bits, asymmetric, one calibrated (static) scale |
| `w4g128a8` | both |
| `-dynamic` | inputs: one scale a candidate and frame, found while running |
| `-token` | inputs: one scale a token, found while running |
| `-a_symmetric` | inputs: symmetric, no zero point |
| `-w_tensor` | weights: one scale for the whole matrix |
| `-w_asymmetric` | weights: asymmetric, with zero points |
| `-w_study` | weights: the study's scale rule, absmax / ((2^b - 1) / 2) |

`str(scheme)` prints the short name, and every scheme has one: the text is lossless.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

from quantwm.checks import is_integer
from quantwm.errors import UsageError, unknown_name

MIN_BITS, MAX_BITS = 2, 8

ScaleRule: TypeAlias = Literal["absmax", "study"]
ActivationGranularity: TypeAlias = Literal["per_tensor_static", "per_tensor_dynamic", "per_token"]


@dataclass(frozen=True)
class PerTensor:
    """One scale for a weight: (out, in) → scale (1, 1)."""


@dataclass(frozen=True)
class PerChannel:
    """One scale an output channel: weight (out, in) → scale (out, 1)."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for `size` consecutive inputs of an output channel.

    Weight (out, in) → scale (out, ceil(in / size)). Groups never cross rows; the last group of a
    row is shorter where `size` does not divide `in`.
    """

    size: int

    def __post_init__(self) -> None:
        if not is_integer(self.size, 1):
            raise UsageError(f"a group needs an integer size of at least 1, got {self.size!r}")


WeightGranularity: TypeAlias = PerTensor | PerChannel | PerGroup


@dataclass(frozen=True)
class WeightScheme:
    """How a weight matrix is stored.

    Attributes:
        bits: 2 to 8.
        symmetric: signed codes and no zero point; otherwise unsigned codes with one.
        granularity: what shares a scale.
        scale_rule: of symmetric scales, "absmax" = absmax / (2^(b-1) - 1), or "study" =
            absmax / ((2^b - 1) / 2), the round-to-nearest of arXiv 2602.02110.

    Raises:
        UsageError: a value out of range.
    """

    bits: int
    symmetric: bool = True
    granularity: WeightGranularity = PerChannel()
    scale_rule: ScaleRule = "absmax"

    def __post_init__(self) -> None:
        _check_bits(self.bits, "weight")
        _check_flag(self.symmetric, "weight")
        if not isinstance(self.granularity, PerTensor | PerChannel | PerGroup):
            raise UsageError(
                f"weight granularity is PerTensor(), PerChannel() or PerGroup(size), "
                f"got {self.granularity!r}"
            )
        if self.scale_rule not in get_args(ScaleRule):
            raise unknown_name("scale rule", str(self.scale_rule), get_args(ScaleRule))
        if self.scale_rule == "study" and not self.symmetric:
            raise UsageError(
                "the study's scale rule is defined for symmetric weights only: "
                "drop w_study or w_asymmetric"
            )


@dataclass(frozen=True)
class ActivationScheme:
    """How a layer's input is rounded.

    Attributes:
        bits: 2 to 8.
        symmetric: signed codes and no zero point; otherwise unsigned codes with one.
        granularity: "per_tensor_static" (one calibrated scale), "per_tensor_dynamic" (one a
            candidate and frame, never shared) or "per_token".

    Raises:
        UsageError: a value out of range.
    """

    bits: int
    symmetric: bool = False
    granularity: ActivationGranularity = "per_tensor_static"

    def __post_init__(self) -> None:
        _check_bits(self.bits, "activation")
        _check_flag(self.symmetric, "activation")
        known = get_args(ActivationGranularity)
        if self.granularity not in known:
            raise unknown_name("activation granularity", str(self.granularity), known)

    @property
    def static(self) -> bool:
        """Whether the scale comes from calibration data."""
        return self.granularity == "per_tensor_static"


@dataclass(frozen=True)
class LayerScheme:
    """What a layer's weight and input are quantized to; None leaves that part in float."""

    weight: WeightScheme | None = None
    activation: ActivationScheme | None = None

    @property
    def is_float(self) -> bool:
        """Whether the layer stays as it is."""
        return self.weight is None and self.activation is None

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any] | LayerScheme") -> "LayerScheme":
        """A scheme from its short name, its full form or itself.

        Raises:
            UsageError: text or a mapping that describes no scheme; it names the part at fault.
        """
        if isinstance(value, LayerScheme):
            return value
        if isinstance(value, str):
            return _parse_name(value)
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise UsageError(f"a scheme is a short name such as 'w8a8' or a mapping, got {value!r}")

    def __str__(self) -> str:
        """The short name; `parse` reads it back."""
        if self.is_float:
            return "float"
        base, suffixes = "", []
        if (weight := self.weight) is not None:
            base += f"w{weight.bits}"
            if isinstance(weight.granularity, PerGroup):
                base += f"g{weight.granularity.size}"
        if (activation := self.activation) is not None:
            base += f"a{activation.bits}"
            suffixes += [_TIMING_SUFFIX[activation.granularity]]
            suffixes += ["a_symmetric"] if activation.symmetric else []
        if weight is not None:
            suffixes += ["w_tensor"] if isinstance(weight.granularity, PerTensor) else []
            suffixes += [] if weight.symmetric else ["w_asymmetric"]
            suffixes += ["w_study"] if weight.scale_rule == "study" else []
        return "-".join([base, *filter(None, suffixes)])

    def to_dict(self) -> dict[str, Any]:
        """The full form, made of JSON values."""
        form: dict[str, Any] = {"weight": None, "activation": None}
        if (weight := self.weight) is not None:
            form["weight"] = {
                "bits": weight.bits,
                "symmetric": weight.symmetric,
                "granularity": _granularity_to_json(weight.granularity),
                "scale_rule": weight.scale_rule,
            }
        if (activation := self.activation) is not None:
            form["activation"] = {
                "bits": activation.bits,
                "symmetric": activation.symmetric,
                "granularity": activation.granularity,
            }
        return form

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> "LayerScheme":
        """The scheme of a full form; missing fields take their defaults.

        Raises:
            UsageError: an unknown field or a value out of range.
        """
        _check_fields(form, {"weight", "activation"}, set(), "scheme")
        weight, activation = form.get("weight"), form.get("activation")
        return cls(
            None if weight is None else _weight_from_dict(weight),
            None if activation is None else _activation_from_dict(activation),
        )


FLOAT = LayerScheme()

_BASE = re.compile(r"^(?:w(?P<w>\d+)(?:g(?P<g>\d*))?)?(?:a(?P<a>\d+))?$")
_WEIGHT_SUFFIXES = {"w_tensor", "w_asymmetric", "w_study"}
_ACTIVATION_SUFFIXES = {"dynamic", "token", "a_symmetric"}
_TIMING_SUFFIX: dict[ActivationGranularity, str] = {
    "per_tensor_static": "",
    "per_tensor_dynamic": "dynamic",
    "per_token": "token",
}


def _parse_name(text: str) -> LayerScheme:
    name = text.strip().lower()
    if name == "float":
        return FLOAT
    base, *suffixes = name.split("-")
    match = _BASE.match(base)
    if match is None or not base:
        raise UsageError(
            f"cannot read the scheme {text!r}: write 'float', or w<bits>[g<group size>] and/or "
            "a<bits>, then suffixes, such as 'w8', 'w4g128', 'w8a8' or 'w4a4-token'"
        )
    _check_suffixes(text, suffixes, has_weight=bool(match["w"]), has_activation=bool(match["a"]))
    try:
        return LayerScheme(
            _weight_from_name(match["w"], match["g"], suffixes) if match["w"] else None,
            _activation_from_name(match["a"], suffixes) if match["a"] else None,
        )
    except UsageError as error:
        raise UsageError(f"in the scheme {text!r}: {error}") from None


def _weight_from_name(bits: str, group: str | None, suffixes: list[str]) -> WeightScheme:
    granularity: WeightGranularity = PerTensor() if "w_tensor" in suffixes else PerChannel()
    if group is not None:
        if isinstance(granularity, PerTensor):
            raise UsageError("groups and w_tensor exclude each other")
        if not group:
            raise UsageError("g needs a group size, such as g128")
        granularity = PerGroup(int(group))
    symmetric = "w_asymmetric" not in suffixes
    return WeightScheme(
        int(bits), symmetric, granularity, "study" if "w_study" in suffixes else "absmax"
    )


def _activation_from_name(bits: str, suffixes: list[str]) -> ActivationScheme:
    if {"dynamic", "token"} <= set(suffixes):
        raise UsageError("dynamic (per tensor) and token exclude each other")
    granularity: ActivationGranularity = "per_tensor_static"
    if "dynamic" in suffixes:
        granularity = "per_tensor_dynamic"
    elif "token" in suffixes:
        granularity = "per_token"
    return ActivationScheme(int(bits), "a_symmetric" in suffixes, granularity)


def _check_suffixes(
    text: str, suffixes: list[str], *, has_weight: bool, has_activation: bool
) -> None:
    for suffix in suffixes:
        if suffix not in _WEIGHT_SUFFIXES | _ACTIVATION_SUFFIXES:
            known = _WEIGHT_SUFFIXES | _ACTIVATION_SUFFIXES
            raise UsageError(f"in the scheme {text!r}: {unknown_name('suffix', suffix, known)}")
        if suffix in _WEIGHT_SUFFIXES and not has_weight:
            raise UsageError(f"in the scheme {text!r}: {suffix} needs weights, w<bits>")
        if suffix in _ACTIVATION_SUFFIXES and not has_activation:
            raise UsageError(f"in the scheme {text!r}: {suffix} needs activations, a<bits>")
    if len(set(suffixes)) < len(suffixes):
        raise UsageError(f"in the scheme {text!r}: a suffix is written twice")


def _weight_from_dict(form: object) -> WeightScheme:
    fields = _fields(
        form, {"bits", "symmetric", "granularity", "scale_rule"}, "a scheme's weight", "{'bits': 4}"
    )
    if "granularity" in fields:
        fields["granularity"] = _granularity_from_json(fields["granularity"])
    return WeightScheme(**fields)


def _activation_from_dict(form: object) -> ActivationScheme:
    known = {"bits", "symmetric", "granularity"}
    return ActivationScheme(**_fields(form, known, "a scheme's activation", "{'bits': 8}"))


def _granularity_to_json(granularity: WeightGranularity) -> str | dict[str, int]:
    if isinstance(granularity, PerGroup):
        return {"per_group": granularity.size}
    return "per_tensor" if isinstance(granularity, PerTensor) else "per_channel"


def _granularity_from_json(form: object) -> WeightGranularity:
    if isinstance(form, PerTensor | PerChannel | PerGroup):
        return form
    if isinstance(form, Mapping) and set(form) == {"per_group"}:
        return PerGroup(cast(int, form["per_group"]))
    if form == "per_tensor":
        return PerTensor()
    if form == "per_channel":
        return PerChannel()
    raise UsageError(
        f"weight granularity is 'per_tensor', 'per_channel' or {{'per_group': size}}, got {form!r}"
    )


def _fields(form: object, known: set[str], what: str, example: str) -> dict[str, Any]:
    if not isinstance(form, Mapping):
        raise UsageError(f"{what} is a mapping such as {example}, got {form!r}")
    _check_fields(form, known, {"bits"}, what)
    return dict(form)


def _check_fields(form: Mapping[str, Any], known: set[str], required: set[str], what: str) -> None:
    for field in form:
        if field not in known:
            raise unknown_name(f"field of {what}:", str(field), known)
    for field in sorted(required - set(form)):
        raise UsageError(f"{what} lacks {field!r}")


def _check_bits(bits: object, what: str) -> None:
    if not is_integer(bits, MIN_BITS) or bits > MAX_BITS:
        raise UsageError(
            f"{what} bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}; "
            f"to leave the {what}s in float, leave them out"
        )


def _check_flag(value: object, what: str) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{what} symmetric is true or false, got {value!r}")
