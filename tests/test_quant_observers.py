import pytest
import torch
from torch import nn

from quant_support import LINEARS, TinyCalibration, TinyWorldModel, run
from quantwm.errors import NonFiniteError, UsageError
from quantwm.quant.observers import MinMax, input_ranges


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
        input_ranges(world_model, ["predictor.fc1", "spare"], TinyCalibration.of(world_model))


def test_ranges_are_those_of_the_inputs():
    world_model, seen = TinyWorldModel(), []
    handle = world_model.predictor.fc2.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    run(world_model)
    handle.remove()
    calibration = TinyCalibration.of(world_model)
    ranges = input_ranges(world_model, LINEARS, calibration)
    low, high = ranges["predictor.fc2"]
    assert (low, high) == (min(x.min() for x in seen), max(x.max() for x in seen))
    assert len(seen) == 3
    assert len(calibration.seen) == 1
    assert set(ranges) == set(LINEARS)


def test_taps_see_what_a_plain_identity_would_hide():
    world_model = TinyWorldModel()
    taps = ["predictor.p_input", "encoder.block.p_input"]
    before = world_model.predictor.p_input
    ranges = input_ranges(world_model, taps, TinyCalibration.of(world_model))
    for low, high in ranges.values():
        assert 0 < low < high <= 1
    assert world_model.predictor.p_input is before
    assert not world_model.predictor.fc1._forward_pre_hooks


def test_the_model_is_restored_after_a_failure():
    world_model = TinyWorldModel()
    world_model.encoder.block.fc1.weight.data[0, 0] = float("nan")
    layers = [*LINEARS, "predictor.p_input"]
    with pytest.raises(NonFiniteError, match=r"encoder\.block\.fc2"):
        input_ranges(world_model, layers, TinyCalibration.of(world_model))
    assert type(world_model.predictor.p_input) is nn.Identity
    assert not any(module._forward_pre_hooks for module in world_model.modules())
