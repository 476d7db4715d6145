"""The command line: what it prints, what it leaves, how it fails."""

import csv
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import quantwm as qwm
from quantwm.bench.methods import MethodRow
from quantwm.calibration import Calibration
from quantwm.cli import app
from quantwm.cli import study as study_module
from quantwm.cli.app import bench_app
from quantwm.study.rows import read_parquet
from quantwm.study.store import FinishedCell, ResultsFolder

SMALL = [
    "episodes=2",
    "mpc_iterations=1",
    "planner.samples=8",
    "planner.elites=3",
    "planner.steps=2",
    "gate=0",
]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_package_runs_as_a_module():
    shown = subprocess.run(
        [sys.executable, "-m", "quantwm", "--help"], capture_output=True, text=True, check=True
    )
    assert "study" in shown.stdout


def test_every_command_has_help_with_an_example():
    commands = [(one.name or one.callback.__name__,) for one in app.registered_commands]
    commands += [("bench", one.name) for one in bench_app.registered_commands]
    assert len(commands) > 10
    for words in commands:
        command = " ".join(words)
        result = run(*words, "--help")
        assert result.exit_code == 0
        assert f"Example: quantwm {command}" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["study", "wal"], "did you mean 'wall'"),
        (["study", "wall", "--preset", "quik"], "did you mean 'quick'"),
        (["study", "wall", "episode=3"], "did you mean 'episodes'"),
        (["study", "wall", "arms=float,w9"], "2 to 8"),
        (["study", "wall", "arms=flaot"], "did you mean 'float'"),
        (["study", "wall", "arms=float,w4g4096"], "4096"),
        (["study", "nowhere.yaml"], "cannot read the study"),
        (["study", "episodes=3"], "name a task"),
        (["study", "wall", "wall"], "named twice"),
        (["study", "wall", "arms=w4", "arms=w4g128", "seed=2"], "given twice"),
        (["study", "wall", "arms=float,w3/steps=[1"], "cannot be read as YAML"),
        (["study", "wall", "arms=[1"], "cannot be read as YAML"),
        # The first study would run for minutes before the second one's slip is met.
        (["study", "wall", "pusth"], "did you mean 'pusht'"),
        (["study", "wall", "--slurm", "--slurm-setting", "a=[1"], "cannot be read as YAML"),
        (["study", "wall", "--workers", "0"], "at least 1"),
        (["study", "wall", "--workers", "2", "--slurm"], "leave them out"),
        (["study", "wall", "--slurm-setting", "a=1"], "add --slurm"),
        (["study", "wall", "--job-minutes", "5"], "--job-minutes is for jobs of a cluster"),
        (["study", "mine.yaml", "--preset", "nosuch"], "--preset is for tasks"),
        (["study", "wall", "--slurm", "--slurm-setting", "a"], "KEY=VALUE"),
        (["status", "nowhere"], "holds no study"),
        (["collect", "wal", "--out", "x"], "did you mean 'wall'"),
        (["quantize", "wall", "--plan", "encodr.*=w4", "--out", "x"], "matches no layer"),
        (
            ["quantize", "wall", "--plan", "w4", "--method", "rtm", "--out", "x"],
            "did you mean 'rtn'",
        ),
        (
            ["quantize", "wall", "--plan", "w4", "--option", "a=[1", "--out", "x"],
            "cannot be read as YAML",
        ),
        (["study", "wall", "name=2024-13-45"], "cannot be read as YAML"),
        (["study", "wall", "diagnostics.sensitivity=5"], "must list schemes, got 5"),
        (["quantize", "wall", "--plan", "w3", "--plan", "w4", "--out", "x"], "twice: w3 and w4"),
        (
            ["quantize", "wall", "--plan", "w4", "--samples", "7", "--out", "x"],
            "--samples: this plan needs no calibration",
        ),
        (["info", "--sheet", "x.png"], "name a model's or data set's folder"),
        (["info", "nowhere"], "neither a bundled model"),
        (["info", "wall", "--sheet", "frames"], "must end in .png"),
        (["info", ".", "--task", "wall"], "--task is about a model, and . is none"),
        (
            ["train", "wall", "--data", "x", "--out", "y", "--decoder-steps", "5"],
            "name its kind, --decoder vqvae",
        ),
        (["collect", "wall", "--out", "x", "--setting", "door_y"], "such as shape=L"),
        (["collect", "wall", "--out", "x", "--setting", "name=pusht"], "argument 'name'"),
    ],
)
def test_bad_usage_exits_two_and_says_what_would_be_right(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert says in result.output.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_study_leaves_its_files_and_resumes(tmp_path):
    out = tmp_path / "study"
    arguments = ["study", "wall", "arms=oracle-state,float,w2", *SMALL, "--out", out]
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert f"results in {out}" in first.output.replace("\n", "")
    for arm in ("oracle-state", "float", "w2"):
        assert any(line.startswith(arm) for line in first.output.splitlines())
    for name in ("config.yaml", "episodes.parquet", "summary.csv", "report.html"):
        assert (out / name).stat().st_size > 0
    cells = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert len(cells) == 3
    again = run(*arguments, "--json")
    assert again.exit_code == 0, again.output
    assert [arm["arm"] for arm in json.loads(again.stdout)["arms"]] == [
        "oracle-state",
        "float",
        "w2",
    ]
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == cells
    other = run(*arguments, "seed=2")
    assert other.exit_code == 1
    assert "another configuration" in other.output.replace("\n", " ")
    shown = run("info", out, "--json")
    assert set(json.loads(shown.stdout)["cells"].values()) == {"finished"}


def reported_arms(folder):
    """What a report's table of arms lists."""
    with (folder / "report-tables/wall-arms.csv").open() as table:
        return sorted(line["arm"] for line in csv.DictReader(table))


def test_a_worker_joins_a_study_and_status_tells(tmp_path):
    out = tmp_path / "study"
    arguments = ["study", "wall", "arms=oracle-state,float", *SMALL, "--out", out]
    assert run(*arguments).exit_code == 0
    cells = sorted((out / "cells").iterdir())
    removed = cells[0].read_text()
    cells[0].unlink()
    half = json.loads(removed)
    half["rows"] = half["rows"][:1]
    ResultsFolder(out).save_part(
        FinishedCell(half["id"], half["cell"], half["rows"], None, half["seconds"])
    )
    before = run("status", out)
    assert "2 arms, 1 done, 1 waiting" in before.output.replace("\n", " ")
    assert "1 episodes kept" in before.output
    reported = run("report", out)
    assert reported.exit_code == 0, reported.output
    assert (out / "report.html").is_file()
    (kept,) = reported_arms(out)
    joined = run("work", out)
    assert joined.exit_code == 0, joined.output
    # A worker writes cells alone; the report puts the tables together, wherever it is asked to.
    apart = run("report", out, "--out", tmp_path / "elsewhere")
    assert apart.exit_code == 0, apart.output
    assert kept in reported_arms(tmp_path / "elsewhere")
    assert reported_arms(tmp_path / "elsewhere") == ["float", "oracle-state"]
    assert (
        json.loads(cells[0].read_text())["rows"][0]["states"]
        == (json.loads(removed)["rows"][0]["states"])
    )
    told = json.loads(run("status", out, "--json").stdout)
    assert [arm["state"] for arm in told[0]["arms"]] == ["done", "done"]
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("quantwm: ", "quantwm: 0.0.0-", 1))
    refused = run("work", out)
    assert refused.exit_code == 1
    assert "another quantwm" in refused.output.replace("\n", " ")
    for cell in (out / "cells").iterdir():
        cell.unlink()
    for folder, says in ((out, "no arm is finished"), (tmp_path, "holds no study")):
        empty = run("report", folder)
        assert empty.exit_code == 2
        assert says in empty.output.replace("\n", " ")


