"""The command that says where and why a world model goes wrong."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantwm.cli.app import Device, Json, ModelName, app, command_line
from quantwm.cli.diagnosis_output import (
    print_fidelity,
    print_interventions,
    print_rollout_diagnosis,
    print_sensitivity,
)
from quantwm.cli.study_output import ArmLines, StudyBar
from quantwm.console import bars, counter, exit_codes, out, print_json

if TYPE_CHECKING:
    from rich.progress import Progress

    from quantwm.models.dino_wm import DINOWM

_TRUTH = "truth"


@app.command(
    epilog="Example: quantwm diagnose wall --episodes 32, quantwm diagnose wall --plan w3, "
    "quantwm diagnose small --against wall, quantwm diagnose wall --sensitivity w3, or "
    "quantwm diagnose wall --interventions w3"
)
def diagnose(
    model: ModelName,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            help="Quantize MODEL so, a scheme for every layer or PATTERN=SCHEME, and compare with "
            "MODEL; may be repeated."
        ),
    ] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(help="Quantize each layer of MODEL alone so, such as w3.", metavar="SCHEME"),
    ] = None,
    interventions: Annotated[
        str | None,
        typer.Option(
            help="Plan with MODEL quantized so, and with its parts mended, to see which of them "
            "makes planning fail.",
            metavar="SCHEME",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="The float model that a quantized MODEL is compared with; default: the bundled "
            "one that it was made from. 'truth': compare with the simulator.",
            metavar="MODEL",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="With a scheme to quantize to, such as gptq.")
    ] = "rtn",
    option: Annotated[
        list[str] | None,
        typer.Option(help="The method's own setting, NAME=VALUE or PART.NAME=VALUE; repeatable."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Calibration file, made there if it does not exist; default: what is needed is "
            "gathered and not kept. With --interventions it lies in the results folder."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task to plan in; default: the model's own.")
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option(
            help="Episodes of the tuning block; default: 16, with --sensitivity 4, with "
            "--interventions 50."
        ),
    ] = None,
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Results folder of --interventions; default "
            "results/TASK-interventions-SCHEME-EPISODES.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other episodes.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Say where a world model goes wrong.

    A float MODEL is compared with what truly happens: errors of imagined
    frames by step, and whether the cheapest candidates are truly the best.

    With --plan, or where MODEL is quantized, the quantized model is compared
    with the float one: drift by step, and whether it ranks candidates alike.

    With --sensitivity each layer is quantized alone.

    With --interventions episodes are planned with the quantized model, with
    one of its sides put back in float at a time and with the true dynamics:
    what restores success is what fails. Also how far lower predicted costs
    mean success. Run the same command again to continue.
    """
    with exit_codes("Run the same command again; with --interventions it goes on from there."):
        from quantwm.cli.plans import method_options
        from quantwm.errors import UsageError
        from quantwm.loading import load
        from quantwm.quant import quantization_of

        options = method_options(option or [])
        quantizing = method != "rtn" or bool(options) or calibration is not None
        _check_together(plan, sensitivity, interventions, against, quantizing)
        if interventions is None and out_folder is not None:
            raise UsageError("--out is the results folder of --interventions: leave it out")
        if interventions is not None and calibration is not None:
            raise UsageError(
                "--calibration: --interventions calibrates in its results folder; leave it out"
            )
        world_model = load(model, device=device)
        where: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype}
        if episodes is not None:
            where["episodes"] = episodes
        job = _Job(world_model, task or world_model.config.task, where, as_json)
        if interventions is not None:
            job.interventions(model, interventions, method, options, out_folder)
        elif sensitivity is not None:
            job.sensitivity(sensitivity, method, options, calibration)
        elif plan:
            job.plan(plan, method, options, calibration)
        elif against == _TRUTH or (against is None and quantization_of(world_model) is None):
            job.rollouts()
        else:
            job.saved(model, against)


def _check_together(
    plan: list[str] | None,
    sensitivity: str | None,
    interventions: str | None,
    against: str | None,
    quantizing: bool,
) -> None:
    from quantwm.errors import UsageError

    asked = [
        option
        for option, value in (
            ("--plan", plan or None),
            ("--sensitivity", sensitivity),
            ("--interventions", interventions),
        )
        if value is not None
    ]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} are comparisons of their own: give one of them")
    if against is not None and asked:
        raise UsageError(
            f"--against is for a MODEL that is quantized already; with {asked[0]} MODEL itself is "
            "the float model: leave --against out"
        )
    if quantizing and not asked:
        raise UsageError(
            "--method, --option and --calibration say how to quantize: give --plan SCHEME, "
            "--sensitivity SCHEME or --interventions SCHEME as well, such as --plan w3"
        )


