"""From a study's settings to its cells: everything that can be checked before any compute."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantwm.compute import (
    NUMERICS_VERSION,
    dtype_name,
    resolve_device,
    resolve_dtype,
)
from quantwm.diagnostics.sensitivity import check_sensitivity
from quantwm.envs import get_task
from quantwm.errors import MismatchError, UsageError
from quantwm.evaluation import ORACLES, check_fits
from quantwm.fingerprint import model_hash
from quantwm.loading import load
from quantwm.methods import get_method
from quantwm.planning.defaults import default_planner
from quantwm.protocols import Planner, Task, WorldModel
from quantwm.quant import LayerScheme, QuantPlan, quantization_of
from quantwm.quant.apply import check_is_float
from quantwm.study.arms import Arm, float_arm, resolve_arms, with_blocks
from quantwm.study.cells import ArmKind, Cell, calibration_id, plain
from quantwm.study.spec import StudySpec

FIRST: tuple[ArmKind, ...] = ("float", "oracle-state", "oracle-latent", "random", "quantized")
"""Kinds of arms in the order of computing; those with a plan come last."""


@dataclass(frozen=True)
class Prepared:
    """A study that is ready to run.

    Attributes:
        spec: the study with nothing left to choose: device, dtype, threads and all settings of
            task and planner.
        world_model, task, planner: the objects it names.
        model_hash: of the float model.
        device: where to compute, with an index where the user gave one.
        planners: arm's name → its planner, which is the study's unless the arm says otherwise.
        cells: arm's name → its cell, in the study's order.
        calibration: id of the calibration that the study's calibrated arms share.
        gated: whether a float arm below the study's gate stops the run.
    """

    spec: StudySpec
    world_model: WorldModel
    task: Task
    planner: Planner
    model_hash: str
    device: torch.device
    planners: Mapping[str, Planner]
    cells: Mapping[str, Cell]
    calibration: str
    gated: bool = True

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.spec.arms if arm.name == name)

    @property
    def float_arm(self) -> str | None:
        """Name of the arm that the gate judges, if there is a float one."""
        own = float_arm(self.spec.arms)
        return None if own is None else own.name

    @property
    def order(self) -> list[str]:
        """Arms as they are computed: what the gate and every difference need comes first."""

        def rank(name: str) -> int:
            arm = self.arm(name)
            return FIRST.index(arm.kind) if arm.plan is None and arm.folder is None else len(FIRST)

        return sorted(self.cells, key=rank)


def prepare(
    spec: StudySpec,
    *,
    world_model: WorldModel | None = None,
    task: Task | None = None,
    planner: Planner | None = None,
    elsewhere: bool = False,
    gated: bool = True,
) -> Prepared:
    """Load the model, build task and planner, and resolve every arm to its cell.

    Args:
        spec: the study.
        world_model, task, planner: used in place of the ones that the study names.
        elsewhere: other machines compute; this one may lack the device.
        gated: as in `Prepared`.

    Raises:
        UsageError: something in the study is wrong; a `PlanError` lists the problems of the arms,
            or those of the diagnoses.
        MismatchError: model and task, or study and task, do not belong together.
        MissingStatisticsError: the model cannot plan.
    """
    task = task if task is not None else build_task(spec.task)
    planner = planner if planner is not None else build_planner(spec.planner, task.name)
    device = resolve_device(spec.device, here=not elsewhere)
    if world_model is None:
        world_model = load(spec.model, device="cpu" if elsewhere else device)
    check_usable(world_model, task)
    spec = replace(spec, arms=with_blocks(spec.arms, world_model))
    planners = {arm.name: arm_planner(arm, planner) for arm in spec.arms}
    check_planners(spec.arms, planners)
    resolved = resolve_arms(spec.arms, world_model)
    check_sensitivity(spec.diagnostics.sensitivity, world_model)
    spec = replace(
        spec,
        task=plain(task.settings() | {"name": task.name}),
        planner=plain(planner.settings()),
        device=device.type,
        dtype=dtype_name(resolve_dtype(spec.dtype, device, here=not elsewhere)),
        threads=spec.threads or torch.get_num_threads(),
    )
    fingerprint = model_hash(world_model)
    shared = _shared(spec, fingerprint)
    calibration = calibration_id(vars(spec.calibration), shared)
    cells = {}
    for arm in spec.arms:
        own = shared | {
            "planner": plain(planners[arm.name].settings()),
            "mpc_iterations": arm.mpc_iterations or spec.mpc_iterations,
        }
        saved = arm.folder is not None
        cells[arm.name] = (
            _saved_cell(arm, own) if saved else _cell(arm, resolved[arm.name], calibration, own)
        )
    return Prepared(
        spec,
        world_model,
        task,
        planner,
        fingerprint,
        device,
        planners,
        cells,
        calibration,
        gated,
    )


def check_usable(world_model: WorldModel, task: Task) -> None:
    """Refuse a model that cannot be studied in this task.

    Raises:
        UsageError: it is quantized already, so that there is no float model to compare with.
        MismatchError: it was trained in another task, or its actions are not the task's.
        MissingStatisticsError: it carries no action statistics.
    """
    check_is_float(world_model)
    check_fits(world_model, task)


def build_task(settings: Mapping[str, Any]) -> Task:
    """The task of a study's settings, which may be those that `Task.settings` gave.

    Raises:
        UsageError: an unknown task or setting.
        MismatchError: the settings are of another version of the task.
    """
    values = dict(settings)
    name, version = values.pop("name"), values.pop("version", None)
    task = get_task(name, **values)
    current = task.settings().get("version")
    if version not in (None, current):
        raise MismatchError(
            f"the study is of version {version} of task {name!r}, this quantwm has {current}; "
            "drop the version to run it as it is now, or install the quantwm that wrote the study"
        )
    return task


def build_planner(settings: Mapping[str, Any], task: str) -> Planner:
    """A planner's default for a task with these settings changed.

    `name` picks the planner, CEM if there is none; `preset` which of its defaults.

    Raises:
        UsageError: an unknown planner or preset; or unknown settings and bad values, all of them.
    """
    values = dict(settings)
    preset, name = values.pop("preset", "compact"), str(values.pop("name", "cem"))
    default = default_planner(task, preset, name)
    return type(default).from_settings(default.settings() | values)


def arm_planner(arm: Arm, planner: Planner) -> Planner:
    """The planner of an arm: the study's, with the settings that the arm changes.

    Raises:
        UsageError: unknown settings or bad values, or a planner that cannot be changed.
    """
    if not arm.planner:
        return planner
    from_settings = getattr(type(planner), "from_settings", None)
    if from_settings is None:
        raise UsageError(
            f"arm {arm.name!r} changes the planner's settings, and {type(planner).__name__} has no "
            "'from_settings' that builds one from settings"
        )
    try:
        changed: Planner = from_settings(planner.settings() | dict(arm.planner))
    except UsageError as error:
        raise type(error)(f"arm {arm.name!r}: {error}") from error
    return changed


def check_planners(arms: Iterable[Arm], planners: Mapping[str, Planner]) -> None:
    """Refuse a planner that needs gradients where an arm has none.

    Raises:
        UsageError: names the arms.
    """
    blind = [
        arm.name
        for arm in arms
        if arm.kind in ORACLES and getattr(planners[arm.name], "needs_gradients", False)
    ]
    oracles = [repr(name) for name in blind]
    if blind:
        name = planners[blind[0]].settings()["name"]
        raise UsageError(
            f"planner {name!r} needs gradients, and the simulator of {', '.join(oracles)} has "
            "none: leave these arms out (arms=float,...) or take a planner that samples "
            "(planner.name=cem, icem or mppi)"
        )


def _shared(spec: StudySpec, fingerprint: str) -> dict[str, Any]:
    """What all cells of a study have in common."""
    return {
        "model": fingerprint,
        "task": dict(spec.task),
        "planner": dict(spec.planner),
        "mpc_iterations": spec.mpc_iterations,
        "episodes": spec.episodes,
        "block": spec.block,
        "seed": spec.seed,
        "dtype": spec.dtype,
        "device": spec.device,
        "threads": spec.threads,
        "numerics": NUMERICS_VERSION,
    }


def needs_calibration(plan: QuantPlan, layers: Mapping[str, LayerScheme]) -> bool:
    """Whether a plan's method or the scales of its layers come from calibration data."""
    static = (s.activation is not None and s.activation.static for s in layers.values())
    return get_method(plan.method, dict(plan.options)).needs_calibration or any(static)


