"""Options that say how to quantize, and what the commands that take them make of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """The plan of repeated `--plan` options: a scheme for every layer, or PATTERN=SCHEME.

    Raises:
        UsageError: one is written otherwise, or a pattern is given twice.
    """
    from quantwm.errors import UsageError
    from quantwm.quant import QuantPlan

    layers: dict[str, str] = {}
    for text in schemes:
        before, equals, scheme = text.rpartition("=")
        pattern = before.strip() if equals else "*"
        if pattern in layers:
            raise UsageError(
                f"--plan gives {pattern!r} twice: {layers[pattern]} and {scheme.strip()}"
            )
        layers[pattern] = scheme.strip()
    return QuantPlan(layers, method, include, options)


def method_options(texts: Iterable[str]) -> dict[str, Any]:
    """The settings of repeated `--option` options, see `settings_of`."""
    return settings_of("a method's option", "alpha=0.5", texts)


def settings_of(what: str, example: str, texts: Iterable[str]) -> dict[str, Any]:
    """The values of a repeated option, NAME=VALUE each.

    Args:
        what, example: for the message.

    Raises:
        UsageError: one is written otherwise.
    """
    from quantwm.checks import parsed
    from quantwm.errors import UsageError

    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"{what} is NAME=VALUE, such as {example}; got {text!r}")
        options[name.strip()] = parsed(value, text)
    return options


def calibration_for(
    plan: "QuantPlan",
    world_model: "DINOWM",
    file: Path | None,
    task: str,
    device: str,
    progress: Callable[[int, int], None],
    **sizes: Any,
) -> "Calibration | None":
    """Calibration data for a plan that needs them: from a file, or gathered now.

    Args:
        file: read if it is there, else written; None keeps what is gathered in memory.
        task: to calibrate in.
        sizes: episodes and samples, where they differ from the default.

    Returns:
        None where neither the method nor a layer needs any.

    Raises:
        PlanError: the plan cannot be applied.
    """
    from quantwm.calibration import Calibration, calibrate

    needed = _needs_calibration(plan, world_model)
    if file is not None and file.is_file():
        return Calibration.load(file)
    if not needed:
        return None
    data = calibrate(world_model, task, device=device, progress=progress, **sizes)
    if file is not None:
        data.save(file)
    return data


def check_calibrates(
    plan: "QuantPlan", world_model: "DINOWM", file: Path | None, options: Sequence[str]
) -> None:
    """Refuse options that say how to calibrate where `calibration_for` would not.

    Raises:
        UsageError: names them.
        PlanError: the plan cannot be applied.
    """
    from quantwm.errors import UsageError

    needed = _needs_calibration(plan, world_model)
    if options and not needed:
        raise UsageError(f"{', '.join(options)}: this plan needs no calibration; leave them out")
    if options and file is not None and file.is_file():
        raise UsageError(f"{', '.join(options)}: {file} is there and says it; leave them out")


def _needs_calibration(plan: "QuantPlan", world_model: "DINOWM") -> bool:
    from quantwm.methods import resolve_plan
    from quantwm.study.prepare import needs_calibration

    return needs_calibration(plan, resolve_plan(plan, world_model))
