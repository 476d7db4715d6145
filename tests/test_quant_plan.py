import pytest
import torch

from quant_support import LINEARS, TAPS, TinyWorldModel
from quantwm.errors import PlanError, UsageError
from quantwm.protocols import LinearGroup
from quantwm.quant import LayerScheme, QuantPlan
from quantwm.quant.plan import specificity


def names(plan, world_model=None):
    resolved = plan.resolve(world_model or TinyWorldModel())
    return {name: str(scheme) for name, scheme in resolved.items()}


def test_parsed_text_addresses_all_linears_in_forward_order():
    resolved = names(QuantPlan.parse("w4g8"))
    assert list(resolved.items()) == [(name, "w4g8") for name in LINEARS]


def test_most_specific_pattern_wins_whatever_the_order():
    layers = {
        "*": "w8",
        "predictor.*": "w4",
        "*.fc2": "w3",
        "predictor.fc?": "w5",
        "predictor.fc2": "w2",
    }
    expected = {
        "encoder.block.fc1": "w8",
        "encoder.block.fc2": "w3",
        "predictor.fc1": "w5",
        "predictor.fc2": "w2",
    }
    assert names(QuantPlan(layers)) == expected
    assert names(QuantPlan(dict(reversed(layers.items())))) == expected


def test_exact_name_beats_a_pattern_with_as_many_characters():
    assert specificity("predictor.fc2") > specificity("predictor.fc2*")
    assert specificity("predictor.fc[12]") == specificity("predictor.fc?") == (False, 12)
    assert specificity("a[]x]b") == (False, 2)
    assert specificity("a[b") == (True, 3)


def test_float_excludes_a_layer():
    assert names(QuantPlan({"*": "w4", "encoder.*": "float"})) == {
        "predictor.fc1": "w4",
        "predictor.fc2": "w4",
    }
    assert names(QuantPlan.parse("float")) == {}


def test_unmatched_layers_stay_float():
    assert names(QuantPlan({"predictor.fc1": "w4"})) == {"predictor.fc1": "w4"}


def test_other_kinds_are_reached_only_if_included():
    plan = QuantPlan(
        {"*": "w8", "*_input": "a8-token"}, include=["attention_matmul", "patch_embedding"]
    )
    resolved = names(plan)
    assert resolved["encoder.patch"] == "w8"
    assert {name for name, scheme in resolved.items() if scheme == "a8-token"} == set(TAPS)
    assert len(resolved) == 1 + len(LINEARS) + len(TAPS)
    with pytest.raises(PlanError, match=r"'\*_input' matches only layers that need include"):
        QuantPlan({"*": "w8", "*_input": "a8"}).resolve(TinyWorldModel())


def test_all_problems_are_reported_together():
    plan = QuantPlan(
        {
            "encodr.*": "w8",
            "predictor.fc1": "w4g16",
            "encoder.*c1": "w8",
            "encoder.?lock.f*": "w4",
            "*.fc2": "w3",
            "encoder.b*fc2": "w2",
            "predictor.q_input": "w8a8",
        },
        include=("attention_matmul",),
    )
    with pytest.raises(PlanError) as caught:
        plan.resolve(TinyWorldModel())
    message = str(caught.value)
    assert "pattern 'encodr.*' matches no layer; did you mean 'encoder.*'?" in message
    assert "predictor.fc1: group size 16 is larger than the layer's 12 inputs" in message
    assert "predictor.q_input: an attention matmul has no weights" in message
    assert message.count("\n  - ") == 3


def test_equally_specific_patterns_must_agree():
    agreeing = {"*.fc1": "w4", "?*.fc1": "w4"}
    assert set(names(QuantPlan(agreeing)).values()) == {"w4"}
    with pytest.raises(PlanError) as caught:
        QuantPlan({"*.fc1": "w4", "*?.fc1": "w8"}).resolve(TinyWorldModel())
    assert "'*.fc1' (w4) and '*?.fc1' (w8) are equally specific" in str(caught.value)
    assert "predictor.fc1" in str(caught.value)


def test_include_kind_the_model_has_not():
    class OnlyLinears(TinyWorldModel):
        def quantizable_groups(self):
            return [group for group in super().quantizable_groups() if group.kind == "linear"]

    plan = QuantPlan({"*": "w8"}, include=("patch_embedding",))
    with pytest.raises(PlanError, match="'patch_embedding': this model has no such layers"):
        plan.resolve(OnlyLinears())