def _cell(
    arm: Arm, layers: Mapping[str, LayerScheme], calibration: str, shared: Mapping[str, Any]
) -> Cell:
    if arm.plan is None or not layers:
        kind: ArmKind = "float" if arm.kind == "quantized" else arm.kind
        return Cell(kind=kind, plan={}, method=None, options={}, calibration=None, **shared)
    method = get_method(arm.plan.method, dict(arm.plan.options))
    return Cell(
        kind=arm.kind,
        plan={name: str(scheme) for name, scheme in layers.items()},
        method=method.name,
        options=method.options(),
        calibration=calibration if needs_calibration(arm.plan, layers) else None,
        **shared,
    )


def _saved_cell(arm: Arm, shared: Mapping[str, Any]) -> Cell:
    """The cell of a quantized model that was saved: its own hash says what it is.

    Raises:
        UsageError: the folder holds no quantized model.
        MismatchError: it was made from another float model than the study's.
    """
    assert arm.folder is not None
    saved = load(Path(arm.folder))
    record = quantization_of(saved)
    if record is None:
        raise UsageError(
            f"arm {arm.name!r}: {arm.folder} holds a float model; a study's arms are quantized "
            "from its own model, so give a folder that 'quantwm quantize' wrote"
        )
    if record.source_model_hash != shared["model"]:
        raise MismatchError(
            f"arm {arm.name!r}: {arm.folder} was made from model {record.source_model_hash[:12]}, "
            f"the study's is {shared['model'][:12]}: quantize the study's model"
        )
    return Cell(
        kind="quantized",
        plan={name: str(scheme) for name, scheme in record.layers},
        method=record.method,
        options={"saved_model": model_hash(saved)},
        calibration=None,
        **shared,
    )