@dataclass(frozen=True)
class _Job:
    """One of the command's comparisons, for a model in a task.

    Attributes:
        where: the arguments that every diagnosis takes.
    """

    model: "DINOWM"
    task: str
    where: dict[str, Any]
    as_json: bool

    def rollouts(self) -> None:
        """The model against what happens."""
        from quantwm.diagnostics.rollouts import diagnose_rollouts

        with bars() as progress:
            report = counter(progress, "diagnose")
            diagnosis = diagnose_rollouts(self.model, self.task, progress=report, **self.where)
        if self.as_json:
            print_json(diagnosis.to_dict())
        else:
            print_rollout_diagnosis(diagnosis)

    def plan(
        self, schemes: list[str], method: str, options: dict[str, Any], calibration: Path | None
    ) -> None:
        """The model quantized as it says, against the model."""
        from quantwm.cli.plans import plan_of
        from quantwm.methods import quantize

        self._check()
        plan = plan_of(schemes, method, options)
        with bars() as progress:
            data = self._calibration(progress, plan, calibration)
            small = quantize(
                self.model, plan, data, progress=counter(progress, f"quantize ({method})")
            )
            name = str(plan) if method == "rtn" else f"{plan}@{method}"
            self._fidelity(progress, self.model, name, small)

    def saved(self, name: str, against: str | None) -> None:
        """The model, which is quantized, against the float one."""
        from quantwm.diagnostics.fidelity import check_comparable
        from quantwm.errors import UsageError
        from quantwm.loading import load
        from quantwm.quant import quantization_of

        if quantization_of(self.model) is None:
            raise UsageError(
                f"{name} is a float model, and --against compares a quantized one with its float "
                "model: give --plan SCHEME to quantize it, or a folder of 'quantwm quantize'"
            )
        reference = self._source(name) if against is None else load(against)
        check_comparable(reference, {name: self.model})
        self._check()
        with bars() as progress:
            self._fidelity(progress, reference, name, self.model)

    def sensitivity(
        self, scheme: str, method: str, options: dict[str, Any], calibration: Path | None
    ) -> None:
        """Each layer alone, against the model."""
        from quantwm.cli.plans import plan_of
        from quantwm.diagnostics.sensitivity import diagnose_sensitivity, single_layer_plans

        self._check()
        plan = plan_of([scheme], method, options)
        single_layer_plans(self.model, scheme, method, options)  # before anything is calibrated
        with bars() as progress:
            found = diagnose_sensitivity(
                self.model,
                self.task,
                scheme,
                method=method,
                options=options,
                calibration=self._calibration(progress, plan, calibration),
                progress=counter(progress, "layers"),
                **self.where,
            )
        if self.as_json:
            print_json(found.to_dict())
        else:
            print_sensitivity(found)

    def interventions(
        self, name: str, scheme: str, method: str, options: dict[str, Any], folder: Path | None
    ) -> None:
        """The model quantized, and its parts mended, in closed loop."""
        from quantwm.cli.study import RESULTS
        from quantwm.diagnostics.interventions import diagnose_interventions, intervention_study
        from quantwm.report import write_report

        spec = intervention_study(
            self.task, name, scheme, method=method, options=options, **self.where
        )
        target = folder or RESULTS / f"{self.task}-{spec.name}"
        if not self.as_json:
            out.print(f"results in {target}", highlight=False)
        with bars() as progress:
            found = diagnose_interventions(
                spec,
                target,
                world_model=self.model,
                progress=StudyBar(progress),
                on_arm=None if self.as_json else ArmLines(),
            )
        report = write_report(target, command=command_line())
        if self.as_json:
            print_json({"folder": str(target), "report": str(report)} | found.to_dict())
        else:
            print_interventions(found)
            out.print(f"report: {report}", highlight=False)

    def _check(self) -> None:
        """What can be wrong with the arguments, before anything is computed."""
        from quantwm.compute import resolve_device, resolve_dtype
        from quantwm.envs import get_task
        from quantwm.evaluation import check_fits

        check_fits(self.model, get_task(self.task))
        resolve_dtype(self.where["dtype"], resolve_device(self.where["device"]))

    def _calibration(self, progress: "Progress", plan: Any, file: Path | None) -> Any:
        from quantwm.cli.plans import calibration_for

        report = counter(progress, "calibrate")
        return calibration_for(plan, self.model, file, self.task, self.where["device"], report)

    def _fidelity(
        self, progress: "Progress", reference: "DINOWM", name: str, quantized: "DINOWM"
    ) -> None:
        from quantwm.diagnostics.fidelity import diagnose_fidelity

        report = counter(progress, "diagnose")
        found = diagnose_fidelity(
            reference, {name: quantized}, self.task, progress=report, **self.where
        )
        if self.as_json:
            print_json(found[name].to_dict())
        else:
            print_fidelity(found[name])

    def _source(self, name: str) -> "DINOWM":
        """The bundled model that the quantized one was made from."""
        from quantwm.errors import UsageError
        from quantwm.fingerprint import model_hash
        from quantwm.loading import load
        from quantwm.models.bundled import bundled_names
        from quantwm.quant import quantization_of

        record = quantization_of(self.model)
        assert record is not None
        for bundled in bundled_names():
            candidate = load(bundled)
            if model_hash(candidate) == record.source_model_hash:
                return candidate
        raise UsageError(
            f"{name} was made from model {record.source_model_hash[:12]}, which is none of the "
            f"bundled ones ({', '.join(bundled_names())}): give --against FOLDER with the float "
            "model, or --against truth to compare with the simulator"
        )