def test_several_tasks_get_a_folder_each(tmp_path):
    planned = study_module._studies(["wall", "pusht", "episodes=3"], "quick", None)
    assert [str(folder) for _, folder in planned] == ["results/quick/wall", "results/quick/pusht"]
    assert {spec.episodes for spec, _ in planned} == {3}
    own = study_module._studies(["pusht", "wall"], "findings", tmp_path)
    assert [folder for _, folder in own] == [tmp_path / "pusht", tmp_path / "wall"]
    one = study_module._studies(["wall"], "findings", None)
    assert str(one[0][1]) == "results/wall-findings"


def test_a_dry_run_lists_cells_and_writes_nothing(tmp_path):
    out = tmp_path / "study"
    result = run("study", "wall", *SMALL, "--dry-run", "--json", "--out", out)
    assert result.exit_code == 0, result.output
    plans = json.loads(result.stdout)
    assert {plan["arm"] for plan in plans} >= {
        "oracle-state",
        "float",
        "w8a8",
        "w4",
        "w4g128",
        "w4a4-token",
        "w3",
        "w2",
    }
    assert not any(plan["done"] for plan in plans)
    assert not out.exists()


def test_quantize_writes_a_folder_that_every_command_can_load(tmp_path):
    result = run(
        "quantize",
        "wall",
        "--plan",
        "encoder.*=w8",
        "--plan",
        "predictor.*=w4g128",
        "--out",
        tmp_path / "small",
        "--json",
    )
    assert result.exit_code == 0, result.output
    sizes = json.loads(result.stdout)
    assert sizes["bytes"] < 0.6 * sizes["float_bytes"]
    facts = json.loads(run("info", tmp_path / "small", "--json").stdout)
    assert facts["bytes"] == sizes["bytes"]
    assert facts["quantized layers"] == 60


def test_quantize_calibrates_where_a_plan_needs_it(tmp_path):
    small = ("quantize", "wall", "--plan", "predictor.*=w8a8", "--out", tmp_path / "small")
    sizes = ("--episodes", 1, "--samples", 8)
    file = tmp_path / "calibration.safetensors"
    made = run(*small, *sizes, "--calibration", file)
    assert made.exit_code == 0, made.output
    assert len(Calibration.load(file)) == 8
    refused = run(*small, *sizes, "--calibration", file)
    assert refused.exit_code == 2
    assert "leave them out" in refused.output.replace("\n", " ")
    assert run(*small, "--calibration", file).exit_code == 0


