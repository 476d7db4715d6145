"""How the command line talks: progress bars with time left, and errors with exit codes."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from quantwm.errors import QuantWMError, UsageError

if TYPE_CHECKING:
    from quantwm.bench.machine import AttentionRow
    from quantwm.bench.methods import MethodRow
    from quantwm.bench.planner import PlannerReport, PlannerRow
    from quantwm.diagnostics.fidelity import Fidelity
    from quantwm.diagnostics.interventions import Interventions
    from quantwm.diagnostics.rollouts import RolloutDiagnosis
    from quantwm.diagnostics.sensitivity import Sensitivity
    from quantwm.study.dry_run import CellPlan
    from quantwm.study.status import StudyStatus

EXIT_FAILED = 1
EXIT_USAGE = 2
_BUSY = 0.5
"""Load average above which a benchmark says that it is not alone."""
_LAYERS = 20
"""Layers that a table of sensitivities shows."""
_UNBOUNDED = 10_000
"""Columns: more than any table needs."""

out = Console()
"""What a command was asked for."""
err = Console(stderr=True)
"""Everything else: progress, notices, errors."""


@contextmanager
def bars() -> Iterator[Progress]:
    """A progress display on standard error; silent where that is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield progress


def counter(progress: Progress, description: str) -> Callable[[int, int], None]:
    """A bar as the (done, total) callback that the library's functions take."""
    task = progress.add_task(description, total=None, note="")

    def update(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    return update


@contextmanager
def exit_codes(resume_hint: str = "") -> Iterator[None]:
    """Turn quantwm's errors and Ctrl-C into a message and an exit code.

    Exit 2 for bad usage, 1 for everything else that failed; an unexpected error keeps its
    traceback.

    Args:
        resume_hint: what to tell somebody who pressed Ctrl-C.
    """
    try:
        yield
    except UsageError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_USAGE)
    except QuantWMError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or f"interrupted. {resume_hint}".strip()
        err.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_FAILED)


class StudyBar:
    """A study's progress: one bar a stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def start(self, label: str, index: int, count: int) -> None:
        """A stage begins."""
        place = f"{label} ({index} of {count})" if index else label
        self._task = self._progress.add_task(place, total=None, note="")

    def update(self, done: int, total: int) -> None:
        """Episode-iterations done, of how many."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def finish(self) -> None:
        """The stage is over."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


class ArmLines:
    """Prints a study's table line by line, as arms finish."""

    _WIDTHS = (18, 22, 26, 9, 9)

    def __init__(self) -> None:
        self._headed = False

    def __call__(self, arm: Mapping[str, Any]) -> None:
        """One arm's summary row."""
        if not self._headed:
            self._line("arm", "success", "against float", "MB", "seconds")
            self._headed = True
        success = f"{arm['success']:.2f} [{arm['low']:.2f}, {arm['high']:.2f}]"
        difference = ""
        if arm["difference"] is not None:
            parts = [arm["difference"], arm["difference_low"], arm["difference_high"]]
            shown = [f"{part:+.2f}" for part in parts]
            difference = f"{shown[0]} [{shown[1]}, {shown[2]}]"
        size = "" if arm["bytes"] is None else f"{arm['bytes'] / 1e6:.1f}"
        self._line(str(arm["arm"]), success, difference, size, f"{arm['seconds']:.1f}")
        if arm["note"]:
            out.print(f"  {arm['note']}", style="dim", markup=False, highlight=False)

    def _line(self, *cells: str) -> None:
        first, *rest = cells
        padded = [first.ljust(self._WIDTHS[0])]
        padded += [cell.rjust(width) for cell, width in zip(rest, self._WIDTHS[1:], strict=True)]
        out.print(" ".join(padded), markup=False, highlight=False, soft_wrap=True)


def print_cells(plans: Iterable["CellPlan"]) -> None:
    """A dry run's list."""
    table = _columns("arm", "cell", "state", _right("estimate"))
    total = 0.0
    for plan in plans:
        state = "done" if plan.done else f"as {plan.shares}" if plan.shares else "to run"
        table.add_row(Text(plan.arm), plan.cell, state, f"{plan.seconds:.0f} s")
        total += plan.seconds
    _print_whole(table)
    out.print(f"estimate: at most {total:.0f} s, good to a factor of two or three", highlight=False)


