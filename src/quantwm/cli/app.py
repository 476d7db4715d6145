"""The application that commands are added to, and the arguments that several of them take."""

import shlex
import sys
from typing import Annotated

import typer

app = typer.Typer(
    help="How few bits can a world model run on and still plan?",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
bench_app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


def command_line() -> str:
    """The command that is running, as it may be typed again."""
    return shlex.join(["quantwm", *sys.argv[1:]])


TaskName = Annotated[str, typer.Argument(help="The task, e.g. wall.")]
ModelName = Annotated[str, typer.Argument(help="A bundled model's name, or a model's folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
