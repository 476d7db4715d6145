"""Checkpoints of DINO-WM's public code: the same numbers as there, its settings, its statistics.

The fixtures come from its own classes, see `scripts/record_checkpoints.py`. Of visual latents and
pictures they hold a sample of the values and the norms of all tokens and rows.
"""

import json
import lzma
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import quantwm as qwm
from checkpoint_support import parts, saved, settings, write_folder
from quantwm.data.collect import collect
from quantwm.data.dino_wm_layout import PUSHT_STATISTICS
from quantwm.data.sources import open_data
from quantwm.data.statistics import Statistics
from quantwm.envs import PointMaze, Wall
from quantwm.errors import (
    CorruptFileError,
    MismatchError,
    MissingStatisticsError,
    UsageError,
)
from quantwm.models.dino_wm_checkpoint import read_checkpoint
from quantwm.models.hydra_settings import read_settings
from quantwm.planning.objective import Objective
from reference_support import (
    assert_close,
    assert_sample_close,
    blocky_frames,
    drawn_latents,
    read_arrays,
    sampled,
)
from test_cli import run
from test_dino_wm_data import write_point_maze, write_wall

FIXTURES = Path(__file__).parent / "fixtures/checkpoints"
CASES = ["concat0_hist1", "concat0_hist3", "concat1_hist1", "concat1_hist3", "class_token"]
WITH_PICTURES = {"concat1_hist3": "vqvae", "class_token": "transposed_conv"}
STATISTICS = ("action_mean", "action_std", "proprio_mean", "proprio_std")


def unpack(case, folder):
    """A recorded folder as the public code leaves it."""
    packed = (FIXTURES / case / "model_latest.pth.xz").read_bytes()
    return write_folder(
        folder, lzma.decompress(packed), (FIXTURES / case / "hydra.yaml").read_text()
    )


@cache
def expected(case):
    return read_arrays(FIXTURES / case / "expected.npz")


def write_statistics(case, path):
    path.write_text(json.dumps({name: expected(case)[name].tolist() for name in STATISTICS}))
    return path


def tiny(folder, content=None, **changes):
    """A folder of SETTINGS with changes."""
    return write_folder(
        folder,
        saved(parts() if content is None else content),
        yaml.safe_dump(settings(**changes)),
    )


@pytest.fixture(params=CASES)
def loaded(request, tmp_path):
    """A recorded case and our model of it, with the statistics it was recorded with."""
    folder = unpack(request.param, tmp_path / "run")
    stats = write_statistics(request.param, tmp_path / "stats.json")
    return request.param, qwm.load(folder, stats=stats), folder


@torch.no_grad()
def test_latents_rollouts_and_costs_are_those_of_the_public_code(loaded):
    case, model, _ = loaded
    arrays = expected(case)
    latent = model.encode({"visual": blocky_frames(), "proprio": arrays["proprio"].numpy()})
    assert_sample_close(latent["visual"], arrays, "encode/visual")
    assert_close(latent["proprio"], arrays["encode/proprio"], "encoded proprio")
    start = {name: value[:, :1] for name, value in latent.items()}
    goal = {name: value[:, -1:] for name, value in latent.items()}
    rolled = model.rollout(start, arrays["actions"])
    latents = {k: v for k, v in arrays.items() if k.startswith("rollout/0/")}
    for frame in range(rolled["proprio"].shape[2] - 1):
        theirs = {k: v[:, frame] for k, v in latents.items()}
        assert_sample_close(rolled["visual"][0, :, frame + 1], theirs, "rollout/0/visual")
        ours = rolled["proprio"][0, :, frame + 1]
        assert_close(ours, theirs["rollout/0/proprio"], f"proprio {frame}")
    for mode in ("last", "all"):
        objective = Objective({"visual": 1.0, "proprio": 0.5}, mode=mode, base=2.0)
        assert_close(objective(rolled, goal)[0], arrays[f"cost/{mode}/0"], f"cost {mode}")


