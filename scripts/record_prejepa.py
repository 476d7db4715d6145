"""Record what stable-worldmodel's DINO-WM (`PreJEPA`) computes, as a fixture for the tests.

    pip install -e .[dev] einops transformers
    python scripts/record_prejepa.py --stable-worldmodel PATH --out tests/fixtures

writes `prejepa/config.json` and `prejepa/recorded.npz`: the names and shapes of the predictor's and
the embeddings' weights, the attention masks, and the latents and rollouts of its own classes, of
visual ones every thirteenth value and the norms of all tokens. Weights, frames, proprioception and
actions are those that `tests/reference_support.py` makes of seeds. The backbone is transformers'
`Dinov2Model` with the package's encoder weights, hence in no file. Only the two modules that define
the model are imported, not the package around them.
"""

import argparse
import importlib
import json
import sys
import types
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from fixture_file import save_npz
from record_reference import ROOT, WEIGHTS, commit_of
from reference_models import kept_latents, load_seeded, prefixed

sys.path.insert(0, str(ROOT / "tests"))
from encoder_support import to_hugging_face
from reference_support import prejepa_inputs

SIDE, CANDIDATES, FRAMESKIP = 28, 2, 5
WIDTHS = {"proprio": (4, 6), "action": (2 * FRAMESKIP, 8)}
MODULE = "stable_worldmodel.wm.prejepa.module"


def config() -> dict:
    """What its training script leaves in `config.json`, at a small size."""
    return {
        "_target_": "stable_worldmodel.wm.PreJEPA",
        "history_size": 3,
        "num_pred": 1,
        "interpolate_pos_encoding": True,
        "encoder": {"_target_": f"{MODULE}.create_backbone", "name": "dinov2_small"},
        "predictor": {
            "_target_": f"{MODULE}.CausalPredictor",
            "num_patches": (SIDE // 14) ** 2,
            "num_frames": 3,
            "dim": 384 + sum(emb for _, emb in WIDTHS.values()),
            "depth": 2,
            "heads": 2,
            "mlp_dim": 24,
            "dim_head": 8,
            "dropout": 0.1,
            "emb_dropout": 0.0,
        },
        "extra_encoders": {
            "_target_": "torch.nn.ModuleDict",
            "modules": {
                name: {"_target_": f"{MODULE}.Embedder", "in_chans": width, "emb_dim": emb}
                for name, (width, emb) in WIDTHS.items()
            },
        },
    }


def backbone() -> torch.nn.Module:
    """Hugging Face's encoder with the package's weights."""
    sizes = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = transformers.Dinov2Model(sizes).eval()
    state = to_hugging_face({k: v.float() for k, v in load_file(WEIGHTS).items()})
    own = {"output.dense": "o_proj", "attention.query": "q_proj"}
    own |= {"attention.key": "k_proj", "attention.value": "v_proj"}
    if "encoder.layer.0.attention.q_proj.weight" in model.state_dict():
        for theirs, ours in own.items():
            state = {
                k.replace(f".attention.{theirs}.", f".attention.{ours}."): v
                for k, v in state.items()
            }
    model.load_state_dict(state)
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stable-worldmodel", type=Path, required=True, help="checkout of it")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/fixtures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("stable_worldmodel", "stable_worldmodel.wm", "stable_worldmodel.wm.prejepa"):
        package = types.ModuleType(name)
        package.__path__ = [str(arguments.stable_worldmodel / name.replace(".", "/"))]
        sys.modules[name] = package
    module = importlib.import_module(MODULE)
    public = importlib.import_module("stable_worldmodel.wm.prejepa.prejepa")

    settings = config()
    sizes = {k: v for k, v in settings["predictor"].items() if k != "_target_"}
    predictor = module.CausalPredictor(**sizes)
    extra = torch.nn.ModuleDict(
        {name: module.Embedder(in_chans=width, emb_dim=e) for name, (width, e) in WIDTHS.items()}
    )
    weights = load_seeded(predictor=predictor, extra_encoders=extra)
    model = public.PreJEPA(backbone(), predictor, extra).eval()
    frames, proprio, actions = prejepa_inputs().values()
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    pixels = (torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255 - mean) / std
    encoded = model.encode({"pixels": pixels, "proprio": proprio, "action": actions[:, 0, :2]})
    info = {
        "pixels": pixels[:, None, :1].expand(-1, CANDIDATES, -1, -1, -1, -1),
        "proprio": proprio[:, None, :1].expand(-1, CANDIDATES, -1, -1),
        "action": torch.zeros(1, CANDIDATES, 1, WIDTHS["action"][0]),
    }
    rolled = model.rollout(info, actions)
    latent = {"visual": encoded["pixels_emb"], "proprio": encoded["proprio_emb"]}
    imagined = {
        "visual": rolled["predicted_pixels_emb"][:, :, 1:],
        "proprio": rolled["predicted_proprio_emb"][:, :, 1:],
    }
    arrays = {"weights": weights} | prefixed("masks", dict(predictor.named_buffers()))
    arrays |= prefixed("encode", kept_latents(latent))
    arrays |= prefixed("rollout", kept_latents(imagined))
    folder = arguments.out / "prejepa"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_npz(folder / "recorded.npz", arrays)
    manifest = {
        "commits": {"galilai-group/stable-worldmodel": commit_of(arguments.stable_worldmodel)},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
