"""A block's calls, kept so that they can be repeated."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from block_support import SmallReplayData, small_model
from dino_wm_support import relative
from foreign import PointWorld
from quant_support import TinyWorldModel, observations
from quantwm.errors import NonFiniteError, UsageError
from quantwm.models.attention import KeyValueCache
from quantwm.quant.block_inputs import BlockInputs, block_calls, held_out_rows
from quantwm.quant.observers import Replay

EVERYTHING = 10**9


def calls_of(world_model, block, tokens=EVERYTHING, data=None):
    replay = Replay(world_model, data or SmallReplayData(world_model))
    return block_calls(replay, [block], tokens)[block]


@contextmanager
def recorded(module):
    """Arguments and output of every call while the context lasts."""
    seen = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args, dict(kwargs), output.clone())),
        with_kwargs=True,
    )
    yield seen
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("observed", [1, 2])
@pytest.mark.parametrize("num_hist", [1, 2, 3])
def test_whole_windows_leave_rollouts_as_they_are(num_hist, observed):
    model = small_model(num_hist=num_hist)
    data = SmallReplayData(model, frames=observed)
    latent = data.encode(model)
    usual = model.rollout(latent, data.actions)
    with model.whole_windows():
        whole = model.rollout(latent, data.actions)
    again = model.rollout(latent, data.actions)
    for name in usual:
        assert relative(whole[name], usual[name]) < 1e-6
        assert torch.equal(again[name], usual[name])


@torch.no_grad()
@pytest.mark.parametrize("num_hist", [1, 3])
def test_calls_within_whole_windows_repeat_their_outputs(num_hist):
    model = small_model(num_hist=num_hist)
    data = SmallReplayData(model)
    latent = data.encode(model)
    for block in model.predictor.blocks:
        with recorded(block) as seen, model.whole_windows():
            model.rollout(latent, data.actions)
        assert len(seen) == 5
        for args, kwargs, output in seen:
            assert not any(isinstance(one, KeyValueCache) for one in (*args, *kwargs.values()))
            assert torch.equal(block(*args, **kwargs), output)


@torch.no_grad()
@pytest.mark.parametrize("block", ["encoder.blocks.1", "predictor.blocks.0", "predictor.blocks.1"])
def test_kept_calls_give_what_the_model_computed(block):
    model = small_model(num_hist=3)
    data = SmallReplayData(model)
    calls = calls_of(model, block, data=data)
    module = model.get_submodule(block)
    with recorded(module) as seen, model.whole_windows():
        data.roll_out(model, data.encode(model))
    # Windows of one, two and three frames, each kind as one call; the encoder knows one kind.
    assert len(calls) == (3 if block.startswith("predictor") else 1)
    rows = torch.cat([call.run(module).flatten(1).norm(dim=1) for call in calls])
    expected = torch.cat([output.flatten(1).norm(dim=1) for _, _, output in seen])
    torch.testing.assert_close(rows.sort().values, expected.sort().values, rtol=1e-5, atol=1e-6)


def test_rows_belong_to_the_sample_they_were_computed_for():
    model = small_model(num_hist=3)
    data = SmallReplayData(model)
    calls = calls_of(model, "predictor.blocks.0", data=data)
    counts = torch.cat([call.samples for call in calls]).bincount()
    # Frames were encoded first, so candidates are numbered after them.
    assert counts[data.episodes :].tolist() == [5] * len(data)
    assert not counts[: data.episodes].any()
    first = next(call for call in calls if call.tokens == model.config.frame_tokens)
    same_start = (first.samples - data.episodes) // data.actions.shape[1]
    proprio = first.arguments[0][:, 0, model.config.encoder.width :][:, :10]
    for start in range(data.episodes):
        rows = proprio[same_start == start]
        assert torch.equal(rows, rows[:1].expand_as(rows))


def test_a_fifth_of_the_samples_is_held_out_with_all_their_rows():
    calls = calls_of(small_model(num_hist=3), "predictor.blocks.0")
    masks = held_out_rows(calls, "predictor.blocks.0")
    samples, held_out = torch.cat([call.samples for call in calls]), torch.cat(masks)
    ours, theirs = set(samples[~held_out].tolist()), set(samples[held_out].tolist())
    assert not ours & theirs
    assert len(theirs) == round(0.2 * len(ours | theirs))
    again = held_out_rows(calls, "predictor.blocks.0")
    assert torch.equal(torch.cat(again), held_out)
    assert not torch.equal(torch.cat(held_out_rows(calls, "predictor.blocks.1")), held_out)


def test_the_same_rows_are_kept_whatever_the_model_computes():
    model, other = small_model(num_hist=3), small_model(seed=1, num_hist=3)
    data = SmallReplayData(model)
    for block in ("encoder.blocks.1", "predictor.blocks.0"):
        kept = calls_of(model, block, 40, data)
        theirs = block_calls(Replay(other, data), ["encoder.blocks.0", block], 40)[block]
        assert [call.samples.tolist() for call in kept] == [c.samples.tolist() for c in theirs]
        assert sum(map(len, kept)) < sum(map(len, calls_of(model, block, data=data)))


@pytest.mark.parametrize("tokens", [1, 50, 200])
def test_no_more_is_kept_than_was_asked_for(tokens):
    model = small_model(num_hist=3)
    everything = calls_of(model, "predictor.blocks.0")
    some = calls_of(model, "predictor.blocks.0", tokens)
    rows = [row.tolist() for call in everything for row in call.arguments[0][:, 0]]
    kept = [row.tolist() for call in some for row in call.arguments[0][:, 0]]
    size = sum(call.tokens * len(call) for call in some)
    longest = max(call.tokens for call in everything)
    assert all(row in rows for row in kept)
    # As much as fits: one row more would have been too many; and one row whatever happens.
    assert len(kept) == 1 if tokens < longest else tokens - longest < size <= tokens


def test_what_is_kept_does_not_change_when_the_model_writes_into_its_tensors():
    inputs = BlockInputs("block", EVERYTHING)
    x = torch.ones(3, 2, 4)
    inputs.see(nn.Identity(), (x,), {"tokens_per_frame": 2})
    x.zero_()
    (call,) = inputs.value()
    assert torch.equal(call.arguments[0], torch.ones(3, 2, 4))


def test_inputs_made_in_inference_mode_can_take_part_in_a_gradient():
    inputs = BlockInputs("block", EVERYTHING)
    with torch.inference_mode():
        inputs.see(nn.Identity(), (torch.ones(3, 2, 4),), {})
    (call,) = inputs.value()
    linear = nn.Linear(4, 1)
    linear(call.arguments[0]).sum().backward()
    assert torch.equal(linear.weight.grad, torch.full((1, 4), 6.0))


def test_masks_are_not_cut_into_rows():
    inputs, mask = BlockInputs("block", EVERYTHING), torch.eye(2)
    for _ in range(2):
        inputs.see(nn.Identity(), (torch.randn(3, 2, 4),), {"mask": mask.clone()})
    inputs.see(nn.Identity(), (torch.randn(3, 2, 4),), {"mask": mask * 2})
    calls = inputs.value()
    assert [len(call) for call in calls] == [6, 3]
    assert torch.equal(calls[0].rows(torch.tensor([1])).arguments["mask"], mask)


def test_each_part_of_a_replay_is_run_only_where_it_shows_the_block():
    model = small_model()
    data = SmallReplayData(model)
    replay = Replay(model, data)
    for block in ("encoder.blocks.0", "encoder.blocks.1", "predictor.blocks.0"):
        block_calls(replay, [block], 100)
        replay.changed([f"{block}.attn.qkv"])
    # The first replay finds out who runs where; the encoder's change makes frames stale.
    assert (data.encoded, data.rolled_out) == (3, 2)
    block_calls(replay, ["predictor.blocks.1"], 100)
    assert (data.encoded, data.rolled_out) == (3, 3)


def test_a_model_that_keeps_nothing_needs_no_whole_windows():
    world_model = TinyWorldModel()
    data = SmallReplayData(world_model, observation=observations(6))
    (encoded,) = calls_of(world_model, "encoder.block", data=data)
    assert encoded.samples.tolist() == list(range(6))
    predicted = calls_of(world_model, "predictor", data=data)
    assert {call.tokens for call in predicted} == {4, 8}


def test_rows_that_hold_several_candidates_are_one_sample_each():
    world_model = PointWorld()
    data = SmallReplayData(world_model, width=world_model.action_spec.model_dim)
    (call,) = calls_of(world_model, "move", data=data)
    assert call.arguments[0].shape == (data.episodes * 5, 4, 20)
    assert call.samples.unique().tolist() == [data.episodes + 4 * i for i in range(data.episodes)]


def test_too_few_samples_are_refused_with_both_numbers():
    world_model = TinyWorldModel()
    data = SmallReplayData(world_model, observation=observations(4))
    calls = calls_of(world_model, "encoder.block", data=data)
    with pytest.raises(UsageError, match=r"too few .* encoder\.block inputs from 4 .* at least 5"):
        held_out_rows(calls, "encoder.block")


def test_what_cannot_be_repeated_is_refused():
    inputs = BlockInputs("some.block", 10)
    with pytest.raises(UsageError, match=r"some\.block is not called with a tensor"):
        inputs.see(nn.Identity(), ([torch.ones(2, 3)],), {"size": 3})
    with pytest.raises(NonFiniteError, match=r"some\.block"):
        inputs.see(nn.Identity(), (torch.full((2, 3), torch.inf),), {})
    with pytest.raises(UsageError, match=r"never ran predictor\.blocks"):
        calls_of(small_model(), "predictor.blocks")
    inputs.see(nn.Identity(), (torch.ones(2, 3),), {})

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(UsageError, match=r"as many rows as its input .*; got tuple"):
        inputs.value()[0].run(Pair())
