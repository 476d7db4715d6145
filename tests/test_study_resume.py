"""Results folders: resuming after anything, and refusing what does not belong."""

import logging
import resource
from dataclasses import replace

import pytest

from quantwm import evaluation
from quantwm.calibration import Calibration
from quantwm.errors import (
    CellsFailedError,
    MismatchError,
    QuantWMError,
)
from quantwm.fingerprint import model_hash
from quantwm.study import StudyInterrupted, run_study, work
from quantwm.study.prepare import prepare
from quantwm.study.rows import read_parquet
from quantwm.study.status import study_status
from quantwm.study.store import ResultsFolder
from study_support import PointModel, PointTask, Recorder, by_arm, content, point_spec, study


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The study of `point_spec`, run once without interruption."""
    return run_study(**study(), out=tmp_path_factory.mktemp("reference"))


def test_a_finished_study_computes_nothing_again(reference):
    cells = {k: v for k, v in content(reference.folder).items() if k.startswith("cells/")}
    recorder = Recorder()
    again = run_study(**study(), out=reference.folder, progress=recorder)
    assert recorder.calls == []
    assert again.rows == reference.rows
    assert again.summary == reference.summary
    after = {k: v for k, v in content(reference.folder).items() if k.startswith("cells/")}
    assert after == cells


def test_an_interrupted_study_goes_on_to_the_same_rows(tmp_path, reference):
    with pytest.raises(StudyInterrupted) as caught:
        run_study(**study(), out=tmp_path, progress=Recorder(break_at=4))
    assert "3 of 6 cells are finished" in str(caught.value)
    assert "the same command goes on" in str(caught.value)
    assert len(list((tmp_path / "cells").iterdir())) == 3
    # What is finished is in the tables already.
    assert len(read_parquet(tmp_path / "episodes.parquet")) == 3 * 6
    recorder = Recorder()
    resumed = run_study(**study(), out=tmp_path, progress=recorder)
    assert recorder.started == ["w8", "w4", "w2"]
    assert by_arm(resumed) == by_arm(reference)


class TestPartsOfACell:
    """Episodes that a worker has finished when it dies in the middle of an arm."""

    @pytest.fixture(autouse=True)
    def parts_of_two_episodes(self, monkeypatch):
        monkeypatch.setattr(work, "PART", 2)

    def broken_off(self, out):
        """A study of which the worker dies in the third part of `w8`; the arm's folder of parts."""
        recorder = Recorder(break_at=4, after=lambda: len(list(out.glob("parts/*/*.json"))) == 2)
        with pytest.raises(StudyInterrupted):
            run_study(**study(), out=out, progress=recorder)
        (parts,) = (out / "parts").iterdir()
        return parts

    def planned_of_w8(self, monkeypatch, out):
        """(episodes planned anew of `w8`, the study) of the same command."""
        planned = []
        run_episodes = evaluation.run_episodes

        def recorded(task, episodes, *args, **kwargs):
            planned.append(len(episodes))
            return run_episodes(task, episodes, *args, **kwargs)

        monkeypatch.setattr(evaluation, "run_episodes", recorded)
        result = run_study(**study(), out=out)
        return sum(planned) - 2 * 6, result  # w4 and w2 are six episodes each

    def test_the_next_worker_goes_on_behind_them(self, tmp_path, reference, monkeypatch):
        parts = self.broken_off(tmp_path)
        assert [arm.arm for arm in study_status(tmp_path).arms if "4 episodes" in arm.note] == [
            "w8"
        ]
        assert sorted(path.name for path in parts.iterdir()) == ["0.json", "2.json"]
        planned, resumed = self.planned_of_w8(monkeypatch, tmp_path)
        assert planned == 2
        assert by_arm(resumed) == by_arm(reference)
        assert not (tmp_path / "parts").exists()

    def test_the_time_of_all_workers_counts(self, tmp_path):
        parts = self.broken_off(tmp_path)
        folder, id = ResultsFolder(tmp_path), parts.name
        for part in folder.load_parts(id):
            folder.save_part(replace(part, seconds=1000.0))
        run_study(**study(), out=tmp_path)
        assert 2000 < folder.load_cell(id).seconds < 2100

    def test_references_are_kept_as_well(self, tmp_path):
        recorder = Recorder(break_at=2, after=lambda: len(list(tmp_path.glob("parts/*/*"))) == 1)
        with pytest.raises(StudyInterrupted, match=r"1 of 6 cells .* and 2 episodes of others"):
            run_study(**study(), out=tmp_path, progress=recorder)
        notes = {arm.arm: arm.note for arm in study_status(tmp_path).arms if arm.note}
        assert notes == {"oracle-state": "2 episodes kept"}

    def test_parts_of_a_finished_cell_do_not_stay(self, tmp_path):
        """A worker that dies between the two leaves both."""
        whole = run_study(**study(), out=tmp_path)
        folder = ResultsFolder(tmp_path)
        folder.save_part(folder.load_cell(whole.summary[3]["cell"]))
        run_study(**study(), out=tmp_path)
        assert not (tmp_path / "parts").exists()

    def test_a_damaged_part_is_computed_again(self, tmp_path, reference, monkeypatch, caplog):
        parts = self.broken_off(tmp_path)
        damaged = parts / "0.json"
        damaged.write_text(damaged.read_text().replace('"episode": 1', '"episode": 5'))
        with caplog.at_level(logging.WARNING):
            planned, resumed = self.planned_of_w8(monkeypatch, tmp_path)
        assert "0.json does not match its checksum; its episodes run again" in caplog.text
        assert planned == 4
        assert by_arm(resumed) == by_arm(reference)

    def test_a_part_that_cannot_be_written_stops_nothing(
        self, tmp_path, reference, monkeypatch, caplog
    ):
        def full(*_):
            raise QuantWMError("cannot write: No space left on device")

        monkeypatch.setattr(ResultsFolder, "save_part", full)
        with caplog.at_level(logging.WARNING):
            assert by_arm(run_study(**study(), out=tmp_path)) == by_arm(reference)
        assert "a worker that dies loses these episodes" in caplog.text


