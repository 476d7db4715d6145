"""`quantwm diagnose`: what is compared with what, on a model small enough for a test."""

import json

import pytest
from typer.testing import CliRunner

from dino_wm_support import tiny_model
from quantwm import calibration
from quantwm.cli import app
from quantwm.diagnostics import candidates
from quantwm.diagnostics.interventions import Interventions
from quantwm.diagnostics.verdict import InterventionVerdict
from quantwm.loading import save
from quantwm.methods import quantize
from quantwm.planning.cem import CEM
from quantwm.study.evidence import Evidence

ONE = ("--episodes", "1", "--dtype", "float32")


@pytest.fixture(autouse=True)
def small_planner(monkeypatch):
    planner = CEM(samples=8, elites=2, steps=2, horizon=2)
    for module in (candidates, calibration):
        monkeypatch.setattr(module, "default_planner", lambda _task: planner, raising=False)


@pytest.fixture
def folders(tmp_path):
    """A float model, the same in 3 bits, and another float model."""
    model = tiny_model()
    save(model, tmp_path / "float")
    save(quantize(model, "w3"), tmp_path / "w3")
    save(tiny_model(seed=1), tmp_path / "other")
    return {path.name: str(path) for path in tmp_path.iterdir()}


def run(*arguments):
    result = CliRunner().invoke(app, ["diagnose", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def facts(*arguments):
    return json.loads(run(*arguments, "--json"))


def refused(*arguments):
    result = CliRunner().invoke(app, ["diagnose", *arguments])
    assert result.exit_code in (1, 2), result.output
    return " ".join(result.output.split())


def test_a_plan_and_a_saved_model_of_it_are_the_same_comparison(folders):
    planned = facts(folders["float"], "--plan", "w3", *ONE)
    saved = facts(folders["w3"], "--against", folders["float"], *ONE)
    assert planned["kind"] == saved["kind"] == "fidelity"
    assert (planned.pop("arm"), saved.pop("arm")) == ("w3", folders["w3"])
    assert planned == saved
    assert planned["drift"]["visual"]["against_float"][0] > 0


def test_a_plan_may_differ_by_part_and_name_a_method(folders):
    found = facts(folders["float"], "--plan", "*=w8", "--plan", "predictor.*=w2", *ONE)
    assert found["arm"] == "*=w8, predictor.*=w2"
    arguments = ("--plan", "w3", "--method", "omse", "--option", "ratios=11")
    assert facts(folders["float"], *arguments, *ONE)["arm"] == "w3@omse"


def test_a_model_is_compared_with_the_bundled_one_that_it_was_made_from(folders, monkeypatch):
    monkeypatch.setattr("quantwm.models.bundled.bundled_names", lambda: [folders["float"]])
    found = facts(folders["w3"], *ONE)
    assert found["kind"] == "fidelity"
    assert found == facts(folders["w3"], "--against", folders["float"], *ONE)


def test_the_simulator_is_what_a_float_model_is_compared_with(folders):
    for arguments in ((folders["float"],), (folders["w3"], "--against", "truth")):
        found = facts(*arguments, *ONE)
        assert len(found["error"]["visual"]) == len(found["still"]["proprio"]) == 2
        assert 0 <= found["elite_overlap"] <= 1
    assert "rank correlation" in run(folders["float"], *ONE)


def test_calibration_is_gathered_where_it_is_needed_and_kept_where_asked(folders, tmp_path):
    file = tmp_path / "calibration.safetensors"
    arguments = (folders["float"], "--plan", "w8a8", "--calibration", str(file), *ONE)
    first = facts(*arguments)
    written = file.read_bytes()
    assert facts(*arguments) == first
    assert file.read_bytes() == written


def test_the_tables_name_what_they_show(folders):
    shown = run(folders["float"], "--plan", "w3", *ONE)
    for text in ("w3: relative errors", "observed", "at random", "near float's plan", "regret"):
        assert text in shown
    shown = run(folders["float"], "--sensitivity", "w2", *ONE)
    layers = facts(folders["float"], "--sensitivity", "w2", *ONE)["layers"]
    worst = max(layers, key=lambda layer: layer["error"])
    lines = [line for line in shown.splitlines() if ".blocks." in line]
    assert len(lines) == len(layers) == 16
    assert lines[0].split()[0] == worst["layer"]
    assert "encoder: 8 layers" in shown
    assert "predictor: 8 layers" in shown


def test_interventions_plan_judge_and_report(folders, tmp_path):
    """The tiny model knows nothing, so that its float arm is what is judged."""
    where = ("--episodes", "2", "--dtype", "float32", "--out", str(tmp_path / "out"))
    arguments = (folders["float"], "--interventions", "w3", *where)
    shown = run(*arguments)
    assert "float: " in shown
    assert "against a gate of 0.70" in shown
    assert "does a lower predicted cost mean success?" in shown
    found = facts(*arguments)
    assert found["kind"] == "interventions"
    assert found["verdict"]["arm"] == "float"
    assert set(found["alignment"]) == {"float"}
    assert (tmp_path / "out" / "report.html").is_file()


def test_interventions_are_of_what_was_asked_for(folders, monkeypatch):
    """Scheme, method, options, episodes and folder arrive; differences have signs, rates none."""
    asked = []
    rate = Evidence("float", 0.9, 0.79, 0.96, None, 50, "supported", "against a gate of 0.70")
    loss = Evidence("w4@gptq minus float", -0.2, -0.3, 0.0, 0.1, 50, "undecided")
    verdict = InterventionVerdict("w4@gptq", "undecided", "it is open", (rate, loss), (), 81)

    def diagnose(spec, folder, **_):
        asked.append((spec, folder))
        return Interventions(verdict, {}, None)

    monkeypatch.setattr("quantwm.diagnostics.interventions.diagnose_interventions", diagnose)
    monkeypatch.setattr("quantwm.report.write_report", lambda folder, **_: folder)
    options = ("--method", "gptq", "--option", "damping=0.02", "--episodes", "12", "--seed", "3")
    shown = run(folders["float"], "--interventions", "w4", *options)
    spec, folder = asked[0]
    plans = [arm.plan for arm in spec.arms if arm.plan is not None]
    assert {(plan.method, dict(plan.options)["damping"]) for plan in plans} == {("gptq", 0.02)}
    assert (spec.episodes, spec.seed, spec.block) == (12, 3, "tuning")
    assert str(folder) == "results/wall-interventions-w4@gptq-12"
    assert "0.90 [0.79, 0.96]" in shown
    assert "-0.20 [-0.30, +0.00]" in shown
    assert "--episodes 81 would decide it" in shown


def test_mistakes_say_what_would_be_right(folders, tmp_path):
    model, small, other = folders["float"], folders["w3"], folders["other"]
    assert "give one of them" in refused(model, "--plan", "w3", "--sensitivity", "w3")
    assert "leave --against out" in refused(model, "--plan", "w3", "--against", model)
    assert "give --plan SCHEME" in refused(model, "--method", "gptq")
    assert "give --plan SCHEME" in refused(model, "--against", model)
    assert "--against FOLDER" in refused(small)
    assert "was made from model" in refused(small, "--against", other)
    assert "quantized already" in refused(small, "--plan", "w3")
    assert "did you mean 'encoder.*'?" in refused(model, "--plan", "encodr.*=w3")
    assert "did you mean 'gptq'?" in refused(model, "--plan", "w3", "--method", "gptx")
    smooth = ("--method", "smoothquant", "--calibration", str(tmp_path / "data"))
    refusal = refused(model, "--sensitivity", "w3", *smooth)
    assert not (tmp_path / "data").exists()
    for layer in ("encoder.blocks.0.attn.proj", "predictor.blocks.0.mlp.fc2"):
        assert f"{layer} alone: smoothquant: it scales" in refusal
    assert "qkv alone" not in refusal
    assert "did you mean 'wall'?" in refused(model, "--plan", "w3", "--task", "wal")
    for option, value in (("--plan", "w3"), ("--sensitivity", "w3"), ("--against", model)):
        refusal = refused(model, "--interventions", "w3", option, value)
        assert option in refusal
        assert "--interventions" in refusal
    assert "leave it out" in refused(model, "--out", "somewhere")
    assert "leave it out" in refused(model, "--interventions", "w3", "--calibration", "file")
    assert "quantized already" in refused(small, "--interventions", "w3")
    assert "NAME=VALUE" in refused(model, "--plan", "w3", "--option", "alpha")
    assert "unknown dtype" in refused(model, "--sensitivity", "w3", "--dtype", "int8")
