"""The models against what the public classes computed, see tests/fixtures/README.md."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quantwm.models
from encoder_support import ENCODER_SIDES, seeded_images, seeded_state, shapes_of
from quantwm.models.config import DINOWMConfig, EncoderConfig, PredictorConfig
from quantwm.models.dino_wm import DINOWM
from quantwm.models.dinov2 import DINOv2, vit_base, vit_small
from quantwm.models.predictor import Predictor, reference_state_dict
from quantwm.planning.objective import Objective

FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS = Path(quantwm.models.__file__).parent / "weights/dinov2_vits14.safetensors"
TOLERANCE = 1e-5
WORLD_MODELS = [(0, 1), (0, 3), (1, 1), (1, 3)]


@cache
def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def below(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays under a prefix, without it; weights back in float32."""
    found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in found.items()}


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    assert ours.dtype == torch.float32
    error = ((ours - theirs).double().norm() / theirs.double().norm()).item()
    assert error <= TOLERANCE, f"{what}: relative L2 {error:.2e}"


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
    state = below(arrays, "state/") | {"pos_embed": arrays[f"pos_embed/{grid}"].float()}
    encoder.load_state_dict(state)  # strict: the names and shapes are Meta's
    if attention == "explicit":
        use_explicit_attention(encoder)
    tokens = encoder(as_input(arrays["image"][:, :height, :width]))
    assert_close(tokens, arrays[f"tokens/{grid}/{height}x{width}"], "x_norm_patchtokens")


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
    assert_close(encoder(image), arrays["tokens"], "x_norm_patchtokens of ViT-S/14")


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
        assert_close(tokens[:, ::12], arrays[f"{case}/{side}/tokens"], f"{case} at {side} px")
        assert_close(tokens.norm(dim=-1), arrays[f"{case}/{side}/norms"], f"norms at {side} px")


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize(("frames", "window"), [(1, 1), (3, 1), (3, 2), (3, 3)])
@torch.no_grad()
def test_predictor_matches_the_public_class(frames: int, window: int, attention: str) -> None:
    arrays = load("predictor")
    predictor = Predictor(5, frames, 28, depth=2, heads=3, head_dim=8, mlp_width=40).eval()
    predictor.load_state_dict(reference_state_dict(below(arrays, f"state/{frames}/")))
    if attention == "explicit":
        use_explicit_attention(predictor)
    output = predictor(arrays["input"][:, : 5 * window])
    assert_close(output, arrays[f"output/{frames}/{window}"], "predicted tokens")


def build(
    arrays: dict[str, Tensor], parts: dict[str, Tensor], concat_dim: int, num_hist: int, side: int
) -> DINOWM:
    """Our world model with a recorded one's weights and statistics."""
    embedding = 10 if concat_dim == 1 else 24
    statistics = {
        name: tuple(arrays[f"input/{name}"].tolist())
        for name in ("action_mean", "action_std", "proprio_mean", "proprio_std")
    }
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
        **statistics,
    )
    model = DINOWM(config)
    model.encoder.load_state_dict(below(arrays, "encoder/"))
    model.predictor.load_state_dict(reference_state_dict(below(parts, "predictor/")))
    model.proprio_embed.load_state_dict(below(parts, "proprio_encoder/patch_embed."))
    model.action_embed.load_state_dict(below(parts, "action_encoder/patch_embed."))
    return model.eval()


def encode(model: DINOWM, arrays: dict[str, Tensor], frames: slice) -> dict[str, Tensor]:
    return model.encode(
        {
            "visual": arrays["input/frames"][:, frames].numpy(),
            "proprio": arrays["input/proprio"][:, frames].numpy(),
        }
    )


def assert_same_costs(
    rolled: dict[str, Tensor], goal: dict[str, Tensor], case: dict[str, Tensor]
) -> None:
    """Every recorded objective; `case` holds the public costs (B, N) as "cost/mode/alpha"."""
    for mode in ("last", "all"):
        for alpha in (0, 0.5, 1):
            objective = Objective({"visual": 1.0, "proprio": float(alpha)}, mode=mode, base=2.0)
            costs = objective(rolled, goal)
            assert_close(costs, case[f"cost/{mode}/{alpha}"], f"cost {mode}, alpha {alpha}")


@pytest.fixture(params=WORLD_MODELS, ids=lambda p: f"concat{p[0]}_hist{p[1]}")
def recorded(request: pytest.FixtureRequest) -> tuple[DINOWM, dict[str, Tensor], dict[str, Tensor]]:
    """Our model, all arrays, and the arrays of this setting."""
    concat_dim, num_hist = request.param
    arrays = load("world_model")
    case = below(arrays, f"concat{concat_dim}_hist{num_hist}/")
    return build(arrays, case, concat_dim, num_hist, side=48), arrays, case


@torch.no_grad()
def test_world_model_encodes_as_the_public_one(
    recorded: tuple[DINOWM, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    model, arrays, case = recorded
    latent = encode(model, arrays, slice(3))
    assert_close(latent["visual"], case["encode/visual"], "visual latent")
    assert_close(latent["proprio"], case["encode/proprio"], "proprio latent")


@torch.no_grad()
def test_world_model_predicts_as_the_public_one(
    recorded: tuple[DINOWM, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    model, _, case = recorded
    assert_close(model.predict(case["predict/input"]), case["predict/output"], "prediction")


@pytest.mark.parametrize("observed", [1, 2])
@torch.no_grad()
def test_world_model_rolls_out_as_the_public_one(
    recorded: tuple[DINOWM, dict[str, Tensor], dict[str, Tensor]], observed: int
) -> None:
    model, arrays, case = recorded
    latent, actions = encode(model, arrays, slice(observed)), arrays["input/actions"]
    rolled = model.rollout(latent, actions)
    last = model.rollout(latent, actions, last_only=True)
    for part in ("visual", "proprio"):
        theirs = case[f"rollout{observed}/{part}"]
        for frame in range(theirs.shape[2]):
            assert_close(rolled[part][:, :, frame], theirs[:, :, frame], f"{part} frame {frame}")
        assert_close(last[part], theirs[:, :, -1:], f"{part} of the last frame alone")
    goal = encode(model, arrays, slice(-1, None))
    assert_same_costs(rolled, goal, below(case, f"rollout{observed}/"))


def test_actions_are_denormalised_as_the_public_preprocessor_does() -> None:
    arrays = load("world_model")
    case = below(arrays, "concat1_hist1/")
    model = build(arrays, case, 1, 1, side=48)
    raw = model.action_spec.denormalize(arrays["input/actions"])
    np.testing.assert_allclose(raw, arrays["input/raw"].numpy(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_wall_frames_become_the_public_costs_through_the_resize_to_196() -> None:
    arrays = load("end_to_end")
    model = build(arrays, arrays, concat_dim=1, num_hist=1, side=224)
    assert model.config.image_size == 196
    latent = encode(model, arrays, slice(1))
    assert_close(latent["visual"], arrays["encode/visual"], "visual latent")
    rolled = model.rollout(latent, arrays["input/actions"])
    for part in ("visual", "proprio"):
        assert_close(rolled[part][:, :, -1:], arrays[f"rollout1/{part}"], f"last {part}")
    goal = encode(model, arrays, slice(-1, None))
    assert_same_costs(rolled, goal, below(arrays, "rollout1/"))
