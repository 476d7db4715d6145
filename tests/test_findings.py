"""Findings: synthetic rows reach every verdict, and what is missing is said."""

import random
from dataclasses import replace

import pytest

from quantwm.statistics import wilson_interval
from quantwm.study.arms import Arm
from quantwm.study.findings import arms_read, findings_of
from quantwm.study.findings_rules import RULES
from quantwm.study.results import TaskResults
from quantwm.study.spec import load_preset
from results_support import N, results


def finding(number, arms, **settings):
    return next(one for one in findings_of([results(arms, **settings)]) if one.number == number)


def across(wall, pusht):
    both = [results(wall, "wall"), results(pusht, "pusht")]
    return findings_of(both)[-1]


FLOAT = {"float": 95}
EIGHT = FLOAT | {"w8": 95, "w8a8": 94}
GROUPS = FLOAT | {"w4": 70, "w4g128": 94, "w3g128": 20}
TOKENS = {
    "w8a8": 95,
    "w8a8-token": 95,
    "w6a6": 95,
    "w6a6-token": 94,
    "w4a8": 80,
    "w4a8-token": 78,
    "w4a4": 30,
    "w4a4-token": 75,
}
SIDES = {
    "encoder:w4": 85,
    "predictor:w4": 92,
    "encoder:w3": 10,
    "predictor:w3": 40,
    "encoder:w2": 0,
    "predictor:w2": 0,
}
LOW = FLOAT | {"w3": 20, "w3/steps=20": 25, "w3/mpc_iterations=24": 30}
WALL = FLOAT | {"oracle-latent": 93, "w3": 10, "predictor:w3": 60, "oracle-latent:w3": 30}
PUSHT = FLOAT | {"oracle-latent": 93, "w3": 10, "predictor:w3": 30, "oracle-latent:w3": 92}

SCENES = [
    (1, EIGHT, "supported"),
    (1, EIGHT | {"w8a8": 70}, "contradicted"),
    (1, EIGHT | {"w8a8": 87}, "undecided"),
    (2, GROUPS, "supported"),
    (2, GROUPS | {"w4": 95}, "contradicted"),
    (2, GROUPS | {"w4g128": 70}, "contradicted"),
    (2, GROUPS | {"w3g128": 95}, "contradicted"),
    (2, GROUPS | {"w3g128": 84}, "undecided"),
    (3, TOKENS, "supported"),
    (3, TOKENS | {"w4a4-token": 20}, "contradicted"),
    (3, {arm: 95 if "token" in arm else 30 for arm in TOKENS}, "contradicted"),
    (3, TOKENS | {"w4a4-token": 36}, "undecided"),
    (4, SIDES, "supported"),
    (4, dict(zip(SIDES, (92, 85, 40, 10, 0, 0), strict=True)), "contradicted"),
    (4, dict(zip(SIDES, (92, 92, 10, 10, 0, 0), strict=True)), "contradicted"),
    (4, dict(zip(SIDES, (92, 92, 10, 15, 0, 0), strict=True)), "undecided"),
    (5, LOW, "supported"),
    (5, LOW | {"w3/steps=20": 94}, "contradicted"),
    (5, LOW | {"w3/mpc_iterations=24": 94}, "contradicted"),
    (5, LOW | {"w3/steps=20": 84}, "undecided"),
]


@pytest.mark.parametrize(("number", "arms", "verdict"), SCENES)
def test_every_verdict_is_reached(number, arms, verdict):
    found = finding(number, arms)
    assert (found.verdict, found.missing, found.task) == (verdict, (), "wall")
    if verdict == "undecided":
        assert found.episodes_needed is None or found.episodes_needed > N
    else:
        assert found.episodes_needed is None


@pytest.mark.parametrize(
    ("wall", "pusht", "verdict"),
    [
        (WALL, PUSHT, "supported"),
        (PUSHT, PUSHT, "contradicted"),  # representation holds in Wall
        (WALL, WALL, "contradicted"),  # representation breaks in PushT
        (WALL, PUSHT | {"predictor:w3": 95}, "contradicted"),  # the encoder is to blame in PushT
        (WALL | {"oracle-latent:w3": 82}, PUSHT, "undecided"),
        (WALL | {"w3": 95}, PUSHT, "undecided"),  # nothing fails
        (WALL | {"oracle-latent": 30}, PUSHT, "undecided"),  # the oracle tells nothing
    ],
)
def test_failure_modes_across_tasks(wall, pusht, verdict):
    found = across(wall, pusht)
    assert (found.number, found.task, found.verdict) == (6, None, verdict)


