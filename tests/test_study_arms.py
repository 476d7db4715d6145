"""Arms of a study: grids, budgets of their own, blocks, oracles that encode with few bits."""

import pytest

from quantwm.errors import PlanError, UsageError
from quantwm.study import load_preset, presets, run_study
from quantwm.study.arms import Arm, parse_arms, reference_arm
from quantwm.study.evidence import short_form
from quantwm.study.findings import arms_read
from quantwm.study.labels import labels_of
from quantwm.study.prepare import prepare
from quantwm.study.results import read_results
from study_support import by_arm, point_spec, study


def names(text):
    return [arm.name for arm in parse_arms(text)]


def test_braces_make_a_grid():
    assert names("float,w{4,3}{,g128}{,@gptq}") == [
        "float",
        *("w4", "w4@gptq", "w4g128", "w4g128@gptq"),
        *("w3", "w3@gptq", "w3g128", "w3g128@gptq"),
    ]
    assert names(["{float,w3}/steps={5,20}"]) == [
        *("float/steps=5", "float/steps=20"),
        *("w3/steps=5", "w3/steps=20"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w{}", "grid is empty"),
        ("w{4", "without its pair"),
        ("w3/steps", "SETTING=VALUE"),
        ("w3/mpc_iterations=0", "at least 1"),
        ("encodr:w3", "did you mean 'encoder'"),
        ("oracle-latent:x3", "unknown arm"),
    ],
)
def test_bad_arms(text, said):
    with pytest.raises(UsageError, match=said):
        parse_arms([text])


@pytest.mark.parametrize(
    "text",
    [
        "oracle-latent:w3",
        "mine=w4g128a8-token@gptq/samples=16",
        "float/mpc_iterations=9",
        "encoder.blocks.3:w3",
        "predictor:w2",
    ],
)
def test_full_form_reads_back(text):
    arm = Arm.parse(text)
    assert Arm.from_value(arm.to_dict()) == arm


def test_labels():
    arm = labels_of(Arm.parse("encoder:w4g128a8-token@gptq/steps=20"))
    assert (arm.part, arm.width, arm.weights, arm.activations) == (
        "encoder",
        "W4A8",
        "g128",
        "token",
    )
    assert (arm.method, arm.budget) == ("gptq", (("steps", 20),))
    assert labels_of(Arm.parse("encoder.blocks.3:w3")).part == "encoder.blocks.3.*"
    assert labels_of(Arm.parse("float")).width == "float"
    mixed = Arm.from_value({"name": "m", "plan": {"encoder.*": "w8", "predictor.*": "w4"}})
    assert labels_of(mixed).width == "mixed"


@pytest.mark.parametrize(
    ("changes", "variant", "written"),
    [
        ({}, "", "encoder:w4a8@gptq"),
        ({"options": {"damping": 0.01}}, "", "encoder:w4a8@gptq"),  # its default
        (
            {"plan": {"encoder.*": "w4a8-w_study-a_symmetric"}},
            "-a_symmetric-w_study",
            "encoder:w4a8-a_symmetric-w_study@gptq",
        ),
        (
            {"plan": {"encoder.*": "w4a8-w_asymmetric"}, "options": {"gptq.damping": 0.1}},
            "-w_asymmetric (gptq.damping=0.1)",
            "encoder:w4a8-w_asymmetric@gptq (gptq.damping=0.1)",
        ),
        (
            {"include": ["attention_matmul"], "options": {"damping": 0.1}},
            " (gptq.damping=0.1, with attention_matmul)",
            "encoder:w4a8@gptq (gptq.damping=0.1, with attention_matmul)",
        ),
        # A method of one's own that is not registered where results are read.
        ({"method": "mine", "options": {"k": 3}}, " (k=3)", "encoder:w4a8@mine (k=3)"),
    ],
)
def test_what_else_makes_another_quantization_is_a_label(changes, variant, written):
    form = {"name": "x", "plan": {"encoder.*": "w4a8"}, "method": "gptq"} | changes
    labels = labels_of(Arm.from_value(form))
    assert labels.variant == variant
    assert short_form(labels) == written


def test_arms_are_compared_with_the_float_arm_of_their_budget():
    arms = parse_arms("float/steps=9,float,w3,w3/steps=9,w3/steps=5")
    compared = {arm.name: getattr(reference_arm(arms, arm), "name", None) for arm in arms}
    assert compared == {
        "float/steps=9": "float",
        "float": None,
        "w3": "float",
        "w3/steps=9": "float/steps=9",
        "w3/steps=5": "float",
    }


def test_an_arms_budget_is_part_of_its_cell():
    spec = point_spec(arms=["float", "w8", "w8/steps=3", "w8/mpc_iterations=5", "w8/steps=2"])
    cells = prepare(**study(spec)).cells
    assert cells["w8/steps=3"].planner["steps"] == 3
    assert cells["w8/mpc_iterations=5"].mpc_iterations == 5
    # Writing out what the study says anyway changes nothing.
    assert cells["w8/steps=2"].id == cells["w8"].id
    assert len({cell.id for cell in cells.values()}) == 4
    with pytest.raises(UsageError, match=r"arm 'w8/stepz=3'.*did you mean 'steps'"):
        prepare(**study(point_spec(arms=["w8/stepz=3"])))


