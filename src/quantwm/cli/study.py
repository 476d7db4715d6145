"""The commands that plan in closed loop: a study, workers that join it, and where it stands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantwm.cli.app import Json, app, command_line
from quantwm.cli.study_output import ArmLines, StudyBar, print_cells, print_status
from quantwm.console import bars, exit_codes, out, print_json

if TYPE_CHECKING:
    from quantwm.study.executors import Executor
    from quantwm.study.spec import StudySpec

RESULTS = Path("results")


@app.command(
    epilog="Example: quantwm study wall --preset quick episodes=32, or "
    "quantwm study wall pusht point_maze --preset findings --workers 2"
)
def study(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Tasks, or studies' YAML files; then settings to change, as KEY=VALUE.",
            metavar="TASK|KEY=VALUE",
        ),
    ],
    preset: Annotated[
        str | None, typer.Option(help="Which shipped study to run on the tasks; default: quick.")
    ] = None,
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Results folder; default results/TASK-NAME. Of several tasks, each gets a folder "
            "in it; default results/NAME.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that share the cells, and this machine's cores.")
    ] = 1,
    slurm: Annotated[bool, typer.Option(help="Compute in jobs of a Slurm cluster.")] = False,
    slurm_setting: Annotated[
        list[str] | None,
        typer.Option(help="For the jobs, as submitit has it, e.g. slurm_partition=gpu."),
    ] = None,
    job_minutes: Annotated[
        float | None,
        typer.Option(help="About how long a job of the cluster should take; default: 30."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List what would run and for how long; write nothing."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Plan in closed loop with every arm of a study; write rows, tables and a report.

    Run the same command again to continue after an interruption.
    """
    with exit_codes():
        from quantwm.study.dry_run import plan_study
        from quantwm.study.executors import shared_threads

        executor = _executor(workers, slurm, slurm_setting or [], job_minutes)
        planned = [
            (shared_threads(spec, executor), folder)
            for spec, folder in _studies(sources, preset, out_folder)
        ]
        if dry_run:
            plans = [
                plan
                for spec, folder in planned
                for plan in plan_study(spec, folder, elsewhere=executor.elsewhere)
            ]
            if as_json:
                print_json([vars(plan) for plan in plans])
            else:
                print_cells(plans)
            return
        _run(planned, executor, as_json)


@app.command(epilog="Example: quantwm work results/findings/wall")
def work(
    folders: Annotated[list[Path], typer.Argument(help="Results folders of started studies.")],
    device: Annotated[
        str | None, typer.Option(help="e.g. cuda:1; default: as the study says.")
    ] = None,
) -> None:
    """Help to compute started studies, from any machine that shares their folders."""
    with exit_codes("The study's other workers go on; run the same command to join again."):
        from dataclasses import replace

        from quantwm.study.worker import job_of
        from quantwm.study.worker import work as work_on

        for folder in folders:
            job = job_of(folder)
            if device is not None:
                job = replace(job, spec=replace(job.spec, device=device))
            with bars() as progress:
                work_on(job, progress=StudyBar(progress))
            out.print(f"nothing is left to do in {folder}", highlight=False)


@app.command(epilog="Example: quantwm status results/wall-quick")
def status(
    folders: Annotated[list[Path], typer.Argument(help="Results folders.")],
    as_json: Json = False,
) -> None:
    """Show what of a study is done, running, failed and waiting."""
    with exit_codes():
        from quantwm.study.status import study_status

        found = [study_status(folder) for folder in folders]
        if as_json:
            print_json(
                [
                    {
                        "folder": str(one.folder),
                        "arms": [vars(arm) for arm in one.arms],
                        "diagnoses": dict(zip(("done", "wanted"), one.diagnoses, strict=True)),
                    }
                    for one in found
                ]
            )
        else:
            print_status(found)


@app.command(
    epilog="Example: quantwm report results/wall-quick, or "
    "quantwm report docs/results/*-findings.parquet --out report"
)
def report(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Results folders, finished or not, or Parquet files of rows."),
    ],
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for report.html, or an HTML file; default the results folder, or of "
            "several the folder that they are in.",
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="Whose arms the files of rows hold.")] = "findings",
    brief: Annotated[
        bool, typer.Option("--brief", help="A small page without what is told episode by episode.")
    ] = False,
) -> None:
    """Write tables and report of what is finished of studies, without computing anything."""
    with exit_codes():
        from quantwm.errors import UsageError
        from quantwm.report import write_report
        from quantwm.study.tables import Tables

        folders = [source for source in sources if not source.is_file()]
        for folder in folders:
            tables = Tables.of_folder(folder)
            tables.look()
            if not tables.names:
                raise UsageError(f"{folder} has no rows yet: no arm is finished")
            tables.write()
        if target is None and len(sources) > 1 and folders == sources:
            target = sources[0].parent
        written = write_report(sources, out=target, preset=preset, brief=brief)
        out.print(f"report: {written}", highlight=False)


