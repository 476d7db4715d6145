"""What the public encoder, predictor, world model and objective compute.

Weights and inputs are those that `tests/encoder_support.py` and `tests/reference_support.py` make
of seeds, hence in no file. Recorded are the names and shapes that the public classes give their
weights, and what comes out; where that is large, a sample of it and the norms of all tokens.
"""

import contextlib
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reference_wall import make_wall

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import encoder_support as support
import reference_support as shared

Arrays = dict[str, Any]


def load_seeded(**modules: nn.Module) -> str:
    """Give modules the weights of the seed; returns their names and shapes."""
    text = shared.described(**modules)
    for part, state in shared.seeded_parts(text).items():
        modules[part].load_state_dict(modules[part].state_dict() | state)
    return text


def make_encoder(public: types.SimpleNamespace, grid: int, depth: int, width: int, heads: int):
    """Meta's class with the options of the released models, at another size."""
    block = partial(public.meta.Block, attn_class=public.meta.MemEffAttention)
    return public.meta.DinoVisionTransformer(
        img_size=14 * grid,
        patch_size=14,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4,
        block_fn=block,
        init_values=1.0,
        block_chunks=0,
        num_register_tokens=0,
        interpolate_antialias=False,
        interpolate_offset=0.1,
    ).eval()


@contextlib.contextmanager
def masks_on_cpu() -> Iterator[None]:
    """`Tensor.to("cuda")` stays on the CPU: the predictor's attention asks for a GPU by name."""
    to = Tensor.to

    def patched(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if args == ("cuda",) else to(self, *args, **kwargs)

    with mock.patch.object(Tensor, "to", patched):
        yield


def make_predictor(public: types.SimpleNamespace, patches: int, frames: int, width: int):
    with masks_on_cpu():
        return public.vit.ViTPredictor(
            num_patches=patches,
            num_frames=frames,
            dim=width,
            depth=2,
            heads=3,
            dim_head=8,
            mlp_dim=40,
            dropout=0.1,
            emb_dropout=0.1,
            pool="mean",
        ).eval()


def to_input(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W) in [-1, 1]."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0 - 0.5) / 0.5


def record_encoder(public: types.SimpleNamespace) -> Arrays:
    """x_norm_patchtokens of a small ViT at several image and position-grid sizes."""
    image = shared.noise_images(1, 224, 224, 3)
    cases = [(5, 98, 98), (5, 196, 196), (5, 224, 224), (5, 98, 196), (7, 98, 98)]
    cases += [(37, 98, 98), (37, 196, 196), (37, 224, 224)]
    arrays: Arrays = {}
    for grid in (5, 7, 37):
        encoder = make_encoder(public, grid, depth=2, width=48, heads=3)
        arrays[f"weights/{grid}"] = load_seeded(encoder=encoder)
        for _, height, width in (case for case in cases if case[0] == grid):
            tokens = encoder.forward_features(to_input(image[:, :height, :width]))
            kept = shared.sampled(tokens["x_norm_patchtokens"])
            arrays |= prefixed(f"tokens/{grid}/{height}x{width}", kept)
    return arrays


def record_released_encoder(public: types.SimpleNamespace, weights: Path) -> Arrays:
    """The released ViT-S/14 architecture with the bundled weights, on one Wall frame."""
    encoder = public.meta_hub.dinov2_vits14(pretrained=False).eval()
    encoder.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    env = make_wall(public, 32, 30)
    frame = env.prepare(0, np.array([18.25, 41.5]))[0]["visual"].round().numpy().astype(np.uint8)
    normalised = public.transforms.default_transform(224)(to_input(frame[None]) * 0.5 + 0.5)
    tokens = encoder.forward_features(public.transforms.transforms.Resize(98)(normalised))[
        "x_norm_patchtokens"
    ]
    return {"frame": frame} | prefixed("tokens", shared.sampled(tokens))


def record_encoder_sizes(public: types.SimpleNamespace, weights: Path) -> Arrays:
    """The released ViT-S/14 and ViT-B/14 at three image sizes, of every 149th value.

    Also the ViT-S/14 with the bundled weights.
    """
    arrays: Arrays = {}
    released = {k: v.float() for k, v in load_file(weights).items()}
    for case, name in (("vits14", "vits14"), ("vitb14", "vitb14"), ("bundled", "vits14")):
        encoder = getattr(public.meta_hub, f"dinov2_{name}")(pretrained=False).eval()
        seeded = support.seeded_state(support.shapes_of(encoder))
        encoder.load_state_dict(released if case == "bundled" else seeded)
        for side in support.ENCODER_SIDES:
            tokens = encoder.forward_features(support.seeded_images(side))["x_norm_patchtokens"]
            kept = shared.sampled(tokens, support.ENCODER_EVERY)
            arrays |= prefixed(f"{case}/{side}", kept)
    return arrays


def record_predictor(public: types.SimpleNamespace) -> Arrays:
    """ViTPredictor for one and three frames, on full and on shorter windows."""
    arrays: Arrays = {}
    for frames in (1, 3):
        predictor = make_predictor(public, patches=5, frames=frames, width=28)
        arrays[f"weights/{frames}"] = load_seeded(predictor=predictor)
        for window in range(1, frames + 1):
            tokens = 2 * support.seeded_values((2, 5 * window, 28), 0)
            arrays[f"output/{frames}/{window}"] = predictor(tokens)
    return arrays


class Setting:
    """A public world model, its preprocessing, and what goes in: frames, proprio, actions."""

    def __init__(self, public: Any, frames: np.ndarray, concat_dim: int, num_hist: int) -> None:
        self.public, self.frames, side = public, frames, frames.shape[2]
        released = make_encoder(public, grid=5, depth=1, width=24, heads=2)
        with mock.patch.object(torch.hub, "load", return_value=released):
            encoder = public.dino.DinoV2Encoder("dinov2_vits14", "x_norm_patchtokens")
        embedding = 10 if concat_dim == 1 else encoder.emb_dim
        proprio_encoder, action_encoder = (
            public.proprio.ProprioceptiveEmbedding(1, 1, in_chans, embedding)
            for in_chans in (2, 10)
        )
        predictor = make_predictor(
            public,
            patches=(side // 16) ** 2 + 2 * (1 - concat_dim),
            frames=num_hist,
            width=encoder.emb_dim + 2 * embedding * concat_dim,
        )
        self.weights = load_seeded(
            encoder=released,
            predictor=predictor,
            proprio_encoder=proprio_encoder,
            action_encoder=action_encoder,
        )
        self.model = public.world_model.VWorldModel(
            image_size=side,
            num_hist=num_hist,
            num_pred=1,
            encoder=encoder,
            proprio_encoder=proprio_encoder,
            action_encoder=action_encoder,
            decoder=None,
            predictor=predictor,
            proprio_dim=embedding,
            action_dim=embedding,
            concat_dim=concat_dim,
            num_action_repeat=1,
            num_proprio_repeat=1,
        )
        self.model.eval()
        inputs = shared.world_model_inputs(frames.shape[1])
        self.proprio, self.actions = inputs["proprio"], inputs["actions"]
        self.preprocessor = public.preprocessor.Preprocessor(
            **{name: torch.tensor(values) for name, values in shared.STATISTICS.items()},
            state_mean=None,
            state_std=None,
            transform=public.transforms.default_transform(side),
        )

    def raw_actions(self) -> Tensor:
        """The actions before normalisation."""
        raw = self.actions.reshape(*self.actions.shape[:2], -1, 2)
        return self.preprocessor.denormalize_actions(raw)

    def encode(self, first: int, frames: int) -> dict[str, Tensor]:
        """Preprocess and encode `frames` observations of every episode."""
        chosen = slice(first, first + frames)
        obs = {"visual": self.frames[:, chosen], "proprio": self.proprio[:, chosen].numpy()}
        return self.model.encode_obs(self.preprocessor.transform_obs(obs))

    def rollout(self, observed: int) -> Iterator[dict[str, Tensor]]:
        """Latents (candidates, horizon + 1, ...) for each episode, repeated as CEM does."""
        for episode in range(shared.EPISODES):
            obs = {
                "visual": self.frames[episode : episode + 1, :observed],
                "proprio": self.proprio[episode : episode + 1, :observed].numpy(),
            }
            obs = self.preprocessor.transform_obs(obs)
            obs = {k: v.repeat_interleave(shared.CANDIDATES, dim=0) for k, v in obs.items()}
            yield self.model.rollout(obs_0=obs, act=self.actions[episode])[0]

    def record(self, observed: int, full: bool) -> Arrays:
        """Latents and costs of a rollout, the goal being the last frame."""
        goal = {
            name: value.repeat_interleave(shared.CANDIDATES, dim=0).unflatten(
                0, (shared.EPISODES, -1)
            )
            for name, value in self.encode(self.frames.shape[1] - 1, 1).items()
        }
        latents = list(self.rollout(observed))
        both = {k: torch.stack([latent[k] for latent in latents]) for k in ("visual", "proprio")}
        arrays = kept_latents(both if full else {k: v[:, :, -1:] for k, v in both.items()})
        for mode in ("last", "all"):
            for alpha in (0, 0.5, 1):
                objective = self.public.objectives.create_objective_fn(alpha, base=2, mode=mode)
                costs = [
                    objective(latent, {k: v[i] for k, v in goal.items()})
                    for i, latent in enumerate(latents)
                ]
                arrays[f"cost/{mode}/{alpha}"] = torch.stack(costs)
        return arrays


def prefixed(prefix: str, arrays: Arrays) -> Arrays:
    return {f"{prefix}/{name}": value for name, value in arrays.items()}


def kept_latents(latents: dict[str, Tensor]) -> Arrays:
    """A sample of the visual latents, the small proprioceptive ones whole."""
    return {"proprio": latents["proprio"]} | prefixed("visual", shared.sampled(latents["visual"]))


def record_world_model(public: types.SimpleNamespace) -> Arrays:
    """Encode, predict, rollout and cost for both ways to attach actions and two histories."""
    frames = shared.noise_images(shared.EPISODES, 3, 48, 48, 3)
    arrays: Arrays = {}
    for concat_dim in (0, 1):
        for num_hist in (1, 3):
            setting = Setting(public, frames, concat_dim, num_hist)
            case = f"concat{concat_dim}_hist{num_hist}"
            arrays[f"{case}/weights"] = setting.weights
            arrays |= prefixed(f"{case}/encode", kept_latents(setting.encode(0, 3)))
            _, tokens, width = setting.model.predictor.pos_embedding.shape
            window = 2 * support.seeded_values((2, num_hist, tokens // num_hist, width), 0)
            arrays |= prefixed(f"{case}/predict", shared.sampled(setting.model.predict(window)))
            for observed in (1, 2):
                arrays |= prefixed(f"{case}/rollout{observed}", setting.record(observed, True))
    return arrays | {"raw_actions": setting.raw_actions()}


def record_end_to_end(public: types.SimpleNamespace, seed: int) -> Arrays:
    """224-pixel Wall frames to costs, through the resize to 196 pixels."""
    env = make_wall(public, 32, 30)
    states = np.random.default_rng(seed).uniform(10, 54, (shared.EPISODES, 2, 2))
    shown = [[env.prepare(0, state)[0]["visual"] for state in episode] for episode in states]
    frames = np.round(np.array([[f.numpy() for f in row] for row in shown])).astype(np.uint8)
    setting = Setting(public, frames, concat_dim=1, num_hist=1)
    arrays = {"frames": frames, "weights": setting.weights}
    arrays |= prefixed("encode", kept_latents(setting.encode(0, 1)))
    return arrays | prefixed("rollout1", setting.record(1, full=False))