def test_an_arm_that_fails_does_not_keep_the_others_from_running(tmp_path, reference):
    with pytest.raises(CellsFailedError) as caught:
        run_study(
            **study(), out=tmp_path, progress=Recorder(break_at=4, error=RuntimeError("no luck"))
        )
    assert "1 of 6 arms could not be computed" in str(caught.value)
    assert "w8: RuntimeError: no luck" in str(caught.value)
    assert "no luck" in next((tmp_path / "failed").iterdir()).read_text()
    assert len(read_parquet(tmp_path / "episodes.parquet")) == 5 * 6
    recorder = Recorder()
    again = run_study(**study(), out=tmp_path, progress=recorder)
    assert recorder.started == ["w8"]
    assert by_arm(again) == by_arm(reference)
    assert not list((tmp_path / "failed").iterdir())


def test_a_truncated_cell_is_set_aside_and_run_again(tmp_path, reference, caplog):
    first = run_study(**study(), out=tmp_path)
    cell = next(row["cell"] for row in first.summary if row["arm"] == "w4")
    path = tmp_path / "cells" / f"{cell}.json"
    path.write_bytes(path.read_bytes()[:500])
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        again = run_study(**study(), out=tmp_path, progress=recorder)
    assert recorder.started == ["w4"]
    assert f"{cell}.json.corrupt-1" in caplog.text
    assert (tmp_path / "cells" / f"{cell}.json.corrupt-1").exists()
    assert by_arm(again) == by_arm(reference)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"episodes": 5}, ["episodes: the folder has 6, this study 5"]),
        ({"seed": 2, "mpc_iterations": 2}, ["seed", "mpc_iterations"]),
        ({"planner": {"samples": 16, "elites": 4, "steps": 3, "horizon": 3}}, ["planner.steps"]),
        ({"calibration": {"episodes": 2, "samples": 9, "seed": 4}}, ["calibration.samples"]),
        ({"block": "tuning"}, ["block"]),
        ({"dtype": "bfloat16"}, ["dtype"]),
        ({"threads": 2}, ["threads"]),
    ],
)
def test_a_folder_of_another_configuration_is_refused(reference, changes, keys):
    before = content(reference.folder)
    with pytest.raises(MismatchError) as caught:
        run_study(**study(point_spec(**changes)), out=reference.folder)
    message = str(caught.value)
    for key in keys:
        assert key in message
    assert len(message.splitlines()) == len(keys) + 2
    assert "--out" in message
    assert content(reference.folder) == before


def test_another_model_or_task_is_another_configuration(reference):
    with pytest.raises(MismatchError, match="model_hash"):
        run_study(point_spec(), reference.folder, world_model=PointModel(9), task=PointTask())
    with pytest.raises(MismatchError, match=r"task\.reach: the folder has 0\.5, this study 1\.0"):
        run_study(point_spec(), reference.folder, world_model=PointModel(), task=PointTask(1.0))


