"""The command line: parses, calls the library, prints."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from quantwm.console import (
    ArmLines,
    StudyBar,
    bars,
    counter,
    err,
    exit_codes,
    out,
    print_cells,
    print_facts,
    print_json,
    print_planner_bench,
)

app = typer.Typer(
    help="How few bits can a world model run on and still plan?",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)

bench_app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

TaskName = Annotated[str, typer.Argument(help="The task, e.g. wall.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def main() -> None:
    """Entry point of the `quantwm` command."""
    app()


@app.command(epilog="Example: quantwm collect wall --out data/wall")
def collect(
    task: TaskName,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the data set.")],
    train: Annotated[int, typer.Option(help="Training trajectories.")] = 12_000,
    validation: Annotated[int, typer.Option(help="Validation trajectories.")] = 500,
    seed: Annotated[int, typer.Option(help="Another seed gives other trajectories.")] = 0,
) -> None:
    """Collect trajectories with the task's scripted policy. Run again to continue."""
    with exit_codes("Complete shards are kept: run the same command to go on."):
        from quantwm.data.collect import collect as collect_trajectories
        from quantwm.envs import get_task

        with bars() as progress:
            store = collect_trajectories(
                get_task(task),
                out_folder,
                train=train,
                validation=validation,
                seed=seed,
                progress=counter(progress, f"collect {task}"),
            )
        out.print(f"{train} training and {validation} validation trajectories in {store.folder}")


@app.command(epilog="Example: quantwm train wall --data data/wall --out runs/wall")
def train(
    task: TaskName,
    data: Annotated[Path, typer.Option(help="Folder that `quantwm collect` wrote.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for model and checkpoints.")],
    cache: Annotated[
        Path | None, typer.Option(help="Folder for cached latents (GBs); default OUT/latents.")
    ] = None,
    scale: Annotated[str, typer.Option(help="compact or paper.")] = "compact",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 6000,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    unroll: Annotated[
        int, typer.Option(help="Predictions fed back in the loss; 1 as DINO-WM.")
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of initialisation and shuffling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a world model's predictor. Run again to continue after an interruption."""
    with exit_codes("The last checkpoint is kept: run the same command to go on."):
        from quantwm.envs import get_task
        from quantwm.training.pipeline import MODEL_FOLDER, train_task
        from quantwm.training.train import TrainingSettings

        settings = TrainingSettings(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            unroll=unroll,
            seed=seed,
        )
        with bars() as progress:
            bar = progress.add_task("train", total=steps, note="", start=False)

            def report(step: int, total: int, figures: dict[str, float]) -> None:
                note = f"loss {figures['loss']:.4f}"
                progress.start_task(bar)
                progress.update(bar, completed=step, total=total, note=note)
                if "rollout_ratio" in figures:
                    err.print(
                        f"step {step}: {note}, validation: one step {figures['one_step']:.4f}, "
                        f"five steps {figures['rollout']:.4f} "
                        f"({figures['rollout_ratio']:.3f} of copying the frame)",
                        highlight=False,
                    )

            train_task(
                get_task(task),
                data,
                out_folder,
                cache or out_folder / "latents",
                settings,
                scale=scale,
                device=device,
                encoding=counter(progress, "encode frames"),
                report=report,
            )
        out.print(f"world model in {out_folder / MODEL_FOLDER}")


@app.command(
    epilog="Example: quantwm quantize wall --plan w4g128 --out small, or "
    "--plan 'encoder.*=w8a8-token' --plan 'predictor.*=w4g128'"
)
def quantize(
    model: Annotated[str, typer.Argument(help="A bundled model's name, or a model's folder.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the quantized model.")],
    plan: Annotated[
        list[str],
        typer.Option(help="A scheme for every layer, or PATTERN=SCHEME; may be repeated."),
    ],
    method: Annotated[str, typer.Option(help="The quantization method.")] = "rtn",
    include: Annotated[
        list[str] | None,
        typer.Option(help="Also quantize patch_embedding or attention_matmul; may be repeated."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration file; made there if it does not exist.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task to calibrate in; default: the model's own.")
    ] = None,
    episodes: Annotated[int, typer.Option(help="Calibration episodes.")] = 8,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Quantize a world model and write it, packed, to a folder that every command can load."""
    with exit_codes("Nothing was written."):
        from quantwm.calibration import Calibration, calibrate
        from quantwm.loading import load, save
        from quantwm.methods import quantize as quantize_model
        from quantwm.methods import resolve_plan
        from quantwm.quant import QuantPlan, stored_bytes

        world_model = load(model, device=device)
        layers = dict(_pattern_and_scheme(text) for text in plan)
        quant_plan = QuantPlan(layers, method=method, include=tuple(include or ()))
        resolve_plan(quant_plan, world_model)
        data = None
        with bars() as progress:
            if calibration is not None and calibration.is_file():
                data = Calibration.load(calibration)
            elif calibration is not None:
                data = calibrate(
                    world_model,
                    task or world_model.config.task,
                    episodes=episodes,
                    samples=samples,
                    device=device,
                    progress=counter(progress, "calibrate"),
                )
                data.save(calibration)
            small = quantize_model(
                world_model, quant_plan, data, progress=counter(progress, f"quantize ({method})")
            )
        save(small, out_folder)
        before, after = stored_bytes(world_model), stored_bytes(small)
        if as_json:
            print_json({"folder": str(out_folder), "bytes": after, "float_bytes": before})
        else:
            out.print(
                f"{out_folder}: {after / 1e6:.2f} MB, {after / before:.2f} of the float model's "
                f"{before / 1e6:.2f} MB",
                highlight=False,
            )


@app.command(epilog="Example: quantwm study wall --preset quick --out results/wall episodes=32")
def study(
    source: Annotated[str, typer.Argument(help="A task, or a study's YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, as KEY=VALUE.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Which shipped study to run on the task.")] = "quick",
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Results folder; default results/TASK-NAME.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List cells and estimated time; compute nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Plan in closed loop with every arm of a study; write rows, tables and a report.

    Run the same command again to continue after an interruption.
    """
    with exit_codes():
        from quantwm.errors import GateError
        from quantwm.report import write_report
        from quantwm.study.dry_run import plan_study
        from quantwm.study.run import run_study
        from quantwm.study.spec import StudySpec, load_preset

        is_file = source.endswith((".yaml", ".yml"))
        spec = StudySpec.from_yaml(source) if is_file else load_preset(preset, source)
        spec = spec.with_overrides(overrides or [])
        folder = out_folder or Path("results") / f"{spec.task['name']}-{spec.name}"
        if dry_run:
            plans = plan_study(spec, folder)
            if as_json:
                print_json([vars(plan) for plan in plans])
            else:
                print_cells(plans)
            return
        if not as_json:
            out.print(f"results in {folder}", highlight=False)
        command = shlex.join(["quantwm", *sys.argv[1:]])
        try:
            with bars() as progress:
                result = run_study(
                    spec,
                    folder,
                    progress=StudyBar(progress),
                    on_arm=None if as_json else ArmLines(),
                )
        except GateError:
            # What is finished shows why the float arm fails.
            write_report(folder, command=command)
            raise
        report = write_report(folder, command=command)
        if as_json:
            print_json({"folder": str(folder), "report": str(report), "arms": result.summary})
        else:
            out.print(f"report: {report}", highlight=False)


@app.command(epilog="Example: quantwm info wall")
def info(
    source: Annotated[
        str | None,
        typer.Argument(help="A bundled model, or the folder of a model, data set or study."),
    ] = None,
    as_json: Json = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Data set: write a contact sheet of frames (PNG) here.")
    ] = None,
) -> None:
    """Show what a model, data set, calibration file or results folder holds; without one, what
    this installation offers."""
    with exit_codes():
        from quantwm.describe import contact_sheet, describe, describe_installation

        facts = describe_installation() if source is None else describe(source)
        if sheet is not None:
            contact_sheet(str(source), sheet)
        if as_json:
            print_json(facts)
        else:
            print_facts(facts)


@bench_app.command("planner", epilog="Example: quantwm bench planner --scale compact --rounds 5")
def bench_planner(
    scale: Annotated[str, typer.Option(help="paper, compact or all.")] = "all",
    variant: Annotated[
        list[str] | None,
        typer.Option(help="What to measure, e.g. bfloat16; may be repeated. Default: all but one."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns of every variant; medians are shown.")] = 3,
    candidates: Annotated[
        int | None, typer.Option(help="Candidates an episode; default: 300 paper, 64 compact.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Time one optimisation step of the planner against the order in which DINO-WM computes it.

    Paper scale takes minutes a round; fewer --candidates take less.
    """
    with exit_codes("Nothing is kept of a benchmark: run it again with fewer rounds."):
        from quantwm.bench.planner import bench_planner as measure
        from quantwm.bench.subjects import SCALES
        from quantwm.bench.variants import DEFAULT_VARIANTS

        with bars() as progress:
            report = measure(
                tuple(SCALES) if scale == "all" else (scale,),
                variant or DEFAULT_VARIANTS,
                rounds=rounds,
                candidates=candidates,
                device=device,
                progress=counter(progress, "bench planner"),
            )
        if as_json:
            print_json(report.to_dict())
        else:
            print_planner_bench(report)


def _pattern_and_scheme(text: str) -> tuple[str, str]:
    pattern, equals, scheme = text.partition("=")
    return (pattern.strip(), scheme.strip()) if equals else ("*", text.strip())


if __name__ == "__main__":
    main()
