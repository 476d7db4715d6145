"""The command that draws what models imagine."""

from pathlib import Path
from typing import Annotated

import typer

from quantwm.cli.app import Device, app
from quantwm.console import exit_codes, out


@app.command(epilog="Example: quantwm imagine runs/wall/model small --out imagined.png")
def imagine(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models of one task, with decoders.")
    ],
    out_file: Annotated[Path, typer.Option("--out", help="PNG to write.")],
    episodes: Annotated[int, typer.Option(help="Validation trajectories to show.")] = 4,
    steps: Annotated[int, typer.Option(help="Model steps to imagine.")] = 5,
    seed: Annotated[int, typer.Option(help="Another seed gives other trajectories.")] = 0,
    device: Device = "auto",
) -> None:
    """Draw what world models imagine from one frame and a trajectory's actions, under what really
    happens. Models need a decoder: `quantwm train TASK --decoder vqvae`."""
    with exit_codes("Nothing was written."):
        from quantwm.diagnostics.pictures import (
            TRUE,
            imagined_frames,
            row_labels,
            strip,
            true_frames,
            validation_excerpts,
        )
        from quantwm.envs import get_task
        from quantwm.errors import MismatchError
        from quantwm.files import atomic_path
        from quantwm.loading import load

        labels = row_labels(models)
        loaded = {name: load(name, device=device) for name in models}
        first = next(iter(loaded.values()))
        for name, world_model in loaded.items():
            for what in ("task", "frameskip"):
                if getattr(world_model.config, what) != getattr(first.config, what):
                    raise MismatchError(
                        f"{name} has another {what} ({getattr(world_model.config, what)}) than "
                        f"{models[0]} ({getattr(first.config, what)})"
                    )
        frameskip = first.config.frameskip
        excerpts = validation_excerpts(
            get_task(first.config.task), episodes=episodes, steps=steps * frameskip, seed=seed
        )
        rows = {TRUE: true_frames(excerpts, frameskip)}
        for label, world_model in zip(labels, loaded.values(), strict=True):
            rows[label] = imagined_frames(world_model, excerpts)
        with atomic_path(out_file) as temporary:
            strip(rows).save(temporary, format="PNG")
        out.print(f"{out_file}: {episodes} trajectories, {steps} steps each", highlight=False)
