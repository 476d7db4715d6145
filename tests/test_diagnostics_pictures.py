"""Pictures of what a model imagines, beside what happens."""

import numpy as np
import pytest
from PIL import Image

import quantwm as qwm
from dino_wm_support import tiny_model
from quantwm.diagnostics.pictures import (
    imagined_frames,
    row_labels,
    strip,
    true_frames,
    validation_excerpts,
)
from quantwm.envs import Wall
from quantwm.errors import MissingStatisticsError, UsageError
from quantwm.models.config import DecoderConfig
from test_cli import run

DECODER = DecoderConfig(channel=8, n_res_block=1, n_res_channel=4)


def drawing_model(seed=0, **changes):
    return tiny_model(seed, decoder=DECODER, **changes)


def test_true_frames_are_the_states_a_model_step_apart():
    excerpts = validation_excerpts(Wall(), episodes=2, steps=10)
    frames = true_frames(excerpts, frameskip=5, side=224)
    assert frames.shape == (2, 3, 224, 224, 3)
    last = Wall().observe(excerpts.states[:, 10:11], excerpts.layout)["visual"]
    np.testing.assert_array_equal(frames[:, 2], last[:, 0])
    replayed = Wall().rollout(excerpts.states[:, 0], excerpts.layout, excerpts.actions)
    np.testing.assert_allclose(replayed, excerpts.states[:, 1:])


def test_imagined_frames_follow_the_actions_as_the_model_understands_them():
    excerpts = validation_excerpts(Wall(), episodes=2, steps=10)
    model = drawing_model()
    drawn = imagined_frames(model, excerpts, side=64)
    assert drawn.shape == (2, 3, 64, 64, 3)
    latent = model.encode(Wall().observe(excerpts.states[:, :1], excerpts.layout))
    np.testing.assert_array_equal(drawn[:, 0], model.decode(latent["visual"], 64)[:, 0].numpy())
    # The same raw actions under other statistics are other model actions.
    other = imagined_frames(drawing_model(action_std=(0.1, 0.1)), excerpts, side=64)
    np.testing.assert_array_equal(other[:, 0], drawn[:, 0])
    assert (other[:, 1:] != drawn[:, 1:]).any()


def test_models_that_cannot_draw_say_why():
    excerpts = validation_excerpts(Wall(), episodes=1, steps=10)
    with pytest.raises(UsageError, match="no decoder"):
        imagined_frames(tiny_model(), excerpts)
    with pytest.raises(MissingStatisticsError):
        imagined_frames(drawing_model(action_mean=None, action_std=None), excerpts)
    with pytest.raises(UsageError, match="take fewer steps"):
        validation_excerpts(Wall(), episodes=1, steps=30)


def test_a_strip_has_a_line_a_model_for_each_trajectory():
    rows = {name: np.full((2, 3, 8, 8, 3), value, np.uint8) for name, value in (("a", 9), ("b", 7))}
    picture = np.asarray(strip(rows))
    assert picture.shape[0] == 2 * (2 * 12 + 4) - 8
    assert [int((picture == value).all(-1).sum()) for value in (9, 7)] == [2 * 3 * 64] * 2


def test_rows_are_told_apart_by_as_much_of_a_path_as_it_takes():
    assert row_labels(["wall", "runs/small"]) == ["wall", "small"]
    assert row_labels(["runs/a/model", "runs/b/model"]) == ["a/model", "b/model"]
    assert row_labels(["runs/true", "wall"]) == ["runs/true", "wall"]
    for models in (["a/model", "a/model"], ["true"]):
        with pytest.raises(UsageError, match="named twice, or one is called 'true'"):
            row_labels(models)
    long = "a-run-with-a-long-name/model"
    rows = dict.fromkeys([long, "b"], np.zeros((1, 1, 8, 8, 3), np.uint8))
    assert strip(rows).size[0] > 72 + 12


def test_the_command_draws_several_models_of_one_task(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        qwm.save(drawing_model(seed), tmp_path / name)
    qwm.save(drawing_model(frameskip=1), tmp_path / "faster")
    command = ["imagine", "--out", tmp_path / "x.png", "--episodes", 2, "--steps", 2]
    assert run(*command, tmp_path / "one", tmp_path / "two").exit_code == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (72 + 3 * 116, 2 * (3 * 116 + 4) - 8)
    refused = run(*command, tmp_path / "one", tmp_path / "faster")
    assert refused.exit_code == 1
    assert "another frameskip" in refused.output
    assert run(*command, tmp_path / "one", tmp_path / "one").exit_code == 2
    assert "no decoder" in run(*command, "wall").output
