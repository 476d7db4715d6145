"""What benchmarks print."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantwm.console import columns, out, print_whole, right

if TYPE_CHECKING:
    from quantwm.bench.machine import AttentionRow
    from quantwm.bench.methods import MethodRow
    from quantwm.bench.planner import PlannerReport, PlannerRow

_BUSY = 0.5
"""Load average above which a benchmark says that it is not alone."""


def print_planner_bench(report: "PlannerReport") -> None:
    """The planner's benchmark: machine, variants, attention kernels."""
    machine = report.machine
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s {dtype}"
        for dtype, rate in machine["matrix_flops_per_second"].items()
    )
    where = machine["gpu"] or machine["processor"] or machine["device"]
    out.print(f"{where}, {machine['threads']} threads; matrix products: {rates}", highlight=False)
    load = machine["load_average_before"]
    if load is not None and load > _BUSY:
        out.print(
            f"the machine was busy before (load average {load:.1f}): its ratios are not to be "
            "trusted, because work beside it slows what runs on all threads the most",
            style="yellow",
            highlight=False,
        )
    names = ("seconds", "faster", "time\nvs float", "TFLOP", "of the\nrate", "memory\nMiB")
    table = columns("scale", "variant", *(right(name) for name in (*names, "cost\nerror")))
    for row in report.rows:
        table.add_row(row.scale, row.variant, *_bench_cells(row))
    print_whole(table)
    for row in report.rows:
        if row.linearity is not None:
            out.print(
                f"{row.scale} {row.variant}: {row.measured_candidates} of {row.candidates} "
                f"candidates measured, in chunks of {row.chunk}, and scaled; twice as many took "
                f"{2 * (1 + row.linearity):.2f} times as long",
                highlight=False,
            )
    sizes = ("rows x heads x\nqueries x keys", "fused\nms", "products\nms", "blocked\nms")
    table = columns("attention", "type", *(right(size) for size in sizes))
    for kernel in report.attention:
        table.add_row(kernel.scale, kernel.dtype, *_attention_cells(kernel))
    print_whole(table)


def _bench_cells(row: "PlannerRow") -> list[str]:
    return [
        f"{row.seconds:.3g}",
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        "" if row.twin_ratio is None else f"{row.twin_ratio:.2f}x",
        f"{2e-12 * (row.linear_multiply_adds + row.attention_multiply_adds):.3g}",
        f"{row.share:.0%}",
        f"{row.memory_mb:.0f}",
        "" if row.cost_error is None else f"{row.cost_error:.1e}",
    ]


def _attention_cells(row: "AttentionRow") -> list[str]:
    shape = f"{row.rows} x {row.heads} x {row.queries} x {row.keys}"
    return [shape, *(f"{1e3 * t:.3g}" for t in (row.fused, row.products, row.blocked))]


def print_methods_bench(rows: Iterable["MethodRow"]) -> None:
    """Methods under plans: relative L2 errors of blocks and weights, time, memory."""
    errors = ("encoder\nblocks", "predictor\nblocks", "encoder\nweights", "predictor\nweights")
    names = (*errors, "seconds", "peak\nMiB")
    table = columns("plan", "method", *(right(name) for name in names))
    refused: dict[str, list[str]] = {}
    for row in rows:
        if row.refused is not None:
            refused.setdefault(row.refused, []).append(f"{row.method} at {row.plan}")
            continue
        found = (row.encoder, row.predictor, row.encoder_weights, row.predictor_weights)
        table.add_row(
            row.plan,
            row.method,
            *("" if error is None else f"{error:.4f}" for error in found),
            f"{row.seconds:.1f}",
            f"{row.peak_mb:.0f}",
        )
    print_whole(table)
    for reason, which in refused.items():
        out.print(f"{', '.join(which)}: {reason}", markup=False, highlight=False)
