"""Record small checkpoints that DINO-WM's public code saves, and what its classes compute.

    pip install -e .[dev] gym==0.26.2 einops omegaconf accelerate
    python scripts/record_checkpoints.py --dino-wm PATH --dinov2 PATH --out tests/fixtures

Each case becomes a folder `checkpoints/<case>` with

    hydra.yaml              the public settings, composed and resolved as its `train.py` does
    model_latest.pth.xz     the dictionary of whole modules that its `save_ckpt` writes
    expected.npz            proprioception, actions, statistics; proprioceptive latents, costs; of
                            visual latents and decoded pictures every thirteenth value and the
                            norms of all tokens and rows

All are shown the same frames, and decoders are given the same latents: `tests/reference_support.py`
makes them.

The classes are the public code's, imported with the replacements that `record_reference.py`
lists; optimizers go through accelerate, as there. Encoders are frozen, hence in no checkpoint:
they are the released DINOv2 ViT-S/14 with the bundled weights. Other weights follow from a seed,
and each repeats its first 251 values, so that the files pack well. Optimizers take one step of
learning rate and gradient zero, so that they have a state and weights stay what they are.
"""

import argparse
import importlib
import json
import lzma
import os
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

# Before `psutil` is replaced, which accelerate needs.
import accelerate
import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from fixture_file import save_npz
from record_reference import ROOT, WEIGHTS, commit_of, import_public_code
from reference_models import Arrays, kept_latents, masks_on_cpu, prefixed, shared, support

EPISODES, CANDIDATES, HORIZON, FRAMES = 1, 2, 4, 2
PERIOD = 251
GROUPS = ("env", "encoder", "action_encoder", "proprio_encoder", "decoder", "predictor")
STATISTICS = ([0.01, -0.02], [0.75, 0.5], [31.5, 28.25, 1.5, -0.5], [14.5, 12.75, 2.0, 3.0])


@dataclass(frozen=True)
class Case:
    """A training run: its environment, decoder, and what differs from the public settings."""

    env: str
    proprio_dim: int
    decoder: str = "vqvae"
    changes: dict[str, Any] = field(default_factory=dict)


TINY = {
    "predictor.depth": 2,
    "predictor.heads": 2,
    "predictor.dim_head": 8,
    "predictor.mlp_dim": 24,
}
TOKENS = {"concat_dim": 0, "action_emb_dim": 384, "proprio_emb_dim": 384}
NO_DECODER = {"has_decoder": False, "model.train_decoder": False}
CASES = {
    "concat1_hist1": Case(
        "wall",
        2,
        changes=NO_DECODER
        | {"img_size": 32, "num_hist": 1}
        | {"predictor.depth": 1, "predictor.heads": 1, "predictor.mlp_dim": 24},
    ),
    "concat1_hist3": Case(
        "pusht",
        4,
        changes=TINY
        | {"img_size": 48, "num_action_repeat": 2, "num_proprio_repeat": 3}
        | {"action_emb_dim": 6, "proprio_emb_dim": 4},
    ),
    "concat0_hist1": Case(
        "point_maze",
        4,
        "transposed_conv",
        TINY | TOKENS | {"img_size": 32, "num_hist": 1, "frameskip": 4},
    ),
    "concat0_hist3": Case("wall", 2, changes=NO_DECODER | TINY | TOKENS | {"img_size": 48}),
    "class_token": Case(
        "wall",
        2,
        "transposed_conv",
        TINY
        | {"encoder.feature_key": "x_norm_clstoken", "img_size": 32, "num_hist": 1}
        | {"predictor.depth": 1},
    ),
}
DECODERS = {
    "vqvae": {
        "channel": 4,
        "n_embed": 8,
        "n_res_block": 1,
        "n_res_channel": 4,
        "quantize": True,
    },
    "transposed_conv": {"observation_shape": [3, 32, 32], "depth": 1},
}


