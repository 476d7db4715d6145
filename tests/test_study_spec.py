"""Study files: parsing, overrides, round trips, and errors that name what is wrong."""

import pytest
import yaml

from quantwm.errors import MismatchError, PlanError, UsageError
from quantwm.study.arms import Arm, parse_arms, resolve_arms
from quantwm.study.prepare import build_planner, build_task
from quantwm.study.spec import StudySpec, load_preset, presets
from study_support import PointModel, point_spec


def test_arm_short_forms():
    assert Arm.parse("float") == Arm("float", "float")
    assert Arm.parse("ceiling=oracle-state") == Arm("ceiling", "oracle-state")
    side = Arm.parse("small=encoder:w3")
    assert (side.name, side.kind) == ("small", "quantized")
    assert side.plan is not None
    assert side.plan.to_dict()["layers"] == {"encoder.*": "w3"}
    everywhere = Arm.parse("w4a4-token").plan
    assert everywhere is not None
    assert everywhere.to_dict()["layers"] == {"*": "w4a4-token"}
    by = Arm.parse("tuned=predictor:w3@smoothquant+gptq")
    assert by.name == "tuned"
    assert by.plan is not None
    assert by.plan.to_dict()["layers"] == {"predictor.*": "w3"}
    assert by.plan.method == "smoothquant+gptq"
    assert Arm.parse("w3@gptq").name == "w3@gptq"


def test_a_saved_model_as_an_arm():
    arm = Arm.parse("mine=folder:results/small")
    assert (arm.name, arm.kind, arm.plan, arm.folder) == (
        "mine",
        "quantized",
        None,
        "results/small",
    )
    assert Arm.from_value(arm.to_dict()) == arm
    with pytest.raises(UsageError, match="leave out plan"):
        Arm.from_value({"name": "mine", "folder": "small", "plan": "w4"})


def test_arms_resolve_to_the_layers_of_their_side():
    arms = parse_arms("float,w8,encoder:w3,predictor:w2")
    resolved = resolve_arms(arms, PointModel())
    names = {
        name: {layer: str(s) for layer, s in found.items()} for name, found in resolved.items()
    }
    assert names == {
        "float": {},
        "w8": {"encoder.0": "w8", "predictor.0": "w8"},
        "encoder:w3": {"encoder.0": "w3"},
        "predictor:w2": {"predictor.0": "w2"},
    }


def test_arm_mapping_form():
    arm = Arm.from_value(
        {"name": "mixed", "plan": {"encoder.*": "w8", "predictor.*": "w4g2"}, "method": "rtn"}
    )
    assert arm.plan is not None
    assert arm.plan.to_dict()["layers"] == {"encoder.*": "w8", "predictor.*": "w4g2"}
    assert Arm.from_value(arm.to_dict()) == arm
    assert Arm.from_value({"name": "all", "plan": "w4"}).plan == Arm.parse("w4").plan
    assert Arm.from_value(Arm.parse("x=oracle-latent").to_dict()) == Arm("x", "oracle-latent")


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (["flaot"], "did you mean 'float'"),
        (["oracle-stat"], "did you mean 'oracle-state'"),
        (["encodr:w4"], "did you mean 'encoder'"),
        (["w9"], "9"),
        (["w4@gptp"], "did you mean 'gptq'"),
        (["w4@awq+smoothquant"], "take one of them"),
        (["w4a4-tokn"], "did you mean 'token'"),
        (["=w4"], "empty name"),
        (["w4", "w2", "w4"], "2 arms are called 'w4'"),
        ([], "needs a list of arms"),
        ([3], "a string or a mapping"),
        ([{"plan": "w4"}], "needs a name"),
        ([{"name": "a"}], "needs a plan"),
        ([{"name": "a", "pln": "w4"}], "did you mean 'plan'"),
        ([{"name": "a", "kind": "floot"}], "did you mean 'float'"),
        ([{"name": "a", "kind": "float", "plan": "w4"}], "takes no plan"),
        ([{"name": "a", "plan": "w4", "include": ["patch_embeding"]}], "patch_embedding"),
    ],
)
def test_bad_arms(arms, said):
    with pytest.raises(UsageError, match=said):
        parse_arms(arms)


def test_all_bad_arms_are_reported_together():
    with pytest.raises(UsageError) as caught:
        parse_arms(["flaot", "w4", "w12", "w4"])
    message = str(caught.value)
    assert "3 problems" in message
    assert all(part in message for part in ("flaot", "12", "'w4'"))


def test_all_arms_that_do_not_fit_the_model_are_reported_together():
    arms = parse_arms(
        [
            {"name": "nowhere", "plan": {"decoder.*": "w4"}},
            {"name": "coarse", "plan": "w4g128"},
            {"name": "odd", "plan": "w4", "method": "rtm"},
            "w4",
        ]
    )
    with pytest.raises(PlanError) as caught:
        resolve_arms(arms, PointModel())
    message = str(caught.value)
    for part in ("'nowhere'", "decoder", "'coarse'", "128", "'odd'", "did you mean 'rtn'"):
        assert part in message
    assert "arm 'w4'" not in message