def test_a_larger_budget_is_planned_with(tmp_path):
    spec = point_spec(arms=["float", "w2", "w2/mpc_iterations=9", "w2/samples=64"])
    rows = by_arm(run_study(**study(spec), out=tmp_path))
    few, many = rows["w2"], rows["w2/mpc_iterations=9"]
    assert {len(row["success_by_iteration"]) for row in many} == {10}
    # The same noise and the same model: the longer episodes begin as the shorter ones.
    for short, long in zip(few, many, strict=True):
        assert long["success_by_iteration"][:4] == short["success_by_iteration"]
        assert (
            long["cost_by_iteration"][: len(short["cost_by_iteration"])]
            == (short["cost_by_iteration"])
        )
    wide = [row["cost_by_iteration"][0] for row in rows["w2/samples=64"]]
    assert wide != [row["cost_by_iteration"][0] for row in few]
    steps = [costs for row in few for costs in row["cost_by_step"]]
    assert {len(costs) for costs in steps} == {2}
    assert [costs[-1] for row in few for costs in row["cost_by_step"]] == [
        cost for row in few for cost in row["cost_by_iteration"]
    ]
    results = read_results(tmp_path)
    assert results.reference == "float"
    assert results.compared["w2/samples=64"] == "float"


def test_oracle_latent_can_encode_with_the_quantized_model(tmp_path):
    spec = point_spec(arms=["float", "oracle-latent", "oracle-latent:w2", "oracle-latent:w8"])
    cells = prepare(**study(spec)).cells
    assert cells["oracle-latent:w2"].kind == "oracle-latent"
    assert cells["oracle-latent:w2"].plan == {"encoder.0": "w2", "predictor.0": "w2"}
    rows = by_arm(run_study(**study(spec), out=tmp_path))
    costs = {name: [row["cost_by_iteration"][0] for row in rows[name]] for name in rows}
    assert costs["oracle-latent:w2"] != costs["oracle-latent"]
    assert costs["oracle-latent:w8"] == pytest.approx(costs["oracle-latent"], rel=0.1)


def test_each_block_is_an_arm_of_its_own():
    prepared = prepare(**study(point_spec(arms=["float", "each_block:w3", "x=each_block:w2"])))
    assert list(prepared.cells) == [
        "float",
        "encoder:w3",
        "predictor:w3",
        "x encoder",
        "x predictor",
    ]
    assert prepared.cells["predictor:w3"].plan == {"predictor.0": "w3"}
    assert [arm.name for arm in prepared.spec.arms] == list(prepared.cells)


def test_each_block_beside_an_arm_of_one_block():
    def arms(*others):
        return list(prepare(**study(point_spec(arms=["float", *others]))).cells)

    assert arms("each_block:w3", "predictor:w3") == ["float", "encoder:w3", "predictor:w3"]
    with pytest.raises(UsageError, match="2 arms are called 'predictor:w3'; name one otherwise"):
        arms("predictor:w3=predictor:w2", "each_block:w3")


def test_each_block_beside_what_the_other_layers_are():
    arm = {"name": "x", "plan": {"each_block.*": "w3", "predictor.*": "w8"}}
    prepared = prepare(**study(point_spec(arms=["float", arm])))
    assert prepared.cells["x encoder"].plan == {"encoder.0": "w3", "predictor.0": "w8"}


def test_a_saved_models_path_may_hold_what_else_means_something():
    (arm,) = parse_arms(["mine=folder:/tmp/seed=1/small"])
    assert (arm.name, arm.folder) == ("mine", "/tmp/seed=1/small")


def test_a_block_that_is_not_there_is_named():
    with pytest.raises(PlanError, match=r"encoder\.blocks\.7"):
        prepare(**study(point_spec(arms=["encoder.blocks.7:w3"])))


@pytest.mark.parametrize("name", presets())
def test_presets_resolve_for_the_bundled_model(name):
    prepared = prepare(load_preset(name, "wall"))
    assert len(set(prepared.cells)) == len(prepared.cells)
    assert prepared.float_arm == "float"


def test_the_findings_preset_has_what_findings_read():
    arms = {arm.name for arm in load_preset("findings", "wall").arms}
    assert set(arms_read("wall")) <= arms


def test_errors_of_a_study_file_name_the_line(tmp_path):
    from quantwm.study import StudySpec

    path = tmp_path / "study.yaml"
    path.write_text("task: wall\nmodel: wall\narms: [float]\nepisods: 5\n")
    with pytest.raises(UsageError, match=r"study\.yaml, line 4: .*did you mean 'episodes'"):
        StudySpec.from_yaml(path)
    path.write_text(
        "task: wall\nmodel: wall\narms:\n- float\n- name: x\n  plan: w4\n  methd: awq\n"
    )
    with pytest.raises(UsageError, match=r"line 7: .*did you mean 'method'"):
        StudySpec.from_yaml(path)
    path.write_text("task: wall\nmodel: wall\narms: [float]\ncalibration:\n  episode: 5\n")
    with pytest.raises(UsageError, match=r"line 5: .*did you mean 'episodes'"):
        StudySpec.from_yaml(path)
