"""Whole studies of a tiny world model: tables, shared cells, the gate, dry runs, bad input."""

import csv
import time
from dataclasses import fields, replace

import pytest
import torch
import yaml
from torch import nn

from quantwm.errors import (
    GateError,
    MismatchError,
    MissingStatisticsError,
    PlanError,
    UsageError,
)
from quantwm.evaluation import evaluate
from quantwm.fingerprint import model_hash
from quantwm.methods import quantize
from quantwm.protocols import ActionSpec
from quantwm.statistics import paired_difference, wilson_interval
from quantwm.study import StudySpec, dry_run, plan_study, run_study
from quantwm.study.cells import Cell
from quantwm.study.estimate import SECONDS_PER_FRAME, estimated_seconds, measured_pace
from quantwm.study.prepare import prepare
from quantwm.study.rows import comparable, read_parquet
from study_support import (
    Fragile,
    PointModel,
    PointTask,
    Recorder,
    by_arm,
    content,
    point_spec,
    study,
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The study of `point_spec`, run once without interruption."""
    return run_study(**study(), out=tmp_path_factory.mktemp("reference"))


def test_tables_say_what_the_rows_say(reference):
    folder = reference.folder
    assert read_parquet(folder / "episodes.parquet") == reference.rows
    names = [arm.name for arm in point_spec().arms]
    assert [row["arm"] for row in reference.rows] == [name for name in names for _ in range(6)]
    with (folder / "summary.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    assert [line["arm"] for line in lines] == names
    successes = {
        name: [row["success"] for row in reference.rows if row["arm"] == name] for name in names
    }
    for line in lines:
        own = successes[line["arm"]]
        low, high = wilson_interval(sum(own), len(own))
        assert float(line["success"]) == sum(own) / 6
        assert (float(line["low"]), float(line["high"])) == (low, high)
        assert (line["bytes"] == "") == line["arm"].startswith("oracle")
        if line["arm"] == "float":
            assert line["difference"] == ""
            continue
        compared = paired_difference(own, successes["float"])
        assert float(line["difference"]) == compared.difference
        assert float(line["difference_low"]) == compared.low
        assert float(line["p_value"]) == compared.p_value


def test_random_plans_are_an_arm_that_float_is_read_against(tmp_path):
    spec = point_spec(arms=["float", "random", "other=random/sigma=2", "again=random"])
    done = run_study(**study(spec), out=tmp_path)
    rows = {name: by_arm(done)[name] for name in ("float", "random", "other", "again")}
    assert [row["goal"] for row in rows["random"]] == [row["goal"] for row in rows["float"]]
    states = {name: [row["states"] for row in found] for name, found in rows.items()}
    assert states["random"] == states["again"] != states["other"]
    lines = {line["arm"]: line for line in done.summary}
    assert lines["random"]["success"] < lines["float"]["success"] == 1
    assert lines["random"]["difference"] == lines["random"]["success"] - 1
    assert lines["random"]["bytes"] is None
    cells = prepare(**study(spec)).cells
    assert cells["random"].id == cells["again"].id
    assert estimated_seconds(cells["random"]) < estimated_seconds(cells["float"]) / 1000


def test_the_study_shows_what_it_is_about(reference):
    success = {row["arm"]: row["success"] for row in reference.summary}
    size = {row["arm"]: row["bytes"] for row in reference.summary}
    assert success["float"] == success["w8"] == 1
    assert success["w2"] < 1
    assert size["w2"] < size["w4"] < size["w8"] < size["float"]


def test_rows_are_those_of_evaluate(reference):
    """A study adds nothing of its own to what evaluating an arm alone gives."""
    spec = reference.spec
    outcome = evaluate(
        quantize(PointModel(), "w4"),
        PointTask(),
        episodes=6,
        seed=3,
        planner=prepare(**study()).planner,
        mpc_iterations=spec.mpc_iterations,
        device="cpu",
        dtype="float32",
    )
    cell = next(row["cell"] for row in reference.summary if row["arm"] == "w4")
    alone = [comparable(row | {"cell": cell}) for row in outcome.rows]
    assert alone == by_arm(reference)["w4"]


def test_two_arms_with_the_same_model_give_the_same_rows(tmp_path):
    arms = [
        "float",
        "again=float",
        {"name": "untouched", "plan": {"encoder.*": "float"}},
        "w3",
        {"name": "spelled", "plan": {"encoder.0": "w3", "predictor.*": "w3"}},
    ]
    recorder = Recorder()
    result = run_study(**study(point_spec(arms=arms)), out=tmp_path, progress=recorder)
    rows = by_arm(result)
    assert rows["float"] == rows["again"] == rows["untouched"]
    assert rows["w3"] == rows["spelled"] != rows["float"]
    assert recorder.started == ["float", "w3"]
    notes = {row["arm"]: row["note"] for row in result.summary}
    assert notes["again"] == "same model as float"
    assert notes["float"] == ""


def test_the_model_is_left_as_it_was(tmp_path):
    model = PointModel()
    before = model_hash(model)
    run_study(point_spec(arms=["float", "w8a8"]), tmp_path, world_model=model, task=PointTask())
    assert model_hash(model) == before
    assert isinstance(model.encoder[0], nn.Linear)


def test_differences_are_known_as_soon_as_an_arm_is(tmp_path):
    seen = []
    run_study(**study(), out=tmp_path, on_arm=seen.append)
    assert seen[0]["arm"] == "float"
    assert sorted(row["arm"] for row in seen) == sorted(arm.name for arm in point_spec().arms)
    assert all(row["difference"] is not None for row in seen[1:])


def test_progress_counts_stages(tmp_path):
    recorder = Recorder()
    run_study(**study(point_spec(arms=["w8a8", "float"])), out=tmp_path, progress=recorder)
    starts = [call for call in recorder.calls if call[0] == "start"]
    assert starts == [
        ("start", "float", 1, 2),
        ("start", "calibration", 0, 2),
        ("start", "w8a8", 2, 2),
    ]
    assert [call[0] for call in recorder.calls].count("finish") == 3
    done, total = [call[1:] for call in recorder.calls if call[0] == "update"][-1]
    assert done == total


class TestGate:
    slow = ("oracle-state", "oracle-latent", "float", "w8")

    def test_a_failing_float_arm_is_compared_with_nothing(self, tmp_path):
        # The model believes in actions a hundred times as strong as they are.
        arguments = {"world_model": PointModel(speed=100.0), "task": PointTask()}
        spec = point_spec(arms=list(self.slow))
        with pytest.raises(GateError) as caught:
            run_study(spec, tmp_path, **arguments)
        message = str(caught.value)
        assert "of 6 episodes" in message
        assert "gate of 0.50" in message
        assert "dynamics (the predictor)" in message
        # Float and oracles are kept, and nothing else was run.
        kept = {row["arm"] for row in read_parquet(tmp_path / "episodes.parquet")}
        assert kept == {"oracle-state", "oracle-latent", "float"}
        # The gate holds on a second try, and can be turned off.
        recorder = Recorder()
        with pytest.raises(GateError):
            run_study(spec, tmp_path, **arguments, progress=recorder)
        assert recorder.calls == []
        result = run_study(replace(spec, gate=0.0), tmp_path, **arguments)
        assert [row["arm"] for row in result.summary] == list(self.slow)

    def test_the_planner_is_blamed_when_the_oracle_fails_too(self, tmp_path):
        spec = point_spec(arms=list(self.slow), mpc_iterations=1, gate=1.0)
        with pytest.raises(GateError, match="the planner and its settings"):
            run_study(spec, tmp_path, world_model=PointModel(), task=PointTask(reach=0.01))

    def test_without_oracles_they_are_asked_for(self, tmp_path):
        spec = point_spec(arms=["float", "w8"])
        with pytest.raises(GateError, match="Add the arms oracle-state and oracle-latent"):
            run_study(spec, tmp_path, world_model=PointModel(speed=100.0), task=PointTask())

    def test_it_counts_only_where_something_is_compared(self, tmp_path):
        bad = {"world_model": PointModel(speed=100.0), "task": PointTask()}
        assert run_study(point_spec(arms=["float"]), tmp_path / "a", **bad).summary
        assert run_study(point_spec(arms=["w8"]), tmp_path / "b", **bad).summary


def test_an_arm_of_nans_fails_and_the_study_goes_on(tmp_path):
    spec = point_spec(arms=["float", "encoder:w2", "predictor:w4"])
    arguments = {"world_model": Fragile(), "task": PointTask()}
    result = run_study(spec, tmp_path, **arguments)
    rows = [row for row in result.rows if row["arm"] == "encoder:w2"]
    assert all(not row["success"] for row in rows)
    assert all(row["failure"].startswith("non_finite") for row in rows)
    summary = {row["arm"]: row for row in result.summary}
    assert "6 of 6 episodes non_finite" in summary["encoder:w2"]["note"]
    assert summary["predictor:w4"]["success"] > 0
    # Rows with NaN in them are read back from their cells as they were.
    assert run_study(spec, tmp_path, **arguments).rows == result.rows


def test_a_cells_id_covers_each_of_its_fields():
    cell = prepare(**study()).cells["w4"]
    changed = {
        "kind": "float",
        "model": "other",
        "task": {},
        "plan": {"encoder.0": "w4"},
        "method": "gptq",
        "options": {"damp": 0.1},
        "calibration": "x",
        "planner": {},
        "mpc_iterations": 9,
        "episodes": 9,
        "block": "held_out",
        "seed": 9,
        "dtype": "bfloat16",
        "device": "cuda",
        "threads": 9,
        "numerics": 99,
    }
    assert set(changed) == {field.name for field in fields(Cell)}
    ids = {replace(cell, **{key: value}).id for key, value in changed.items()} | {cell.id}
    assert len(ids) == len(changed) + 1
    assert replace(cell, plan=dict(reversed(cell.plan.items()))).id == cell.id


class TestDryRun:
    def test_it_lists_cells_and_writes_nothing(self, tmp_path):
        arms = ["float", "again=float", "w4", "w2"]
        plans = plan_study(**study(point_spec(arms=arms)), out=tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        assert [plan.arm for plan in plans] == ["float", "again", "w4", "w2"]
        assert [plan.done for plan in plans] == [False] * 4
        assert [plan.shares for plan in plans] == [None, "float", None, None]
        assert [plan.seconds > 0 for plan in plans] == [True, False, True, True]

    def test_its_cells_are_those_of_the_run(self, tmp_path, reference):
        plans = plan_study(**study(), out=tmp_path)
        ids = {row["arm"]: row["cell"] for row in reference.summary}
        assert {plan.arm: plan.cell for plan in plans} == ids

    def test_finished_cells_are_free_and_damaged_ones_are_not(self, tmp_path):
        spec = point_spec(arms=["float", "w4"])
        run_study(**study(spec), out=tmp_path)
        cell = plan_study(**study(spec), out=tmp_path)[1].cell
        path = tmp_path / "cells" / f"{cell}.json"
        path.write_text(path.read_text()[:100])
        before = content(tmp_path)
        plans = plan_study(**study(spec), out=tmp_path)
        assert [plan.done for plan in plans] == [True, False]
        assert plans[0].seconds == 0 < plans[1].seconds
        assert content(tmp_path) == before

    def test_estimates_go_by_this_machines_pace(self):
        class Slow(PointModel):
            def rollout(self, latent, actions, *, last_only=False):
                time.sleep(0.05)
                return super().rollout(latent, actions, last_only=last_only)

        prepared = prepare(**(study() | {"world_model": Slow()}))
        pace = measured_pace(prepared)
        assert pace["float"] >= 0.05 / (16 * 3)
        assert (
            estimated_seconds(prepared.cells["float"], pace) >= 6 * 3 * 16 * 2 * 3 * pace["float"]
        )

    def test_estimates_follow_the_work_and_what_was_measured(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dry_run, "measured_pace", lambda _: SECONDS_PER_FRAME)
        small, large = (
            plan_study(**study(point_spec(arms=["float"], episodes=n)), out=tmp_path / "none")
            for n in (6, 12)
        )
        assert large[0].seconds == pytest.approx(2 * small[0].seconds)
        run_study(**study(point_spec(arms=["float"])), out=tmp_path)
        measured = plan_study(**study(point_spec(arms=["float", "w4"])), out=tmp_path)[1]
        took = run_study(**study(point_spec(arms=["float"])), out=tmp_path).summary[0]["seconds"]
        assert measured.seconds == pytest.approx(took, rel=0.1, abs=0.001)

    def test_it_refuses_what_the_run_refuses(self, reference):
        with pytest.raises(MismatchError, match="seed"):
            plan_study(**study(point_spec(seed=5)), out=reference.folder)


def test_the_configuration_is_a_study_file(tmp_path, reference):
    config = reference.folder / "config.yaml"
    spec = StudySpec.from_yaml(config)
    assert spec == reference.spec
    ids = [plan.cell for plan in plan_study(**study(spec), out=tmp_path)]
    assert ids == [row["cell"] for row in reference.summary]
    record = yaml.safe_load(config.read_text())["record"]
    assert record["model_hash"] == model_hash(PointModel())
    assert record["environment"]["torch"] == torch.__version__


def test_nothing_is_computed_before_every_arm_is_checked(tmp_path):
    spec = point_spec(arms=["float", {"name": "a", "plan": {"x.*": "w4"}}, "w4g128"])
    recorder = Recorder()
    with pytest.raises(PlanError) as caught:
        run_study(**study(spec), out=tmp_path / "out", progress=recorder)
    assert "arm 'a'" in str(caught.value)
    assert "arm 'w4g128'" in str(caught.value)
    assert recorder.calls == []
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_studied(tmp_path):
    def refuse(error, said, model, task=None):
        with pytest.raises(error, match=said):
            run_study(point_spec(), tmp_path, world_model=model, task=task or PointTask())

    refuse(UsageError, "quantized already", quantize(PointModel(), "w4"))
    model = PointModel()
    model.action_spec = ActionSpec(2, 1)
    refuse(MissingStatisticsError, "no action statistics", model)
    model.action_spec = ActionSpec(3, 1, (0.0,) * 3, (1.0,) * 3)
    refuse(MismatchError, "actions of width 3", model)


def test_threads_are_set_for_the_study_alone(tmp_path):
    before = torch.get_num_threads()
    wanted = before + 1
    result = run_study(**study(point_spec(arms=["float"], threads=wanted)), out=tmp_path)
    assert torch.get_num_threads() == before
    assert f'"threads": {wanted}' in result.rows[0]["provenance"]