def test_a_statement_says_what_it_misses():
    for rule in RULES:
        empty = TaskResults("wall", {}, {})
        found = next(one for one in findings_of([empty]) if one.number == rule.number)
        assert found.verdict == "undecided"
        assert set(found.missing) == set(rule.reads)
    alone = findings_of([results(WALL)])[-1]
    assert alone.verdict == "undecided"
    assert set(alone.missing) == {f"pusht: {arm}" for arm in PUSHT}
    assert finding(1, {"float": 95, "w8a8": 20}).missing == ("w8",)
    assert finding(1, {"float": 95, "w8a8": 20}).verdict == "undecided"


@pytest.mark.parametrize(("number", "arms", "verdict"), SCENES)
def test_too_few_episodes_decide_nothing(number, arms, verdict):
    few = {arm: count // 10 for arm, count in arms.items()}
    found = finding(number, few, n=10)
    least = next(rule.least_episodes for rule in RULES if rule.number == number)
    assert found.verdict == "undecided"
    assert found.episodes_needed is None or found.episodes_needed >= least > 10


def test_the_least_number_of_episodes_is_needed_where_the_clauses_decide():
    assert finding(1, {"float": 10, "w8": 10, "w8a8": 0}, n=10).episodes_needed == 36
    # Two lost of 20, none won: neither clause can tell after how many more it would be decided.
    for n in (20, 40):
        arms = {"float": n, "w8": n * 9 // 10, "w8a8": n * 9 // 10}
        assert finding(1, arms, n=n).episodes_needed is None


@pytest.mark.parametrize(("number", "arms", "verdict"), SCENES)
def test_verdicts_do_not_depend_on_the_order_of_episodes_or_arms(number, arms, verdict):
    straight = results(arms)
    mixed = {}
    for seed, (name, own) in enumerate(reversed(straight.rows.items())):
        mixed[name] = random.Random(seed).sample(list(own), len(own))
    shuffled = replace(straight, rows=mixed, arms=dict(reversed(straight.arms.items())))
    before, after = (findings_of([one])[number - 1] for one in (straight, shuffled))
    assert before == after


def test_arms_are_found_by_what_they_are():
    assert finding(1, {"float": 95, "small=w8": 95, "both=w8a8": 94}).verdict == "supported"
    # A larger budget than asked for counts too, one that is no larger does not.
    renamed = {"float": 95, "w3": 20, "w3/steps=60": 25, "w3/mpc_iterations=24": 30}
    assert finding(5, renamed).verdict == "supported"
    smaller = {"float": 95, "w3": 20, "w3/steps=3": 25, "w3/mpc_iterations=2": 30}
    assert finding(5, smaller).missing == ("w3/steps=20", "w3/mpc_iterations=24")
    # Other grids are other arms.
    other = {"float": 95, "w8-w_tensor": 95, "w8-w_asymmetric": 20, "w8a8-a_symmetric": 95}
    assert finding(1, other).missing == ("w8", "w8a8")


def test_eight_bits_evidence_in_numbers():
    first, second = finding(1, EIGHT).evidence
    assert (first.text, second.text) == ("w8 minus float", "w8a8 minus float")
    assert (first.estimate, second.estimate, second.n) == (0.0, pytest.approx(-0.01), 100)
    assert -0.1 < second.low < -0.01 < second.high
    assert second.margin == 0.10
    assert second.note == "0 won, 1 lost of 100"


def test_misalignment_needs_an_objective_that_falls():
    assert finding(5, LOW, falls=False).verdict == "contradicted"
    falls = finding(5, LOW).evidence[1]
    assert (falls.estimate, falls.n) == (1.0, 100)
    assert falls.low == pytest.approx(wilson_interval(100, 100)[0])


def test_misalignment_without_costs_by_step_is_undecided():
    """Rows of schema version 1."""
    old = results(LOW)
    for own in old.rows.values():
        for one in own:
            one["cost_by_step"] = []
    found = findings_of([old])[4]
    assert found.verdict == "undecided"
    assert "no costs by optimisation step" in found.evidence[1].note


def test_misalignment_is_no_verdict_on_an_arm_that_plans():
    healthy = finding(5, LOW | {"w3": 95})
    assert (healthy.verdict, healthy.episodes_needed) == ("undecided", None)
    assert "nothing to repair" in healthy.evidence[0].note
    # Two bits take over where their arms are there.
    two = {"w2": 5, "w2/steps=20": 5, "w2/mpc_iterations=24": 8}
    assert finding(5, LOW | {"w3": 95} | two).verdict == "supported"


def test_a_gain_must_survive_the_correction_for_four_widths():
    """Six wins without a loss have p = 0.03 alone and 0.125 among four."""
    gains = TOKENS | {"w4a4-token": 36}
    token = finding(3, gains).evidence[-1]
    assert token.verdict != "supported"
    assert finding(3, gains).verdict != "supported"


def test_pooling_widths_finds_what_none_shows_alone():
    few = dict(zip(SIDES, (87, 92, 35, 40, 4, 9), strict=True))
    pooled, *alone = finding(4, few).evidence
    assert all(one.verdict != "supported" for one in alone)
    # Nested outcomes: 15 different episodes lost, none won.
    assert pooled.estimate == pytest.approx(-15 / 300)
    assert pooled.high < 0
    assert finding(4, few).verdict == "supported"


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_float_model_below_its_studys_gate_decides_nothing(number):
    """With float at 0 all arms are alike, and none of that is a matter of bits."""
    dead = results(dict.fromkeys([*arms_read("wall"), "w3/steps=20"], 0))
    found = findings_of([dead])[number - 1]
    assert (found.verdict, found.missing, found.episodes_needed) == ("undecided", (), None)
    assert "float reaches 0.00, below the gate of 0.70" in found.evidence[0].note
    few = findings_of([results(dict.fromkeys(dead.arms, 0), n=10)])[number - 1]
    assert (few.verdict, few.episodes_needed) == ("undecided", None)


def test_the_gate_is_that_of_the_results():
    modest = results({"float": 50, "w8": 50, "w8a8": 50})
    assert findings_of([modest])[0].verdict == "undecided"
    for gate in (0.0, 0.3, 0.5):
        assert findings_of([replace(modest, gate=gate)])[0].verdict == "supported"


def test_failure_modes_need_float_to_plan_in_both_tasks():
    low = PUSHT | {"float": 60, "oracle-latent": 93}
    wall, pusht = results(WALL, "wall"), results(low, "pusht")
    found = findings_of([wall, pusht])[-1]
    assert (found.verdict, found.episodes_needed) == ("undecided", None)
    gated = ["below the gate" in one.note for one in found.evidence]
    assert gated == [False, False, True, True, True]
    assert findings_of([wall, replace(pusht, gate=0.3)])[-1].verdict == "supported"


def _enough(number, arms):
    """Episodes needed, with what is found at so many and at three quarters of it, same rates."""
    needed = finding(number, arms).episodes_needed
    verdicts = []
    for n in (needed * 3 // 4, needed):
        stretched = {arm: [own[i * N // n] for i in range(n)] for arm, own in arms.items()}
        verdicts.append(finding(number, stretched, n=n).verdict)
    return needed, *verdicts


def _first(count, begin=0):
    """`count` successes in a row from an episode on, back to the first after the last."""
    return [(episode - begin) % N < count for episode in range(N)]


def test_the_need_is_that_of_the_clauses_that_decide():
    # Pooled, the difference shows long before it does at three bits; only pooled decides.
    wide = [_first(84), _first(92), _first(50), _first(54, begin=10), _first(0), _first(0)]
    needed, before, then = _enough(4, dict(zip(SIDES, wide, strict=True)))
    assert (before, then) == ("undecided", "supported")
    assert N < needed < 150
    # One clause that falls short is enough, though the other is open for long.
    losing = FLOAT | {"w8": 88, "w8a8": 80}
    needed, before, then = _enough(1, {arm: _first(n) for arm, n in losing.items()})
    assert (before, then) == ("undecided", "contradicted")
    assert N < needed < 250


def test_arms_that_share_no_episode_are_not_compared():
    apart = results(EIGHT)
    for one in apart.rows["w8"]:
        one["episode_seed"] += 5000
    found = findings_of([apart])[0]
    assert found.verdict == "undecided"
    assert found.evidence[0].note.startswith("the arms share no episode")


def test_the_intervention_verdict_is_told():
    found = across(WALL | {"encoder:w3": 15}, PUSHT | {"encoder:w3": 95})
    notes = " ".join(one.note for one in found.evidence)
    assert "verdict by intervention: both" in notes
    assert "verdict by intervention: dynamics" in notes


@pytest.mark.parametrize("task", ["wall", "pusht", "point_maze"])
def test_the_preset_holds_all_arms_that_findings_read(task):
    preset = {arm.name for arm in load_preset("findings", task).arms}
    read = set(arms_read(task))
    assert read <= preset
    # And no more than what planning could reach and chance does.
    beside = {"oracle-state", "random", "random/mpc_iterations=24"}
    assert preset - set(arms_read("wall")) <= beside
    assert all(Arm.parse(name).name == name for name in read)
