"""The grammar of methods, with parts that only note what they are asked for."""

from dataclasses import dataclass, make_dataclass
from itertools import permutations

import pytest

from quant_support import TinyCalibration, TinyWorldModel, assert_unchanged, snapshot
from quantwm.errors import PlanError, UsageError
from quantwm.methods import get_method, method_names, quantize, registry, transformed
from quantwm.methods.rtn import RTN
from quantwm.quant import QuantPlan

BLOCKS = {
    "encoder.block": ("encoder.block.fc1", "encoder.block.fc2"),
    "predictor": ("predictor.fc1", "predictor.fc2"),
}
calls = []


class Transforming:
    def transform(self, work, clipping):
        assert all(
            type(work.world_model.get_submodule(n)).__name__ == "Linear" for n in work.layers
        )
        calls.append((self.name, "transform", clipping.name))


class Clipping:
    def extents(self, work, weights, schemes):
        calls.append((self.name, "extents", *weights))
        return RTN().extents(work, weights, schemes)


class Rounding:
    def codes(self, work, extents):
        calls.append((self.name, "codes", *extents))
        return RTN().codes(work, extents)


class Learning:
    def learn(self, work, block, make_observer):
        layers = work.blocks[block]
        calls.append((self.name, "learn", block))
        codes = RTN().codes(work, RTN().extents(work, *weights_of(work, layers)))
        work.quantize(layers, codes, work.static_ranges(layers, make_observer))


class Ranging:
    def observer(self, layer):
        calls.append((self.name, "observer", layer))
        return RTN().observer(layer)


class Correcting:
    def correct(self, work, floats):
        assert {type(one).__name__ for one in floats.values()} == {"Linear"}
        calls.append((self.name, "correct", *floats))


class Objecting:
    def problems(self, world_model, schemes, groups):
        return [f"cannot do {', '.join(schemes)}", "is unwell"]


def weights_of(work, layers):
    schemes = work.weighted(layers)
    return {name: work.weight(name) for name in schemes}, schemes


def part(name, *roles, needs_calibration=False, **options):
    fields = [(key, type(value), value) for key, value in options.items()]
    made = make_dataclass(name, fields, bases=roles, frozen=True)
    made.name, made.needs_calibration = name, needs_calibration
    made.scales_channels = name in {"smoothquant", "awq", "omniquant"}
    made.rounds_to_nearest = name == "awq"
    return made


FAKES = [
    RTN,
    part("rotation", Transforming, seed=0),
    part("smoothquant", Transforming, needs_calibration=True, alpha=0.5),
    part("awq", Transforming, Clipping, needs_calibration=True, grid=20, alpha=1.0),
    part("omse", Clipping, ratios=101, lowest=0.35),
    part("mse", Clipping),
    part("gptq", Rounding, needs_calibration=True, damping=0.01),
    part("adaround", Rounding),
    part("omniquant", Learning, epochs=10),
    part("brecq", Learning),
    part("percentile", Ranging, percentile=99.9),
    part("entropy", Ranging),
    part("bias_correction", Correcting),
    part("variance_correction", Correcting),
    part("fussy", Transforming, Objecting),
]


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr("quantwm.methods.registry.PARTS", {one.name: one for one in FAKES})
    calls.clear()


def run(method, scheme="w4a8", **options):
    world_model = TinyWorldModel()
    plan = QuantPlan({"*.fc*": scheme}, method, options=options)
    return quantize(world_model, plan, TinyCalibration.of(world_model))


def called(*names):
    return [call for call in calls if call[0] in names]


def expected_by_block(name, what):
    return [(name, what, *layers) for layers in BLOCKS.values()]


@pytest.mark.parametrize(
    "canonical",
    [
        "rotation+smoothquant+omse+gptq+percentile+bias_correction",
        "rotation+awq+omse+percentile",
        "rotation+omniquant+percentile+bias_correction",
        "rotation+smoothquant+rtn",
        "rtn+percentile+bias_correction",
    ],
)
def test_parts_run_in_one_order_however_they_are_written(canonical):
    names = canonical.split("+")
    for order in permutations(names):
        assert get_method("+".join(order)).name == canonical
    assert get_method(" + ".join(reversed(names))).name == canonical


