"""The command line: parses, calls the library, prints."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quantwm.console import bars, counter, err, exit_codes, out

app = typer.Typer(
    help="How few bits can a world model run on and still plan?",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)

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


def _print_json(value: Any) -> None:
    out.print_json(json.dumps(value))


if __name__ == "__main__":
    main()
