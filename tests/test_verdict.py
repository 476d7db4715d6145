"""Verdict by intervention: planted causes get their verdict, and what is missing is named."""

import json
from dataclasses import replace

import pytest

from quantwm.diagnostics.verdict import verdict_by_intervention, verdicts
from quantwm.errors import UsageError
from results_support import results

GOOD = {"float": 95, "oracle-state": 96, "oracle-latent": 94, "w3": 10}
ENCODER = {"predictor:w3": 94, "encoder:w3": 12, "oracle-latent:w3": 15}
PREDICTOR = {"predictor:w3": 12, "encoder:w3": 94, "oracle-latent:w3": 93}


def verdict(arms, arm="w3", **settings):
    return verdict_by_intervention(results(arms, **settings), arm)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (ENCODER, "representation"),
        (PREDICTOR, "dynamics"),
        (ENCODER | {"predictor:w3": 20}, "both"),
        (PREDICTOR | {"predictor:w3": 95}, "either"),
        (ENCODER | {"predictor:w3": 86}, "undecided"),
        (PREDICTOR | {"w3": 94}, "healthy"),
        (PREDICTOR | {"w3": 86}, "undecided"),
        # The float model fails: quantization is not to blame.
        (PREDICTOR | {"float": 30, "oracle-state": 40}, "planner"),
        (PREDICTOR | {"float": 30, "oracle-latent": 35}, "objective"),
        (PREDICTOR | {"float": 30}, "dynamics"),
        (PREDICTOR | {"float": 30, "oracle-latent": 70}, "undecided"),
    ],
)
def test_a_planted_cause_is_found(changes, expected):
    assert verdict(GOOD | changes).verdict == expected


def test_a_float_model_fails_by_its_own_studys_gate():
    found = results(GOOD | PREDICTOR | {"float": 50})
    assert verdict_by_intervention(found, "w3").verdict == "dynamics"
    assert "float" in verdict_by_intervention(found, "w3").reason
    modest = replace(found, gate=0.3)
    assert verdict_by_intervention(modest, "float").verdict == "healthy"


def test_true_dynamics_tell_how_an_encoder_breaks_planning():
    lost = verdict(GOOD | ENCODER)
    assert "no longer tell how far the goal is" in lost.reason
    readable = verdict(GOOD | ENCODER | {"oracle-latent:w3": 93})
    assert (readable.verdict, lost.verdict) == ("representation", "representation")
    assert "cannot roll them out" in readable.reason
    # An oracle that fails in float tells nothing about the quantized encoder.
    blind = verdict(GOOD | ENCODER | {"oracle-latent": 15})
    assert blind.verdict == "representation"
    assert "goal" not in blind.reason
    assert blind.evidence[-1].verdict == "undecided"


def test_true_dynamics_with_only_the_encoder_named():
    arms = GOOD | ENCODER
    arms["oracle-latent:encoder:w3"] = arms.pop("oracle-latent:w3")
    assert "no longer tell" in verdict(arms).reason


@pytest.mark.parametrize("lost", ["float", "predictor:w3", "encoder:w3"])
def test_a_missing_arm_leaves_it_undecided(lost):
    arms = GOOD | ENCODER
    del arms[lost]
    found = verdict(arms)
    assert (found.verdict, found.missing) == ("undecided", (lost,))


def test_missing_oracles_matter_only_where_float_fails():
    arms = {arm: n for arm, n in (GOOD | ENCODER).items() if not arm.startswith("oracle")}
    assert verdict(arms).verdict == "representation"
    assert verdict(arms | {"float": 30}).missing == ("oracle-state", "oracle-latent")


def test_undecided_says_how_many_episodes_would_decide():
    found = verdict(GOOD | ENCODER | {"predictor:w3": 86})
    assert found.episodes_needed > 100
    few = {arm: round(n * 0.24) for arm, n in (GOOD | ENCODER).items()}
    assert verdict(few, n=24).verdict == "undecided"


def test_names_do_not_matter():
    renamed = {
        "reference=float": 95,
        "tiny=w3@gptq": 10,
        "a=predictor:w3@gptq": 94,
        "b=encoder:w3@gptq": 12,
        # Other methods and widths are other interventions.
        "predictor:w3": 10,
        "encoder:w2@gptq": 94,
    }
    assert verdict(renamed, "tiny").verdict == "representation"
    del renamed["b=encoder:w3@gptq"]
    assert verdict(renamed, "tiny").missing == ("encoder:w3@gptq",)


def test_interventions_share_the_grid_of_the_arm():
    odd = {f"{arm}-w_asymmetric" if "w3" in arm else arm: n for arm, n in (GOOD | ENCODER).items()}
    # A symmetric grid, which would say the opposite.
    arms = odd | PREDICTOR
    assert verdict(arms, "w3-w_asymmetric").verdict == "representation"
    del arms["encoder:w3-w_asymmetric"]
    found = verdict(arms, "w3-w_asymmetric")
    assert (found.verdict, found.missing) == ("undecided", ("encoder:w3-w_asymmetric",))
    del arms["predictor:w3-w_asymmetric"]
    assert verdicts(results(arms)) == []


def test_interventions_share_the_planning_budget_of_the_arm():
    found = verdict(GOOD | ENCODER | {"w3/steps=20": 10}, "w3/steps=20")
    assert (found.verdict, found.missing) == ("undecided", ("float/steps=20",))


def test_the_float_arm_is_judged_by_the_oracles():
    assert verdict(GOOD, "float").verdict == "healthy"
    assert verdict(GOOD | {"float": 20, "oracle-latent": 25}, "float").verdict == "objective"


def test_parts_alone_are_not_judged():
    assert verdict(GOOD | ENCODER, "encoder:w3").verdict == "undecided"


def test_verdicts_of_all_arms_that_have_interventions():
    both = results(GOOD | ENCODER | {"w2": 0, "w4": 94, "encoder:w4": 95})
    assert [(one.arm, one.verdict) for one in verdicts(both)] == [
        ("w3", "representation"),
        ("w4", "healthy"),
    ]


def test_order_of_episodes_carries_no_information():
    straight = results(GOOD | ENCODER)
    backwards = replace(straight, rows={name: own[::-1] for name, own in straight.rows.items()})
    assert verdict_by_intervention(straight, "w3") == verdict_by_intervention(backwards, "w3")


def test_to_dict_is_json():
    values = verdict(GOOD | ENCODER).to_dict()
    assert values["kind"] == "verdict"
    assert json.loads(json.dumps(values)) == values


def test_an_unknown_arm_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'w3'"):
        verdict(GOOD, "w33")