def compose(dino_wm: Path, case: Case) -> Any:
    """The settings that hydra would compose, and what `train.py` adds to them."""
    os.environ["DATASET_DIR"] = "/data"
    settings = OmegaConf.load(dino_wm / "conf/train.yaml")
    del settings["defaults"], settings["hydra"]
    chosen = dict.fromkeys(GROUPS, "proprio") | {"env": case.env, "encoder": "dino"}
    chosen |= {"decoder": case.decoder, "predictor": "vit"}
    for group, name in chosen.items():
        settings[group] = OmegaConf.load(dino_wm / f"conf/{group}/{name}.yaml")
    for name, value in DECODERS[case.decoder].items():
        OmegaConf.update(settings, f"decoder.{name}", value)
    for name, value in case.changes.items():
        OmegaConf.update(settings, name, value)
    settings.saved_folder = "/outputs/2025-01-01/00-00-00"
    settings.effective_batch_size = settings.gpu_batch_size = settings.training.batch_size
    settings.wandb_run_id = "recorded"
    return settings


def instantiate(settings: Any, **arguments: Any) -> Any:
    """What `hydra.utils.instantiate` does with a `_target_` of the public code."""
    values = OmegaConf.to_container(settings, resolve=True)
    module, _, name = values.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name)(**values, **arguments)


class Run:
    """One training run's modules and optimizers, built as `train.py` builds them."""

    def __init__(self, encoder: nn.Module, settings: Any, case: Case) -> None:
        self.settings, self.accelerator = settings, accelerate.Accelerator(cpu=True)
        widths = {"proprio": case.proprio_dim, "action": 2 * settings.frameskip}
        for name, width in widths.items():
            module = instantiate(
                settings[f"{name}_encoder"],
                in_chans=width,
                emb_dim=settings[f"{name}_emb_dim"],
            )
            setattr(self, f"{name}_encoder", module)
        with mock.patch.object(torch.hub, "load", return_value=encoder):
            self.encoder = instantiate(settings.encoder)
        self.patches = 1 if self.encoder.latent_ndim == 1 else (settings.img_size // 16) ** 2
        extra = settings.num_proprio_repeat * settings.proprio_emb_dim
        extra += settings.num_action_repeat * settings.action_emb_dim
        with masks_on_cpu():
            self.predictor = instantiate(
                settings.predictor,
                num_patches=self.patches + 2 * (1 - settings.concat_dim),
                num_frames=settings.num_hist,
                dim=self.encoder.emb_dim + extra * settings.concat_dim,
            )
        self.decoder = instantiate(settings.decoder, emb_dim=384) if settings.has_decoder else None
        for seed, part in enumerate(("proprio_encoder", "action_encoder", "predictor")):
            load_periodic(getattr(self, part), seed)
            setattr(self, part, self.accelerator.prepare(getattr(self, part)))
        if self.decoder is not None:
            load_periodic(self.decoder, 3)
        self.model = instantiate(
            settings.model,
            encoder=self.encoder,
            proprio_encoder=self.proprio_encoder,
            action_encoder=self.action_encoder,
            predictor=self.predictor,
            decoder=self.decoder,
            proprio_dim=settings.proprio_emb_dim,
            action_dim=settings.action_emb_dim,
            concat_dim=settings.concat_dim,
            num_action_repeat=settings.num_action_repeat,
            num_proprio_repeat=settings.num_proprio_repeat,
        )

    def optimizer(self, kind: type[torch.optim.Optimizer], part: str) -> Any:
        parameters = list(getattr(self, part).parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = self.accelerator.prepare(kind(parameters, lr=0.0))
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def checkpoint(self) -> dict[str, Any]:
        """The dictionary of `save_ckpt`, in its order."""
        saved = {"epoch": 7, "predictor": self.predictor}
        saved["predictor_optimizer"] = self.optimizer(torch.optim.AdamW, "predictor")
        if self.decoder is not None:
            saved["decoder"] = self.decoder
            saved["decoder_optimizer"] = self.optimizer(torch.optim.Adam, "decoder")
        return saved | {name: getattr(self, name) for name in ("action_encoder", "proprio_encoder")}


def load_periodic(module: nn.Module, seed: int) -> None:
    """Give a module weights that pack well; a period that divides no width makes rows differ."""
    state = support.seeded_state(support.shapes_of(module), seed, gain=2, period=PERIOD)
    module.load_state_dict(state)


@torch.no_grad()
def expected(public: types.SimpleNamespace, run: Run, case: Case, seed: int) -> Arrays:
    """What goes into the public model and what comes out, the last frame being the goal."""
    run.model.eval()
    generator = torch.Generator().manual_seed(seed + 1)
    proprio = 30 * torch.rand(EPISODES, FRAMES, case.proprio_dim, generator=generator)
    model_dim = 2 * run.settings.frameskip
    actions = torch.randn(EPISODES, CANDIDATES, HORIZON, model_dim, generator=generator)
    mean, std, proprio_mean, proprio_std = (torch.tensor(values) for values in STATISTICS)
    statistics = {"action_mean": mean, "action_std": std}
    statistics["proprio_mean"] = proprio_mean[: case.proprio_dim]
    statistics["proprio_std"] = proprio_std[: case.proprio_dim]
    preprocessor = public.preprocessor.Preprocessor(
        **statistics,
        state_mean=None,
        state_std=None,
        transform=public.transforms.default_transform(run.settings.img_size),
    )
    shown = {"visual": shared.blocky_frames(), "proprio": proprio.numpy()}
    shown = preprocessor.transform_obs(shown)
    latent = run.model.encode_obs(shown)
    arrays: Arrays = {"proprio": proprio, "actions": actions, **statistics}
    arrays |= prefixed("encode", kept_latents(latent))
    # With more tokens the public code fails to draw by transposed convolutions.
    if run.decoder is not None and (case.decoder == "vqvae" or run.patches == 1):
        drawn = run.model.decode_obs({**latent, "visual": shared.drawn_latents(run.patches)})[0]
        arrays |= prefixed("decode", shared.sampled(drawn["visual"]))
    objective = {
        mode: public.objectives.create_objective_fn(0.5, base=2, mode=mode)
        for mode in ("last", "all")
    }
    for episode in range(EPISODES):
        start = {
            k: v[episode : episode + 1, :1].repeat_interleave(CANDIDATES, 0)
            for k, v in shown.items()
        }
        rolled = run.model.rollout(obs_0=start, act=actions[episode])[0]
        # The first frame is the encoded one.
        imagined = {name: value[:, 1:] for name, value in rolled.items()}
        arrays |= prefixed(f"rollout/{episode}", kept_latents(imagined))
        goal = {
            k: v[episode : episode + 1, -1:].repeat_interleave(CANDIDATES, 0)
            for k, v in latent.items()
        }
        for mode, cost in objective.items():
            arrays[f"cost/{mode}/{episode}"] = cost(rolled, goal)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dino-wm", type=Path, required=True, help="checkout of dino_wm")
    parser.add_argument("--dinov2", type=Path, required=True, help="checkout of dinov2")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/fixtures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    dino_wm = arguments.dino_wm.resolve()
    public = import_public_code(dino_wm, arguments.dinov2.resolve())
    encoder = public.meta_hub.dinov2_vits14(pretrained=False).eval()
    encoder.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    folder = arguments.out / "checkpoints"
    for name, case in CASES.items():
        settings = compose(dino_wm, case)
        run = Run(encoder, settings, case)
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        (target / "hydra.yaml").write_text(OmegaConf.to_yaml(settings, resolve=True))
        arrays = {k: as_array(v) for k, v in expected(public, run, case, arguments.seed).items()}
        save_npz(target / "expected.npz", arrays)
        # By its own name, which the archive in the file takes over.
        saved = target / "model_latest.pth"
        torch.save(run.checkpoint(), saved)
        packed = lzma.compress(saved.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
        saved.with_suffix(".pth.xz").write_bytes(packed)
        saved.unlink()
        print(f"{name}: {sum(f.stat().st_size for f in target.iterdir()) / 1024:.0f} KiB")
    manifest = {
        "seed": arguments.seed,
        "commits": {
            "gaoyuezhou/dino_wm": commit_of(arguments.dino_wm),
            "facebookresearch/dinov2": commit_of(arguments.dinov2),
        },
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "accelerate": accelerate.__version__,
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def as_array(value: Any) -> np.ndarray:
    return value.numpy() if isinstance(value, Tensor) else np.asarray(value)


if __name__ == "__main__":
    main()
