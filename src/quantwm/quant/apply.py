"""Carrying out a plan: a copy that shares tensors, a method, and a record of what was done."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import nn

from quantwm.errors import MismatchError, NonFiniteError, UsageError
from quantwm.fingerprint import model_hash
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.observers import CalibrationData
from quantwm.quant.plan import QuantPlan
from quantwm.quant.scheme import LayerScheme
from quantwm.quant.structure import Structure, changes

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, int], None]
"""(steps done, steps in total)."""
AnyModel = TypeVar("AnyModel", bound=WorldModel)


class Method(Protocol):
    """A post-training quantization method, ready to run (`quantwm.methods.recipe`)."""

    @property
    def name(self) -> str:
        """What plans call it."""
        ...

    @property
    def needs_calibration(self) -> bool:
        """Whether it reads calibration data even where no activation is static."""
        ...

    def problems(
        self,
        world_model: WorldModel,
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],
    ) -> list[str]:
        """What stands against it for these layers of this model, found without computing."""
        ...

    def apply(
        self,
        world_model: WorldModel,
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],
        calibration: CalibrationData | None,
        progress: Progress | None,
    ) -> Mapping[str, Any]:
        """Replace the layers of `schemes` in `world_model`, which is a copy.

        The copy shares its tensors with the model it was made from: put new tensors in the place
        of old ones, never write into them.

        Args:
            world_model: to be changed; in float.
            schemes: by layer name, in forward order; a plan's resolved layers.
            groups: all that the model declares.
            calibration: of this very model; present where it is needed.
            progress: called after each step.

        Returns:
            what it has to tell of its work, JSON values: `Quantization.report`.
        """
        ...


@dataclass(frozen=True)
class Quantization:
    """What was done to a model: its attribute `quantization`.

    Attributes:
        plan: as it was given.
        layers: each quantized layer's scheme, in forward order.
        source_model_hash: `model_hash` of the float model.
        structure: modules that the method added, see `quantwm.quant.structure`.
        report: what the method had to tell, such as errors before and after; not saved, and no
            part of what makes two records equal.
    """

    plan: QuantPlan
    layers: tuple[tuple[str, LayerScheme], ...]
    source_model_hash: str
    structure: Structure = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.plan.method

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {
            "plan": self.plan.to_dict(),
            "layers": {name: str(scheme) for name, scheme in self.layers},
            "source_model_hash": self.source_model_hash,
            "structure": {name: dict(one) for name, one in self.structure.items()},
        }

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> "Quantization":
        """The record that `to_dict` wrote."""
        layers = tuple((name, LayerScheme.parse(text)) for name, text in form["layers"].items())
        plan = QuantPlan.from_dict(form["plan"])
        return cls(plan, layers, form["source_model_hash"], form["structure"])


def quantization_of(world_model: WorldModel) -> Quantization | None:
    """The record of a quantized model; None for a float model."""
    record = getattr(world_model, "quantization", None)
    return record if isinstance(record, Quantization) else None


def attach_record(world_model: WorldModel, record: Quantization) -> None:
    """Make `quantization_of(world_model)` answer `record`."""
    setattr(world_model, "quantization", record)  # noqa: B010 - the protocol has no such member


def check_is_float(world_model: WorldModel) -> None:
    """Refuse a model that is quantized already.

    Raises:
        UsageError: it is.
    """
    record = quantization_of(world_model)
    if record is not None:
        raise UsageError(
            f"this model is quantized already ('{record.plan}' by {record.method}); "
            "quantize the float model instead"
        )


def calibration_problems(
    schemes: Mapping[str, LayerScheme], method: Method, calibration: CalibrationData | None
) -> list[str]:
    """What stands against quantizing without the calibration data that were not given."""
    if calibration is not None:
        return []
    problems = []
    if method.needs_calibration:
        problems.append(f"the method {method.name!r} needs calibration data: pass calibration=")
    static = [
        name
        for name, scheme in schemes.items()
        if scheme.activation is not None and scheme.activation.static
    ]
    if static:
        problems.append(
            f"static activations need calibration data: pass calibration=, or use '-token' or "
            f"'-dynamic'; {len(static)} layers: {', '.join(static)}"
        )
    return problems


def apply_method(
    world_model: AnyModel,
    plan: QuantPlan,
    schemes: Mapping[str, LayerScheme],
    method: Method,
    calibration: CalibrationData | None,
    *,
    inplace: bool = False,
    progress: Progress | None = None,
) -> AnyModel:
    """Run a method whose plan has been resolved without a problem.

    Returns:
        a new model that shares its untouched tensors with `world_model`, or `world_model` itself
        with `inplace`; either carries a `Quantization` record.

    Raises:
        MismatchError: the calibration data belong to another model.
        NonFiniteError: a weight or a calibrated input holds NaN or infinite values.
    """
    source_hash = model_hash(world_model)
    if calibration is not None and calibration.model_hash != source_hash:
        raise MismatchError(
            f"the calibration data were gathered with model {calibration.model_hash[:12]}, "
            f"this model is {source_hash[:12]}: calibrate this model (a model cast to another "
            "type is another model: quantize before casting)"
        )
    _check_finite(world_model, schemes)
    before = copy_sharing_tensors(world_model) if inplace else world_model
    target = world_model if inplace else copy_sharing_tensors(world_model)
    groups = tuple(world_model.quantizable_groups())
    logger.info("quantizing %d layers by %s", len(schemes), method.name)
    report = method.apply(target, schemes, groups, calibration, progress)
    structure = changes(before, target, set(schemes))
    record = Quantization(plan, tuple(schemes.items()), source_hash, structure, report)
    attach_record(target, record)
    return target


def copy_sharing_tensors(world_model: AnyModel) -> AnyModel:
    """A copy of a model's structure whose parameters and buffers share the original's memory.

    Parameters become new objects over the same memory, because `Module.to` changes a parameter
    object in place: casting the copy must not cast the original.
    """
    memo: dict[int, Any] = {}
    for _, parameter in world_model.named_parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for _, buffer in world_model.named_buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(world_model, memo)


def _check_finite(world_model: WorldModel, schemes: Mapping[str, LayerScheme]) -> None:
    spoilt = []
    for name, scheme in schemes.items():
        if scheme.weight is not None:
            weight = world_model.get_submodule(name).get_parameter("weight")
            spoilt += [] if weight.isfinite().all() else [name]
    if spoilt:
        raise NonFiniteError(
            f"weights hold NaN or infinite values: {', '.join(spoilt)}; load the model again"
        )
