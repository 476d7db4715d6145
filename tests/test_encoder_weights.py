"""Encoder weights: every place they come from, downloads, and models around another encoder.

No test uses the network: downloads come from `file://` addresses or from a planted opener.
"""

import hashlib
import io
import logging
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from encoder_support import (
    TINY,
    assert_same,
    hollow_state,
    seeded_state,
    shapes_of,
    tiny_state,
    to_hugging_face,
    write,
)
from quantwm import loading
from quantwm.cli import app
from quantwm.data.collect import collect
from quantwm.data.statistics import Statistics
from quantwm.describe import describe
from quantwm.envs import Wall
from quantwm.errors import CorruptFileError, MismatchError, QuantWMError, UsageError
from quantwm.models import encoder_weights
from quantwm.models.checkpoint import (
    bundled_encoder_state,
    load_world_model,
    new_world_model,
    save_world_model,
)
from quantwm.models.config import DINOWMConfig, EncoderConfig, PredictorConfig
from quantwm.models.dinov2 import DINOv2, vit_small
from quantwm.models.encoder_weights import (
    RELEASES,
    download_encoder,
    find_encoder,
    open_encoder,
)
from quantwm.training import pipeline
from quantwm.training.pipeline import model_config, train_task
from quantwm.training.train import TrainingSettings


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches of our own, and an opener that fails."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def refuse(url, timeout):
        raise OSError("no network in tests")

    monkeypatch.setattr(encoder_weights, "urlopen", refuse)
    return tmp_path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny release in the place of ViT-B, with the file that its address leads to."""
    payload = write(tmp_path / "server/weights.pth", tiny_state())
    content = payload.read_bytes()
    release = replace(
        RELEASES["dinov2_vitb14"],
        config=TINY,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        url=payload.as_uri(),
    )
    monkeypatch.setitem(RELEASES, "dinov2_vitb14", release)
    return payload


def torch_file(folder):
    return folder / "torch/hub/checkpoints/dinov2_vitb14_pretrain.pth"


def hf_folder(folder, revision="abc"):
    return folder / "hf/hub/models--facebook--dinov2-base/snapshots" / revision


def serve(monkeypatch):
    from urllib.request import urlopen

    monkeypatch.setattr(encoder_weights, "urlopen", urlopen)


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "facebook/dinov2-with-registers-small"])
def test_names_with_registers_are_refused(name):
    with pytest.raises(UsageError, match="with registers is another encoder"):
        open_encoder(name)
    with pytest.raises(UsageError, match="with registers is another encoder"):
        find_encoder(name)


def test_missing_files_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"no encoder file .*nowhere\.pth"):
        open_encoder(str(tmp_path / "nowhere.pth"))
    with pytest.raises(UsageError, match=r"holds no model\.safetensors or pytorch_model\.bin"):
        open_encoder(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'dinov2_vitb14'"):
        open_encoder("dinov2_vitb")
    with pytest.raises(UsageError, match="did you mean 'torch-hub'"):
        find_encoder(places=("torchhub",))


def test_the_package_comes_before_the_caches(tmp_path):
    cached = tmp_path / "torch/hub/checkpoints/dinov2_vits14_pretrain.pth"
    write(cached, hollow_state(vit_small()))
    assert_same(find_encoder(), bundled_encoder_state())
    other = find_encoder("dinov2_vits14", places=("torch-hub",))
    assert other["cls_token"].unique().tolist() == [0.5]


@pytest.mark.parametrize("place", ["torch-hub", "hugging-face", "hugging-face-bin"])
def test_caches_are_found_through_the_environment(caches, tiny, place):
    if place == "torch-hub":
        write(torch_file(caches), tiny_state(1))
    else:
        name = "pytorch_model.bin" if place.endswith("bin") else "model.safetensors"
        write(hf_folder(caches) / name, to_hugging_face(tiny_state(1)))
    assert_same(find_encoder("dinov2_vitb14"), tiny_state(1))


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"])
def test_hugging_faces_own_variables_are_honoured(tmp_path, tiny, monkeypatch, variable):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    below = "huggingface/hub" if variable == "XDG_CACHE_HOME" else ""
    folder = tmp_path / "elsewhere" / below / "models--facebook--dinov2-base/snapshots/abc"
    write(folder / "model.safetensors", to_hugging_face(tiny_state(1)))
    assert_same(find_encoder("dinov2_vitb14"), tiny_state(1))


def test_the_revision_that_main_names_is_taken(caches, tiny):
    for seed, revision in ((1, "aaa"), (2, "bbb"), (3, "ccc")):
        folder = hf_folder(caches, revision)
        write(folder / "model.safetensors", to_hugging_face(tiny_state(seed)))
    main = folder.parents[1] / "refs/main"
    main.parent.mkdir()
    main.write_text("bbb")
    assert_same(open_encoder("facebook/dinov2-base").state, tiny_state(2))


def test_a_damaged_cache_is_reported_and_passed_over(caches, tiny, caplog):
    write(torch_file(caches), tiny_state(1))
    torch_file(caches).write_bytes(torch_file(caches).read_bytes()[:1000])
    write(hf_folder(caches) / "model.safetensors", to_hugging_face(tiny_state(2)))
    with caplog.at_level(logging.WARNING):
        assert_same(find_encoder("dinov2_vitb14"), tiny_state(2))
    assert str(torch_file(caches)) in caplog.text


def test_one_message_lists_every_place_and_what_it_held(caches, tiny):
    with pytest.raises(UsageError) as caught:
        find_encoder("dinov2_vitb14")
    message = str(caught.value)
    assert f"{torch_file(caches)} is not there" in message
    assert f"{hf_folder(caches, '*')}/model.safetensors is not there" in message
    assert f"download from {tiny.as_uri()}: not asked for" in message

    write(torch_file(caches), tiny_state(1))
    torch_file(caches).write_bytes(torch_file(caches).read_bytes()[:1000])
    wider = to_hugging_face(seeded_state(shapes_of(DINOv2(2, 48, 3))))
    write(hf_folder(caches) / "model.safetensors", wider)
    with pytest.raises(CorruptFileError) as caught:
        find_encoder("dinov2_vitb14", download=True)
    message = str(caught.value)
    assert f"has 1000 bytes of the official file's {RELEASES['dinov2_vitb14'].size}" in message
    assert "width 48" in message
    assert "no network in tests" in message


def test_a_download_lands_in_torch_hubs_cache_and_is_used_again(caches, tiny, monkeypatch):
    serve(monkeypatch)
    seen = []
    state = find_encoder("dinov2_vitb14", download=True, progress=lambda *p: seen.append(p))
    assert_same(state, tiny_state())
    size = tiny.stat().st_size
    assert seen[-1] == (size, size)
    assert torch_file(caches).read_bytes() == tiny.read_bytes()
    tiny.unlink()
    assert_same(find_encoder("dinov2_vitb14", download=True), tiny_state())
    assert download_encoder("dinov2_vitb14") == torch_file(caches)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda content: content[:-10], "bytes of"),
        (lambda content: content + b"more", "bytes of"),
        (lambda content: content[:-1] + b"\x01", "not the checksum"),
    ],
)
def test_what_arrives_wrong_is_not_kept(caches, tiny, monkeypatch, change, hint):
    serve(monkeypatch)
    tiny.write_bytes(change(tiny.read_bytes()))
    with pytest.raises(CorruptFileError, match=hint):
        download_encoder("dinov2_vitb14")
    assert list(torch_file(caches).parent.iterdir()) == []


def test_a_connection_that_breaks_leaves_nothing(caches, tiny, monkeypatch):
    class Breaking(io.BytesIO):
        def read(self, size):
            chunk = super().read(100)
            if self.tell() > 1000:
                raise ConnectionResetError("reset by peer")
            return chunk

    content = tiny.read_bytes()
    monkeypatch.setattr(encoder_weights, "urlopen", lambda url, timeout: Breaking(content))
    with pytest.raises(QuantWMError, match=r"cannot fetch .*reset by peer"):
        download_encoder("dinov2_vitb14")
    assert list(torch_file(caches).parent.iterdir()) == []


def test_a_failed_download_leaves_the_damaged_file_that_was_there(caches, tiny):
    torch_file(caches).parent.mkdir(parents=True)
    torch_file(caches).write_bytes(b"half")
    with pytest.raises(QuantWMError, match="no network"):
        download_encoder("dinov2_vitb14")
    assert torch_file(caches).read_bytes() == b"half"


def test_a_model_around_another_encoder_stores_it(tmp_path):
    config = DINOWMConfig(
        task="wall",
        action_dim=2,
        proprio_dim=2,
        encoder=TINY,
        image_size=28,
        predictor=PredictorConfig(1, 1, 8, 16),
    )
    model = new_world_model(config, tiny_state(5))
    save_world_model(model, tmp_path / "model")
    again = load_world_model(tmp_path / "model")
    assert_same(dict(again.encoder.state_dict()), tiny_state(5))
    with pytest.raises(UsageError, match="find_encoder"):
        new_world_model(config)
    with pytest.raises(MismatchError, match="do not fit"):
        new_world_model(replace(config, encoder=EncoderConfig()), tiny_state(5))


def test_the_official_vit_small_is_not_taken_for_the_bundled_one(tmp_path):
    """It has the same size, but its weights were not rounded to float16."""
    state = bundled_encoder_state()
    state["norm.bias"] = state["norm.bias"] * (1 + 2.0**-20)
    config = DINOWMConfig(
        task="wall", action_dim=2, proprio_dim=2, predictor=PredictorConfig(1, 1, 8, 16)
    )
    save_world_model(new_world_model(config, state), tmp_path / "model")
    assert_same(dict(load_world_model(tmp_path / "model").encoder.state_dict()), state)


@pytest.mark.parametrize("scale", ["compact", "paper"])
def test_the_predictors_width_follows_the_encoder(scale):
    statistics = Statistics((0.0, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, 1.0))
    config = model_config(Wall(), statistics, scale, RELEASES["dinov2_vitb14"].config)
    assert config.token_width == 768 + 20
    assert model_config(Wall(), statistics, scale).token_width == 384 + 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    collect(Wall(), folder, train=8, validation=4)
    return folder


def test_training_with_another_encoder_from_a_cache_to_a_stored_model(caches, tiny, data):
    write(torch_file(caches), tiny_state(7))
    settings = TrainingSettings(steps=2, batch_size=4, warmup=1)
    run = {"task": Wall(), "data": data, "cache": caches / "latents", "settings": settings}
    train_task(**run, out=caches / "run", encoder="dinov2_vitb14", device="cpu")
    stored = loading.load(caches / "run/model")
    assert stored.config.encoder == TINY
    assert stored.predictor.width == 24 + 20
    assert_same(dict(stored.encoder.state_dict()), tiny_state(7))

    write(torch_file(caches), tiny_state(8))  # the same size, other weights
    with pytest.raises(MismatchError, match="another encoder"):
        train_task(**run, out=caches / "other", encoder="dinov2_vitb14", device="cpu")
    run["cache"] = caches / "other-latents"
    with pytest.raises(MismatchError, match="other settings, another model"):
        train_task(**run, out=caches / "run", encoder="dinov2_vitb14", device="cpu")


def test_the_command_line_downloads_unless_told_not_to(caches, tiny, data, monkeypatch):
    serve(monkeypatch)
    command = ["train", "wall", "--data", str(data), "--out", str(caches / "run")]
    command += ["--encoder", "dinov2_vitb14", "--steps", "1", "--batch-size", "2"]
    command += ["--device", "cpu"]
    refused = CliRunner().invoke(app, [*command, "--no-download"])
    assert refused.exit_code == 2
    assert not torch_file(caches).exists()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert torch_file(caches).read_bytes() == tiny.read_bytes()
    assert loading.load(caches / "run/model").config.encoder == TINY


def test_a_finished_run_gets_a_decoder_that_draws(caches, tiny, data, monkeypatch):
    write(torch_file(caches), tiny_state(7))
    monkeypatch.setitem(
        pipeline.DECODER_SIZES, "compact", {"channel": 8, "n_res_block": 1, "n_res_channel": 4}
    )
    command = ["train", "wall", "--data", str(data), "--out", str(caches / "run")]
    command += ["--encoder", "dinov2_vitb14", "--steps", "1", "--batch-size", "2"]
    command += ["--device", "cpu"]
    imagine = ["imagine", str(caches / "run/model"), "--out", str(caches / "x.png")]
    imagine += ["--episodes", "1", "--steps", "2"]
    assert CliRunner().invoke(app, command).exit_code == 0
    plain = dict(loading.load(caches / "run/model").named_parameters())
    assert "no decoder" in CliRunner().invoke(app, imagine).output

    done = CliRunner().invoke(app, [*command, "--decoder", "vqvae", "--decoder-steps", "2"])
    assert done.exit_code == 0, done.output
    assert len((caches / "run/decoder/curve.jsonl").read_text().splitlines()) == 1
    drawing = loading.load(caches / "run/model")
    assert drawing.config.decoder.channel == 8
    assert_same({k: v for k, v in drawing.named_parameters() if k in plain}, plain)
    assert CliRunner().invoke(app, imagine).exit_code == 0
    assert (caches / "x.png").stat().st_size > 0
    assert describe(str(caches / "run/model"))["parameters"]["decoder"] > 0
    refused = CliRunner().invoke(app, [*command, "--decoder", "vqgan"])
    assert refused.exit_code == 2
    assert "vqvae" in refused.output
