"""DINO-WM: encoding, rollouts, its declaration, and its files."""

import json

import numpy as np
import pytest
import torch

from dino_wm_support import observation, tiny_config, tiny_model
from quantwm import loading
from quantwm.errors import CorruptFileError, MissingStatisticsError, UsageError
from quantwm.models import checkpoint
from quantwm.models.checkpoint import load_world_model, save_world_model
from quantwm.models.config import DINOWMConfig, PredictorConfig
from quantwm.models.dino_wm import DINOWM


@torch.no_grad()
@pytest.mark.parametrize("concat_dim", [0, 1])
def test_candidates_and_episodes_do_not_see_each_other(concat_dim):
    model = tiny_model(concat_dim=concat_dim)
    latent = model.encode(observation(batch=3))
    actions = torch.randn(3, 4, 5, 10)
    together = model.rollout(latent, actions)["visual"]
    alone = model.rollout({k: v[1:2] for k, v in latent.items()}, actions[1:2, 2:3])["visual"]
    torch.testing.assert_close(together[1, 2], alone[0, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pooled_tokens_are_means_over_squares_of_the_grid():
    plain, pooled = (tiny_model(image_size=56, token_pool=pool) for pool in (1, 2))
    pooled.encoder.load_state_dict(plain.encoder.state_dict())
    grid = plain.encode(observation())["visual"].view(2, 1, 4, 4, 24)
    found = pooled.encode(observation())["visual"]
    assert found.shape == (2, 1, 4, 24)
    torch.testing.assert_close(found[:, :, 1], grid[:, :, :2, 2:].mean((2, 3)))
    torch.testing.assert_close(found[:, :, 2], grid[:, :, 2:, :2].mean((2, 3)))
    rolled = pooled.rollout(pooled.encode(observation()), torch.randn(2, 3, 5, 10))
    assert rolled["visual"].shape == (2, 3, 6, 4, 24)


def test_a_pool_must_divide_the_grid_and_is_written_only_where_it_pools():
    with pytest.raises(UsageError, match="token_pool 3 does not divide the grid of 4"):
        tiny_config(image_size=56, token_pool=3)
    assert "token_pool" not in tiny_config().to_dict()
    pooled = tiny_config(image_size=56, token_pool=2)
    assert DINOWMConfig.from_dict(pooled.to_dict()) == pooled


@torch.no_grad()
@pytest.mark.parametrize("num_hist", [1, 2, 3])
def test_last_only_is_the_last_frame_of_the_whole_rollout(num_hist):
    model = tiny_model(num_hist=num_hist)
    latent = model.encode(observation())
    actions = torch.randn(2, 3, 5, 10)
    whole, last = model.rollout(latent, actions), model.rollout(latent, actions, last_only=True)
    assert whole["visual"].shape == (2, 3, 6, 4, 24)
    assert whole["proprio"].shape == (2, 3, 6, 10)
    for name in whole:
        torch.testing.assert_close(whole[name][:, :, -1:], last[name])
        torch.testing.assert_close(
            whole[name][:, :, 0], latent[name].expand_as(whole[name][:, :, 0])
        )


@torch.no_grad()
def test_an_earlier_frame_does_not_see_a_later_one():
    model = tiny_model(num_hist=3)
    tokens = torch.randn(1, 3, 4, 44)
    changed = tokens.clone()
    changed[:, 2] += 1
    before, after = model.predict(tokens), model.predict(changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


@torch.no_grad()
def test_training_mode_drops_and_evaluation_mode_does_not():
    model = tiny_model(predictor=PredictorConfig(2, 2, 8, 32, dropout=0.5))
    tokens = torch.randn(1, 2, 4, 44)
    assert torch.equal(model.predict(tokens), model.predict(tokens))
    model.train()
    assert not torch.equal(model.predict(tokens), model.predict(tokens))


def test_declared_layers_exist_and_cover_every_block_linear():
    model = tiny_model()
    modules = dict(model.named_modules())
    declared = [name for group in model.quantizable_groups() for name in group.layers]
    assert len(declared) == len(set(declared))
    linears = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    default = {
        name
        for group in model.quantizable_groups()
        if group.kind == "linear"
        for name in group.layers
    }
    assert default == linears
    for group in model.quantizable_groups():
        assert set(group.layers) <= set(modules)
        assert group.producer is None or isinstance(modules[group.producer], torch.nn.LayerNorm)
        assert group.block in modules


def test_paper_scale_declares_seventy_two_linears():
    with torch.device("meta"):
        model = DINOWM(DINOWMConfig(task="wall", action_dim=2, proprio_dim=2))
    groups = [group for group in model.quantizable_groups() if group.kind == "linear"]
    assert sum(len(group.layers) for group in groups) == 72
    assert model.config.token_width == 404
    assert sum(p.numel() for p in model.predictor.parameters()) == pytest.approx(20e6, rel=0.1)


def test_without_statistics_it_encodes_but_cannot_plan():
    nothing = dict.fromkeys(["action_mean", "action_std", "proprio_mean", "proprio_std"])
    model = tiny_model(**nothing)
    assert torch.isfinite(model.encode(observation())["visual"]).all()
    with pytest.raises(MissingStatisticsError, match="statistics"):
        model.action_spec.denormalize(torch.zeros(1, 5, 10))


def test_denormalizing_unfolds_the_frameskip():
    raw = tiny_model().action_spec.denormalize(torch.arange(20.0).reshape(2, 10))
    assert raw.shape == (10, 2)
    np.testing.assert_allclose(raw[0], [0 * 0.5 + 0.0, 1 * 0.6 + 0.1])
    np.testing.assert_allclose(raw[5], [10 * 0.5, 11 * 0.6 + 0.1])


def test_normalizing_folds_it_back():
    spec, raw = tiny_model().action_spec, np.arange(20.0).reshape(10, 2)
    folded = spec.normalize(raw)
    assert (folded.shape, folded.dtype) == ((2, 10), torch.float32)
    np.testing.assert_allclose(folded[0, :2], [0.0, (1 - 0.1) / 0.6], rtol=1e-6)
    np.testing.assert_allclose(spec.denormalize(folded), raw, atol=1e-5)
    with pytest.raises(UsageError, match="9 actions are no multiple"):
        spec.normalize(raw[1:])
    nothing = dict.fromkeys(["action_mean", "action_std", "proprio_mean", "proprio_std"])
    with pytest.raises(MissingStatisticsError, match="statistics"):
        tiny_model(**nothing).action_spec.normalize(raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concat_dim": 2}, "concat_dim must be 0 or 1"),
        ({"image_size": 30}, "no multiple of the patch"),
        ({"action_std": (0.0, 1.0)}, "must be positive"),
        ({"action_mean": (0.0,)}, "needs 2 values"),
    ],
)
def test_contradictory_configurations_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        tiny_config(**changes)


def test_configuration_round_trips_and_names_unknown_settings():
    config = tiny_config()
    assert DINOWMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UsageError, match="did you mean 'num_hist'"):
        DINOWMConfig.from_dict({**config.to_dict(), "num_hists": 3})


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model = tiny_model()
    loading.save(model, tmp_path / "model")
    again = loading.load(tmp_path / "model")
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_model_around_the_bundled_encoder_does_not_store_it_again(tmp_path):
    config = DINOWMConfig(
        task="wall",
        action_dim=2,
        proprio_dim=2,
        image_size=98,
        num_hist=1,
        predictor=PredictorConfig(1, 1, 8, 16),
    )
    model = checkpoint.new_world_model(config)
    save_world_model(model, tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").stat().st_size < 1_000_000
    again = load_world_model(tmp_path / "model")
    assert torch.equal(again.encoder.pos_embed, model.encoder.pos_embed)
    # In another type it is another encoder, although that one's values are float16's.
    save_world_model(model.half(), tmp_path / "half")
    for name, value in load_world_model(tmp_path / "half").state_dict().items():
        assert value.dtype == model.state_dict()[name].dtype, name
        assert torch.equal(value, model.state_dict()[name]), name


def test_damaged_files_are_recognised(tmp_path):
    save_world_model(tiny_model(), tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(CorruptFileError, match="checksum"):
        load_world_model(tmp_path / "model")
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFileError, match="checksum"):
        load_world_model(tmp_path / "model")
    weights.unlink()
    with pytest.raises(CorruptFileError, match="missing"):
        load_world_model(tmp_path / "model")


def test_a_damaged_bundled_encoder_is_recognised(tmp_path, monkeypatch):
    damaged = tmp_path / "dinov2_vits14.safetensors"
    damaged.write_bytes((checkpoint.BUNDLED_FOLDER / damaged.name).read_bytes()[:1000])
    monkeypatch.setattr(checkpoint, "BUNDLED_FOLDER", tmp_path)
    checkpoint._bundled_encoder.cache_clear()
    try:
        with pytest.raises(CorruptFileError, match="do not match their checksum"):
            checkpoint.bundled_encoder_state()
    finally:
        checkpoint._bundled_encoder.cache_clear()


def test_unknown_models_are_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'wall'"):
        loading.load("wal")
    with pytest.raises(UsageError, match="no saved model"):
        loading.load(tmp_path)
