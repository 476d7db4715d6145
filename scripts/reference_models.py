"""What the public encoder, predictor, world model and objective compute.

Random weights are multiples of 2^-9 below 4, hence exact in float16, as which they are stored.
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

Arrays = dict[str, Any]
GRID = 2.0**-9


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter anew, none of them neutral: biases, scales and positions included."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")):
            value = 1 + 0.3 * noise
        elif parameter.ndim == 1:
            value = 0.2 * noise
        elif "pos_embed" in name or "token" in name:
            value = 0.5 * noise
        else:
            value = 1.5 * noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(((value / GRID).round() * GRID).clamp(-3.9, 3.9))


def stored(module: nn.Module, prefix: str) -> Arrays:
    """A module's state under a prefix, in float16 after checking that this loses nothing."""
    state = {}
    for name, value in module.state_dict().items():
        half = value.half()
        assert torch.equal(half.float(), value), name
        state[f"{prefix}/{name}"] = half.numpy()
    return state


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


def coarse_noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """uint8 noise of eight levels: every pixel differs from its neighbours, yet it packs well."""
    return (rng.integers(0, 8, shape) * 36).astype(np.uint8)


def to_input(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W) in [-1, 1]."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0 - 0.5) / 0.5


def record_encoder(public: types.SimpleNamespace, seed: int) -> Arrays:
    """x_norm_patchtokens of a small ViT at several image and position-grid sizes."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    arrays: Arrays = {"image": coarse_noise(rng, 1, 224, 224, 3)}
    cases = [(5, 98, 98), (5, 196, 196), (5, 224, 224), (5, 98, 196), (7, 98, 98)]
    cases += [(37, 98, 98), (37, 196, 196), (37, 224, 224)]
    shared: dict[str, Tensor] = {}
    for grid in (5, 7, 37):
        encoder = make_encoder(public, grid, depth=2, width=48, heads=3)
        randomise(encoder, generator)
        encoder.load_state_dict(shared, strict=False)  # only the position grid differs
        shared = {k: v for k, v in encoder.state_dict().items() if k != "pos_embed"}
        state = stored(encoder, "state")
        arrays[f"pos_embed/{grid}"] = state.pop("state/pos_embed")
        arrays |= state
        for _, height, width in (case for case in cases if case[0] == grid):
            features = encoder.forward_features(to_input(arrays["image"][:, :height, :width]))
            arrays[f"tokens/{grid}/{height}x{width}"] = features["x_norm_patchtokens"].numpy()
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
    return {"frame": frame, "tokens": tokens.numpy()}


def record_encoder_sizes(public: types.SimpleNamespace, weights: Path) -> Arrays:
    """The released ViT-S/14 and ViT-B/14 at three image sizes, weights and images by seed.

    Of the tokens every twelfth, and of all of them the norm. Also the ViT-S/14 with the bundled
    weights.
    """
    arrays: Arrays = {}
    released = {k: v.float() for k, v in load_file(weights).items()}
    for case, name in (("vits14", "vits14"), ("vitb14", "vitb14"), ("bundled", "vits14")):
        encoder = getattr(public.meta_hub, f"dinov2_{name}")(pretrained=False).eval()
        seeded = support.seeded_state(support.shapes_of(encoder))
        encoder.load_state_dict(released if case == "bundled" else seeded)
        for side in support.ENCODER_SIDES:
            tokens = encoder.forward_features(support.seeded_images(side))["x_norm_patchtokens"]
            arrays[f"{case}/{side}/tokens"] = tokens[:, ::12].numpy()
            arrays[f"{case}/{side}/norms"] = tokens.norm(dim=-1).numpy()
    return arrays


def record_predictor(public: types.SimpleNamespace, seed: int) -> Arrays:
    """ViTPredictor for one and three frames, on full and on shorter windows."""
    generator = torch.Generator().manual_seed(seed)
    arrays: Arrays = {"input": torch.randn(2, 3 * 5, 28, generator=generator).numpy()}
    for frames in (1, 3):
        predictor = make_predictor(public, patches=5, frames=frames, width=28)
        randomise(predictor, generator)
        arrays |= stored(predictor, f"state/{frames}")
        for window in range(1, frames + 1):
            tokens = torch.from_numpy(arrays["input"][:, : 5 * window])
            arrays[f"output/{frames}/{window}"] = predictor(tokens).numpy()
    return arrays


class Setting:
    """A public world model, its preprocessing, and what goes in: frames, proprio, actions.

    Two episodes with three candidates of five model actions each; a model action is five raw
    actions of width two.
    """

    episodes, candidates, horizon = 2, 3, 5

    def __init__(
        self, public: Any, seed: int, frames: np.ndarray, concat_dim: int, num_hist: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.public, self.frames, side = public, frames, frames.shape[2]
        self.encoder = make_encoder(public, grid=5, depth=1, width=24, heads=2)
        randomise(self.encoder, generator)
        with mock.patch.object(torch.hub, "load", return_value=self.encoder):
            encoder = public.dino.DinoV2Encoder("dinov2_vits14", "x_norm_patchtokens")
        embedding = 10 if concat_dim == 1 else encoder.emb_dim
        self.proprio_encoder, self.action_encoder = (
            public.proprio.ProprioceptiveEmbedding(1, 1, in_chans, embedding)
            for in_chans in (2, 10)
        )
        self.predictor = make_predictor(
            public,
            patches=(side // 16) ** 2 + 2 * (1 - concat_dim),
            frames=num_hist,
            width=encoder.emb_dim + 2 * embedding * concat_dim,
        )
        for part in (self.proprio_encoder, self.action_encoder, self.predictor):
            randomise(part, generator)
        self.model = public.world_model.VWorldModel(
            image_size=side,
            num_hist=num_hist,
            num_pred=1,
            encoder=encoder,
            proprio_encoder=self.proprio_encoder,
            action_encoder=self.action_encoder,
            decoder=None,
            predictor=self.predictor,
            proprio_dim=embedding,
            action_dim=embedding,
            concat_dim=concat_dim,
            num_action_repeat=1,
            num_proprio_repeat=1,
        )
        self.model.eval()
        # From a stream of their own: every setting of a seed meets the same inputs.
        generator = torch.Generator().manual_seed(seed + 1)
        shape = (self.episodes, self.candidates, self.horizon, 10)
        self.actions = torch.randn(shape, generator=generator)
        shape = (*frames.shape[:2], 2)
        self.proprio = 4.5 + 55 * torch.rand(shape, generator=generator)
        self.statistics = {
            "action_mean": torch.tensor([0.01, -0.02]),
            "action_std": torch.tensor([0.75, 0.5]),
            "proprio_mean": torch.tensor([31.5, 28.25]),
            "proprio_std": torch.tensor([14.5, 12.75]),
        }
        self.preprocessor = public.preprocessor.Preprocessor(
            **self.statistics,
            state_mean=None,
            state_std=None,
            transform=public.transforms.default_transform(side),
        )

    def inputs(self) -> Arrays:
        """Raw inputs and the statistics they are normalised with."""
        arrays = {"frames": self.frames, "proprio": self.proprio, "actions": self.actions}
        raw = self.actions.reshape(*self.actions.shape[:2], -1, 2)
        return arrays | self.statistics | {"raw": self.preprocessor.denormalize_actions(raw)}

    def weights(self) -> Arrays:
        """The parts' states without the encoder, which all settings share."""
        parts = ("predictor", "proprio_encoder", "action_encoder")
        return {k: v for part in parts for k, v in stored(getattr(self, part), part).items()}

    def encode(self, first: int, frames: int) -> dict[str, Tensor]:
        """Preprocess and encode `frames` observations of every episode."""
        chosen = slice(first, first + frames)
        obs = {"visual": self.frames[:, chosen], "proprio": self.proprio[:, chosen].numpy()}
        return self.model.encode_obs(self.preprocessor.transform_obs(obs))

    def rollout(self, observed: int) -> Iterator[dict[str, Tensor]]:
        """Latents (candidates, horizon + 1, ...) for each episode, repeated as CEM does."""
        for episode in range(self.episodes):
            obs = {
                "visual": self.frames[episode : episode + 1, :observed],
                "proprio": self.proprio[episode : episode + 1, :observed].numpy(),
            }
            obs = self.preprocessor.transform_obs(obs)
            obs = {k: v.repeat_interleave(self.candidates, dim=0) for k, v in obs.items()}
            yield self.model.rollout(obs_0=obs, act=self.actions[episode])[0]

    def record(self, observed: int, full: bool) -> Arrays:
        """Latents and costs of a rollout, the goal being the last frame."""
        goal = {
            name: value.repeat_interleave(self.candidates, dim=0).unflatten(0, (self.episodes, -1))
            for name, value in self.encode(self.frames.shape[1] - 1, 1).items()
        }
        latents = list(self.rollout(observed))
        arrays: Arrays = {}
        for part in ("visual", "proprio"):
            both = torch.stack([latent[part] for latent in latents])
            arrays[part] = both if full else both[:, :, -1:]
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


def merge_shared(arrays: Arrays, shared: Arrays) -> None:
    """Add arrays that every case has in common, checking that they really are the same."""
    for name, value in shared.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(arrays.get(name, value)))
        arrays[name] = value


def record_world_model(public: types.SimpleNamespace, seed: int) -> Arrays:
    """Encode, predict, rollout and cost for both ways to attach actions and two histories."""
    frames = coarse_noise(np.random.default_rng(seed), 2, 3, 48, 48, 3)
    arrays: Arrays = {}
    for concat_dim in (0, 1):
        for num_hist in (1, 3):
            setting = Setting(public, seed, frames, concat_dim, num_hist)
            case = f"concat{concat_dim}_hist{num_hist}"
            merge_shared(arrays, stored(setting.encoder, "encoder"))
            merge_shared(arrays, prefixed("input", setting.inputs()))
            arrays |= prefixed(case, setting.weights() | prefixed("encode", setting.encode(0, 3)))
            _, tokens, width = setting.predictor.pos_embedding.shape
            generator = torch.Generator().manual_seed(seed)
            window = torch.randn(2, num_hist, tokens // num_hist, width, generator=generator)
            predicted = {"input": window, "output": setting.model.predict(window)}
            arrays |= prefixed(f"{case}/predict", predicted)
            for observed in (1, 2):
                arrays |= prefixed(f"{case}/rollout{observed}", setting.record(observed, True))
    return arrays


def record_end_to_end(public: types.SimpleNamespace, seed: int) -> Arrays:
    """224-pixel Wall frames to costs, through the resize to 196 pixels."""
    env = make_wall(public, 32, 30)
    states = np.random.default_rng(seed).uniform(10, 54, (2, 2, 2))
    shown = [[env.prepare(0, state)[0]["visual"] for state in episode] for episode in states]
    frames = np.round(np.array([[f.numpy() for f in row] for row in shown])).astype(np.uint8)
    setting = Setting(public, seed, frames, concat_dim=1, num_hist=1)
    arrays = stored(setting.encoder, "encoder") | prefixed("input", setting.inputs())
    arrays |= setting.weights() | prefixed("encode", setting.encode(0, 1))
    return arrays | prefixed("rollout1", setting.record(1, full=False))
