"""Post-training quantization methods, and `quantize`, which runs one.

A new method is one module here: a frozen dataclass under `@register` that plays one or more of
the roles of `quantwm.methods.roles`. Every module of this package is imported, so nothing else
needs to know of it.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from quantwm.errors import UsageError
from quantwm.methods.recipe import Recipe
from quantwm.methods.registry import build_parts, method_names, register
from quantwm.methods.work import Work
from quantwm.protocols import WorldModel
from quantwm.quant.apply import (
    AnyModel,
    Progress,
    apply_method,
    calibration_problems,
    check_is_float,
    copy_sharing_tensors,
)
from quantwm.quant.observers import CalibrationData
from quantwm.quant.plan import QuantPlan
from quantwm.quant.scheme import LayerScheme

__all__ = [
    "get_method",
    "method_names",
    "quantize",
    "register",
    "resolve_plan",
    "transformed",
]

for _module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    importlib.import_module(_module.name)


def quantize(
    world_model: AnyModel,
    plan: QuantPlan | str | Mapping[str, Any],
    calibration: CalibrationData | None = None,
    *,
    inplace: bool = False,
    progress: Progress | None = None,
) -> AnyModel:
    """A quantized model.

    Args:
        world_model: a float model; its tensors are read and left bit-unchanged.
        plan: a `QuantPlan`, or what `QuantPlan.parse` reads: "w4g128", {"encoder.*": "w8"}, ….
        calibration: needed by static activations ("w8a8") and by methods that say so; it must
            come from this very model.
        inplace: change `world_model` itself. If that raises while a method runs, the model may
            be left partly quantized.
        progress: called with (steps done, steps in total).

    Returns:
        a new model, or `world_model` itself with `inplace`. Tensors that the method leaves alone
        are shared with `world_model`: cast or move either freely, but write into neither. Its
        attribute `quantization` records what was done.

    Raises:
        PlanError: the plan cannot be applied, or calibration data are lacking; every problem is
            listed, and nothing has been computed.
        MismatchError: the calibration data belong to another model.
        NonFiniteError: a weight or a calibrated input holds NaN or infinite values.
        UsageError: the model is quantized already.
    """
    plan = QuantPlan.parse(plan)
    schemes, method, problems = _prepare(plan, world_model)
    if method is not None:
        problems += calibration_problems(schemes, method, calibration)
    if method is None or problems:
        raise plan.error(problems)
    return apply_method(
        world_model, plan, schemes, method, calibration, inplace=inplace, progress=progress
    )


def resolve_plan(
    plan: QuantPlan | str | Mapping[str, Any], world_model: WorldModel
) -> dict[str, LayerScheme]:
    """The scheme of each layer that a plan changes, its method and options checked as well.

    Raises:
        PlanError: the plan cannot be applied; every problem is listed.
        UsageError: the model is quantized already.
    """
    plan = QuantPlan.parse(plan)
    schemes, _, problems = _prepare(plan, world_model)
    if problems:
        raise plan.error(problems)
    return schemes


def transformed(
    world_model: AnyModel,
    plan: QuantPlan | str | Mapping[str, Any],
    calibration: CalibrationData | None = None,
) -> AnyModel:
    """The float model after a method's transforms and before any rounding.

    It computes what `world_model` computes, up to float rounding: the check that a method's
    transforms are what they claim to be. Arguments and errors as in `quantize`.
    """
    plan = QuantPlan.parse(plan)
    schemes, method, problems = _prepare(plan, world_model)
    if method is not None:
        problems += calibration_problems({}, method, calibration)
    if method is None or problems:
        raise plan.error(problems)
    twin = copy_sharing_tensors(world_model)
    method.transform(Work(twin, schemes, tuple(world_model.quantizable_groups()), calibration))
    return twin


def get_method(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """A method with its options set.

    Args:
        name: a part's name, or several joined by "+", such as "smoothquant+gptq".
        options: by name, or by `part.option` where several parts have one of that name.

    Raises:
        UsageError: an unknown part or option (with the nearest name), a value that a part
            refuses, or parts that do not go together.
    """
    return Recipe(build_parts(name, options))


def _prepare(
    plan: QuantPlan, world_model: WorldModel
) -> tuple[dict[str, LayerScheme], Recipe | None, list[str]]:
    check_is_float(world_model)
    schemes, problems = plan.match(world_model)
    try:
        method = get_method(plan.method, dict(plan.options))
    except UsageError as error:
        return schemes, None, [*problems, str(error)]
    problems += method.problems(world_model, schemes, tuple(world_model.quantizable_groups()))
    return schemes, method, problems
