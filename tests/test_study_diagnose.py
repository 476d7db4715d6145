"""The diagnoses that a study adds to its rows."""

import json

import pytest

from quantwm.errors import PlanError, UsageError
from quantwm.report.load import read_task
from quantwm.study import plan_study, run_study
from quantwm.study.diagnose import diagnoses_of
from quantwm.study.estimate import SECONDS_PER_FRAME, diagnosis_seconds
from quantwm.study.prepare import prepare
from quantwm.study.status import study_status
from quantwm.study.store import ResultsFolder
from study_support import Fragile, PointTask, Recorder, content, point_spec, study

ARMS = ["oracle-state", "float", "w8", "w2", "w8a8", "w2/steps=3"]


def diagnosed(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "diagnostics").iterdir()}


def test_fidelity_of_each_arm_and_sensitivity_of_each_layer(tmp_path):
    asked = {"fidelity": True, "sensitivity": ["w2", "w8a8"], "episodes": 2}
    spec = point_spec(arms=ARMS, diagnostics=asked)
    run_study(**study(spec), out=tmp_path)
    found = diagnosed(tmp_path)
    fidelity = {one["arm"]: one for one in found.values() if one["kind"] == "fidelity"}
    assert set(fidelity) == {"w8", "w2", "w8a8"}
    drift = {name: one["drift"]["latent"]["against_float"][-1] for name, one in fidelity.items()}
    assert drift["w8"] < drift["w2"]
    layers = found["sensitivity-w2"]["layers"]
    assert [one["layer"] for one in layers] == ["encoder.0", "predictor.0"]
    assert found["sensitivity-w8a8"]["layers"][0]["error"] < layers[0]["error"]

    planned = {one.arm: one for one in plan_study(**study(spec), out=tmp_path)}
    assert all(one.done for one in planned.values())

    # Again: nothing is computed. With other settings: made anew. Rows stay as they are.
    before = content(tmp_path)
    recorder = Recorder()
    run_study(**study(spec), out=tmp_path, progress=recorder)
    assert recorder.calls == []
    more = point_spec(arms=ARMS, diagnostics=asked | {"episodes": 3})
    run_study(**study(more), out=tmp_path, progress=recorder)
    assert set(recorder.started) == {
        "fidelity of w8, w2, w8a8",
        "sensitivity to w2",
        "sensitivity to w8a8",
    }
    assert study_status(tmp_path).diagnoses == (5, 5)
    after = content(tmp_path)
    assert {k: v for k, v in after.items() if k.startswith("cells/")} == {
        k: v for k, v in before.items() if k.startswith("cells/")
    }
    assert diagnosed(tmp_path)["sensitivity-w2"] != found["sensitivity-w2"]


def test_what_is_left_of_them_is_told(tmp_path):
    """A dry run lists and estimates them after the arms; the status counts their files."""
    asked = {"fidelity": True, "sensitivity": ["w2"], "episodes": 2}
    spec = point_spec(arms=ARMS, diagnostics=asked)
    plans = plan_study(**study(spec), out=tmp_path)
    told = {one.arm: one for one in plans if not one.cell}
    assert list(told) == ["fidelity of w8, w2, w8a8", "sensitivity to w2"]
    assert [one.arm for one in plans][: len(ARMS)] == ARMS
    assert all(one.seconds > 0 and not one.done for one in told.values())
    run_study(**study(spec), out=tmp_path)
    (tmp_path / "diagnostics" / "sensitivity-w2.json").unlink()
    status = study_status(tmp_path)
    assert status.diagnoses == (3, 4)
    assert str(status).endswith("6 done; diagnoses: 3 of 4 files")
    left = {one.arm: one.done for one in plan_study(**study(spec), out=tmp_path)}
    assert left["fidelity of w8, w2, w8a8"]
    assert not left["sensitivity to w2"]


def test_a_report_shows_those_that_the_study_asks_for_now(tmp_path):
    def shown():
        found = read_task(tmp_path, task=PointTask()).diagnoses
        return [(one["kind"], one.get("arm") or one.get("scheme")) for one in found]

    def run(arms, **asked):
        spec = point_spec(arms=["float", *arms], diagnostics={"episodes": 2} | asked)
        run_study(**study(spec), out=tmp_path)

    folder = ResultsFolder(tmp_path)
    run(["old=w8", "w2"], fidelity=True, sensitivity=["w2"])
    assert sorted(shown()) == [("fidelity", "old"), ("fidelity", "w2"), ("sensitivity", "w2")]
    run(["new=w8"], fidelity=True)
    assert shown() == [("fidelity", "new")]
    (file,) = folder.read_config()["record"]["diagnoses"]
    path = folder.diagnosis_path(file)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id": "of another study"}))
    assert shown() == []
    # Older folders do not say what they ask for: all that lies there, by the names of now.
    config = folder.read_config()
    del config["record"]["diagnoses"]
    folder.write_config(config)
    assert sorted(shown()) == [("fidelity", "new"), ("fidelity", "w2"), ("sensitivity", "w2")]


def test_an_estimate_grows_with_episodes_models_and_layers():
    def seconds(episodes, arms):
        asked = {"fidelity": True, "sensitivity": ["w2"], "episodes": episodes}
        prepared = prepare(**study(point_spec(arms=["float", *arms], diagnostics=asked)))
        return [diagnosis_seconds(d, prepared, SECONDS_PER_FRAME) for d in diagnoses_of(prepared)]

    (two, layers), (four, more_layers) = seconds(2, ["w4"]), seconds(4, ["w4"])
    assert (four, more_layers) == pytest.approx((2 * two, 2 * layers))
    fidelity, same = seconds(2, ["w4", "w2", "w3"])
    assert fidelity > two
    assert same == layers


def test_a_layer_whose_costs_are_not_finite_fails_alone_and_once(tmp_path):
    asked = {"fidelity": True, "sensitivity": ["w2", "w8"], "episodes": 2}
    spec = point_spec(arms=["float", "w8"], diagnostics=asked)
    arguments = {"world_model": Fragile(), "task": PointTask()}
    run_study(spec, tmp_path, **arguments)
    found = diagnosed(tmp_path)
    failed = found.pop("sensitivity-w2")
    assert (failed["kind"], failed["arm"]) == ("failed", "sensitivity to w2")
    assert "encoder.1 at w2" in failed["error"]
    assert sorted(one["kind"] for one in found.values()) == ["fidelity", "sensitivity"]
    recorder = Recorder()
    run_study(spec, tmp_path, progress=recorder, **arguments)
    assert recorder.calls == []


@pytest.mark.parametrize("begin", [run_study, plan_study])
def test_schemes_that_no_layer_can_have_are_refused_before_any_cell(tmp_path, begin):
    spec = point_spec(diagnostics={"sensitivity": ["float", "w2", "w3g128"]})
    with pytest.raises(PlanError) as caught:
        begin(**study(spec), out=tmp_path / "out")
    assert "'float' quantizes nothing" in str(caught.value)
    assert "group size 128 is larger" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_settings():
    with pytest.raises(UsageError, match="did you mean 'fidelity'"):
        point_spec(diagnostics={"fidelty": True})
    with pytest.raises(UsageError, match="weight bits"):
        point_spec(diagnostics={"sensitivity": "w9"})
    with pytest.raises(UsageError, match="true or false"):
        point_spec(diagnostics={"fidelity": "yes please"})
