"""The command that plans in closed loop."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from quantwm.cli.app import Json, app
from quantwm.console import ArmLines, StudyBar, bars, exit_codes, out, print_cells, print_json


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
