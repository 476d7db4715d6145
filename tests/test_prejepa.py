"""stable-worldmodel's DINO-WM: the same numbers as there, whichever names its backbone has.

The fixture comes from its own classes, see `scripts/record_prejepa.py`; of visual latents it holds
a sample of the values and the norms of all tokens.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import quantwm as qwm
from encoder_support import to_hugging_face
from quantwm.errors import CorruptFileError, MismatchError, MissingStatisticsError, UsageError
from quantwm.models.checkpoint import bundled_encoder_state
from quantwm.models.dinov2 import DINOv2
from reference_support import (
    assert_close,
    assert_sample_close,
    prejepa_inputs,
    read_arrays,
    seeded_parts,
)
from test_cli import run

FIXTURE = Path(__file__).parent / "fixtures/prejepa"
TRANSFORMERS_5 = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
STATISTICS = {
    "action_mean": [0.0, 0.0],
    "action_std": [0.3, 0.3],
    "proprio_mean": [200.0, 200.0, 0.0, 0.0],
    "proprio_std": [100.0, 100.0, 60.0, 60.0],
}


@cache
def recorded():
    return read_arrays(FIXTURE / "recorded.npz")


@cache
def state(modern):
    """The whole state dict, with the backbone under the names of one version or the other."""
    backbone = to_hugging_face(bundled_encoder_state())
    if modern:
        for old, new in TRANSFORMERS_5.items():
            backbone = {name.replace(old, new): value for name, value in backbone.items()}
    parts = {"backbone": backbone} | seeded_parts(recorded()["weights"])
    for key, mask in recorded().items():
        if key.startswith("masks/"):
            parts["predictor"][key.removeprefix("masks/")] = mask
    return {f"{part}.{name}": v for part, state in parts.items() for name, v in state.items()}


def config(**changes):
    """The recorded `config.json` with changes by dotted name, `__` for the dot."""
    values = json.loads((FIXTURE / "config.json").read_text())
    for name, value in changes.items():
        *groups, last = name.split("__")
        target = values
        for group in groups:
            target = target[group]
        target[last] = value
    return json.dumps(values)


def write(folder, tensors, settings=None, name="weights.pt"):
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / name)
    (folder / "config.json").write_text(config() if settings is None else settings)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("prejepa"), state(False))


@pytest.mark.parametrize("modern", [False, True], ids=["released names", "transformers 5"])
@torch.no_grad()
def test_latents_and_rollouts_are_those_of_its_own_classes(modern, tmp_path):
    model = qwm.load(write(tmp_path / "model", state(modern)), task="pusht")
    inputs, arrays = prejepa_inputs(), recorded()
    # Recorded after normalisation, as nothing but the model is compared here.
    proprio = model.embed_proprio(inputs["proprio"])
    latent = model.encode({"visual": inputs["frames"], "proprio": np.zeros((1, 2, 4))})
    assert_sample_close(latent["visual"], arrays, "encode/visual")
    assert_close(proprio, arrays["encode/proprio"], "encoded proprioception")
    start = {"visual": latent["visual"][:, :1], "proprio": proprio[:, :1]}
    rolled = model.rollout(start, inputs["actions"])
    assert_sample_close(rolled["visual"][:, :, 1:], arrays, "rollout/visual")
    assert_close(rolled["proprio"][:, :, 1:], arrays["rollout/proprio"], "imagined proprioception")


def test_positions_reach_a_grid_of_any_size():
    """Some sides, 39 for instance, are rounded down where a grid is scaled by their ratio."""
    encoder = DINOv2(1, 8, 2, position_offset=0.0)
    for side in range(1, 80):
        assert encoder.position_embedding(side, 3).shape == (1, 1 + 3 * side, 8)


def test_it_plans_quantizes_and_survives_conversion(folder, tmp_path):
    stats = tmp_path / "stats.json"
    stats.write_text(json.dumps(STATISTICS))
    without = qwm.load(folder, task="pusht")
    assert without.config.frameskip == 5
    assert without.config.image_size == 28
    with pytest.raises(MissingStatisticsError):
        qwm.evaluate(without, "pusht", episodes=1, block="tuning")
    done = run("convert", folder, tmp_path / "out", "--task", "pusht", "--stats", stats)
    assert done.exit_code == 0
    model = qwm.load(tmp_path / "out")
    assert model.action_spec.std == (0.3, 0.3)
    for name, value in without.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    small = qwm.quantize(model, "w8")
    qwm.save(small, tmp_path / "small")
    observation = {"visual": prejepa_inputs()["frames"], "proprio": np.zeros((1, 2, 4))}
    again = qwm.load(tmp_path / "small")
    assert torch.equal(again.encode(observation)["visual"], small.encode(observation)["visual"])


def test_the_task_is_named_or_comes_from_the_data(folder):
    with pytest.raises(UsageError, match="does not say what it was trained in"):
        qwm.load(folder)
    with pytest.raises(MismatchError, match="proprioception of 4; wall has"):
        qwm.load(folder, task="wall")
    with pytest.raises(UsageError, match="pusht"):
        qwm.load(folder, task="push")


def test_info_shows_it(folder):
    shown = run("info", folder, "--task", "pusht")
    assert shown.exit_code == 0
    assert "stable-worldmodel" in shown.output


def test_the_highest_epoch_is_taken(folder, tmp_path):
    small = {k: v for k, v in state(False).items() if not k.startswith("backbone.")}
    write(tmp_path, small, name="weights_epoch_9.pt")
    (tmp_path / "weights_epoch_10.pt").hardlink_to(folder / "weights.pt")
    assert qwm.load(tmp_path, task="pusht").config.num_hist == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder__name": "mae_base"}, "quantwm has dinov2_small, dinov2_base"),
        ({"_target_": "os.system.PreJEPA"}, "quantwm has stable_worldmodel.wm.PreJEPA"),
        ({"predictor__dim": 400}, "is not the 398 of encoder and extra_encoders"),
        ({"predictor__depth": 10**9}, "predictor.depth must be a whole number"),
        ({"predictor__num_patches": 5}, "no square"),
        ({"history_size": 2}, "contradicts history_size 2"),
        ({"num_pred": 2}, "num_pred must be 1"),
        ({"extra_encoders__modules": {"action": {}, "proprio": {}}}, "in this order"),
        ({"predictor__mlp_dim": 25}, "the settings make"),
        ({"predictor__depth": 1}, "unexpected: predictor.blocks.1"),
        ({"predictor__heads": 4, "predictor__dim_head": 16}, "the settings make"),
        ({"encoder__name": "dinov2_base", "predictor__dim": 782}, "the settings make"),
    ],
    ids=str,
)
def test_settings_that_are_another_models_are_refused(changes, message, folder, tmp_path):
    (tmp_path / "weights.pt").hardlink_to(folder / "weights.pt")
    (tmp_path / "config.json").write_text(config(**changes))
    with pytest.raises((UsageError, CorruptFileError), match=message):
        qwm.load(tmp_path, task="pusht")


def test_broken_files_are_refused_by_name(folder, tmp_path):
    (tmp_path / "config.json").write_text(config())
    with pytest.raises(UsageError, match=r"no weights\.pt beside it"):
        qwm.load(tmp_path, task="pusht")
    whole = (folder / "weights.pt").read_bytes()
    (tmp_path / "weights.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match=r"weights\.pt is truncated or damaged"):
        qwm.load(tmp_path, task="pusht")
    (tmp_path / "config.json").write_text("{PreJEPA")
    with pytest.raises(CorruptFileError, match="no JSON"):
        qwm.load(tmp_path, task="pusht")


def test_parts_that_are_missing_unknown_or_not_finite_are_refused(tmp_path):
    tensors = state(False)
    cases = {
        "nothing of proprio_embed is there": {
            k: v for k, v in tensors.items() if not k.startswith("extra_encoders.proprio")
        },
        "unknown: goal_encoder.weight": tensors | {"goal_encoder.weight": torch.zeros(1)},
        "missing: blocks.11.attn.qkv.weight": {
            k: v for k, v in tensors.items() if "layer.11.attention.attention.key" not in k
        },
        "norm.weight: NaN": tensors | {"backbone.layernorm.weight": torch.full((384,), torch.nan)},
        "larger than config.json's encoder": tensors
        | {"backbone.layernorm.weight": torch.zeros(10**6)},
    }
    for message, content in cases.items():
        write(tmp_path / "model", content)
        with pytest.raises(CorruptFileError, match=message):
            qwm.load(tmp_path / "model", task="pusht")


def test_nothing_in_the_file_is_executed(tmp_path):
    canary = tmp_path / "sang"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (canary,))

    write(tmp_path / "model", state(False) | {"predictor.trap": Trap()})
    with pytest.raises(CorruptFileError, match="nothing of it was executed"):
        qwm.load(tmp_path / "model", task="pusht")
    assert not canary.exists()
