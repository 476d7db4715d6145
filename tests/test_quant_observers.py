import pytest
import torch
from torch import nn

from quant_support import LINEARS, TinyCalibration, TinyWorldModel, run
from quantwm.errors import NonFiniteError, UsageError
from quantwm.quant.layer_inputs import ChannelAbsMax, SecondMoment, TokenSample
from quantwm.quant.observers import MinMax, Replay, input_ranges


def replay_of(world_model):
    return Replay(world_model, TinyCalibration.of(world_model))


def test_min_max_covers_every_batch():
    observer = MinMax("layer")
    for batch in ([1.0, 2.0], [-3.0, 0.5], [0.0, 7.0]):
        observer.update(torch.tensor(batch, dtype=torch.bfloat16))
    low, high = observer.range()
    assert (low.item(), high.item()) == (-3.0, 7.0)
    assert low.dtype == high.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_name_the_layer(bad):
    with pytest.raises(NonFiniteError, match=r"input of encoder\.fc1 holds NaN or infinite"):
        MinMax("encoder.fc1").update(torch.tensor([1.0, bad]))


def test_an_unseen_layer_is_named():
    world_model = TinyWorldModel()
    world_model.spare = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="never ran spare"):
        input_ranges(replay_of(world_model), ["predictor.fc1", "spare"])


def test_ranges_are_those_of_the_inputs():
    world_model, seen = TinyWorldModel(), []
    handle = world_model.predictor.fc2.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    run(world_model)
    handle.remove()
    calibration = TinyCalibration.of(world_model)
    ranges = input_ranges(Replay(world_model, calibration), LINEARS)
    low, high = ranges["predictor.fc2"]
    assert (low, high) == (min(x.min() for x in seen), max(x.max() for x in seen))
    assert len(seen) == 3
    assert len(calibration.seen) == 1
    assert set(ranges) == set(LINEARS)


def test_taps_see_what_a_plain_identity_would_hide():
    world_model = TinyWorldModel()
    taps = ["predictor.p_input", "encoder.block.p_input"]
    before = world_model.predictor.p_input
    ranges = input_ranges(replay_of(world_model), taps)
    for low, high in ranges.values():
        assert 0 < low < high <= 1
    assert world_model.predictor.p_input is before
    assert not world_model.predictor.fc1._forward_pre_hooks


def test_the_model_is_restored_after_a_failure():
    world_model = TinyWorldModel()
    world_model.encoder.block.fc1.weight.data[0, 0] = float("nan")
    layers = [*LINEARS, "predictor.p_input"]
    with pytest.raises(NonFiniteError, match=r"encoder\.block\.fc2"):
        input_ranges(replay_of(world_model), layers)
    assert type(world_model.predictor.p_input) is nn.Identity
    assert not any(module._forward_pre_hooks for module in world_model.modules())


def test_a_replay_computes_only_what_the_asked_layers_need():
    world_model = TinyWorldModel()
    calibration = TinyCalibration.of(world_model)
    replay = Replay(world_model, calibration)

    def done():
        return calibration.encoded, len(calibration.seen)

    input_ranges(replay, LINEARS)
    assert done() == (1, 1)
    input_ranges(replay, ["predictor.fc1"])
    assert done() == (1, 2)
    input_ranges(replay, ["encoder.block.fc1"])
    assert done() == (2, 2)
    replay.changed(["predictor.fc1"])
    input_ranges(replay, ["predictor.fc2"])
    assert done() == (2, 3)
    replay.changed(["encoder.block.fc1"])
    input_ranges(replay, ["predictor.fc2"])
    assert done() == (3, 4)


def test_a_replay_shows_the_model_as_it_is_now():
    world_model = TinyWorldModel()
    replay = replay_of(world_model)
    before = input_ranges(replay, LINEARS)
    layer = world_model.encoder.block.fc1
    layer.weight = nn.Parameter(layer.weight.detach() * 3)
    replay.changed(["encoder.block.fc1"])
    after = input_ranges(replay, ["encoder.block.fc2", "predictor.fc1"])
    for name in after:
        assert after[name] != before[name]


def test_channel_extremes_and_second_moments_are_those_of_all_inputs():
    batches = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    absmax, moment = ChannelAbsMax("layer"), SecondMoment("layer")
    for batch in batches:
        absmax.update(batch)
        moment.update(batch)
    flat = batches.reshape(-1, 4)
    assert torch.equal(absmax.value(), flat.abs().amax(0))
    torch.testing.assert_close(moment.value(), (flat.T @ flat).double(), rtol=1e-5, atol=1e-5)
    assert moment.tokens == 30


def test_a_token_sample_does_not_depend_on_how_many_come_at_a_time():
    tokens = torch.arange(400.0).reshape(100, 4)
    samples = []
    for size in (100, 7, 1):
        sample = TokenSample("layer", capacity=10)
        for batch in tokens.split(size):
            sample.update(batch)
        samples.append(sample.value())
        assert sample.tokens == 100
    assert samples[0].shape == (10, 1, 4)
    assert all(torch.equal(samples[0], other) for other in samples)
    rows = samples[0][:, 0, 0]
    assert torch.equal(rows, rows.sort().values)


def test_a_token_sample_keeps_everything_that_fits_and_frames_whole():
    x = torch.arange(2 * 6 * 3.0).reshape(2, 6, 3)
    everything = TokenSample("layer", capacity=100)
    everything.update(x)
    assert torch.equal(everything.value().flatten(0, 1), x.flatten(0, 1))
    frames = TokenSample("layer", capacity=4, unit=2)
    frames.update(x)
    value = frames.value()
    assert value.shape == (2, 2, 3)
    assert torch.equal(value[:, 1, 0] - value[:, 0, 0], torch.full((2,), 3.0))
    whole = TokenSample("layer", capacity=12, unit=None)
    whole.update(x)
    assert torch.equal(whole.value(), x)


def test_samples_of_different_layers_are_drawn_apart():
    x = torch.arange(100.0)[:, None]
    rows = []
    for name in ("a", "b"):
        sample = TokenSample(name, capacity=20)
        sample.update(x)
        rows.append(set(sample.value().flatten().tolist()))
    assert rows[0] != rows[1]
