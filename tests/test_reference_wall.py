"""Wall against what the public code's own environment did, see tests/fixtures/README.md."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from quantwm.envs.wall import Wall
from quantwm.protocols import Layout

FIXTURES = Path(__file__).parent / "fixtures"
GROUPS = (
    "room",
    "wall_face",
    "door",
    "door_corner",
    "border",
    "far",
    "solid",
    "zero_component",
    "zero",
    "exact",
    "tie",
)


def load(name: str) -> dict[str, npt.NDArray]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return dict(arrays)


def as_layout(pairs: npt.NDArray) -> Layout:
    return {"wall_x": pairs[:, 0].astype(np.int64), "door_y": pairs[:, 1].astype(np.int64)}


def assert_same_positions(ours: npt.NDArray, case: dict[str, npt.NDArray]) -> None:
    """Within 1e-9 pixel, NaN where the public code has NaN; names the worst case otherwise."""
    assert ours.dtype == np.float64
    theirs = case["next"]
    error = np.where(np.isnan(ours) & np.isnan(theirs), 0.0, np.abs(ours - theirs))
    error = np.where(np.isnan(error), np.inf, error).max(axis=1)
    wrong = np.flatnonzero(error > 1e-9)
    worst = int(error.argmax())
    assert not len(wrong), (
        f"{len(wrong)} of {len(error)} steps differ; the worst from {case['state'][worst]} with "
        f"{case['action'][worst]} in layout {case['layout'][worst]}: ours {ours[worst]}, "
        f"theirs {theirs[worst]}"
    )


@pytest.fixture(scope="module")
def transitions() -> dict[str, npt.NDArray]:
    return load("wall_transitions")


@pytest.mark.parametrize("group", GROUPS)
def test_one_step_lands_where_the_public_step_lands(
    transitions: dict[str, npt.NDArray], group: str
) -> None:
    names = transitions["names"].tolist()
    chosen = transitions["group"] == names.index(group)
    case = {k: transitions[k][chosen] for k in ("state", "action", "next", "layout")}
    actions = case["action"].astype(np.float64)
    ours = Wall().step(case["state"], as_layout(case["layout"]), actions)
    assert_same_positions(ours, case)


def test_every_recorded_group_is_compared(transitions: dict[str, npt.NDArray]) -> None:
    assert transitions["names"].tolist() == list(GROUPS)
    assert set(transitions["group"].tolist()) == set(range(len(GROUPS)))


def test_recorded_steps_meet_what_they_are_meant_to_meet(
    transitions: dict[str, npt.NDArray],
) -> None:
    """The comparison is worth something: most groups really hold many collisions."""
    free = transitions["state"] + 2.0 * transitions["action"].astype(np.float64)
    collided = (free != transitions["next"]).any(axis=1)
    for index, group in enumerate(GROUPS):
        share = collided[transitions["group"] == index].mean()
        assert share > 0.05, f"{group}: only {share:.2f} of the steps collide"


def test_rollouts_visit_the_public_states() -> None:
    case = load("wall_rollouts")
    layout = as_layout(case["layout"])
    ours = Wall().rollout(case["start"], layout, case["action"].astype(np.float64))
    np.testing.assert_array_equal(case["state"][:, 0], case["start"])
    np.testing.assert_allclose(ours, case["state"][:, 1:], rtol=0, atol=1e-9)


def test_a_position_that_became_nan_never_recovers_nor_succeeds() -> None:
    """The public step divides by zero here; afterwards only the fact of NaN is comparable."""
    case = load("wall_non_finite")
    task = Wall()
    ours = task.rollout(case["start"], as_layout(case["layout"]), case["action"].astype(np.float64))
    np.testing.assert_array_equal(ours[:, 0], case["state"][:, 1])
    assert np.isnan(case["state"][:, 1:]).any(axis=2).all()
    assert np.isnan(ours).any(axis=2).all()
    assert not task.success(ours[:, -1], np.array([59.7, 4.3])).any()


def test_boards_are_equal_bit_for_bit() -> None:
    case = load("wall_frames")
    ours = Wall().board(case["state"], as_layout(case["layout"]))
    assert ours.dtype == np.uint8
    differing = np.flatnonzero((ours != case["board"]).any(axis=(1, 2, 3)))
    assert not len(differing), f"boards of states {case['state'][differing]} differ"


def test_frames_are_the_public_frames_rounded() -> None:
    case = load("wall_frames")
    framed = case["framed"]
    ours = Wall().observe(case["state"][framed, None], as_layout(case["layout"][framed]))
    assert ours["visual"].dtype == np.uint8
    error = np.abs(ours["visual"][:, 0].astype(np.float64) - case["frame"])
    assert error.max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(ours["proprio"][:, 0], case["state"][framed].astype(np.float32))


@pytest.mark.parametrize("index", [0, 1])
def test_starts_and_goals_are_the_public_draws(index: int) -> None:
    case = load("wall_random_states")
    wall_x, door_y = (int(value) for value in case["layout"][index])
    ours = [Wall.random_state(int(seed), wall_x, door_y) for seed in case["seed"]]
    np.testing.assert_allclose(np.array(ours), case[f"built/{index}"], rtol=0, atol=1e-12)


def test_public_planning_draws_for_the_wall_it_was_built_with() -> None:
    """A public environment moved to another layout keeps drawing for the wall at 32."""
    case = load("wall_random_states")
    assert case["layout"][1].tolist() == [24, 47]
    ours = [Wall.random_state(int(seed), 32, 47) for seed in case["seed"]]
    np.testing.assert_allclose(np.array(ours), case["moved/1"], rtol=0, atol=1e-12)


def test_success_has_the_public_edge() -> None:
    case = load("wall_success")
    task = Wall()
    ours = task.success(case["state"], case["goal"])
    np.testing.assert_allclose(
        task.distance(case["state"], case["goal"]), case["distance"], rtol=0, atol=1e-12
    )
    # Within a few units in the last place of 4.5 the order of additions decides; exactly 4.5,
    # reached along an axis, is no success, and 1e-9 to either side is settled.
    settled = (np.abs(case["distance"] - 4.5) > 1e-12) | (case["distance"] == 4.5)
    assert settled.sum() >= 54
    assert (case["distance"] == 4.5).any()
    np.testing.assert_array_equal(ours[settled], case["success"][settled])