REFUSED = {
    "gptq+gptq": "'gptq' is written twice",
    "rtn+rtn": "'rtn' is written twice",
    "rtn+gptq": "rtn is what is done where no other part chooses; leave it out",
    "omse+rtn": "rtn is what is done where no other part chooses",
    "rtn+awq": "rtn is what is done where no other part chooses",
    "rtn+omniquant": "rtn is what is done where no other part chooses",
    "smoothquant+awq": "awq and smoothquant scale the same channels; take one of them",
    "omniquant+smoothquant": "omniquant and smoothquant scale the same channels",
    "gptq+adaround": "adaround and gptq both choose the codes; take one of them",
    "percentile+entropy": "entropy and percentile both choose input ranges",
    "omse+mse": "mse and omse both choose the ranges of weights",
    "omniquant+brecq": "brecq and omniquant both choose all codes of a block",
    "bias_correction+variance_correction": "both choose how layers are corrected",
    "omniquant+omse": "omniquant learns ranges and rounds by itself; leave out omse",
    "gptq+brecq+omse": "brecq learns ranges and rounds by itself; leave out gptq, omse",
    "awq+gptq": "awq searches its scales by what rounding to nearest does",
}


@pytest.mark.parametrize("method", REFUSED)
def test_parts_that_do_not_go_together_are_refused_with_the_reason(method):
    with pytest.raises(UsageError) as error:
        get_method(method)
    assert f"the method {method!r} makes no sense: " in str(error.value)
    assert REFUSED[method] in str(error.value)
    with pytest.raises(PlanError, match="makes no sense"):
        run(method)


def test_all_reasons_are_given_at_once():
    with pytest.raises(UsageError) as error:
        get_method("awq+gptq+smoothquant+entropy+percentile")
    reasons = str(error.value)
    assert reasons.count(";") >= 3
    for word in ("same channels", "input ranges", "rounding to nearest"):
        assert word in reasons


def test_every_single_part_is_a_method():
    for name in method_names():
        assert get_method(name).name == name


def test_unknown_parts_suggest_the_nearest():
    with pytest.raises(UsageError, match=r"unknown method 'gtpq'; did you mean 'gptq'\?"):
        get_method("smoothquant+gtpq")
    with pytest.raises(UsageError, match="unknown method ''"):
        get_method("smoothquant+")


def test_options_go_to_the_part_that_has_them():
    method = get_method(
        "gptq+smoothquant+percentile", {"alpha": 0.7, "gptq.damping": 0.1, "percentile": 99}
    )
    assert method.options() == {
        "smoothquant.alpha": 0.7,
        "gptq.damping": 0.1,
        "percentile.percentile": 99,
    }


def test_options_are_complete_with_their_defaults():
    assert get_method("omse+awq+rotation").options() == {
        "rotation.seed": 0,
        "awq.grid": 20,
        "awq.alpha": 1.0,
        "omse.ratios": 101,
        "omse.lowest": 0.35,
    }
    assert get_method("rtn").options() == {}


def test_options_of_a_recipe_build_the_same_recipe_again():
    method = get_method("awq+omse", {"grid": 5, "lowest": 0.5})
    assert get_method(method.name, method.options()) == method


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("omse+gptq", {"dampign": 1}, r"option of omse\+gptq: 'dampign'; did you mean 'damping'"),
        ("omse+gptq", {"gptq.dampign": 1}, "option of gptq: 'dampign'; did you mean 'damping'"),
        ("omse+gptq", {"gptq.ratios": 1}, r"option of gptq: 'ratios' \(known: damping\)"),
        ("omse+gptq", {"awq.grid": 1}, r"unknown part of 'omse\+gptq': 'awq'"),
        ("omse+gptq", {"gtpq.damping": 1}, "'gtpq'; did you mean 'gptq'"),
        ("omse+mse", {"mse.ratios": 1}, "the method 'mse' has no options, got 'mse.ratios'"),
        ("adaround", {"ratios": 1}, "the method 'adaround' has no options, got 'ratios'"),
        ("omse", {"ratios": 1, "omse.ratios": 2}, r"option omse\.ratios is given twice"),
    ],
)
def test_options_that_no_part_has_are_refused(method, options, message):
    with pytest.raises(UsageError, match=message):
        get_method(method, options)


def test_an_option_of_several_parts_needs_the_part(monkeypatch):
    rotating = part("turning", Transforming, seed=1)
    monkeypatch.setitem(registry.PARTS, "turning", rotating)
    with pytest.raises(
        UsageError,
        match=r"rotation and turning both have an option 'seed'; write 'rotation.seed' or "
        r"'turning.seed'",
    ):
        get_method("rotation+turning", {"seed": 3})
    options = get_method("rotation+turning", {"turning.seed": 3}).options()
    assert options == {"rotation.seed": 0, "turning.seed": 3}


@pytest.mark.parametrize("method", ["rotation", "omse+gptq", "omse+percentile+smoothquant"])
def test_calibration_is_needed_where_a_part_needs_it(method):
    recipe = get_method(method)
    assert recipe.needs_calibration == ("gptq" in method or "smoothquant" in method)


