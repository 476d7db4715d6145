"""The command that turns a foreign checkpoint into a model folder."""

from pathlib import Path
from typing import Annotated

import typer

from quantwm.cli.app import Json, ModelName, app
from quantwm.console import exit_codes, out, print_json


@app.command(epilog="Example: quantwm convert outputs/wall_single wall --data data/wall_single")
def convert(
    model: ModelName,
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    data: Annotated[
        Path | None,
        typer.Option(help="The data set it was trained on; its statistics go into the model."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The task it was trained in, where the checkpoint says none.")
    ] = None,
    stats: Annotated[Path | None, typer.Option(help="A JSON file of the statistics.")] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint of DINO-WM's public code, or of stable-worldmodel's, as safetensors and
    JSON. Nothing that is in the checkpoint is executed; optimizers are left out."""
    with exit_codes("Nothing was written."):
        from quantwm.loading import load, save

        world_model = load(model, task=task, data=data, stats=stats)
        save(world_model, out_folder)
        can_plan = world_model.action_spec.mean is not None
        if as_json:
            facts = {"folder": str(out_folder), "task": world_model.config.task}
            print_json(facts | {"statistics": can_plan})
        else:
            note = "" if can_plan else ", without statistics: give --data or --stats to plan"
            out.print(f"{out_folder}: {world_model.config.task}{note}", highlight=False)
