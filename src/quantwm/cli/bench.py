"""Commands that measure."""

from pathlib import Path
from typing import Annotated

import typer

from quantwm.cli.app import Device, Json, bench_app
from quantwm.cli.bench_output import print_methods_bench, print_planner_bench
from quantwm.console import bars, counter, exit_codes, print_json


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
    device: Device = "auto",
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


@bench_app.command(
    "methods",
    epilog="Example: quantwm bench methods wall --calibration a.safetensors "
    "--held-out b.safetensors --plan w4 --plan w3g128",
)
def bench_methods(
    model: Annotated[
        str, typer.Argument(help="A model's name or folder; 'paper' for times at DINO-WM's size.")
    ],
    calibration: Annotated[
        Path | None, typer.Option(help="File to quantize with (quantwm calibrate).")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="File of other episodes, to measure errors on.")
    ] = None,
    plan: Annotated[
        list[str] | None, typer.Option(help="Schemes; may be repeated. Default: seven of them.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Methods; may be repeated. Default: all.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences to use; default: all (paper: 32).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare methods by the error of every block's output on held-out data, time and memory."""
    with exit_codes("Rows that were finished are above."):
        from quantwm.bench.methods import DEFAULT_METHODS, DEFAULT_PLANS, MethodRow
        from quantwm.bench.methods import bench_methods as measure

        rows: list[MethodRow] = []
        try:
            with bars() as progress:
                for row in measure(
                    model,
                    calibration,
                    held_out,
                    methods=method or DEFAULT_METHODS,
                    plans=plan or DEFAULT_PLANS,
                    samples=samples,
                    progress=counter(progress, "bench methods"),
                ):
                    rows.append(row)
        finally:
            # Interrupted too: a row can take minutes.
            if as_json:
                print_json({"rows": [row.to_dict() for row in rows]})
            elif rows:
                print_methods_bench(rows)