def test_every_role_is_played_by_its_part():
    run("bias_correction+percentile+gptq+omse+smoothquant+rotation")
    assert calls[:2] == [
        ("rotation", "transform", "omse"),
        ("smoothquant", "transform", "omse"),
    ]
    assert called("omse") == expected_by_block("omse", "extents")
    assert called("gptq") == expected_by_block("gptq", "codes")
    assert called("bias_correction") == expected_by_block("bias_correction", "correct")
    assert called("percentile") == [
        ("percentile", "observer", layer) for layers in BLOCKS.values() for layer in layers
    ]
    by_block = [call[0] for call in calls if call[1] in ("extents", "codes", "correct")]
    assert by_block == ["omse", "gptq", "bias_correction"] * len(BLOCKS)
    # Static ranges are those of the transformed float model, found before anything is rounded.
    assert [call[1] for call in calls[2:6]] == ["observer"] * 4


@pytest.mark.parametrize(
    ("method", "clips"),
    [
        ("awq", "awq"),
        ("awq+omse", "omse"),
        ("omse+awq+rotation", "omse"),
        ("smoothquant", "rtn"),
        ("smoothquant+gptq", "rtn"),
        ("gptq+omse+smoothquant", "omse"),
    ],
)
def test_a_part_that_does_nothing_but_clip_clips(method, clips):
    run(method)
    transforms = [call for call in calls if call[1] == "transform"]
    assert {call[2] for call in transforms} == {clips}
    assert {call[0] for call in calls if call[1] == "extents"} == {clips} - {"rtn"}


def test_a_part_that_rounds_and_clips_leaves_clipping_to_one_that_only_clips(monkeypatch):
    both = part("aaround", Rounding, Clipping)
    monkeypatch.setitem(registry.PARTS, "aaround", both)
    run("aaround+omse")
    assert called("omse") == expected_by_block("omse", "extents")
    assert called("aaround") == expected_by_block("aaround", "codes")
    calls.clear()
    run("aaround")
    assert [call[1] for call in calls] == ["extents", "codes"] * len(BLOCKS)


def test_roles_that_no_part_plays_are_played_by_round_to_nearest():
    plain = run("rtn")
    for method in ("percentile", "bias_correction+rtn", "omse", "gptq", "rotation"):
        assert_unchanged(run(method), snapshot(plain))


def test_a_learner_has_its_blocks_to_itself():
    run("rotation+omniquant+percentile+bias_correction")
    assert [call[:2] for call in calls if call[1] != "observer"] == [
        ("rotation", "transform"),
        ("omniquant", "learn"),
        ("bias_correction", "correct"),
        ("omniquant", "learn"),
        ("bias_correction", "correct"),
    ]
    assert [call[2] for call in called("omniquant")] == list(BLOCKS)
    assert {call[2] for call in called("percentile")} == {n for b in BLOCKS.values() for n in b}


def test_problems_name_their_part_and_come_before_any_computing():
    with pytest.raises(PlanError) as error:
        run("fussy+omse", "w4")
    message = str(error.value)
    names = ", ".join(n for b in BLOCKS.values() for n in b)
    assert f"- fussy: cannot do {names}\n" in message
    assert "- fussy: is unwell" in message
    assert calls == []


def test_progress_counts_transforms_and_blocks():
    world_model, steps = TinyWorldModel(), []
    for method in ("rotation+smoothquant+omse", "rotation+omniquant"):
        quantize(
            world_model,
            QuantPlan({"*": "w4"}, method),
            TinyCalibration.of(world_model),
            progress=lambda *step: steps.append(step),
        )
    assert steps == [*((n, 4) for n in range(1, 5)), *((n, 3) for n in range(1, 4))]


def test_the_transformed_model_is_still_float():
    world_model = TinyWorldModel()
    plan = QuantPlan({"*": "w4"}, "smoothquant+omse+gptq+bias_correction")
    twin = transformed(world_model, plan, TinyCalibration.of(world_model))
    assert calls == [("smoothquant", "transform", "omse")]
    assert_unchanged(twin, snapshot(world_model))
    assert twin is not world_model


def test_a_refused_value_is_reported_with_the_plans_other_problems(monkeypatch):
    @dataclass(frozen=True)
    class Strict:
        share: float = 0.5
        name = "strict"
        needs_calibration = False

        def __post_init__(self):
            raise UsageError(f"share must be positive, got {self.share}")

    monkeypatch.setitem(registry.PARTS, "strict", Strict)
    plan = QuantPlan({"*": "w4", "nothing": "w3"}, "strict", options={"share": -1})
    with pytest.raises(PlanError, match=r"(?s)matches no layer.*share must be positive, got -1"):
        quantize(TinyWorldModel(), plan)
