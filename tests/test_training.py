"""Collecting, caching latents and training: resumable, and really learning."""

import json
import logging
import multiprocessing
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from quantwm import compute
from quantwm.data.collect import _Shard, _shards, _simulated, collect
from quantwm.data.drawing import drawn
from quantwm.data.latents import FrameIndex, encode_split
from quantwm.data.sources import Rendered, Split
from quantwm.data.trajectories import Trajectories, TrajectoryFolder
from quantwm.envs import Wall, get_task
from quantwm.errors import CorruptFileError, MismatchError, NonFiniteError, QuantWMError, UsageError
from quantwm.models.config import DecoderConfig, DINOWMConfig, EncoderConfig, PredictorConfig
from quantwm.models.dino_wm import DINOWM
from quantwm.training import batches
from quantwm.training.batches import Windows
from quantwm.training.decoder import DecoderSettings, Frames, train_decoder
from quantwm.training.initialization import initialize, trainable
from quantwm.training.loss import validate, window_loss
from quantwm.training.state import TrainingState
from quantwm.training.train import TrainingSettings, train

SETTINGS = TrainingSettings(
    steps=12, batch_size=8, warmup=2, unroll=2, checkpoint_every=5, validate_every=6
)


def model(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "task": "wall",
        "action_dim": 2,
        "proprio_dim": 2,
        "encoder": EncoderConfig(1, 24, 3, patch_size=14, pretrained_grid=3),
        "predictor": PredictorConfig(1, 2, 8, 32, dropout=0.0),
        "image_size": 28,
        "num_hist": 1,
        "action_mean": (0.0, 0.0),
        "action_std": (0.8, 0.8),
        "proprio_mean": (32.0, 32.0),
        "proprio_std": (15.0, 15.0),
    }
    world_model = DINOWM(DINOWMConfig(**settings | changes))
    with torch.no_grad():
        for parameter in world_model.encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return world_model.eval()


def split_of(trajectories):
    return Split(trajectories, Rendered(Wall(), trajectories))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return collect(Wall(), tmp_path_factory.mktemp("data"), train=40, validation=10)


@pytest.fixture(scope="module")
def windows(data, tmp_path_factory):
    cache = tmp_path_factory.mktemp("latents")
    world_model, made = model(), {}
    for split, length in (("train", 3), ("validation", 6)):
        trajectories = data.load(split)
        latents = encode_split(world_model, split_of(trajectories), cache, split, key={"a": 1})
        made[split] = Windows(world_model.config, Wall(), trajectories, latents, length)
    return made


def test_stored_states_follow_from_stored_actions(data):
    trajectories = data.load("train")
    steps = int(trajectories.lengths[0])
    states = trajectories.states.reshape(-1, steps + 1, 2)
    actions = trajectories.actions.reshape(-1, steps, 2).astype(np.float64)
    replayed = Wall().rollout(states[:, 0], trajectories.layout, actions)
    np.testing.assert_array_equal(replayed, states[:, 1:])


def test_trajectories_cross_the_door_in_both_directions_and_stay_on_the_board(data):
    trajectories = data.load("train")
    states = trajectories.states.reshape(len(trajectories), -1, 2)
    left, right = states[:, 0, 0] < 29, states[:, 0, 0] > 35
    assert (states[left].max(axis=1)[:, 0] > 35).any()
    assert (states[right].min(axis=1)[:, 0] < 29).any()
    assert np.isfinite(states).all()
    assert states.min() > 4
    assert states.max() < 60