def test_decoders_draw_the_pictures_of_the_public_code(loaded):
    case, model, _ = loaded
    assert (model.decoder is not None) == (case in WITH_PICTURES)
    if case not in WITH_PICTURES:
        with pytest.raises(UsageError, match="no decoder"):
            model.decode(torch.zeros(1, 1, 1, 384))
        return
    assert model.config.decoder.kind == WITH_PICTURES[case]
    arrays = expected(case)
    side = arrays["decode/norms"].shape[-1]
    latent = drawn_latents(model.config.num_patches)
    with torch.no_grad():
        assert_sample_close(model.decoder(latent[0])[None], arrays, "decode")
    frames = model.decode(latent, side=side)
    assert frames.shape == (1, 2, side, side, 3)
    exact = (arrays["decode/values"].clamp(-1, 1) + 1) * 127.5
    shown = sampled(frames.float().movedim(-1, 2))["values"]
    assert (shown - exact).abs().max() <= 0.51
    assert model.decode(latent).shape[-2] == 224


def test_a_decoder_survives_saving_and_is_no_part_of_what_is_quantized(tmp_path):
    stats = write_statistics("concat1_hist3", tmp_path / "stats.json")
    model = qwm.load(unpack("concat1_hist3", tmp_path / "run"), stats=stats)
    latent = drawn_latents(9)
    qwm.save(model, tmp_path / "copy")
    assert torch.equal(qwm.load(tmp_path / "copy").decode(latent), model.decode(latent))
    small = qwm.quantize(model, qwm.QuantPlan.parse("w4"), None)
    assert torch.equal(small.decode(latent), model.decode(latent))
    qwm.save(small, tmp_path / "small")
    assert torch.equal(qwm.load(tmp_path / "small").decode(latent), model.decode(latent))