def test_yaml_round_trip(tmp_path):
    spec = point_spec(
        arms=["oracle-state", "f=float", "w8a8", {"name": "m", "plan": {"encoder.*": "w4"}}]
    )
    path = tmp_path / "study.yaml"
    path.write_text(spec.to_yaml())
    assert StudySpec.from_yaml(path) == spec
    assert StudySpec.from_yaml(path).to_yaml() == spec.to_yaml()


def test_full_form_leaves_nothing_to_defaults():
    written = yaml.safe_load(StudySpec.from_dict(MINIMAL).to_yaml())
    assert written["version"] == 1
    assert written["task"] == {"name": "wall"}
    assert written["calibration"] == {"episodes": 8, "samples": 128, "seed": 0}
    assert written["gate"] == 0.7
    assert written["arms"][1]["plan"] == {"*": "w4"}


MINIMAL = {"task": "wall", "model": "wall", "arms": ["float", "w4"]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"episods": 3}, "unknown study setting 'episods'; did you mean 'episodes'"),
        ({"calibration": {"sample": 3}}, "did you mean 'samples'"),
        ({"episodes": 0}, "episodes must be an integer, 1 to 4096, got 0"),
        ({"episodes": True}, "episodes must be an integer"),
        ({"episodes": 16.0}, "episodes must be an integer"),
        ({"mpc_iterations": 0}, "mpc_iterations"),
        ({"seed": -1}, "seed must be"),
        ({"block": "evaluaton"}, "did you mean 'evaluation'"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"device": "cpuu"}, "did you mean 'cpu'"),
        ({"threads": 0}, "threads"),
        ({"gate": 1.5}, "gate"),
        ({"version": 2}, "version 2"),
        ({"task": {"door_y": 3}}, "task needs a name"),
        ({"planner": "cem"}, "planner must map"),
        ({"planner": {"sampels": 4}}, "did you mean 'samples'"),
        ({"planner": {"name": "mppi", "elites": 4}}, "unknown mppi setting 'elites'"),
        ({"task": {"name": "wall", "dor_y": 3}}, "did you mean 'door_y'"),
        ({"calibration": {"samples": 0}}, "calibration.samples"),
    ],
)
def test_bad_settings(changes, said):
    with pytest.raises(UsageError, match=said):
        StudySpec.from_dict(MINIMAL | changes)


@pytest.mark.parametrize("missing", ["task", "model", "arms"])
def test_required_settings(missing):
    values = {key: value for key, value in MINIMAL.items() if key != missing}
    with pytest.raises(UsageError, match=f"lacks '{missing}'"):
        StudySpec.from_dict(values)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00", ""])
def test_files_that_are_no_study(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"study\.yaml"):
        StudySpec.from_yaml(path)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("task: wall\nepisodes: 2\nmodel: wall\nepisodes: 3\n", 4, "'episodes' is given twice"),
        ("task: wall\nplanner:\n  steps: 2\n  steps: 3\n", 4, "'steps' is given twice"),
        ("arms:\n- {name: a, plan: w4, plan: w3}\n", 2, "'plan' is given twice"),
        ("task: wall\nmodel: wall\narms: float\nplanner:\n  sampels: 4\n", 5, "'samples'"),
        ("task: {name: wall,\n  dor_y: 3}\nmodel: wall\narms: float\n", 2, "'door_y'"),
    ],
)
def test_a_slip_in_a_file_is_told_with_its_line(tmp_path, text, line, said):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"study\.yaml, line {line}: .*{said}"):
        StudySpec.from_yaml(path)


def test_settings_of_ones_own_task_and_planner_are_kept(tmp_path):
    own = {"task": {"name": "mine", "size": 3}, "planner": {"name": "mine", "depth": 2}}
    assert StudySpec.from_dict(MINIMAL | own).task["size"] == 3
    # What ran with another planner under a name of quantwm's is read back all the same.
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"planner": {"depth": 2}, "record": {}}))
    assert StudySpec.from_yaml(path).planner == {"depth": 2}


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="cannot read the study"):
        StudySpec.from_yaml(tmp_path / "none.yaml")


def test_overrides():
    spec = StudySpec.from_dict(MINIMAL).with_overrides(
        ["episodes=32", "planner.samples=64", "task.door_y=[20, 40]", "calibration.seed=3"]
    )
    assert spec.episodes == 32
    assert spec.planner == {"samples": 64}
    assert spec.task == {"name": "wall", "door_y": [20, 40]}
    assert spec.calibration.seed == 3
    assert spec.arms == parse_arms(["float", "w4"])


def test_arms_overridden_from_a_shell():
    spec = StudySpec.from_dict(MINIMAL).with_overrides(["arms=float,again=float,w2"])
    assert [arm.name for arm in spec.arms] == ["float", "again", "w2"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("episodes", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("episode=3", "did you mean 'episodes'"),
        ("calibration.smples=3", "did you mean 'samples'"),
        ("gate.x=3", "holds no settings"),
        ("episodes=many", "episodes must be an integer"),
        ("arms=[", "cannot be read as YAML"),
    ],
)
def test_bad_overrides(override, said):
    with pytest.raises(UsageError, match=said):
        StudySpec.from_dict(MINIMAL).with_overrides([override])


def test_what_a_study_left_open_follows_its_overrides():
    open_study = StudySpec.from_dict(MINIMAL)
    paper = open_study.with_overrides(["planner.preset=paper"])
    assert (open_study.mpc_iterations, paper.mpc_iterations) == (6, 50)
    other = open_study.with_overrides(["task=pusht", "model=pusht"])
    assert (open_study.gate, other.gate) == (0.7, 0.3)
    # What was said stays, also where the default says the same.
    said = StudySpec.from_dict(MINIMAL | {"mpc_iterations": 6, "gate": 0.7})
    kept = said.with_overrides(["planner.preset=paper", "task=pusht", "model=pusht"])
    assert (kept.mpc_iterations, kept.gate) == (6, 0.7)


def test_quick_preset():
    spec = load_preset("quick", "wall")
    assert spec.mpc_iterations == 6
    assert load_preset("quick", "pusht").mpc_iterations == 2  # its plans take long
    names = [arm.name for arm in spec.arms]
    assert names == [
        *("oracle-state", "oracle-latent", "random", "float"),
        *("w8a8", "w4", "w4g128", "w4a4-token", "w3", "w2"),
    ]
    assert (spec.episodes, spec.seed, spec.block) == (24, 1, "evaluation")
    assert spec.mpc_iterations == 6
    settings = build_planner(spec.planner, "wall").settings()
    wanted = {"samples": 64, "steps": 5, "elites": 8, "horizon": 5, "noise_correlation": 0.8}
    assert wanted.items() <= settings.items()


def test_unknown_preset_lists_what_ships():
    assert presets() == [
        "activations",
        "budget",
        "findings",
        "methods",
        "paper",
        "quick",
        "sensitivity",
        "weights",
    ]
    with pytest.raises(UsageError, match="did you mean 'quick'"):
        load_preset("quik", "wall")


def test_planner_settings_override_the_default_they_pick():
    paper = build_planner({"preset": "paper", "steps": 3}, "wall").settings()
    assert (paper["samples"], paper["steps"]) == (300, 3)
    # Resolved settings name no preset, and every one of them counts.
    assert build_planner(paper, "wall").settings() == paper
    with pytest.raises(UsageError, match="did you mean 'samples'"):
        build_planner({"sample": 3}, "wall")


def test_task_settings_come_back_and_a_version_is_held():
    settings = build_task({"name": "wall", "door_y": 20}).settings()
    assert build_task(settings).settings() == settings
    with pytest.raises(MismatchError, match="version 99"):
        build_task(settings | {"version": 99})
    with pytest.raises(UsageError, match="did you mean 'wall'"):
        build_task({"name": "wal"})


@pytest.mark.parametrize(
    ("task", "planner", "expected"),
    [
        ("wall", {}, 6),
        ("point_maze", {}, 20),
        ("point_maze", {"preset": "paper"}, 50),
        ({"name": "pusht", "shape": "L"}, {"preset": "paper"}, 50),
    ],
)
def test_iterations_that_are_not_set_are_the_task_s(task, planner, expected):
    values = {"task": task, "model": "m", "arms": ["float"], "planner": planner}
    spec = StudySpec.from_dict(values)
    assert spec.mpc_iterations == expected
    assert StudySpec.from_dict(spec.to_dict()) == spec
    assert StudySpec.from_dict(values | {"mpc_iterations": None}) == spec
    assert StudySpec.from_dict(values | {"mpc_iterations": 3}).mpc_iterations == 3
    with pytest.raises(UsageError, match="unknown planner scale 'papers'"):
        StudySpec.from_dict(values | {"planner": {"preset": "papers"}})


@pytest.mark.parametrize(("task", "expected"), [("wall", 0.7), ("pusht", 0.3)])
def test_a_gate_that_is_not_set_is_the_task_s(task, expected):
    values = {"task": task, "model": "m", "arms": ["float"]}
    spec = StudySpec.from_dict(values)
    assert spec.gate == expected
    assert StudySpec.from_dict(spec.to_dict()) == spec
    assert StudySpec.from_dict(values | {"gate": 0.0}).gate == 0.0
