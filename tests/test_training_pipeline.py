"""Training as a whole, from a data folder to a stored model, around a tiny encoder."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import quantwm as qwm
from encoder_support import TINY, assert_same, tiny_state
from quantwm.cli import app
from quantwm.data.collect import collect
from quantwm.data.sources import end_to_end, open_data
from quantwm.envs import Wall
from quantwm.errors import MismatchError, UsageError
from quantwm.loading import load
from quantwm.models.encoder_weights import Encoder, encoder_sha256
from quantwm.training import pipeline
from quantwm.training.initialization import trainable
from quantwm.training.pipeline import train_task
from quantwm.training.train import TrainingSettings, unroll_at

SETTINGS = TrainingSettings(steps=2, batch_size=4, warmup=1)


@pytest.fixture(scope="module", autouse=True)
def encoders():
    """Two tiny encoders in the place of all others, which keep these tests fast."""

    def tiny(source, **_options):
        state = tiny_state({"tiny": 7, "other": 8}[str(source)])
        return Encoder(TINY, state, encoder_sha256(state))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "open_encoder", tiny)
        yield


@pytest.fixture(scope="module")
def folder(encoders, tmp_path_factory):
    """Data, and a finished run on them."""
    made = tmp_path_factory.mktemp("pipeline")
    collect(Wall(), made / "data", train=8, validation=4)
    run_training(made, "run")
    return made


def run_training(folder, out, encoder="tiny", settings=SETTINGS, **options):
    return train_task(
        Wall(),
        folder / "data",
        folder / out,
        folder / f"latents-{encoder}",
        settings,
        encoder=encoder,
        device="cpu",
        **options,
    )


def test_what_cannot_be_trained_is_told_before_frames_are_encoded(folder, monkeypatch):
    monkeypatch.setattr(pipeline, "encode_split", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(UsageError, match=r"fewer than a batch of 4096.*--batch-size"):
        run_training(folder, "large", settings=replace(SETTINGS, batch_size=4096))
    with pytest.raises(UsageError, match=r"\(train\): no trajectory has .* longer trajectories"):
        run_training(folder, "long", settings=replace(SETTINGS, unroll=9))
    (folder / "foreign/model").mkdir(parents=True)
    (folder / "foreign/model/notes.txt").touch()
    with pytest.raises(UsageError, match=r"no saved model's \(notes.txt\)"):
        run_training(folder, "foreign")


def trained(world_model):
    return {name: value.detach().clone() for name, value in trainable(world_model).items()}


def test_training_goes_on_from_a_model(folder):
    first = load(folder / "run/model")
    still = replace(SETTINGS, learning_rate=0.0, weight_decay=0.0)
    same = run_training(folder, "still", settings=still, init=first)
    assert same.config == first.config
    torch.testing.assert_close(trained(same), trained(first))
    moved = run_training(folder, "moved", init=first)
    assert not torch.equal(moved.predictor.norm.weight, first.predictor.norm.weight)
    again = run_training(folder, "moved", init=first)  # resumes a finished run
    assert_same(trained(again), trained(moved))
    with pytest.raises(MismatchError, match="other settings, another model"):
        run_training(folder, "moved", init=moved)
    collect(Wall(), folder / "others/data", train=9, validation=4)
    with pytest.raises(MismatchError, match="or other data"):
        run_training(folder / "others", "../moved", init=first)
    with pytest.raises(MismatchError, match="other settings, another model"):
        run_training(folder, "run", init=first)


def test_models_that_training_cannot_go_on_from_are_refused(folder):
    first = load(folder / "run/model")
    with pytest.raises(MismatchError, match="has another encoder"):
        run_training(folder, "refused", encoder="other", init=first)
    other = load(folder / "run/model")
    other.config = replace(first.config, task="pusht")
    with pytest.raises(MismatchError, match="trained in pusht, not in wall"):
        run_training(folder, "refused", init=other)
    bare = load(folder / "run/model")
    bare.config = replace(first.config, action_mean=None, action_std=None)
    with pytest.raises(UsageError, match="carries no statistics"):
        run_training(folder, "refused", init=bare)
    with pytest.raises(UsageError, match="a size of its own"):
        run_training(folder, "refused", init=first, scale="paper")
    with pytest.raises(UsageError, match="unknown scale 'papers'"):
        run_training(folder, "refused", init=first, scale="papers", decoder="vqvae")
    small = qwm.quantize(first, "w4")
    with pytest.raises(UsageError, match="is quantized"):
        run_training(folder, "refused", init=small)
    assert not (folder / "refused").exists()


def test_the_command_line_goes_on_from_a_folder(folder, tmp_path):
    command = ["train", "wall", "--data", str(folder / "data"), "--out", str(tmp_path / "run")]
    command += ["--encoder", "tiny", "--steps", "1", "--batch-size", "2"]
    command += ["--device", "cpu", "--unroll", "3", "--ramp", "0.5"]
    done = CliRunner().invoke(app, [*command, "--init", str(folder / "run/model")])
    assert done.exit_code == 0, done.output
    first, last = (trained(load(f / "run/model")) for f in (folder, tmp_path))
    # One step away from it, and not from where training without it begins.
    name = "predictor.pos_embedding"
    torch.testing.assert_close(last[name], first[name], rtol=0, atol=2e-3)
    del command[command.index("--out") + 1]
    command.insert(command.index("--out") + 1, str(tmp_path / "anew"))
    done = CliRunner().invoke(app, [*command, "--seed", "1"])
    assert done.exit_code == 0, done.output
    anew = trained(load(tmp_path / "anew/model"))
    assert (anew[name] - first[name]).abs().max() > 1e-2
    assert CliRunner().invoke(app, [*command, "--init", "nowhere"]).exit_code == 2
    assert CliRunner().invoke(app, [*command, "--ramp", "2"]).exit_code == 2


def test_the_ramp_grows_to_the_whole_unroll():
    settings = replace(SETTINGS, steps=100, unroll=4, ramp=0.8)
    found = [unroll_at(step, settings) for step in range(100)]
    assert found == sorted(found)
    assert [found.count(n) for n in (1, 2, 3, 4)] == [20, 20, 20, 40]
    assert {unroll_at(step, replace(settings, ramp=0.0)) for step in range(100)} == {4}


@pytest.mark.parametrize(
    "change",
    [
        {"pixel_mean": (0.485, 0.456, 0.406)},
        {"position_offset": 0.0},
        {"frame_size": 98},
        {"frameskip": 4},
    ],
)
def test_latents_are_of_all_that_an_encoder_sees_through(folder, change):
    config = load(folder / "run/model").config
    data = pipeline.open_data(folder / "data", Wall())
    key, other = (
        pipeline.latents_key(data, "x", one) for one in (config, replace(config, **change))
    )
    assert other != key
    assert json.loads(json.dumps(other)) == other


@pytest.fixture(scope="module")
def more(folder):
    """Data beside those of `folder`."""
    collect(Wall(), folder / "more", train=5, validation=3, seed=1)


@pytest.mark.usefixtures("more")
def test_several_data_sets_are_trained_on_as_one(folder, monkeypatch):
    seen = {}

    def remember(world_model, windows, validation, *_arguments, **options):
        seen.update(train=windows, validation=validation, data=options["data"])
        return world_model

    def windows_of(*names):
        monkeypatch.setattr(pipeline, "train", remember)
        folders = [folder / name for name in names]
        train_task(
            Wall(),
            folders[0] if len(folders) == 1 else folders,
            folder / "-".join(names),
            folder / f"latents-{'-'.join(names)}",
            SETTINGS,
            encoder="tiny",
            init=load(folder / "run/model"),
            device="cpu",
        )
        return dict(seen)

    both, first, second = windows_of("data", "more"), windows_of("data"), windows_of("more")
    for split in ("train", "validation"):
        own = [part[split].batch(np.arange(len(part[split]))) for part in (first, second)]
        joined = both[split].batch(np.arange(len(both[split])))
        for name in ("visual", "proprio", "actions"):
            torch.testing.assert_close(
                getattr(joined, name), torch.cat([getattr(part, name) for part in own])
            )
    assert both["data"] != first["data"]


@pytest.mark.usefixtures("more")
def test_frames_of_several_data_sets_are_each_ones_own(folder):
    sets = [open_data(folder / name, Wall()) for name in ("data", "more")]
    splits = [data_set.splits["train"] for data_set in sets]
    joined = end_to_end(splits)
    trajectory, steps = np.array([9, 0, 12, 3]), np.array([2, 5, 0, 1])
    expected = [splits[1], splits[0], splits[1], splits[0]]
    own = trajectory - np.where(trajectory >= 8, 8, 0)
    shown = joined.frames(trajectory, steps)
    for at, split in enumerate(expected):
        np.testing.assert_array_equal(
            shown[at], split.frames(own[at : at + 1], steps[at : at + 1])[0]
        )