def test_arms_may_come_and_go_without_moving_a_row(tmp_path, reference):
    few = run_study(**study(point_spec(arms=["w4", "float"])), out=tmp_path)
    assert by_arm(few) == {name: by_arm(reference)[name] for name in ("w4", "float")}
    # More arms, another order, another gate: the finished cells serve.
    recorder = Recorder()
    arms = ["w2", "w3", "float", "w4"]
    more = run_study(**study(point_spec(arms=arms, gate=0.9)), out=tmp_path, progress=recorder)
    assert recorder.started == ["w2", "w3"]
    assert list(by_arm(more)) == arms
    assert by_arm(more)["w2"] == by_arm(reference)["w2"]


class TestCalibration:
    arms = ("float", "w8a8", "w8")

    def test_it_is_made_once_and_only_if_needed(self, tmp_path):
        run_study(**study(point_spec(arms=["float", "w8", "w4a8-token"])), out=tmp_path)
        assert not (tmp_path / "calibration.safetensors").exists()
        run_study(**study(point_spec(arms=["float", "w8a8"])), out=tmp_path)
        before = content(tmp_path)["calibration.safetensors"]
        recorder = Recorder()
        spec = point_spec(arms=["float", "w8a8", "w4a4"])
        run_study(**study(spec), out=tmp_path, progress=recorder)
        assert recorder.started == ["w4a4"]
        assert content(tmp_path)["calibration.safetensors"] == before

    @pytest.mark.parametrize("damage", ["cut", "swapped", "gone"])
    def test_a_damaged_one_is_made_anew(self, tmp_path, caplog, damage):
        whole = run_study(**study(point_spec(arms=self.arms)), out=tmp_path / "whole")
        folder = tmp_path / "damaged"
        run_study(**study(point_spec(arms=["float", "w4a4"])), out=folder)
        path = folder / "calibration.safetensors"
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-9])
        elif damage == "swapped":
            other = point_spec(arms=["w8a8"], calibration={"episodes": 3, "samples": 8})
            run_study(**study(other), out=tmp_path / "other")
            path.write_bytes((tmp_path / "other" / "calibration.safetensors").read_bytes())
        else:
            path.unlink()
        with caplog.at_level(logging.WARNING):
            result = run_study(**study(point_spec(arms=self.arms)), out=folder)
        assert ("calibration.safetensors.corrupt-1" in caplog.text) == (damage != "gone")
        assert by_arm(result) == by_arm(whole)

    def test_it_is_made_as_the_study_says(self, tmp_path):
        result = run_study(**study(point_spec(arms=["w8a8"])), out=tmp_path)
        made = Calibration.load(tmp_path / "calibration.safetensors")
        assert made.model_hash == model_hash(PointModel())
        assert made.origin == {
            "task": PointTask().settings(),
            "seed": 4,
            "episodes": 2,
            "samples": 8,
            "planner": result.spec.planner,
            "mpc_iterations": 3,
            "dtype": "float32",
        }

    def test_only_calibrated_arms_depend_on_it(self):
        one = prepare(**study(point_spec(arms=self.arms))).cells
        settings = {"episodes": 2, "samples": 9, "seed": 4}
        two = prepare(**study(point_spec(arms=self.arms, calibration=settings))).cells
        assert one["w8"].id == two["w8"].id
        assert one["float"].id == two["float"].id
        assert one["w8a8"].id != two["w8a8"].id


def test_unwritable_folder_is_found_before_any_compute(tmp_path):
    (tmp_path / "file").write_text("mine")
    recorder = Recorder()
    with pytest.raises(QuantWMError, match="cannot write"):
        run_study(**study(), out=tmp_path / "file" / "out", progress=recorder)
    assert recorder.calls == []
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_loses_nothing(tmp_path, reference):
    """A limit on file sizes makes writes fail as a full disk does: in the middle of a file."""
    run_study(**study(point_spec(arms=["float"])), out=tmp_path)
    before = content(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(QuantWMError, match="cannot write"):
            run_study(**study(), out=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = content(tmp_path)
    kept = [name for name in before if name != "config.yaml"]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert set(after) == set(before)
    assert by_arm(run_study(**study(), out=tmp_path)) == by_arm(reference)