def test_quantize_looks_at_its_target_before_it_computes(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("")
    monkeypatch.setattr("quantwm.loading.load", lambda *_, **__: pytest.fail("computed"))
    result = run("quantize", "wall", "--plan", "w4", "--out", tmp_path)
    assert result.exit_code == 2
    assert "mine.txt" in result.output


def test_a_tasks_settings_are_collected_and_trained_with(tmp_path, monkeypatch):
    data = tmp_path / "data"
    command = ["collect", "wall", "--out", data, "--train", 2, "--validation", 1]
    assert run(*command, "--setting", "door_y=20").exit_code == 0
    facts = json.loads(run("info", data, "--json").stdout)
    assert facts["task"]["door_y"] == 20
    seen = []
    monkeypatch.setattr(
        "quantwm.training.pipeline.train_task", lambda task, *_, **__: seen.append(task.settings())
    )
    result = run("train", "wall", "--data", data, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert seen == [facts["task"]]


def test_collect_and_info_show_the_data(tmp_path):
    data = tmp_path / "data"
    assert run("collect", "wall", "--out", data, "--train", 20, "--validation", 5).exit_code == 0
    result = run("info", data, "--json", "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["train"]["trajectories"] == 20
    assert facts["validation"]["trajectories"] == 5
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_train_without_data_says_so(tmp_path):
    result = run("train", "wall", "--data", tmp_path / "none", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "no data set" in result.output.replace("\n", " ")


def test_info_without_arguments_tells_what_there_is():
    facts = json.loads(run("info", "--json").stdout)
    assert "wall" in facts["world models"]
    assert "rtn" in facts["methods"]
    assert "quick" in facts["presets"]


def test_an_interrupted_quantization_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("quantwm.methods.rtn.RTN.codes", interrupted)
    result = run("quantize", "wall", "--plan", "w4", "--out", tmp_path / "small")
    assert result.exit_code not in (0, 2)
    assert "Nothing was written" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_methods_options_are_read_and_checked(tmp_path):
    bad = run(
        "quantize", "wall", "--plan", "w4", "--method", "omse", "--option", "ratio=3",
        "--out", tmp_path / "small",
    )  # fmt: skip
    assert bad.exit_code == 2
    assert "did you mean 'ratios'" in bad.output.replace("\n", " ")
    arguments = ("--method", "omse", "--option", "omse.ratios=3", "--json")
    good = run("quantize", "wall", "--plan", "predictor.*=w4", *arguments, "--out", tmp_path / "o")
    assert good.exit_code == 0, good.output
    described = run("info", tmp_path / "o", "--json")
    assert json.loads(described.output)["method"] == "omse"


def test_a_saved_model_is_an_arm_and_plans_as_when_it_was_made(tmp_path):
    small, out = tmp_path / "small", tmp_path / "study"
    assert run("quantize", "wall", "--plan", "w3", "--out", small).exit_code == 0
    arms = f"arms=float,w3,mine=folder:{small}"
    result = run("study", "wall", arms, *SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    rows = read_parquet(out / "episodes.parquet")
    made, saved = ([row for row in rows if row["arm"] == arm] for arm in ("w3", "mine"))
    assert len(saved) == 2
    for one, other in zip(made, saved, strict=True):
        assert one["cost_by_iteration"] == other["cost_by_iteration"]
        assert one["states"] == other["states"]
        assert one["cell"] != other["cell"]
    other = tmp_path / "float"
    qwm.save(qwm.load("wall"), other)
    refused = run("study", "wall", f"arms=float,mine=folder:{other}", *SMALL, "--out", out)
    assert refused.exit_code == 2
    assert "holds a float model" in refused.output.replace("\n", " ")


def test_an_interrupted_benchmark_of_methods_keeps_the_rows_it_has(monkeypatch):
    def rows(*arguments, **settings):
        yield MethodRow("rtn", "w4", None, 1.5, 600.0, 0.25, 0.125, 0.1, 0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr("quantwm.bench.methods.bench_methods", rows)
    shown = run("bench", "methods", "wall")
    assert shown.exit_code not in (0, 2)
    assert "0.2500" in shown.output
    printed = run("bench", "methods", "wall", "--json").stdout
    assert [row["encoder"] for row in json.loads(printed)["rows"]] == [0.25]


def test_info_counts_the_products_that_a_rotation_added(tmp_path):
    turned = tmp_path / "turned"
    arguments = ("--plan", "predictor.*=w8", "--method", "rotation", "--out", turned)
    assert run("quantize", "wall", *arguments).exit_code == 0
    added = json.loads(run("info", turned, "--json").output)["added multiply-adds a token"]
    assert added["predictor.entry"] == 404**2
    assert added["predictor.blocks.0.mlp.hidden"] == 512 * (16 + 32)
