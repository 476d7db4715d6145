import numpy as np
import pytest
import torch

from quant_support import LINEARS, TinyCalibration, TinyWorldModel, assert_unchanged, run, snapshot
from quantwm.errors import NonFiniteError, PlanError, UsageError
from quantwm.methods import get_method, quantize
from quantwm.methods.percentile import Percentile, PercentileRange
from quantwm.quant import QuantPlan


def values(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, count).astype(np.float32))


def by_percentile(world_model, layers, percentile=99.9, include=()):
    plan = QuantPlan(layers, "percentile", include, {"percentile": percentile})
    return quantize(world_model, plan, TinyCalibration.of(world_model))


def inputs_of(world_model, name):
    seen = []
    layer = world_model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten()))
    run(world_model)
    handle.remove()
    return torch.cat(seen).double().numpy()


@pytest.mark.parametrize("percentile", [50.5, 90, 99.9, 99.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_range_is_that_of_numpy(percentile, dtype):
    x = values(5000).view(50, 10, 10).to(dtype)
    observer = PercentileRange("layer", percentile)
    for batch in x.split(7):
        observer.update(batch)
    low, high = observer.range()
    expected = np.percentile(x.double().numpy(), [100 - percentile, percentile])
    assert (low.item(), high.item()) == pytest.approx(tuple(expected), rel=1e-6)
    assert low.dtype == high.dtype == torch.float32
    assert low.shape == high.shape == ()


def test_zero_is_not_forced_into_the_range():
    observer = PercentileRange("layer", 99)
    observer.update(values(1000).abs() + 3)
    low, high = observer.range()
    assert 3 < low < high


def test_a_hundred_is_the_full_range_however_much_is_seen():
    x = values(3 * 2**20 // 2)
    x[-1] = 1e4
    observer = Percentile(percentile=100).observer("layer")
    for batch in x.split(2**19):
        observer.update(batch)
    assert observer.range() == (x.min(), x.max())


@pytest.mark.parametrize("percentile", [99.5, 99.9, 99.999])
@pytest.mark.parametrize("size", [7, 5000, 60_000])
def test_percentiles_near_the_ends_are_exact_however_much_is_seen(percentile, size):
    x = values(60_000)
    x[1000:3000] = x[:1000].repeat(2)  # equal values
    observer = PercentileRange("layer", percentile, extremes=302, sample=50)
    for batch in (*x[:9000].split(size), x[9000:]):
        observer.update(batch)
    expected = np.percentile(x.double().numpy(), [100 - percentile, percentile])
    assert [end.item() for end in observer.range()] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("percentile", [75, 99, 99.9])
def test_a_sample_is_as_good_as_its_size_says(percentile):
    x, capacity = values(400_000), 20_000
    observer = PercentileRange("layer", percentile, extremes=300, sample=capacity)
    for batch in x.split(30_000):
        observer.update(batch)
    low, high = observer.range()
    share = 1 - percentile / 100
    deviation = (share * (1 - share) / capacity) ** 0.5
    for beyond in ((x < low), (x > high)):
        assert abs(beyond.double().mean().item() - share) < 4 * deviation
    assert high < x.max()


def test_a_sample_does_not_depend_on_how_many_come_at_a_time():
    x = values(20_000)
    ranges = []
    for size in (20_000, 3000, 700, 1):
        observer = PercentileRange("layer", 99.5, extremes=50, sample=1000)
        for batch in x.split(size) if size > 1 else (*x[:100].split(1), x[100:]):
            observer.update(batch)
        ranges.append(observer.range())
    assert all(one == ranges[0] for one in ranges)


def test_samples_of_different_layers_are_drawn_apart():
    x = values(20_000)
    ranges = []
    for name in ("a", "b"):
        observer = PercentileRange(name, 99.5, extremes=50, sample=1000)
        observer.update(x)
        ranges.append(observer.range())
    assert ranges[0] != ranges[1]


def test_every_value_counts_alike_wherever_it_comes():
    # A rising sequence: a sample that favours early or late values would be off by far.
    x = torch.arange(100_000.0)
    observer = PercentileRange("layer", 90, extremes=100, sample=5000)
    for batch in x.split(999):
        observer.update(batch)
    low, high = observer.range()
    assert low.item() == pytest.approx(10_000, abs=2000)
    assert high.item() == pytest.approx(90_000, abs=2000)


def test_memory_is_bounded():
    observer = PercentileRange("layer", 99, extremes=400, sample=1000)
    for seed in range(30):
        observer.update(values(700, seed))
        assert sum(len(kept) for kept, _ in observer._sample._kept) <= 1500
        for end in (observer._smallest, observer._largest):
            assert sum(len(kept) for kept in end._kept) <= 800


def test_what_a_layer_read_may_be_overwritten_afterwards():
    x = values(100)
    expected = np.percentile(x.double().numpy(), 90)
    observer = PercentileRange("layer", 90)
    observer.update(x)
    x.zero_()
    assert observer.range()[1].item() == pytest.approx(expected)


def test_bad_and_missing_inputs_are_named():
    observer = PercentileRange("encoder.fc1", 99)
    with pytest.raises(UsageError, match=r"never ran encoder\.fc1"):
        observer.range()
    with pytest.raises(NonFiniteError, match=r"encoder\.fc1"):
        observer.update(torch.tensor([1.0, float("nan")]))


def test_static_scales_of_a_model_are_those_of_its_float_inputs():
    world_model = TinyWorldModel()
    before = snapshot(world_model)
    small = by_percentile(world_model, {"*": "w2a8", "predictor.fc1": "a4-a_symmetric"}, 95)
    for name in LINEARS:
        low, high = np.percentile(inputs_of(world_model, name), [5, 95])
        scale = max(-low, high) / 7 if name == "predictor.fc1" else (high - low) / 255
        assert small.get_submodule(name).input_quantizer.scale.item() == pytest.approx(scale)
    assert_unchanged(world_model, before)


def test_a_hundred_is_round_to_nearest():
    world_model = TinyWorldModel()
    layers, kinds = {"*": "w4a8", "*_input": "a8"}, ("attention_matmul",)
    full = by_percentile(world_model, layers, 100, kinds)
    plain = quantize(world_model, QuantPlan(layers, include=kinds), TinyCalibration.of(world_model))
    assert_unchanged(full, snapshot(plain))


def test_only_static_inputs_are_clipped():
    world_model = TinyWorldModel()
    layers = {"*.fc*": "w4a4-token", "encoder.block.fc1": "w4a4-dynamic", "predictor.p_input": "a4"}
    small = by_percentile(world_model, layers, 90, ("attention_matmul",))
    plain = quantize(
        world_model,
        QuantPlan(layers, include=("attention_matmul",)),
        TinyCalibration.of(world_model),
    )
    assert small.predictor.p_input.scale < plain.predictor.p_input.scale
    small.predictor.p_input = plain.predictor.p_input
    assert torch.equal(run(small), run(plain))


def test_a_plan_without_static_inputs_is_refused():
    world_model = TinyWorldModel()
    for layers in ({"*": "w4"}, {"*": "w4a8-token", "predictor.*": "w4a8-dynamic"}):
        with pytest.raises(PlanError, match="percentile: no layer of the plan has static") as error:
            by_percentile(world_model, layers)
        assert "leave percentile out" in str(error.value)
    with pytest.raises(PlanError, match="'percentile' needs calibration data"):
        quantize(world_model, QuantPlan({"*": "w8a8"}, "percentile"))


@pytest.mark.parametrize("percentile", [50, 100.1, -1, True, "99", float("nan")], ids=str)
def test_percentiles_out_of_range_are_refused(percentile):
    with pytest.raises(UsageError, match=r"must be above 50 and at most 100, such as 99\.9, got"):
        get_method("percentile", {"percentile": percentile})