def _executor(workers: int, slurm: bool, settings: list[str], minutes: float | None) -> "Executor":
    from quantwm.checks import parsed
    from quantwm.errors import UsageError
    from quantwm.study.executors import InProcess, Local, Slurm

    if slurm:
        if workers != 1:
            raise UsageError("--workers are processes of this machine: leave them out with --slurm")
        pairs = [setting.partition("=") for setting in settings]
        bad = [key for key, equals, _ in pairs if not equals]
        if bad:
            raise UsageError(f"--slurm-setting is KEY=VALUE, got {bad[0]!r}")
        parameters = {key: parsed(text, key) for key, _, text in pairs}
        return Slurm(30.0 if minutes is None else minutes, parameters=parameters)
    if settings or minutes is not None:
        option = "--slurm-setting" if settings else "--job-minutes"
        raise UsageError(f"{option} is for jobs of a cluster: add --slurm")
    return InProcess() if workers == 1 else Local(workers)


def _studies(
    sources: list[str], preset: str | None, out_folder: Path | None
) -> list[tuple["StudySpec", Path]]:
    """Each study with its results folder."""
    from quantwm.errors import UsageError
    from quantwm.study.spec import StudySpec, load_preset

    files = (".yaml", ".yml")
    overrides = [text for text in sources if "=" in text and not text.endswith(files)]
    named = [text for text in sources if text not in overrides]
    if not named:
        raise UsageError(f"name a task or a study's YAML file before {overrides[0]!r}")
    if preset is not None and all(one.endswith(files) for one in named):
        raise UsageError(f"--preset is for tasks, and {named[0]} is a study already: leave it out")
    specs = [
        (
            StudySpec.from_yaml(one) if one.endswith(files) else load_preset(preset or "quick", one)
        ).with_overrides(overrides)
        for one in named
    ]
    tasks = [str(spec.task["name"]) for spec in specs]
    if len(specs) == 1:
        return [(specs[0], out_folder or RESULTS / f"{tasks[0]}-{specs[0].name}")]
    twice = [task for task in tasks if tasks.count(task) > 1]
    if twice:
        raise UsageError(f"task {twice[0]!r} is named twice; run its studies one by one")
    root = out_folder or RESULTS / specs[0].name
    return [(spec, root / task) for spec, task in zip(specs, tasks, strict=True)]


def _run(
    planned: list[tuple["StudySpec", Path]],
    executor: "Executor",
    as_json: bool,
) -> None:
    from quantwm.errors import CellsFailedError, GateError
    from quantwm.report import write_report
    from quantwm.study.prepare import prepare
    from quantwm.study.run import run_study
    from quantwm.study.same_study import check_arithmetic, check_folder
    from quantwm.study.store import ResultsFolder

    if len(planned) > 1:  # a slip in the last one shows before the first has run for hours
        for spec, folder in planned:
            prepared = prepare(spec, elsewhere=executor.elsewhere)
            check_folder(prepared, ResultsFolder(folder))
            if not executor.elsewhere:
                check_arithmetic(prepared, ResultsFolder(folder))
    command = command_line()
    stopped: list[GateError | CellsFailedError] = []
    summaries = {}
    for spec, folder in planned:
        if not as_json:
            out.print(f"results in {folder}", highlight=False)
        try:
            with bars() as progress:
                result = run_study(
                    spec,
                    folder,
                    executor=executor,
                    progress=StudyBar(progress),
                    on_arm=None if as_json else ArmLines(),
                )
            summaries[str(folder)] = result.summary
        except (GateError, CellsFailedError) as error:
            # What is finished shows why; the other tasks' studies go on.
            stopped.append(error)
    folders = [folder for _, folder in planned if (folder / "episodes.parquet").is_file()]
    if folders:
        several = len(planned) > 1
        root = planned[0][1].parent
        report = write_report(
            folders if several else folders[0],
            out=root if several else None,
            command=command,
        )
        if as_json:
            found = [{"folder": name, "arms": arms} for name, arms in summaries.items()]
            first = found[0] if found and not several else {"studies": found}
            print_json({"report": str(report)} | first)
        else:
            out.print(f"report: {report}", highlight=False)
    if stopped:
        raise stopped[0]
