"""Options that say how to quantize, and what the commands that take them make of them."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantwm.calibration import Calibration
    from quantwm.models.dino_wm import DINOWM
    from quantwm.quant import QuantPlan


def plan_of(
    schemes: Iterable[str],
    method: str,
    options: Mapping[str, Any],
    include: Iterable[str] = (),
) -> "QuantPlan":
    """The plan of repeated `--plan` options: a scheme for every layer, or PATTERN=SCHEME."""
    from quantwm.quant import QuantPlan

    layers = {}
    for text in schemes:
        pattern, equals, scheme = text.partition("=")
        layers[pattern.strip() if equals else "*"] = scheme.strip() if equals else text.strip()
    return QuantPlan(layers, method, include, options)


def method_options(texts: Iterable[str]) -> dict[str, Any]:
    """The settings of repeated `--option` options, NAME=VALUE each.

    Raises:
        UsageError: one is written otherwise.
    """
    import yaml

    from quantwm.errors import UsageError

    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"a method's option is NAME=VALUE, such as alpha=0.5; got {text!r}")
        options[name.strip()] = yaml.safe_load(value)
    return options


def calibration_for(
    plan: "QuantPlan",
    world_model: "DINOWM",
    file: Path | None,
    task: str,
    device: str,
    progress: Callable[[int, int], None],
) -> "Calibration | None":
    """Calibration data for a plan that needs them: from a file, or gathered now.

    Args:
        file: read if it is there, else written; None keeps what is gathered in memory.
        task: to calibrate in.

    Returns:
        None where neither the method nor a layer needs any.

    Raises:
        PlanError: the plan cannot be applied.
    """
    from quantwm.calibration import Calibration, calibrate
    from quantwm.methods import resolve_plan
    from quantwm.study.prepare import needs_calibration

    layers = resolve_plan(plan, world_model)
    if file is not None and file.is_file():
        return Calibration.load(file)
    if not needs_calibration(plan, layers):
        return None
    data = calibrate(world_model, task, device=device, progress=progress)
    if file is not None:
        data.save(file)
    return data
