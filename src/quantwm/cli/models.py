"""Commands that make models: collect, train, calibrate, quantize."""

import os
from pathlib import Path
from typing import Annotated

import typer

from quantwm.cli.app import Device, Json, ModelName, TaskName, app
from quantwm.cli.plans import (
    calibration_for,
    check_calibrates,
    method_options,
    plan_of,
    settings_of,
)
from quantwm.console import bars, counter, err, exit_codes, out, print_json


@app.command(epilog="Example: quantwm collect wall --out data/wall")
def collect(
    task: TaskName,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the data set.")],
    train: Annotated[int, typer.Option(help="Training trajectories.")] = 12_000,
    validation: Annotated[int, typer.Option(help="Validation trajectories.")] = 500,
    seed: Annotated[int, typer.Option(help="Another seed gives other trajectories.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Processes that simulate; default: one a core.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="The task's own, NAME=VALUE, such as shape=L; may be repeated."),
    ] = None,
    planned_by: Annotated[
        str | None,
        typer.Option(help="A model, whose planner's candidates act instead of a script."),
    ] = None,
) -> None:
    """Collect trajectories of the task's scripted policy, or of a model's plans. Run again to
    continue."""
    with exit_codes("Complete shards are kept: run the same command to go on."):
        from quantwm.data.collect import collect as collect_trajectories
        from quantwm.envs import get_task

        place = get_task(task, **settings_of("a task's setting", "shape=L", setting or []))
        policy = None
        if planned_by is not None:
            from quantwm.data.planned import PlannedPolicy

            policy = PlannedPolicy(place, planned_by)
        with bars() as progress:
            store = collect_trajectories(
                place,
                out_folder,
                policy=policy,
                train=train,
                validation=validation,
                seed=seed,
                workers=(os.cpu_count() or 1) if workers is None else workers,
                progress=counter(progress, f"collect {task}"),
            )
        out.print(f"{train} training and {validation} validation trajectories in {store.folder}")


@app.command(epilog="Example: quantwm train wall --data data/wall --out runs/wall")
def train(
    task: TaskName,
    data: Annotated[
        list[Path],
        typer.Option(help="Folder of `quantwm collect`, or DINO-WM's data set; may be repeated."),
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for model and checkpoints.")],
    cache: Annotated[
        Path | None, typer.Option(help="Folder for cached latents (GBs); default OUT/latents.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="compact or paper; default: compact, or --init's own.")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="A float world model, or its folder, to go on from.")
    ] = None,
    encoder: Annotated[
        str,
        typer.Option(help="dinov2_vits14, dinov2_vitb14, facebook/dinov2-small, or a file."),
    ] = "dinov2_vits14",
    download: Annotated[
        bool, typer.Option(help="Fetch the encoder's weights if they are nowhere on this machine.")
    ] = True,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 6000,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    unroll: Annotated[
        int, typer.Option(help="Predictions fed back in the loss; 1 as DINO-WM.")
    ] = 2,
    ramp: Annotated[
        float, typer.Option(help="Share of the steps over which --unroll grows from 1.")
    ] = 0.0,
    proprio_weight: Annotated[
        float | None,
        typer.Option(help="Of proprioception's own error in the loss; default: as DINO-WM."),
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="Train a decoder of pictures as well: vqvae.")
    ] = None,
    decoder_steps: Annotated[
        int | None, typer.Option(help="Optimiser steps of the decoder; default 2000.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initialisation and shuffling.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a world model's predictor. Run again to continue after an interruption."""
    with exit_codes("The last checkpoint is kept: run the same command to go on."):
        from quantwm.data.sources import stored_task
        from quantwm.envs import get_task
        from quantwm.errors import UsageError
        from quantwm.loading import load
        from quantwm.study.prepare import build_task
        from quantwm.training.decoder import DecoderSettings
        from quantwm.training.pipeline import MODEL_FOLDER, train_task
        from quantwm.training.train import TrainingSettings

        settings = TrainingSettings(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            unroll=unroll,
            ramp=ramp,
            proprio_weight=proprio_weight,
            seed=seed,
        )
        if decoder is None and decoder_steps is not None:
            raise UsageError("--decoder-steps is about a decoder: name its kind, --decoder vqvae")
        drawing_settings = DecoderSettings(
            steps=2000 if decoder_steps is None else decoder_steps, seed=seed
        )
        with bars() as progress:
            bar = progress.add_task("train", total=steps, note="", start=False)

            fetch = progress.add_task("fetch encoder", total=None, note="", visible=False)

            def fetched(done: int, total: int) -> None:
                progress.update(fetch, completed=done, total=total, visible=done < total)

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

            drawing = progress.add_task(
                "decoder", total=drawing_settings.steps, note="", visible=False
            )

            def drawn(step: int, total: int, figures: dict[str, float]) -> None:
                note = f"loss {figures['loss']:.4f}"
                progress.update(drawing, completed=step, total=total, note=note, visible=True)

            stored = stored_task(data[0]) or {}
            train_task(
                build_task(stored) if stored.get("name") == task else get_task(task),
                data,
                out_folder,
                cache or out_folder / "latents",
                settings,
                scale=scale,
                init=None if init is None else load(init),
                encoder=encoder,
                download=download,
                decoder=decoder,
                decoder_settings=drawing_settings,
                device=device,
                downloading=fetched,
                encoding=counter(progress, "encode frames"),
                report=report,
                decoder_report=drawn,
            )
        out.print(f"world model in {out_folder / MODEL_FOLDER}")


@app.command(epilog="Example: quantwm calibrate wall --out wall-calibration.safetensors")
def calibrate(
    model: ModelName,
    out_file: Annotated[Path, typer.Option("--out", help="File to write.")],
    task: Annotated[
        str | None, typer.Option(help="Task to calibrate in; default: the model's own.")
    ] = None,
    episodes: Annotated[int, typer.Option(help="Calibration episodes.")] = 8,
    samples: Annotated[int, typer.Option(help="Candidate sequences to keep.")] = 128,
    seed: Annotated[int, typer.Option(help="Another seed gives other episodes.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Let the float model plan on calibration episodes and keep what it was fed, in one file that
    serves every method."""
    with exit_codes("Nothing was written."):
        from quantwm.calibration import calibrate as gather
        from quantwm.loading import load

        world_model = load(model, device=device)
        with bars() as progress:
            data = gather(
                world_model,
                task or world_model.config.task,
                episodes=episodes,
                seed=seed,
                samples=samples,
                device=device,
                progress=counter(progress, "calibrate"),
            )
        data.save(out_file)
        facts = {"file": str(out_file), "sequences": len(data), "frames": len(data.visual)}
        if as_json:
            print_json(facts)
        else:
            out.print(
                f"{out_file}: {facts['sequences']} sequences from {facts['frames']} frames",
                highlight=False,
            )


@app.command(
    epilog="Example: quantwm quantize wall --plan w4g128 --out small, or "
    "--plan 'encoder.*=w8a8-token' --plan 'predictor.*=w4g128'"
)
def quantize(
    model: ModelName,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the quantized model.")],
    plan: Annotated[
        list[str],
        typer.Option(help="A scheme for every layer, or PATTERN=SCHEME; may be repeated."),
    ],
    method: Annotated[
        str, typer.Option(help="Such as gptq, or several joined: smoothquant+gptq.")
    ] = "rtn",
    option: Annotated[
        list[str] | None,
        typer.Option(help="The method's own setting, NAME=VALUE or PART.NAME=VALUE; repeatable."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Also quantize patch_embedding or attention_matmul; may be repeated."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Calibration file; made there if it does not exist and the plan needs one."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task to calibrate in; default: the model's own.")
    ] = None,
    episodes: Annotated[int | None, typer.Option(help="Calibration episodes; default 8.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Candidate sequences to calibrate on; default 128.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Quantize a world model and write it, packed, to a folder that every command can load."""
    with exit_codes("Nothing was written."):
        from quantwm.loading import load, save
        from quantwm.methods import quantize as quantize_model
        from quantwm.quant import stored_bytes
        from quantwm.storage import check_replaceable

        check_replaceable(out_folder)
        world_model = load(model, device=device)
        quant_plan = plan_of(plan, method, method_options(option or []), include or ())
        sizes = {"episodes": episodes, "samples": samples}
        given = {name: size for name, size in sizes.items() if size is not None}
        options = [f"--{name}" for name in (*given, *(["task"] if task else []))]
        check_calibrates(quant_plan, world_model, calibration, options)
        with bars() as progress:
            data = calibration_for(
                quant_plan,
                world_model,
                calibration,
                task or world_model.config.task,
                device,
                counter(progress, "calibrate"),
                **given,
            )
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
