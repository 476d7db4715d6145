"""The planner's benchmark: the literal order's costs, what a row says, how it fails."""

from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

from bench_support import one_thread  # noqa: F401
from dino_wm_support import observation, relative, tiny_model
from quantwm.bench import machine, variants
from quantwm.bench.literal import LiteralDINOWM
from quantwm.bench.operations import literal_operations, planned_operations
from quantwm.bench.planner import bench_planner, measure
from quantwm.bench.subjects import Subject, subject_of
from quantwm.bench.variants import LITERAL, VARIANTS, prepare
from quantwm.errors import NonFiniteError, UsageError
from quantwm.methods import quantize
from quantwm.planning.objective import Objective
from quantwm.planning.rollout import Rollouts

CPU = torch.device("cpu")


def subject(model=None, candidates=12, literal_candidates=None):
    return Subject.of(
        "tiny",
        model or tiny_model(),
        candidates=candidates,
        episodes=2,
        literal_candidates=literal_candidates,
    )


def chosen(*names):
    return [VARIANTS[name] for name in names]


@pytest.fixture(scope="module")
def measured():
    """A report of all variants, and the progress that was told."""
    progress = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(machine._SIDE, "cpu", 32)
        report = measure(
            [subject(literal_candidates=3)],
            list(VARIANTS.values()),
            rounds=2,
            device=CPU,
            progress=lambda *state: progress.append(state),
        )
    rows = {row.variant: row for row in report.rows}
    return SimpleNamespace(report=report, rows=rows, progress=progress)


@pytest.fixture
def durations(monkeypatch):
    """Seconds, by number of candidates, that calls are said to take, one after the other."""
    script = {}

    def timed(device, function):
        costs = function()
        return next(script[costs.shape[1]]), costs

    monkeypatch.setattr(variants, "timed", timed)
    monkeypatch.setitem(machine._SIDE, "cpu", 32)
    return script


@pytest.mark.parametrize("concat_dim", [0, 1])
@pytest.mark.parametrize("num_hist", [1, 2, 3])
def test_the_literal_order_and_ours_agree_on_costs_and_elites(num_hist, concat_dim):
    model = tiny_model(num_hist=num_hist, concat_dim=concat_dim)
    start, goal = observation(seed=1), observation(seed=2)
    actions = torch.randn(2, 20, 5, 10, generator=torch.Generator().manual_seed(0))
    literal = LiteralDINOWM(model)
    theirs = literal.costs(start, literal.goals(goal), actions, chunk=7)
    with torch.inference_mode():
        ends = [
            [model.encode({k: v[i : i + 1] for k, v in frames.items()}) for i in range(2)]
            for frames in (start, goal)
        ]
    ours = Rollouts(model, Objective(model.objective_weights)).costs(*ends, actions)
    assert relative(ours, theirs) < 1e-5
    for own, other in zip(ours, theirs, strict=True):
        assert set(own.argsort()[:5].tolist()) == set(other.argsort()[:5].tolist())


def test_the_literal_order_refuses_a_quantized_model_and_an_empty_chunk():
    model = tiny_model()
    with pytest.raises(UsageError, match="quantized"):
        LiteralDINOWM(quantize(model, "w8"))
    with pytest.raises(UsageError, match="chunk must be at least 1"):
        LiteralDINOWM(model).costs(observation(), [], torch.zeros(2, 1, 5, 10), chunk=0)


def test_ratios_are_of_medians_scaled_to_all_candidates(durations):
    durations |= {
        # The search for the literal order's chunk.
        1: iter([1.0]),
        2: iter([1.0]),
        # Three rounds of the literal order's two counts.
        3: iter([4.0, 16.0, 8.0]),
        6: iter([28.0, 7.0, 14.0]),
        # Three rounds of the float model and the quantized one, in turns.
        12: iter([13.0, 26.0, 52.0, 39.0, 26.0, 65.0]),
    }
    report = measure(
        [subject(literal_candidates=3)],
        chosen(LITERAL, "float32", "w8a8-float32"),
        rounds=3,
        device=CPU,
    )
    literal, plain, quantized = report.rows
    assert literal.rounds == (56.0, 14.0, 28.0)
    assert (literal.seconds, plain.seconds, quantized.seconds) == (28.0, 26.0, 39.0)
    assert (literal.measured_candidates, plain.measured_candidates) == (6, 12)
    assert literal.linearity == pytest.approx(14 / (2 * 8) - 1)
    assert plain.linearity is quantized.linearity is None
    assert literal.chunk == 2
    assert [row.ratio for row in report.rows] == pytest.approx([1, 28 / 26, 28 / 39])
    assert quantized.twin_ratio == pytest.approx(39 / 26)
    assert literal.twin_ratio is plain.twin_ratio is None
    config = tiny_model().config
    assert plain.flops_per_second == planned_operations(config, 12, 5, 2).flops / 26
    assert literal.flops_per_second == literal_operations(config, 12, 5, 2).flops / 28