def print_status(studies: Iterable["StudyStatus"]) -> None:
    """Counts of each study, and its arms that are running, have failed or are half done."""
    for one in studies:
        out.print(str(one), markup=False, highlight=False, soft_wrap=True)
        shown = [arm for arm in one.arms if arm.note]
        if not shown:
            continue
        table = _columns("arm", "state", _right("seconds"), "")
        for arm in shown:
            seconds = "" if arm.seconds is None else f"{arm.seconds:.0f}"
            table.add_row(Text(arm.arm), arm.state, seconds, Text(arm.note))
        _print_whole(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Nested facts, one a line."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in _flat(facts):
        table.add_row(Text(key, style="bold"), Text(str(value), overflow="fold"))
    out.print(table)


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
    table = _columns("scale", "variant", *(_right(name) for name in (*names, "cost\nerror")))
    for row in report.rows:
        table.add_row(row.scale, row.variant, *_bench_cells(row))
    _print_whole(table)
    for row in report.rows:
        if row.linearity is not None:
            out.print(
                f"{row.scale} {row.variant}: {row.measured_candidates} of {row.candidates} "
                f"candidates measured, in chunks of {row.chunk}, and scaled; twice as many took "
                f"{2 * (1 + row.linearity):.2f} times as long",
                highlight=False,
            )
    sizes = ("rows x heads x\nqueries x keys", "fused\nms", "products\nms", "blocked\nms")
    table = _columns("attention", "type", *(_right(size) for size in sizes))
    for kernel in report.attention:
        table.add_row(kernel.scale, kernel.dtype, *_attention_cells(kernel))
    _print_whole(table)


def _columns(*headers: Column | str) -> Table:
    return Table(*headers, box=None, pad_edge=False, collapse_padding=True)


def _right(header: str) -> Column:
    return Column(header, justify="right")


def _print_whole(table: Table) -> None:
    """As wide as its content, because a name that is cut says nothing: where the console is
    narrower, it wraps the lines."""
    unbounded = out.options.update(width=_UNBOUNDED)
    table.width = out.measure(table, options=unbounded).maximum
    out.print(table, crop=False)


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
    table = _columns("plan", "method", *(_right(name) for name in names))
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
    _print_whole(table)
    for reason, which in refused.items():
        out.print(f"{', '.join(which)}: {reason}", markup=False, highlight=False)


def print_rollout_diagnosis(diagnosis: "RolloutDiagnosis") -> None:
    """Errors of imagined latents by model step, then what they do to the choice of candidates."""
    parts = [(name or "latent", name) for name in diagnosis.error]
    names = [f"{shown}\n{kind}" for shown, _ in parts for kind in ("imagined", "unchanged")]
    table = _columns("model step", *(_right(name) for name in names))
    for step in range(len(next(iter(diagnosis.error.values())))):
        values = [v[name][step] for _, name in parts for v in (diagnosis.error, diagnosis.still)]
        table.add_row(str(step + 1), *(f"{value:.3f}" for value in values))
    _print_whole(table)
    facts = diagnosis.to_dict()
    out.print(
        "candidates, imagined against true costs: rank correlation "
        f"{facts['rank_correlation']:.2f}, {facts['elite_overlap']:.2f} of the {facts['elites']} "
        f"cheapest in common; the favourite ends {facts['regret']:.3g} further from the goal than "
        f"the best candidate (by true costs {facts['true_regret']:.3g}); means over "
        f"{facts['episodes']} episodes",
        highlight=False,
    )


def print_fidelity(fidelity: "Fidelity") -> None:
    """Drift by model step, then how candidates are ranked, against the float model."""
    arm, kinds = fidelity.arm, ("{}\nvs float", "{}\nvs truth", "float {}\nvs truth")
    names = [kind.format(name or "latent") for name in fidelity.drift for kind in kinds]
    table = _columns("model step", *(_right(name) for name in names))
    drifts = list(fidelity.drift.values())
    observed = [[d.observed, d.observed, 0.0] for d in drifts]
    table.add_row("observed", *(f"{value:.3f}" for part in observed for value in part))
    for step in range(len(drifts[0].against_float)):
        shown = [(d.against_float, d.against_truth, d.float_against_truth) for d in drifts]
        values = [kind[step] for part in shown for kind in part]
        table.add_row(str(step + 1), *(f"{value:.3f}" for value in values))
    out.print(f"{arm}: relative errors of latents", markup=False, highlight=False)
    _print_whole(table)
    names = ["rank\ncorrelation", f"cheapest {fidelity.k}\nin common", "regret"]
    table = _columns("candidates", *(_right(name) for name in names))
    for name, ranks in (("at random", fidelity.first), ("near float's plan", fidelity.last)):
        means = [v.mean() for v in (ranks.rank_correlation, ranks.top_k_overlap, ranks.regret)]
        table.add_row(name, *(f"{mean:.3f}" for mean in means))
    out.print(f"\n{arm}: costs of candidates against float's", markup=False, highlight=False)
    _print_whole(table)
    out.print(
        "regret: what its favourite costs above the cheapest, both by the float model; 1 is the "
        f"cost of a plan at random. Means over {len(fidelity.last.regret)} episodes.",
        highlight=False,
    )


def print_sensitivity(sensitivity: "Sensitivity") -> None:
    """The layers that matter most, then a summary of each part."""
    ranked = sensitivity.ranked()
    names = ("error of the\nlast latent", "rank correlation\nof costs")
    table = _columns("layer", *(_right(name) for name in names))
    for layer in ranked[:_LAYERS]:
        table.add_row(layer.layer, f"{layer.error:.4f}", f"{layer.rank_correlation:.3f}")
    out.print(
        f"{sensitivity.scheme} ({sensitivity.method}) in one layer alone, against the float model",
        markup=False,
        highlight=False,
    )
    _print_whole(table)
    if len(ranked) > _LAYERS:
        out.print(
            f"... and {len(ranked) - _LAYERS} less sensitive layers (all with --json)",
            highlight=False,
        )
    for part in dict.fromkeys(layer.part for layer in sensitivity.layers):
        errors = [layer.error for layer in ranked if layer.part == part]
        out.print(
            f"{part}: {len(errors)} layers, median error {errors[len(errors) // 2]:.4f}, "
            f"largest {errors[0]:.4f}",
            highlight=False,
        )


def print_interventions(found: "Interventions") -> None:
    """The verdict with its evidence, then how far costs mean success, arm by arm."""
    one = found.verdict
    out.print(f"\n{one.arm}: {one.verdict}; {one.reason}", markup=False, highlight=False)
    table = _columns("compared", _right("estimate"), "95% interval", "", "")
    for part in one.evidence:
        known = part.estimate is not None and part.low is not None and part.high is not None
        shown = ["", ""]
        if known:
            sign = "" if part.margin is None else "+"  # a success rate, or a difference of two
            values = (part.estimate, part.low, part.high)
            estimate, low, high = (format(value, f"{sign}.2f") for value in values)
            shown = [estimate, f"[{low}, {high}]"]
        table.add_row(Text(part.text), *shown, part.verdict, Text(part.note))
    _print_whole(table)
    if one.episodes_needed is not None:
        needed = f"--episodes {one.episodes_needed}"
        out.print(f"{needed} would decide it, if what was seen goes on", highlight=False)
    out.print("\nobjective: does a lower predicted cost mean success?", highlight=False)
    names = ("AUC", "cost falls to", "episodes in\nwhich it falls")
    table = _columns("arm", *(_right(name) for name in names))
    for name, alignment in found.alignment.items():
        fall = alignment.fall
        table.add_row(
            Text(name),
            "" if alignment.auc is None else f"{alignment.auc:.2f}",
            "" if fall.median is None else f"{fall.median:.2f}",
            f"{fall.falling} of {fall.episodes}",
        )
    _print_whole(table)
    out.print(
        "AUC: chance that a success had the lower predicted cost than a failure of the same MPC "
        "iteration, 0.5 a coin's; empty without both. Costs fall to a share of the first step's.",
        highlight=False,
    )


def print_json(value: Any) -> None:
    """JSON on standard output, nothing else."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
