"""Small checkpoints in the form of DINO-WM's public code, as state dicts."""

import copy
import io

import torch
import yaml

SETTINGS = {
    "img_size": 32,
    "frameskip": 5,
    "concat_dim": 1,
    "normalize_action": True,
    "action_emb_dim": 10,
    "num_action_repeat": 1,
    "proprio_emb_dim": 10,
    "num_proprio_repeat": 1,
    "num_hist": 1,
    "num_pred": 1,
    "has_predictor": True,
    "has_decoder": False,
    "model": {"image_size": 32, "train_encoder": False},
    "env": {"name": "wall", "dataset": {"n_rollout": None, "normalize_action": True}},
    "encoder": {
        "_target_": "models.dino.DinoV2Encoder",
        "name": "dinov2_vits14",
        "feature_key": "x_norm_patchtokens",
    },
    "action_encoder": {"_target_": "models.proprio.ProprioceptiveEmbedding", "tubelet_size": 1},
    "proprio_encoder": {"_target_": "models.proprio.ProprioceptiveEmbedding", "tubelet_size": 1},
    "predictor": {
        "_target_": "models.vit.ViTPredictor",
        "depth": 1,
        "heads": 2,
        "dim_head": 8,
        "mlp_dim": 24,
        "dropout": 0.1,
    },
}


def settings(**changes):
    """SETTINGS with changes by dotted name, `__` for the dot; None removes."""
    changed = copy.deepcopy(SETTINGS)
    for name, value in changes.items():
        *groups, last = name.split("__")
        target = changed
        for group in groups:
            target = target[group]
        if value is None:
            del target[last]
        else:
            target[last] = value
    return changed


def parts(layer="transformer.layers.0.{}", attention="0", mlp="1"):
    """The parts of a checkpoint of SETTINGS, as state dicts with random weights."""
    generator = torch.Generator().manual_seed(0)
    attn, ff = layer.format(attention), layer.format(mlp)
    norm = layer.split("layers")[0] + "norm"
    shapes = {
        "predictor": {
            "pos_embedding": (1, 4, 404),
            f"{attn}.norm.weight": (404,),
            f"{attn}.norm.bias": (404,),
            f"{attn}.to_qkv.weight": (48, 404),
            f"{attn}.to_out.0.weight": (404, 16),
            f"{attn}.to_out.0.bias": (404,),
            f"{ff}.net.0.weight": (404,),
            f"{ff}.net.0.bias": (404,),
            f"{ff}.net.1.weight": (24, 404),
            f"{ff}.net.1.bias": (24,),
            f"{ff}.net.4.weight": (404, 24),
            f"{ff}.net.4.bias": (404,),
            f"{norm}.weight": (404,),
            f"{norm}.bias": (404,),
        },
        "action_encoder": {"patch_embed.weight": (10, 10, 1), "patch_embed.bias": (10,)},
        "proprio_encoder": {"patch_embed.weight": (10, 2, 1), "patch_embed.bias": (10,)},
    }
    return {"epoch": 3} | {
        part: {k: torch.randn(v, generator=generator) * 0.1 for k, v in names.items()}
        for part, names in shapes.items()
    }


def saved(content, **options):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def write_folder(folder, checkpoint, hydra=None):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/model_latest.pth").write_bytes(checkpoint)
    text = yaml.safe_dump(SETTINGS) if hydra is None else hydra
    (folder / "hydra.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder
