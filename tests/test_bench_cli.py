"""`quantwm bench planner`: what it prints, and how it fails."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench_support import one_thread  # noqa: F401
from dino_wm_support import tiny_model
from quantwm import console
from quantwm.bench import machine, subjects
from quantwm.bench.machine import AttentionRow
from quantwm.bench.planner import PlannerReport, PlannerRow
from quantwm.bench.subjects import Subject
from quantwm.bench.variants import DEFAULT_VARIANTS, LITERAL, VARIANTS
from quantwm.cli import app, bench_output

ROW = PlannerRow(
    scale="compact",
    variant=LITERAL,
    dtype="float32",
    episodes=4,
    candidates=300,
    horizon=5,
    seconds=1234.56,
    ratio=12.345,
    twin=None,
    twin_ratio=1.0871,
    measured_candidates=16,
    linearity=None,
    chunk=8,
    linear_multiply_adds=10**12,
    attention_multiply_adds=3 * 10**10,
    flops_per_second=1e9,
    share=0.834,
    memory_mb=12345.4,
    cost_error=0.0321,
    rounds=(1234.56,),
)
ATTENTION = AttentionRow("compact", "bfloat16", 200, 16, 196, 588, 0.123, 0.1, 0.2)
MACHINE = {
    "gpu": None,
    "processor": "A processor",
    "device": "cpu",
    "threads": 2,
    "load_average_before": 0.1,
    "matrix_flops_per_second": {"float32": 1.5e11},
}


@pytest.fixture
def small_matrices(monkeypatch):
    monkeypatch.setitem(machine._SIDE, "cpu", 32)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "planner", *map(str, arguments)])


def printed(monkeypatch, width, *rows):
    to = Console(width=width, file=io.StringIO())
    for module in (console, bench_output):
        monkeypatch.setattr(module, "out", to)
    bench_output.print_planner_bench(PlannerReport(MACHINE, list(rows), [ATTENTION]))
    return to.file.getvalue().splitlines()


def rows_under(heading, lines, count):
    """The cells of a table's rows."""
    start = 1 + next(i for i, line in enumerate(lines) if line.startswith(heading))
    return [line.split() for line in lines[start : start + count]]


@pytest.mark.parametrize("width", [30, 80, 200])
def test_a_table_cuts_nothing_however_narrow_the_console(width, monkeypatch):
    rows = [replace(ROW, variant=name) for name in VARIANTS]
    lines = printed(monkeypatch, width, *rows)
    values = ["1.23e+03", "12.35x", "1.09x", "2.06", "83%", "12345", "3.2e-02"]
    assert rows_under("scale", lines, len(rows)) == [
        ["compact", name, *values] for name in VARIANTS
    ]
    kernels = rows_under("attention", lines, 1)
    assert [" ".join(row) for row in kernels] == [
        "compact bfloat16 200 x 16 x 196 x 588 123 100 200"
    ]
    assert "…" not in "".join(lines)


def test_eighty_columns_are_enough(monkeypatch):
    lines = printed(monkeypatch, 80, *(replace(ROW, variant=name) for name in VARIANTS))
    assert max(map(len, lines)) <= 80


def test_a_scaled_time_says_how_and_an_absent_comparison_is_blank(monkeypatch):
    scaled = replace(ROW, linearity=0.02, ratio=None, twin_ratio=None, cost_error=None)
    lines = printed(monkeypatch, 200, scaled)
    (row,) = rows_under("scale", lines, 1)
    assert row == ["compact", LITERAL, "1.23e+03", "2.06", "83%", "12345"]
    assert (
        f"compact {LITERAL}: 16 of 300 candidates measured, in chunks of 8, and scaled; "
        "twice as many took 2.04 times as long"
    ) in lines
    assert not any("scaled" in line for line in printed(monkeypatch, 200, ROW))


@pytest.mark.usefixtures("small_matrices")
def test_json_is_all_that_is_printed():
    result = run(
        *("--scale", "compact", "--variant", "float32", "--variant", LITERAL),
        *("--candidates", 1, "--rounds", 1, "--device", "cpu", "--json"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [(row["scale"], row["variant"]) for row in report["rows"]] == [
        ("compact", "float32"),
        ("compact", LITERAL),
    ]
    ours, literal = report["rows"]
    assert (ours["episodes"], ours["candidates"], ours["rounds"]) == (4, 1, [ours["seconds"]])
    assert ours["ratio"] == literal["seconds"] / ours["seconds"]
    assert ours["cost_error"] < 1e-5
    assert report["machine"]["device"] == "cpu"
    assert {row["keys"] for row in report["attention"]} == {49}


@pytest.mark.usefixtures("small_matrices")
def test_by_default_every_scale_and_all_variants_but_one_are_measured(monkeypatch):
    for scale in subjects.SCALES:
        tiny = Subject.of(scale, tiny_model(), candidates=3)
        monkeypatch.setitem(subjects.SCALES, scale, lambda tiny=tiny: tiny)
    result = run("--rounds", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = [(scale, variant) for scale in subjects.SCALES for variant in DEFAULT_VARIANTS]
    table = rows_under("scale", result.output.splitlines(), len(rows))
    assert [tuple(row[:2]) for row in table] == rows


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--variant", "bfloat61"], "did you mean 'bfloat16'"),
        (["--scale", "compct"], "did you mean 'compact'"),
        (["--rounds", 0], "rounds must be at least 1, got 0"),
        (["--candidates", 0], "candidates must be at least 1, got 0"),
        (["--device", "gpu0"], "unknown device 'gpu0'"),
    ],
)
def test_bad_usage_exits_two_and_says_what_would_be_right(arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert says in result.output.replace("\n", " ")
    assert result.stdout == ""


def test_help_has_an_example():
    result = run("--help")
    assert result.exit_code == 0
    assert "Example: quantwm bench planner" in result.output.replace("\n", " ")


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (3.0, True), (None, False)])
def test_a_busy_machine_is_told_of(monkeypatch, load, warned):
    monkeypatch.setitem(MACHINE, "load_average_before", load)
    assert any("was busy" in line for line in printed(monkeypatch, 200)) == warned