def test_the_literal_orders_chunk_is_its_fastest(durations):
    # A candidate takes 1, 1.05, 0.5 and 2 s; sixteen at once are not tried.
    durations |= {size: cycle([each]) for size, each in {1: 1, 2: 2.1, 4: 2, 8: 16}.items()}
    assert prepare(VARIANTS[LITERAL], subject(candidates=40), CPU).chunk == 4


@pytest.mark.parametrize(
    ("literal_candidates", "counts"), [(None, (12,)), (3, (3, 6)), (5, (5, 10)), (6, (12,))]
)
def test_the_literal_order_is_scaled_only_where_that_saves_candidates(literal_candidates, counts):
    prepared = prepare(VARIANTS[LITERAL], subject(literal_candidates=literal_candidates), CPU)
    assert prepared.counts == counts
    assert prepared.operations() == literal_operations(tiny_model().config, 12, 5, 2)


def test_rows_agree_with_themselves_and_with_the_machine(measured):
    rates = measured.report.machine["matrix_flops_per_second"]
    assert set(rates) == {"float32", "bfloat16"}
    assert list(measured.rows) == list(VARIANTS)
    for name, row in measured.rows.items():
        assert (row.scale, row.episodes, row.candidates, row.horizon) == ("tiny", 2, 12, 5)
        assert row.dtype == name.rpartition("-")[2]
        assert len(row.rounds) == 2
        assert row.ratio == measured.rows[LITERAL].seconds / row.seconds
        flops = 2 * (row.linear_multiply_adds + row.attention_multiply_adds)
        assert row.flops_per_second == flops / row.seconds
        assert row.share == row.flops_per_second / rates[row.dtype]
        assert row.memory_mb > 0
    twins = {name: row.twin for name, row in measured.rows.items() if row.twin}
    assert twins == {"w8a8-float32": "float32", "w8a8-bfloat16": "bfloat16"}
    for name, twin in twins.items():
        ratio = measured.rows[name].seconds / measured.rows[twin].seconds
        assert measured.rows[name].twin_ratio == ratio


def test_cost_errors_tell_exact_from_rounded(measured):
    errors = {name: row.cost_error for name, row in measured.rows.items()}
    assert errors[LITERAL] == 0
    assert errors["float32"] < 1e-5
    for rounded in ("bfloat16", "w8a8-float32", "w8a8-bfloat16"):
        assert 1e-4 < errors[rounded] < 0.1


def test_progress_counts_preparations_and_rounds(measured):
    total = 5 * (1 + 2)
    assert measured.progress == [(done, total) for done in range(1, total + 1)]


def test_without_the_literal_order_and_the_twin_nothing_is_compared(durations):
    durations[12] = cycle([2.0])
    report = measure([subject()], chosen("w8a8-float32"), rounds=1, device=CPU)
    (row,) = report.rows
    assert row.seconds == 2
    assert row.twin == "float32"
    assert row.ratio is row.twin_ratio is row.cost_error is None


def test_the_paper_scale_is_dino_wms_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    paper = subject_of("paper", 20)
    assert torch.equal(torch.get_rng_state(), before)
    config = paper.world_model.config
    assert (config.frame_tokens, config.token_width, config.num_hist) == (196, 404, 3)
    assert paper.shape == (1, 20, 5)
    assert paper.literal_candidates == 8
    assert not paper.actions[:, 0].any()
    assert paper.actions[:, 1:].std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("variant", [LITERAL, "float32", "bfloat16"])
def test_costs_that_are_not_finite_fail_and_name_the_variant(variant, value, durations):
    durations |= {size: cycle([1.0]) for size in (1, 2, 3)}
    model = tiny_model()
    with torch.no_grad():
        model.predictor.blocks[1].mlp.fc1.weight[0, 0] = value
    with pytest.raises(NonFiniteError, match=f"^{variant}: 6 of 6 candidate costs"):
        measure([subject(model, candidates=3)], chosen(variant), rounds=1, device=CPU)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variants": ["float32", "bfloat61"]}, "did you mean 'bfloat16'"),
        ({"scales": ["papr"]}, "did you mean 'paper'"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"variants": []}, "at least one scale and one variant"),
        ({"scales": []}, "at least one scale and one variant"),
        ({"device": "gpu0"}, "unknown device 'gpu0'"),
    ],
)
def test_bad_usage_is_refused(changes, says):
    arguments = {"scales": ["compact"], "variants": ["float32"], "device": "cpu"} | changes
    with pytest.raises(UsageError, match=says):
        bench_planner(**arguments)


def test_a_subject_needs_candidates():
    with pytest.raises(UsageError, match="candidates must be at least 1, got 0"):
        subject(candidates=0)


def test_calibration_takes_candidates_from_all_episodes_in_turn():
    several = subject().resized(episodes=3)
    calibration = several.calibration(7)
    assert calibration.frame.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert len(calibration.visual) == 6, "starts and goals"
    torch.testing.assert_close(
        torch.from_numpy(calibration.actions[4]), several.actions[1, 1], rtol=0, atol=0
    )
    with pytest.raises(UsageError, match="1 to 36, got 37"):
        several.calibration(37)