def test_collecting_again_keeps_what_is_there_and_goes_on(data, tmp_path):
    def killed(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(Wall(), tmp_path, train=40, validation=10, progress=killed)
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    assert len(kept) == 1
    resumed = collect(Wall(), tmp_path, train=40, validation=10)
    for name, written in kept.items():
        assert (tmp_path / name).stat().st_mtime_ns == written
    for split in ("train", "validation"):
        np.testing.assert_array_equal(resumed.load(split).states, data.load(split).states)


def test_parallel_processes_write_the_same_data(data, tmp_path):
    parallel = collect(Wall(), tmp_path, train=40, validation=10, workers=2)
    for split in ("train", "validation"):
        np.testing.assert_array_equal(parallel.load(split).states, data.load(split).states)
    with pytest.raises(UsageError, match="workers must be at least 1"):
        collect(Wall(), tmp_path, train=40, validation=10, workers=0)


class Slow:
    """Leaves a file for each seed that it simulates, a while after it began."""

    name, policy, trajectory_steps = "slow", "slow", 1

    def __init__(self, folder):
        self.folder = folder

    def settings(self):
        return {"name": self.name}

    def scripted(self, seeds, steps):
        if seeds[0] < 0:
            os._exit(1)
        time.sleep(0.3)
        (self.folder / str(seeds[0])).touch()
        return np.zeros((1, steps + 1, 2)), np.zeros((1, steps, 2))

    def sample_layout(self, seeds):
        return {}


def shards(*seeds):
    return [_Shard(str(seed), "train", [seed]) for seed in seeds]


def test_who_stops_a_parallel_collection_does_not_wait_for_all_of_it(tmp_path):
    simulated = _simulated(Slow(tmp_path), shards(*range(20)), workers=2)
    next(simulated)
    simulated.close()
    for process in multiprocessing.active_children():
        process.join()
    assert len(list(tmp_path.iterdir())) < 10


def test_a_process_that_dies_while_it_simulates_is_told(tmp_path):
    with pytest.raises(QuantWMError, match=r"died, .* with fewer workers"):
        list(_simulated(Slow(tmp_path), shards(0, -1), workers=2))


def test_splits_share_no_seed(data):
    assert not set(data.load("train").seeds) & set(data.load("validation").seeds)


def test_collections_of_two_seeds_share_no_trajectory():
    """Also not their later shards, each of which has an episode seed of its own."""
    first, second = (
        {number for shard in _shards("train", 3000, seed) for number in shard.seeds}
        for seed in (0, 1)
    )
    assert len(first) == len(second) == 3000
    assert not first & second


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"seed": 1024}, "seed must be 0 to 1023"), ({"train": 64_001}, "with another seed")],
)
def test_what_a_seed_cannot_give_is_refused(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        collect(Wall(), tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_data_is_refused(data):
    with pytest.raises(MismatchError, match="origin"):
        collect(Wall(), data.folder, train=41, validation=10)
    with pytest.raises(MismatchError, match="task"):
        collect(Wall(door_y=20), data.folder, train=40, validation=10)


def test_damaged_data_name_the_file(data, tmp_path):
    broken = collect(Wall(), tmp_path, train=3, validation=3)
    shard = next(tmp_path.glob("train*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CorruptFileError, match=shard.name):
        broken.load("train")
    shard.unlink()
    with pytest.raises(CorruptFileError, match="missing"):
        broken.load("train")
    # As the messages say, collecting again puts both right.
    mended = collect(Wall(), tmp_path, train=3, validation=3)
    assert len(mended.load("train")) == 3
    shard.write_bytes(shard.read_bytes()[:-8])
    assert len(collect(Wall(), tmp_path, train=3, validation=3).load("train")) == 3
    with pytest.raises(UsageError, match="no data set"):
        TrajectoryFolder(tmp_path / "nowhere").load("train")


def test_frames_are_every_fifth_state_of_each_trajectory():
    trajectories = Trajectories(
        np.zeros((11 + 13, 2)),
        np.zeros((10 + 12, 2), np.float32),
        np.array([10, 12]),
        {},
        np.array([0, 1]),
    )
    index = FrameIndex.every(5, trajectories)
    assert index.state_rows.tolist() == [0, 5, 10, 11, 16, 21]
    assert index.trajectory.tolist() == [0, 0, 0, 1, 1, 1]
    assert index.steps.tolist() == [0, 5, 10, 0, 5, 10]


def test_windows_pair_frames_with_the_actions_between_them(data, windows):
    trajectories = data.load("train")
    batch = windows["train"].batch(np.array([0, 4]))
    normalized = trajectories.actions[:10] / 0.8
    np.testing.assert_allclose(batch.actions[0, 0], normalized[:5].ravel(), rtol=1e-5)
    np.testing.assert_allclose(batch.actions[0, 1], normalized[5:10].ravel(), rtol=1e-5)
    # Six frames make four windows of three, so the fifth window starts the second trajectory.
    second = trajectories.states[26]
    np.testing.assert_allclose(batch.proprio[1, 0], (second - 32) / 15, rtol=1e-5)


def test_encoding_goes_on_where_it_stopped(data, tmp_path):
    split, drawn_steps = split_of(data.load("train")), []

    def frames(trajectory, steps):
        drawn_steps.append(len(steps))
        return split.frames(trajectory, steps)

    whole = np.array(encode_split(model(), split, tmp_path, "train", key={}))
    state = json.loads((tmp_path / "train.json").read_text())
    assert state["done"] == len(whole)
    (tmp_path / "train.json").write_text(json.dumps({**state, "done": 64}))
    np.memmap(tmp_path / "train.f16", np.float16, "r+", shape=whole.shape)[64:] = 0
    again = encode_split(model(), replace(split, frames=frames), tmp_path, "train", key={})
    np.testing.assert_array_equal(whole, again)
    assert sum(drawn_steps) == len(whole) - 64
    with pytest.raises(MismatchError, match="other data"):
        encode_split(model(), split, tmp_path, "train", key={"other": 1})


def test_runs_that_share_a_cache_wait_for_each_other(data, tmp_path, caplog):
    """The second one comes while the first one encodes, and draws no frame of its own."""
    split, second, late = split_of(data.load("train")), [], []

    def encode(frames):
        return encode_split(model(), replace(split, frames=frames), tmp_path, "train", key={})

    def late_frames(*where):
        late.append(where)
        return split.frames(*where)

    def frames(*where):
        if not second:
            second.append(threads.submit(encode, late_frames))
            deadline = time.monotonic() + 60
            while "waiting for it" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
        return split.frames(*where)

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as threads:
        first = encode(frames)
        np.testing.assert_array_equal(second[0].result(), first)
    assert "another run encodes" in caplog.text
    assert not late
    assert (np.abs(first).max((1, 2)) > 0).all()


def test_a_cache_that_cannot_be_written_or_read_is_told(data, tmp_path):
    split = split_of(data.load("train"))
    (tmp_path / "file").touch()
    with pytest.raises(QuantWMError, match=r"cannot write .*file: "):
        encode_split(model(), split, tmp_path / "file", "train", key={})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(QuantWMError, match=r"cannot write .*train.f16.*disk has room"):
            encode_split(model(), split, tmp_path, "train", key={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    whole = encode_split(model(), split, tmp_path, "train", key={})
    assert (np.abs(whole).max((1, 2)) > 0).all()
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"train.json cannot be read"):
        encode_split(model(), split, tmp_path, "train", key={})


@pytest.mark.parametrize("left", [None, 100])
def test_latents_that_are_lost_are_encoded_again(data, tmp_path, left, caplog):
    split = split_of(data.load("train"))
    whole = np.array(encode_split(model(), split, tmp_path, "train", key={}))
    path = tmp_path / "train.f16"
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    with caplog.at_level(logging.WARNING):
        again = encode_split(model(), split, tmp_path, "train", key={})
    np.testing.assert_array_equal(whole, again)
    assert "missing or cut off" in caplog.text


@pytest.mark.slow
def test_frames_drawn_by_other_processes_are_the_same_and_in_order(data):
    split = split_of(data.load("train"))
    index = FrameIndex.every(5, split.trajectories)
    calls = [(index.trajectory[at : at + 7], index.steps[at : at + 7]) for at in range(0, 70, 7)]
    ahead = list(drawn(split.frames, calls, workers=2))
    for call, frames in zip(calls, ahead, strict=True):
        np.testing.assert_array_equal(frames, split.frames(*call))


def test_a_batch_is_the_same_from_latents_that_the_device_holds(data, monkeypatch):
    held = []

    def fits(latents, device):
        held.append(latents.nbytes)
        return True

    monkeypatch.setattr(batches, "_fits", fits)
    latents = np.arange(3 * 240 * 4 * 24, dtype=np.float16).reshape(-1, 4, 24)
    arguments = (model().config, Wall(), data.load("train"), latents, 3)
    ours = Windows(*arguments)
    monkeypatch.undo()
    theirs, index = Windows(*arguments), np.array([0, 5, 17])
    assert held
    assert torch.equal(ours.batch(index).visual, theirs.batch(index).visual)


def test_training_starts_close_to_copying_the_frame_and_improves(windows, tmp_path):
    world_model = model()
    initialize(world_model, windows["train"], seed=0)
    start = validate(world_model, windows["validation"])
    batch = windows["validation"].batch(np.arange(8))
    spread = batch.visual.var().item()
    assert start["one_step"] < 0.5 * spread
    settings = TrainingSettings(steps=150, batch_size=16, warmup=10, learning_rate=3e-3, ema=0.9)
    train(world_model, windows["train"], windows["validation"], tmp_path, settings)
    end = validate(world_model, windows["validation"])
    assert end["one_step"] < 0.8 * start["one_step"]
    assert end["rollout"] < 0.8 * start["rollout"]


def test_one_step_loss_against_the_definition(windows):
    world_model = model()
    initialize(world_model, windows["train"], seed=1)
    batch = windows["train"].batch(np.arange(4))
    latent = {
        "visual": batch.visual[:, :1],
        "proprio": world_model.embed_proprio(batch.proprio[:, :1]),
    }
    predicted = world_model.rollout(latent, batch.actions[:, None, :1])
    truth = world_model.embed_proprio(batch.proprio[:, 1])
    visual = (predicted["visual"][:, 0, 1] - batch.visual[:, 1]) ** 2
    tokens = world_model.tokens(
        batch.visual[:, 0],
        world_model.embed_proprio(batch.proprio[:, :1])[:, 0],
        world_model.embed_actions(batch.actions[:, :1])[:, 0],
    )
    proprio = (world_model.predict(tokens[:, None])[:, 0, :, 24:34] - truth[:, None]) ** 2
    expected = torch.cat([visual, proprio], dim=-1).mean()
    torch.testing.assert_close(window_loss(world_model, batch, unroll=1), expected)


@pytest.mark.parametrize("concat_dim", [0, 1])
@pytest.mark.parametrize("num_hist", [1, 3])
def test_further_losses_are_those_of_rollouts_from_the_first_frame(windows, num_hist, concat_dim):
    """Each is the error of what the planner's own rollout imagines, the action part left out.

    One patch a frame, so that the decoded proprioception, which is the first token's, is all of it.
    """
    wide = {"action_emb_dim": 24, "proprio_emb_dim": 24} if concat_dim == 0 else {}
    world_model = model(num_hist=num_hist, concat_dim=concat_dim, image_size=14, **wide)
    batch = windows["validation"].batch(np.arange(4))
    batch = replace(batch, visual=batch.visual[:, :, :1])
    latent = {
        "visual": batch.visual[:, :1],
        "proprio": world_model.embed_proprio(batch.proprio[:, :1]),
    }
    imagined = world_model.rollout(latent, batch.actions[:, None, :5])
    truth = world_model.embed_proprio(batch.proprio)
    errors = [
        (imagined["visual"][:, 0] - batch.visual).flatten(2),
        imagined["proprio"][:, 0] - truth,
    ]
    expected = torch.cat(errors, dim=-1).square().mean((0, 2))
    sums = [window_loss(world_model, batch, unroll) * unroll for unroll in (1, 2, 3, 4)]
    further = torch.stack([after - before for before, after in pairwise(sums)])
    torch.testing.assert_close(further, expected[2:5], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_killed_run_ends_with_the_same_weights(windows, tmp_path, dropout):
    def weights(folder, killed_at=None):
        def report(step, total, figures):
            if step == killed_at:
                raise KeyboardInterrupt

        world_model = model(predictor=PredictorConfig(1, 2, 8, 32, dropout=dropout))
        initialize(world_model, windows["train"], seed=0)
        torch.manual_seed(len(str(folder)))  # what else a process draws changes nothing
        train(world_model, windows["train"], windows["validation"], folder, SETTINGS, report=report)
        return {n: p.detach().clone() for n, p in trainable(world_model).items()}

    whole = weights(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "killed", killed_at=8)
    resumed = weights(tmp_path / "killed")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "killed/curve.jsonl").read_text().splitlines()
    ]
    assert steps == [6, 12]


def test_a_model_that_the_last_step_breaks_is_not_kept(windows, tmp_path):
    world_model = model()
    initialize(world_model, windows["train"], seed=0)
    broken = replace(SETTINGS, steps=1, warmup=0, learning_rate=1e30)
    with pytest.raises(NonFiniteError, match="at step 1; lower the learning rate"):
        train(world_model, windows["train"], windows["validation"], tmp_path, broken)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path):
    """A limit on file sizes makes writes fail as a full disk does: in the middle of a file."""

    def state(size):
        settings = {"learning_rate": 0.1, "weight_decay": 0.0, "decay": 0.9}
        return TrainingState({"weight": nn.Parameter(torch.ones(size))}, **settings)

    state(3).save(tmp_path, {"run": 1})
    before = (tmp_path / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))
    try:
        with pytest.raises(QuantWMError, match=r"cannot write .*disk has room"):
            state(10_000).save(tmp_path, {"run": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_training_does_not_touch_the_encoder(windows, tmp_path):
    world_model = model()
    before = {n: p.clone() for n, p in world_model.encoder.named_parameters()}
    initialize(world_model, windows["train"], seed=0)
    train(world_model, windows["train"], windows["validation"], tmp_path, SETTINGS)
    for name, parameter in world_model.encoder.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_run_of_other_settings_is_refused(windows, tmp_path):
    train(model(), windows["train"], windows["validation"], tmp_path, SETTINGS)
    other = TrainingSettings(steps=13, batch_size=8)
    with pytest.raises(MismatchError, match="other settings"):
        train(model(), windows["train"], windows["validation"], tmp_path, other)


def test_a_run_from_a_gpu_goes_on_without_one(windows, tmp_path, monkeypatch):
    """Its tensors come to the CPU first, whatever they were on."""
    asked = []
    load = torch.load

    def recorded(path, **options):
        asked.append(options["map_location"])
        return load(path, **options)

    train(model(), windows["train"], windows["validation"], tmp_path, SETTINGS)
    monkeypatch.setattr(torch, "load", recorded)
    train(model(), windows["train"], windows["validation"], tmp_path, SETTINGS)
    assert asked == ["cpu"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be an integer of at least 1, got 0"),
        ({"validate_every": 0}, "validate_every"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"learning_rate": -1}, "learning_rate must not be negative, got -1"),
        ({"warmup": -5}, "warmup"),
        ({"ema": 1}, "ema must be a decay"),
        ({"clip": 0}, "clip"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        TrainingSettings(**changes)


def test_a_loss_that_is_not_finite_stops_the_run(windows, tmp_path):
    world_model = model()
    with torch.no_grad():
        world_model.predictor.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="learning rate"):
        train(world_model, windows["train"], windows["validation"], tmp_path, SETTINGS)


def test_unknown_tasks_and_settings_are_named():
    with pytest.raises(UsageError, match="did you mean 'wall'"):
        get_task("wal")
    with pytest.raises(UsageError, match="door"):
        get_task("wall", doors=3)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_products_are_bfloat16_only_where_the_device_multiplies_it(native, dtype, monkeypatch):
    monkeypatch.setattr(compute, "_native_bfloat16", lambda _: native)
    with compute.fast_products(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("concat_dim", [0, 1])
def test_the_loss_can_weigh_proprioception_as_the_objective_does(windows, concat_dim):
    """One patch a frame, as above: errors of the rollout, a mean for each part."""
    wide = {"action_emb_dim": 24, "proprio_emb_dim": 24} if concat_dim == 0 else {}
    world_model = model(concat_dim=concat_dim, image_size=14, **wide)
    batch = windows["validation"].batch(np.arange(4))
    batch = replace(batch, visual=batch.visual[:, :, :1])
    truth = {"visual": batch.visual, "proprio": world_model.embed_proprio(batch.proprio)}
    first = {name: part[:, :1] for name, part in truth.items()}
    imagined = world_model.rollout(first, batch.actions[:, None, :1])
    errors = {n: float(((imagined[n][:, 0, 1] - truth[n][:, 1]) ** 2).mean()) for n in truth}
    for weight in (0.0, 1.0, 3.0):
        expected = errors["visual"] + weight * errors["proprio"]
        found = float(window_loss(world_model, batch, 1, proprio_weight=weight))
        assert found == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UsageError, match="must not be negative"):
        TrainingSettings(proprio_weight=-1.0)


def with_decoder(seed=0):
    decoder = DecoderConfig(channel=8, n_res_block=1, n_res_channel=4)
    return model(seed, decoder=decoder)


def trained_decoder(windows, data, folder, steps):
    """A model and its decoder's validation errors."""
    world_model = with_decoder()
    split = {name: split_of(data.load(name)) for name in ("train", "validation")}
    pictured = {name: (windows[name], Frames(world_model, split[name])) for name in split}
    settings = DecoderSettings(steps, batch_size=8, learning_rate=3e-3, checkpoint_every=10)
    train_decoder(world_model, *pictured["train"], pictured["validation"], folder, settings)
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return world_model, [point["validation"] for point in curve]


def test_a_decoder_learns_to_draw_and_changes_nothing_else(windows, data, tmp_path):
    before = {k: v.clone() for k, v in with_decoder().state_dict().items()}
    world_model, errors = trained_decoder(windows, data, tmp_path, 60)
    assert errors[-1] < 0.5 * errors[0]
    changed = {k for k, v in world_model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    latent = windows["validation"].batch(np.arange(3)).visual[:, :1]
    assert world_model.decode(latent).shape == (3, 1, 224, 224, 3)


def test_a_decoders_training_resumes_bit_for_bit(windows, data, tmp_path):
    whole, _ = trained_decoder(windows, data, tmp_path / "whole", 20)
    world_model = with_decoder()
    split = split_of(data.load("train"))
    pictured = (windows["train"], Frames(world_model, split))
    settings = DecoderSettings(20, batch_size=8, learning_rate=3e-3, checkpoint_every=10)

    def stop(step, total, figures):
        if step == 15:
            raise KeyboardInterrupt

    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        train_decoder(world_model, *pictured, pictured, folder, settings, report=stop)
    again = with_decoder()
    seen = []
    train_decoder(
        again, *pictured, pictured, folder, settings, report=lambda step, *_: seen.append(step)
    )
    assert seen == list(range(11, 21))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(MismatchError):
        train_decoder(again, *pictured, pictured, folder, replace(settings, seed=1))


def test_a_decoder_can_be_asked_for_once_training_is_finished(windows, tmp_path):
    plain, later = model(), with_decoder()
    initialize(plain, windows["train"], 0)
    train(plain, windows["train"], windows["validation"], tmp_path, SETTINGS)
    before = (tmp_path / "curve.jsonl").read_text()
    trained = train(later, windows["train"], windows["validation"], tmp_path, SETTINGS)
    assert (tmp_path / "curve.jsonl").read_text() == before
    for name, value in plain.predictor.state_dict().items():
        assert torch.equal(value, trained.predictor.state_dict()[name])