def test_a_decoder_of_another_width_than_the_settings_is_refused(tmp_path):
    folder = unpack("concat1_hist3", tmp_path / "run")
    hydra = yaml.safe_load((folder / "hydra.yaml").read_text())
    hydra["decoder"]["n_res_channel"] = 5
    (folder / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    with pytest.raises(CorruptFileError, match=r"decoder\.\S+: \(4, 4, 3, 3\), .* make \(5"):
        qwm.load(folder)


def test_a_decoder_that_cannot_draw_its_models_latents_is_left_out_with_a_word(tmp_path, caplog):
    model = qwm.load(unpack("concat0_hist1", tmp_path / "run"))
    assert model.config.decoder is None
    assert "takes one token a frame, its latents have 4" in caplog.text


def test_settings_of_the_run_become_the_models(loaded):
    _, model, folder = loaded
    public = yaml.safe_load((folder / "hydra.yaml").read_text())
    config = model.config
    assert config.task == public["env"]["name"]
    for name in (
        "num_hist",
        "concat_dim",
        "frameskip",
        "action_emb_dim",
        "proprio_emb_dim",
        "num_action_repeat",
        "num_proprio_repeat",
    ):
        assert getattr(config, name) == public[name], name
    assert (config.image_size, config.frame_size) == (
        public["img_size"] // 16 * 14,
        public["img_size"],
    )
    assert config.predictor.depth == public["predictor"]["depth"]
    assert config.predictor.heads == public["predictor"]["heads"]
    assert config.predictor.head_dim == public["predictor"].get("dim_head", 64)
    assert model.objective_weights["proprio"] == (0.0 if config.task == "point_maze" else 1.0)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_settings_that_the_public_code_ships_give_the_paper_scale(tmp_path):
    public = yaml.safe_load((FIXTURES / "concat1_hist1/hydra.yaml").read_text())
    public["img_size"] = public["model"]["image_size"] = 224
    public["env"]["dataset"]["transform"]["img_size"] = "${img_size}"
    (tmp_path / "hydra.yaml").write_text(yaml.safe_dump(public))
    read = read_settings(tmp_path / "hydra.yaml")
    assert (read.image_size, read.frame_size) == (196, None)
    assert read.predictor.head_dim == 64
    assert (read.normalize, read.rollouts, read.trained_encoder) == (True, None, False)


@pytest.mark.parametrize(
    ("layer", "attention", "mlp"),
    [
        ("transformer.layers.0.{}", "0", "1"),
        ("layers.0.{}", "0", "1"),
        ("layers.0.{}", "attn", "mlp"),
        ("transformer.layers.0.{}", "attn", "ff"),
    ],
)
def test_every_variant_of_the_predictors_names_is_the_same_model(tmp_path, layer, attention, mlp):
    content = parts(layer, attention, mlp)
    content["predictor"][layer.format(attention) + ".bias"] = torch.ones(1, 1, 4, 4)
    model = read_checkpoint(tiny(tmp_path / "run", content)).world_model
    reference = parts()["predictor"]
    block = model.predictor.blocks[0]
    assert torch.equal(block.attn.qkv.weight, reference["transformer.layers.0.0.to_qkv.weight"])
    assert torch.equal(block.mlp.fc2.bias, reference["transformer.layers.0.1.net.4.bias"])
    assert torch.equal(block.norm2.weight, reference["transformer.layers.0.1.net.0.weight"])
    assert torch.equal(model.predictor.norm.bias, reference["transformer.norm.bias"])


def test_a_trained_encoder_is_taken_from_the_file(tmp_path):
    bundled = read_checkpoint(tiny(tmp_path / "frozen")).world_model.encoder.state_dict()
    content = parts()
    content["encoder"] = {f"base_model.{k}": v.half() for k, v in bundled.items()}
    content["encoder"]["base_model.norm.bias"] = torch.full((384,), 0.5)
    folder = tiny(tmp_path / "run", content, model__train_encoder=True)
    encoder = read_checkpoint(folder).world_model.encoder
    assert torch.equal(encoder.norm.bias, torch.full((384,), 0.5))
    assert torch.equal(encoder.pos_embed, bundled["pos_embed"].half().float())


def test_the_latest_checkpoint_is_taken_or_else_the_highest_epoch(tmp_path):
    folder = tiny(tmp_path / "run")
    weights = folder / "checkpoints"
    (weights / "model_latest.pth").rename(weights / "model_10.pth")
    (weights / "model_9.pth").write_bytes(b"")
    read = read_checkpoint(folder)
    assert (read.file.name, read.epoch) == ("model_10.pth", 3)
    (weights / "model_latest.pth").write_bytes(saved(parts() | {"epoch": 11}))
    assert read_checkpoint(folder).epoch == 11


def test_heads_that_contradict_the_settings_are_refused(tmp_path):
    """Two heads of 8 and four of 4 have the same shapes and another meaning."""
    folder = unpack("concat1_hist3", tmp_path / "run")
    public = yaml.safe_load((folder / "hydra.yaml").read_text())
    public["predictor"] |= {"heads": 4, "dim_head": 4}
    (folder / "hydra.yaml").write_text(yaml.safe_dump(public))
    with pytest.raises(CorruptFileError, match=r"2 heads, hydra.yaml says predictor.heads = 4"):
        qwm.load(folder)


def test_without_statistics_a_model_predicts_and_its_plans_cannot_be_executed(tmp_path):
    model = qwm.load(tiny(tmp_path / "run"))
    assert model.action_spec.mean is None
    visual = np.zeros((1, 1, 224, 224, 3), np.uint8)
    latent = model.encode({"visual": visual, "proprio": np.zeros((1, 1, 2), np.float32)})
    assert model.rollout(latent, torch.zeros(1, 1, 2, 10))["visual"].shape == (1, 1, 3, 4, 384)
    with pytest.raises(MissingStatisticsError, match="data set it was trained on, or a statistics"):
        model.action_spec.denormalize(torch.zeros(1, 1, 10))


@pytest.mark.parametrize(
    ("write", "task", "proprio"), [(write_wall, Wall(), 2), (write_point_maze, PointMaze(), 4)]
)
def test_statistics_come_from_the_public_codes_data_set(tmp_path, write, task, proprio):
    data = write(tmp_path / "data")
    content = parts()
    content["proprio_encoder"]["patch_embed.weight"] = torch.zeros(10, proprio, 1)
    folder = tiny(tmp_path / "run", content, env__name=task.name)
    model = qwm.load(folder, data=data)
    expected_statistics = open_data(data, task).statistics
    assert {name: getattr(model.config, name) for name in STATISTICS} == (
        expected_statistics.to_dict()
    )
    assert model.action_spec.std == expected_statistics.action_std


def test_statistics_of_part_of_a_data_set_are_not_taken_from_all_of_it(tmp_path):
    data = write_wall(tmp_path / "data")
    folder = tiny(tmp_path / "run", env__dataset__n_rollout=4)
    with pytest.raises(UsageError, match="first 4 trajectories"):
        qwm.load(folder, data=data)
    with pytest.raises(MismatchError, match="wall"):
        qwm.load(tiny(tmp_path / "other"), data=write_point_maze(tmp_path / "maze"))


def test_pusht_has_the_public_codes_constants_and_a_run_without_normalisation_none(tmp_path):
    content = parts()
    content["proprio_encoder"]["patch_embed.weight"] = torch.zeros(10, 4, 1)
    pusht = qwm.load(tiny(tmp_path / "pusht", content, env__name="pusht"))
    assert pusht.config.proprio_std == PUSHT_STATISTICS.proprio_std
    assert pusht.action_spec.mean == PUSHT_STATISTICS.action_mean
    plain = qwm.load(tiny(tmp_path / "plain", env__dataset__normalize_action=False))
    assert (plain.action_spec.mean, plain.action_spec.std) == ((0.0, 0.0), (1.0, 1.0))


def test_a_data_set_of_other_statistics_than_the_runs_is_refused(tmp_path):
    plain = tiny(tmp_path / "plain", env__dataset__normalize_action=False)
    with pytest.raises(MismatchError, match="leave data out"):
        qwm.load(plain, data=write_wall(tmp_path / "data"))
    collect(Wall(), tmp_path / "own", train=2, validation=1)
    with pytest.raises(MismatchError, match="a data set of DINO-WM"):
        qwm.load(tiny(tmp_path / "run"), data=tmp_path / "own")


def test_another_tasks_widths_are_refused(tmp_path):
    with pytest.raises(UsageError, match="proprios of width 2, quantwm's pusht has width 4"):
        qwm.load(tiny(tmp_path / "run", env__name="pusht"))


HUGE = json.dumps({field.name: [10**400] for field in fields(Statistics)})
"""An integer that no float holds."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "no names"),
        ('{"action_mean": [1, 2]}', "must be"),
        ('{"action_mean": 1, "action_std": [1], "proprio_mean": [1], "proprio_std": [1]}', "list"),
        ('{"action_mean":[NaN],"action_std":[1],"proprio_mean":[1],"proprio_std":[1]}', "finite"),
        ('{"action_mean":[1],"action_std":[0],"proprio_mean":[1],"proprio_std":[1]}', "positive"),
        (HUGE, "finite"),
    ],
    ids=range(7),
)
def test_a_statistics_file_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "stats.json"
    path.write_text(text)
    with pytest.raises(CorruptFileError, match=message):
        Statistics.read(path)


def test_folders_that_are_no_checkpoint_say_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"neither quantwm.json .* nor hydra.yaml and checkpoints"):
        qwm.load(tmp_path / "empty")
    folder = tiny(tmp_path / "run")
    with pytest.raises(UsageError, match="is a file: give the model's folder"):
        qwm.load(folder / "checkpoints/model_latest.pth")
    (folder / "hydra.yaml").unlink()
    with pytest.raises(UsageError, match=r"it lacks hydra.yaml:"):
        qwm.load(folder)
    (folder / "checkpoints/model_latest.pth").rename(folder / "hydra.yaml")
    with pytest.raises(UsageError, match=r"it lacks checkpoints/model_latest.pth:"):
        qwm.load(folder)


def test_convert_writes_a_model_that_loads_to_the_same(tmp_path):
    folder = unpack("concat1_hist1", tmp_path / "run")
    stats = write_statistics("concat1_hist1", tmp_path / "stats.json")
    result = run("convert", folder, tmp_path / "out", "--stats", stats, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["statistics"] is True
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", "quantwm.json"}
    ours, theirs = qwm.load(tmp_path / "out"), qwm.load(folder, stats=stats)
    assert ours.config == theirs.config
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    with pytest.raises(UsageError, match="statistics of its own"):
        qwm.load(tmp_path / "out", stats=stats)


def test_a_converted_model_takes_statistics_later(tmp_path):
    folder = tiny(tmp_path / "run")
    result = run("convert", folder, tmp_path / "out")
    assert "without statistics" in " ".join(result.output.split())
    stats = write_statistics("concat1_hist1", tmp_path / "stats.json")
    assert qwm.load(tmp_path / "out").action_spec.mean is None
    assert qwm.load(tmp_path / "out", stats=stats).action_spec.std == (0.75, 0.5)


def test_info_describes_a_checkpoint(tmp_path):
    result = run("info", tiny(tmp_path / "run"), "--json")
    facts = json.loads(result.output)
    assert facts["kind"] == "world model, float, in a checkpoint of DINO-WM's public code"
    assert facts["statistics"].startswith("none")
    assert facts["config"]["num_hist"] == 1
