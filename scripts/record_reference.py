"""Record what the public code's own classes compute, as fixtures for the tests.

    pip install -e .[dev] gym==0.26.2 einops omegaconf
    python scripts/record_reference.py --dino-wm PATH --dinov2 PATH --out tests/fixtures

PATH are checkouts of github.com/gaoyuezhou/dino_wm and github.com/facebookresearch/dinov2; the
commits that the stored fixtures come from are in `tests/fixtures/manifest.json`. Run once; with
`--only NAME` for files that were added since, from the same commits and versions. The same seed,
checkouts and library versions write the same files.

Nothing of the public code is rewritten here: every recorded output comes out of its classes
(DinoVisionTransformer, DinoV2Encoder, ViTPredictor, ProprioceptiveEmbedding, VWorldModel,
Preprocessor, create_objective_fn, WallEnvWrapper). What is replaced while it is imported or built:

* `torchvision.transforms`: Resize, CenterCrop, Normalize and Compose, because torchvision does not
  import beside a CPU-only torch. Resize of a tensor is
  `interpolate(mode="bilinear", antialias=True, align_corners=False)` and hands an image that has
  the size already through untouched; both are what torchvision 0.18 does, which DINO-WM pins.
  CenterCrop is only ever asked for the image's own size.
* `psutil`: an empty module; `utils.py` imports it for memory messages.
* the package `env`: its `__init__` registers simulators (MuJoCo, FleX) that Wall does not need.
* `Tensor.to("cuda")` while a predictor is built: its attention mask goes to the CPU.
* `torch.hub.load` while a DinoV2Encoder is built: it returns the DinoVisionTransformer given.
* xFormers is switched off, so that Meta's attention runs PyTorch's own kernel.

What is fed to the classes and recorded is in `reference_models.py` and `reference_wall.py`.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import reference_models as models
import reference_wall as wall
from fixture_file import save_npz

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "src/quantwm/models/weights/dinov2_vits14.safetensors"


def import_public_code(dino_wm: Path, dinov2: Path) -> types.SimpleNamespace:
    """The public classes, imported with the replacements that the module's docstring lists."""
    sys.dont_write_bytecode = True
    os.environ["XFORMERS_DISABLED"] = "1"
    sys.path[:0] = [str(dino_wm), str(dinov2)]
    transforms = types.ModuleType("torchvision.transforms")
    for replacement in (Resize, CenterCrop, Normalize, Compose):
        setattr(transforms, replacement.__name__, replacement)
    torchvision = types.ModuleType("torchvision")
    torchvision.transforms = transforms
    env = types.ModuleType("env")
    env.__path__ = [str(dino_wm / "env")]
    sys.modules.update({"torchvision": torchvision, "torchvision.transforms": transforms})
    sys.modules.update({"psutil": types.ModuleType("psutil"), "env": env})
    names = {
        "wall": "env.wall.wall_env_wrapper",
        "vit": "models.vit",
        "dino": "models.dino",
        "proprio": "models.proprio",
        "world_model": "models.visual_world_model",
        "preprocessor": "preprocessor",
        "transforms": "datasets.img_transforms",
        "objectives": "planning.objectives",
        "meta": "dinov2.models.vision_transformer",
        "meta_hub": "dinov2.hub.backbones",
    }
    return types.SimpleNamespace(**{k: importlib.import_module(v) for k, v in names.items()})


class Resize:
    def __init__(self, size: int | tuple[int, int]) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def __call__(self, image: Tensor) -> Tensor:
        if tuple(image.shape[-2:]) == self.size:
            return image
        batch = nn.functional.interpolate(
            image.reshape(-1, *image.shape[-3:]),
            size=self.size,
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        return batch.reshape(*image.shape[:-2], *self.size)


class CenterCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        assert tuple(image.shape[-2:]) == (self.size, self.size), image.shape
        return image


class Normalize:
    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class Compose:
    def __init__(self, steps: list[Any]) -> None:
        self.steps = steps

    def __call__(self, image: Tensor) -> Tensor:
        for step in self.steps:
            image = step(image)
        return image


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dino-wm", type=Path, required=True, help="checkout of dino_wm")
    parser.add_argument("--dinov2", type=Path, required=True, help="checkout of dinov2")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/fixtures")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="ViT-S/14 in Meta's naming")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="record these files alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    public = import_public_code(arguments.dino_wm.resolve(), arguments.dinov2.resolve())
    seed = arguments.seed
    files: dict[str, Callable[[], dict[str, Any]]] = {
        "encoder": lambda: models.record_encoder(public),
        "encoder_vits14": lambda: models.record_released_encoder(public, arguments.weights),
        "encoder_sizes": lambda: models.record_encoder_sizes(public, arguments.weights),
        "predictor": lambda: models.record_predictor(public),
        "world_model": lambda: models.record_world_model(public),
        "end_to_end": lambda: models.record_end_to_end(public, seed),
        "wall_transitions": lambda: wall.record_transitions(public, seed),
        "wall_rollouts": lambda: wall.record_rollouts(public, seed),
        "wall_non_finite": lambda: wall.record_non_finite(public, seed),
        "wall_frames": lambda: wall.record_frames(public, seed),
        "wall_random_states": lambda: wall.record_random_states(public),
        "wall_success": lambda: wall.record_success(public, seed),
    }
    if unknown := set(arguments.only or ()) - set(files):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(files)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or files:
        arrays = files[name]()
        path = arguments.out / f"{name}.npz"
        save_npz(path, arrays)
        print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size / 1024:.0f} KiB")
    if arguments.only:
        return  # the manifest speaks of all files
    manifest = {
        "seed": seed,
        "commits": {
            "gaoyuezhou/dino_wm": commit_of(arguments.dino_wm),
            "facebookresearch/dinov2": commit_of(arguments.dinov2),
        },
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    (arguments.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
