"""The command that shows what there is."""

from pathlib import Path
from typing import Annotated

import typer

from quantwm.cli.app import Json, app
from quantwm.console import exit_codes, print_facts, print_json


@app.command(epilog="Example: quantwm info wall")
def info(
    source: Annotated[
        str | None,
        typer.Argument(help="A bundled model, or the folder of a model, data set or study."),
    ] = None,
    as_json: Json = False,
    task: Annotated[
        str | None, typer.Option(help="Model: the task it was trained in, if its folder says none.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Data set: write a contact sheet of frames (PNG) here.")
    ] = None,
) -> None:
    """Show what a model, data set, calibration file or results folder holds; without one, what
    this installation offers."""
    with exit_codes():
        from quantwm.describe import contact_sheet, describe, describe_installation
        from quantwm.errors import UsageError

        if source is None:
            if sheet is not None or task is not None:
                option = "--task" if sheet is None else "--sheet"
                raise UsageError(
                    f"{option} is about something: name a model's or data set's folder"
                )
            facts = describe_installation()
        else:
            if sheet is not None:
                contact_sheet(source, sheet)
            facts = describe(source, task)
        if as_json:
            print_json(facts)
        else:
            print_facts(facts)