def test_layers_of_another_type_are_problems():
    class Wrong(TinyWorldModel):
        def quantizable_groups(self):
            return [
                LinearGroup(("encoder.block.norm",), None, "encoder.block"),
                LinearGroup(("predictor.fc1",), None, "predictor", "patch_embedding"),
                LinearGroup(("predictor.fc2",), None, "predictor", "attention_matmul"),
            ]

    plan = QuantPlan(
        {"*norm": "w8", "*fc1": "w8", "*fc2": "a8"}, include=("patch_embedding", "attention_matmul")
    )
    with pytest.raises(PlanError) as caught:
        plan.resolve(Wrong())
    assert "no nn.Linear: LayerNorm" in str(caught.value)
    assert "kernel equals its stride" in str(caught.value)
    assert "must be nn.Identity, not Linear" in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "message"), [(("nowhere",), "which does not exist"), (LINEARS[:1], "twice")]
)
def test_a_wrong_declaration_of_the_model_is_named(layers, message):
    class Wrong(TinyWorldModel):
        def quantizable_groups(self):
            group = LinearGroup(layers, None, "encoder")
            return [*super().quantizable_groups(), group]

    with pytest.raises(UsageError, match=message):
        QuantPlan.parse("w4").resolve(Wrong())


def test_plans_are_values():
    plan = QuantPlan({"a.*": "w8", "b.*": "w4g8"}, include=("patch_embedding",))
    same = QuantPlan({"b.*": LayerScheme.parse("w4g8"), "a.*": "w8"}, include=["patch_embedding"])
    assert plan == same
    assert hash(plan) == hash(same)
    assert plan.to_json() == same.to_json()
    assert plan != QuantPlan({"a.*": "w8", "b.*": "w4g8"})
    assert len({plan, same, QuantPlan.parse("w4")}) == 2
    with pytest.raises(AttributeError):
        plan.method = "other"


def test_plans_round_trip_through_every_form(tmp_path):
    plan = QuantPlan(
        {"encoder.*": "w8a8-token", "*": "w4-w_study"},
        method="other",
        include=("attention_matmul",),
        options={"alpha": 0.5, "names": ["x", "y"]},
    )
    assert plan.to_dict()["version"] == 1
    assert QuantPlan.from_dict(plan.to_dict()) == plan
    assert QuantPlan.parse(plan.to_dict()) == plan
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert QuantPlan.load(tmp_path / "plan.yaml") == plan
    assert QuantPlan.load(tmp_path / "plan.json") == plan
    assert QuantPlan.parse(str(plan)).layers == plan.layers


def test_parse_reads_patterns_from_text_and_mappings():
    expected = QuantPlan({"encoder.*": "w8a8", "predictor.*": "w4g128"})
    assert QuantPlan.parse("encoder.*=w8a8, predictor.*=w4g128") == expected
    assert QuantPlan.parse({"encoder.*": "w8a8", "predictor.*": "w4g128"}) == expected
    assert QuantPlan.parse(expected) is expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantPlan({}), "at least one layer pattern"),
        (lambda: QuantPlan({"encoder.*": "w9"}), r"layer pattern 'encoder\.\*'.* got 9"),
        (lambda: QuantPlan({"*": "w8"}, include=("patch",)), "did you mean 'patch_embedding'"),
        (lambda: QuantPlan({"*": "w8"}, include=("linear",)), "unknown kind of layer"),
        (lambda: QuantPlan({"*": "w8"}, options={"x": {}}), "method option 'x'"),
        (lambda: QuantPlan.parse(""), "such as 'w4g128'"),
        (lambda: QuantPlan.parse(7), "got 7"),
        (lambda: QuantPlan.parse("a=w4,b"), "cannot read 'b'"),
        (lambda: QuantPlan.parse("a=w4,a=w8"), "written twice"),
        (lambda: QuantPlan.from_dict({"layer": {"*": "w8"}}), "did you mean 'layers'"),
        (lambda: QuantPlan.from_dict({"version": 2, "layers": {"*": "w8"}}), "version 2"),
        (lambda: QuantPlan.load("/nowhere/plan.yaml"), "cannot read a plan"),
        (lambda: QuantPlan.from_dict({"layers": {"*": "w8"}, "options": [1]}), r"got \[1\]"),
        (lambda: QuantPlan({"*": "w8"}, options={1: 2, "a": 3}), "options map names to values"),
        (lambda: QuantPlan.from_dict({"layers": {"*": "w8"}, "include": 5}), "include is a list"),
        (lambda: QuantPlan.from_dict({"layers": {"*": "w8"}, "method": None}), "got None"),
    ],
)
def test_bad_plans_say_what_is_wrong(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_layers_with_one_problem_share_a_line():
    class Twelve(TinyWorldModel):
        def __init__(self):
            super().__init__()
            self.row = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(12))

        def quantizable_groups(self):
            names = tuple(f"row.{i}" for i in range(12))
            return (*super().quantizable_groups(), LinearGroup(names, None, "row"))

    with pytest.raises(PlanError) as caught:
        QuantPlan({"row.*": "w4g8"}).resolve(Twelve())
    lines = [line for line in str(caught.value).splitlines() if "group size 8" in line]
    assert lines == [
        "  - row.0, row.1, row.2 and 9 more: group size 8 is larger than the layer's 4 inputs; "
        "use at most 4, or no groups"
    ]
