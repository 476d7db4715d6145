"""The models against what the public classes computed, see tests/fixtures/README.md.

Weights and inputs follow from seeds, as in the recording; the names and shapes of the weights are
those of the public classes. Large outputs are compared in a sample of their values and in the norms
of all tokens.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quantwm.models
from encoder_support import (
    ENCODER_EVERY,
    ENCODER_SIDES,
    seeded_images,
    seeded_state,
    seeded_values,
    shapes_of,
)
from quantwm.models.config import DINOWMConfig, EncoderConfig, PredictorConfig
from quantwm.models.dino_wm import DINOWM
from quantwm.models.dinov2 import DINOv2, vit_base, vit_small
from quantwm.models.predictor import Predictor, reference_state_dict
from quantwm.planning.objective import Objective
from reference_support import (
    STATISTICS,
    assert_close,
    assert_sample_close,
    noise_images,
    read_arrays,
    seeded_parts,
    world_model_inputs,
)

FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS = Path(quantwm.models.__file__).parent / "weights/dinov2_vits14.safetensors"
WORLD_MODELS = [(0, 1), (0, 3), (1, 1), (1, 3)]
Arrays = dict[str, Any]


@cache
def load(name: str) -> Arrays:
    """Recorded tensors, and as text the names and shapes of weights."""
    return read_arrays(FIXTURES / f"{name}.npz")


def below(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def use_explicit_attention(model: DINOv2 | Predictor) -> None:
    """Tap the probabilities with a module that returns them: the unfused path runs."""
    for block in model.blocks:
        block.attn.p_input = torch.nn.Sequential()


def as_input(images: Tensor) -> Tensor:
    return (images.permute(0, 3, 1, 2) / 255.0 - 0.5) / 0.5


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize(
    ("grid", "height", "width"),
    [
        (5, 98, 98),
        (5, 196, 196),
        (5, 224, 224),
        (5, 98, 196),
        (7, 98, 98),
        (37, 98, 98),
        (37, 196, 196),
        (37, 224, 224),
    ],
)
@torch.no_grad()
def test_encoder_matches_metas_class(grid: int, height: int, width: int, attention: str) -> None:
    arrays = load("encoder")
    encoder = DINOv2(depth=2, width=48, heads=3, pretrained_grid=grid).eval()
    state = seeded_parts(arrays[f"weights/{grid}"])["encoder"]
    encoder.load_state_dict(state)  # strict: the names and shapes are Meta's
    if attention == "explicit":
        use_explicit_attention(encoder)
    image = torch.from_numpy(noise_images(1, 224, 224, 3))
    tokens = encoder(as_input(image[:, :height, :width]))
    assert_sample_close(tokens, arrays, f"tokens/{grid}/{height}x{width}")


@torch.no_grad()
def test_bundled_encoder_computes_what_the_released_architecture_does() -> None:
    """Meta's ViT-S/14 with the bundled weights on a Wall frame, through public preprocessing."""
    arrays = load("encoder_vits14")
    encoder = vit_small().eval()
    encoder.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    image = torch.nn.functional.interpolate(
        as_input(arrays["frame"][None]),
        size=(98, 98),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    assert_sample_close(encoder(image), arrays, "tokens")


@pytest.mark.parametrize("case", ["vits14", "vitb14", "bundled"])
@torch.no_grad()
def test_released_sizes_compute_what_metas_do(case: str) -> None:
    """At the compact, DINO-WM's and the rendered resolution, weights as the seed makes them."""
    arrays = load("encoder_sizes")
    encoder = (vit_base() if case == "vitb14" else vit_small()).eval()
    bundled = {k: v.float() for k, v in load_file(WEIGHTS).items()}
    encoder.load_state_dict(bundled if case == "bundled" else seeded_state(shapes_of(encoder)))
    for side in ENCODER_SIDES:
        tokens = encoder(seeded_images(side))
        assert tokens.shape[1] == (side // 14) ** 2
        assert_sample_close(tokens, arrays, f"{case}/{side}", ENCODER_EVERY)


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize(("frames", "window"), [(1, 1), (3, 1), (3, 2), (3, 3)])
@torch.no_grad()
def test_predictor_matches_the_public_class(frames: int, window: int, attention: str) -> None:
    arrays = load("predictor")
    predictor = Predictor(5, frames, 28, depth=2, heads=3, head_dim=8, mlp_width=40).eval()
    state = seeded_parts(arrays[f"weights/{frames}"])["predictor"]
    predictor.load_state_dict(reference_state_dict(state))
    if attention == "explicit":
        use_explicit_attention(predictor)
    output = predictor(2 * seeded_values((2, 5 * window, 28), 0))
    assert_close(output, arrays[f"output/{frames}/{window}"], "predicted tokens")


def build(weights: str, concat_dim: int, num_hist: int, side: int) -> DINOWM:
    """Our world model with a recorded one's weights and statistics."""
    embedding = 10 if concat_dim == 1 else 24
    config = DINOWMConfig(
        task="wall",
        action_dim=2,
        proprio_dim=2,
        encoder=EncoderConfig(depth=1, width=24, heads=2, pretrained_grid=5),
        predictor=PredictorConfig(depth=2, heads=3, head_dim=8, mlp_width=40),
        image_size=side // 16 * 14,
        num_hist=num_hist,
        concat_dim=concat_dim,
        frameskip=5,
        action_emb_dim=embedding,
        proprio_emb_dim=embedding,
        **STATISTICS,
    )
    model = DINOWM(config)
    parts = seeded_parts(weights)
    model.encoder.load_state_dict(parts["encoder"])
    model.predictor.load_state_dict(reference_state_dict(parts["predictor"]))
    model.proprio_embed.load_state_dict(below(parts["proprio_encoder"], "patch_embed."))
    model.action_embed.load_state_dict(below(parts["action_encoder"], "patch_embed."))
    return model.eval()


def encode(model: DINOWM, inputs: Arrays, frames: slice) -> dict[str, Tensor]:
    return model.encode(
        {
            "visual": inputs["frames"][:, frames],
            "proprio": inputs["proprio"][:, frames].numpy(),
        }
    )


def assert_same_costs(rolled: dict[str, Tensor], goal: dict[str, Tensor], case: Arrays) -> None:
    """Every recorded objective; `case` holds the public costs (B, N) as "cost/mode/alpha"."""
    for mode in ("last", "all"):
        for alpha in (0, 0.5, 1):
            objective = Objective({"visual": 1.0, "proprio": float(alpha)}, mode=mode, base=2.0)
            costs = objective(rolled, goal)
            assert_close(costs, case[f"cost/{mode}/{alpha}"], f"cost {mode}, alpha {alpha}")


@pytest.fixture(params=WORLD_MODELS, ids=lambda p: f"concat{p[0]}_hist{p[1]}")
def recorded(request: pytest.FixtureRequest) -> tuple[DINOWM, Arrays, Arrays]:
    """Our model, what goes in, and the arrays of this setting."""
    concat_dim, num_hist = request.param
    case = below(load("world_model"), f"concat{concat_dim}_hist{num_hist}/")
    inputs = world_model_inputs(frames=3) | {"frames": noise_images(2, 3, 48, 48, 3)}
    return build(case["weights"], concat_dim, num_hist, side=48), inputs, case


@torch.no_grad()
def test_world_model_encodes_as_the_public_one(recorded: tuple[DINOWM, Arrays, Arrays]) -> None:
    model, inputs, case = recorded
    latent = encode(model, inputs, slice(3))
    assert_sample_close(latent["visual"], case, "encode/visual")
    assert_close(latent["proprio"], case["encode/proprio"], "proprio latent")


@torch.no_grad()
def test_world_model_predicts_as_the_public_one(recorded: tuple[DINOWM, Arrays, Arrays]) -> None:
    model, _, case = recorded
    _, tokens, width = model.predictor.pos_embedding.shape
    frames = model.config.num_hist
    window = 2 * seeded_values((2, frames, tokens // frames, width), 0)
    assert_sample_close(model.predict(window), case, "predict")


@pytest.mark.parametrize("observed", [1, 2])
@torch.no_grad()
def test_world_model_rolls_out_as_the_public_one(
    recorded: tuple[DINOWM, Arrays, Arrays], observed: int
) -> None:
    model, inputs, case = recorded
    case = below(case, f"rollout{observed}/")
    latent, actions = encode(model, inputs, slice(observed)), inputs["actions"]
    rolled = model.rollout(latent, actions)
    last = model.rollout(latent, actions, last_only=True)
    latents = {k: case[k] for k in ("visual/values", "visual/norms", "proprio")}
    for frame in range(case["proprio"].shape[2]):
        theirs = {k: v[:, :, frame] for k, v in latents.items()}
        assert_sample_close(rolled["visual"][:, :, frame], theirs, "visual")
        assert_close(rolled["proprio"][:, :, frame], theirs["proprio"], f"proprio of {frame}")
    theirs = {k: v[:, :, -1:] for k, v in latents.items()}
    assert_sample_close(last["visual"], theirs, "visual")
    assert_close(last["proprio"], theirs["proprio"], "proprio of the last frame alone")
    goal = encode(model, inputs, slice(-1, None))
    assert_same_costs(rolled, goal, case)


def test_actions_are_denormalised_as_the_public_preprocessor_does() -> None:
    arrays = load("world_model")
    model = build(arrays["concat1_hist1/weights"], 1, 1, side=48)
    raw = model.action_spec.denormalize(world_model_inputs(frames=3)["actions"])
    np.testing.assert_allclose(raw, arrays["raw_actions"].numpy(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_wall_frames_become_the_public_costs_through_the_resize_to_196() -> None:
    arrays = load("end_to_end")
    inputs = world_model_inputs(frames=2) | {"frames": arrays["frames"].numpy()}
    model = build(arrays["weights"], concat_dim=1, num_hist=1, side=224)
    assert model.config.image_size == 196
    latent = encode(model, inputs, slice(1))
    assert_sample_close(latent["visual"], arrays, "encode/visual")
    rolled = model.rollout(latent, inputs["actions"])
    assert_sample_close(rolled["visual"][:, :, -1:], arrays, "rollout1/visual")
    assert_close(rolled["proprio"][:, :, -1:], arrays["rollout1/proprio"], "last proprio")
    goal = encode(model, inputs, slice(-1, None))
    assert_same_costs(rolled, goal, below(arrays, "rollout1/"))
