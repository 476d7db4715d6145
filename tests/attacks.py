"""Malicious and broken checkpoints; run as a script, it loads them all under a memory limit.

`python attacks.py FOLDER` loads every sub-folder and prints, as JSON, what became of each, which
forbidden things happened meanwhile, and how much memory they took.
"""

import json
import os
import resource
import struct
import sys
import zipfile
from pathlib import Path

import torch
import yaml

from attack_programs import archive, program, programs, tensors
from checkpoint_support import parts, saved, settings, write_folder

_ALLOWED_BYTES = 2**29
VQVAE = "models.vqvae.VQVAE"
_WATCHED = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class"}


def damaged():
    """Zips and pickles that are cut off, altered, or larger than they look."""
    good = saved(parts())
    empty = program(b"}")
    directory = good.rfind(b"PK\x01\x02")
    flipped = bytearray(good)
    flipped[good.find(b"data/0") + 4000] ^= 0xFF
    sized = bytearray(archive(empty))
    at = sized.find(b"PK\x01\x02")
    sized[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    encrypted = bytearray(archive(empty))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.find(signature) + offset] |= 1
    bomb = zipfile.ZIP_DEFLATED
    zeros = bytes(48 * 2**20)
    deep = b"]" * 200_000 + b"a" * 199_999
    long_text = b"\x8d" + struct.pack("<Q", 2**60) + b"x"
    files = {
        "empty_file": (b"", "no zip archive"),
        "web_page": (b"<!DOCTYPE html><html>Sign in</html>", "no zip archive"),
        "legacy": (saved(parts(), _use_new_zipfile_serialization=False), "before version 1.6"),
        "half": (good[: len(good) // 2], "truncated or damaged"),
        "ten_bytes_short": (good[:-10], "truncated or damaged"),
        "directory_only": (b"PK\x03\x04" + good[directory:], "truncated or damaged"),
        "flipped_byte": (bytes(flipped), "truncated or damaged"),
        "bomb_in_pickle": (archive(zeros, compression=bomb), "compressed entry"),
        "bomb_in_storage": (archive(empty, {"0": zeros}, compression=bomb), "compressed entry"),
        "large_pickle": (archive(zeros), "a pickle of more than"),
        "declared_large": (bytes(sized), "declares entries of more"),
        "encrypted": (bytes(encrypted), "encrypted"),
        "traversal": (archive(empty, extra=[("model/../../evil", b"x")]), "entry of the name"),
        "absolute": (archive(empty, extra=[("/etc/evil", b"x")]), "entry of the name"),
        "backslashes": (archive(empty, extra=[("model/..\\evil", b"x")]), "entry of the name"),
        "drive": (archive(empty, extra=[("C:/evil", b"x")]), "entry of the name"),
        "two_archives": (archive(empty, extra=[("other/x", b"x")]), "more than one archive"),
        "torchscript": (archive(empty, extra=[("model/constants.pkl", b"x")]), "TorchScript"),
        "big_endian": (archive(empty, extra=[("model/byteorder", b"big")]), "big-endian"),
        "no_pickle": (archive(empty).replace(b"data.pkl", b"data.xyz"), "no entry data.pkl"),
        "pickle_cut": (archive(empty[:-1]), "damaged"),
        "pickle_empty": (archive(b""), "damaged"),
        "pickle_underflow": (archive(program(b"R")), "damaged"),
        "pickle_memo": (archive(program(b"h\x05")), "damaged"),
        "pickle_opcode": (archive(program(b"\xff")), "damaged"),
        "pickle_long_text": (archive(program(long_text, 4)), "damaged"),
        "pickle_long_number": (archive(program(b"\x8b\xff\xff\xff\x7f")), "damaged"),
        "pickle_unfinished": (archive(program(b"}(")), "damaged"),
        "pickle_odd_items": (archive(program(b"}(K\x01u")), "damaged"),
        "pickle_endless": (archive(program(b"]0" * 300_000)), "more than 500000 operations"),
        "pickle_deep": (archive(program(deep)), "no parts by name"),
        "key_is_a_list": (archive(program(b"}]K\x01s")), "as a dictionary's key"),
        # A tuple of two of the tuple before, sixty times: its hash would never be computed.
        "key_of_tuples": (archive(program(b"})" + twins(60) + b"K\x01s")), "key"),
    }
    files["directory_size"] = (huge_directory(archive(empty)), "truncated or damaged")
    return files


def twins(depth):
    """The tuple on the stack, doubled through the memo."""
    return b"".join(b"q\x01h\x01\x86" for _ in range(depth))


def huge_directory(content):
    """The end of the zip says that its directory has 2 GB."""
    changed = bytearray(content)
    at = changed.rfind(b"PK\x05\x06")
    changed[at + 12 : at + 16] = struct.pack("<I", 2**31)
    return bytes(changed)


def contents():
    """Well-formed files that are no checkpoint of SETTINGS."""

    def changed(part, key, value):
        content = parts()
        content[part][key] = value
        return content

    def without(part):
        return {k: v for k, v in parts().items() if k != part}

    qkv, position = "transformer.layers.0.0.to_qkv.weight", "pos_embedding"
    mask = "transformer.layers.0.0.bias"
    files = {
        "a_list": ([1, 2], "no parts by name"),
        "a_tensor": (torch.zeros(3), "no parts by name"),
        "nothing": ({}, "lacks predictor, action_encoder"),
        "no_predictor": (without("predictor"), "lacks predictor"),
        "no_action_encoder": (without("action_encoder"), "lacks action_encoder"),
        "predictor_is_text": (parts() | {"predictor": "x"}, "no module, but a str"),
        "predictor_is_empty": (parts() | {"predictor": {}}, "holds no tensors"),
        "whole_numbers": (
            changed("predictor", qkv, torch.zeros(48, 404, dtype=torch.int64)),
            "weights of type torch.int64",
        ),
        "booleans": (
            changed("predictor", qkv, torch.zeros(48, 404, dtype=torch.bool)),
            "weights of type torch.bool",
        ),
        "not_finite": (changed("predictor", qkv, torch.full((48, 404), torch.nan)), "NaN"),
        "other_width": (changed("predictor", qkv, torch.zeros(48, 400)), "the settings make"),
        "other_tokens": (changed("predictor", position, torch.zeros(1, 9, 404)), "settings make"),
        "scalar": (changed("predictor", position, torch.tensor(1.0)), "the settings make"),
        "added_weight": (changed("predictor", "cls_token", torch.zeros(3)), "no parameter of"),
        "added_bias": (
            changed("predictor", qkv.replace("weight", "bias"), torch.zeros(48)),
            "unexpected",
        ),
        "more_layers": (
            changed("predictor", qkv.replace("s.0.", "s.1."), torch.zeros(48, 404)),
            "predictor.depth = 1",
        ),
        "another_mask": (
            changed("predictor", mask, torch.zeros(1, 1, 4, 4)),
            "attention mask",
        ),
        "action_width": (
            changed("action_encoder", "patch_embed.weight", torch.zeros(10, 7, 1)),
            "no multiple of",
        ),
        "action_kernel": (
            changed("action_encoder", "patch_embed.weight", torch.zeros(10, 10, 3)),
            "the settings make",
        ),
        "action_linear": (
            changed("action_encoder", "patch_embed.weight", torch.zeros(10, 10)),
            "no Conv1d",
        ),
    }
    return {key: (saved(content), message) for key, (content, message) in files.items()}


def yamls():
    """Settings files that try something or say something else: {name: (text, message)}."""
    bomb = "a: &a [x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    texts = {
        "yaml_call": ("a: !!python/object/apply:os.system ['true']", "no plain YAML"),
        "yaml_name": ("a: !!python/name:os.system", "no plain YAML"),
        "yaml_module": ("a: !!python/module:os", "no plain YAML"),
        "yaml_new": ("a: !!python/object/new:type [x]", "no plain YAML"),
        "yaml_tag": ("a: !custom 1", "no plain YAML"),
        "yaml_aliases": (bomb, "an alias"),
        "yaml_merge": ("a: &a {x: 1}\nb: {<<: *a}", "an alias"),
        "yaml_deep": ("[" * 5000, "no plain YAML"),
        "yaml_long": ("a: " + "x" * 300_000, "more than"),
        "yaml_number": ("a: " + "1" * 100_000, "no plain YAML"),
        "yaml_list": ("[1, 2]", "not settings by name"),
        "yaml_empty": ("", "not settings by name"),
        "yaml_binary": (b"\x00\xff\xfe\x80", "no plain YAML"),
    }
    changes = {
        "no_width": ({"action_emb_dim": None}, "action_emb_dim is missing"),
        "text_width": ({"action_emb_dim": "ten"}, "a whole number"),
        "huge_width": ({"action_emb_dim": 10**12}, "a whole number"),
        "other_width": ({"action_emb_dim": 12}, "contradicts hydra.yaml"),
        "other_mlp": ({"predictor__mlp_dim": 32}, "contradicts hydra.yaml"),
        "other_depth": ({"predictor__depth": 3}, "predictor.depth = 3"),
        "other_repeat": ({"num_action_repeat": 2}, "contradicts hydra.yaml"),
        "other_image": ({"model__image_size": 64}, "contradicts img_size"),
        "concat_dim": ({"concat_dim": 2}, "concat_dim must be 0 or 1"),
        "concat_width": ({"concat_dim": 0}, "must be 384"),
        "num_pred": ({"num_pred": 2}, "num_pred must be 1"),
        "task": ({"env__name": "deformable_env"}, "point_maze, pusht, wall"),
        "other_encoder": ({"encoder__name": "dinov2_vitb14"}, "dinov2_vitb14"),
        "class_token": (
            {"encoder__feature_key": "x_norm_clstoken"},
            "pos_embedding: (1, 4, 404), the settings make (1, 1, 404)",
        ),
        "other_decoder": (
            {"has_decoder": True, "decoder": {"_target_": "os.system"}},
            "the decoder is os.system",
        ),
        "huge_decoder": (
            {"has_decoder": True, "decoder": {"_target_": VQVAE, "channel": 10**9}},
            "decoder.channel must be a whole number",
        ),
        "r3m": ({"encoder": {"_target_": "models.encoder.r3m.load_r3m"}}, "load_r3m"),
        "dummy_action": (
            {"action_encoder___target_": "models.dummy.DummyRepeatActionEncoder"},
            "DummyRepeatActionEncoder",
        ),
        "environment": ({"num_hist": "${oc.env:HOME}"}, "cannot be resolved"),
        "circle": ({"num_hist": "${num_hist}"}, "cannot be resolved"),
        "trained_encoder": ({"model__train_encoder": True}, "lacks encoder"),
    }
    return texts | {
        f"settings_{key}": (yaml.safe_dump(settings(**change)), message)
        for key, (change, message) in changes.items()
    }


def decoders():
    """Checkpoints whose settings have a decoder, and what their file has of it."""
    one = torch.zeros(1)
    return {
        "without_tensors": ({}, "its decoder holds no tensors"),
        "of_text": ({"dec.blocks.0.weight": "weights"}, "not only tensors"),
        "incomplete": ({"dec.blocks.0.weight": one}, "missing: decoder.upsample_b.blocks"),
        "list": ([one], "its decoder is no module, but a list"),
    }


def write_all(folder, canary):
    """Every attack as a folder; returns what the refusal of each must say."""
    files = {f"pickle_{k}": v for k, v in programs(canary).items()}
    files = {
        k: (
            content
            if content[:2] == b"PK" or "without" in k
            else archive(content, {"0": bytes(16)}),
            m,
        )
        for k, (content, m) in files.items()
    }
    files |= {f"tensor_{k}": v for k, v in tensors().items()}
    files |= {f"file_{k}": v for k, v in damaged().items()}
    files |= {f"content_{k}": v for k, v in contents().items()}
    messages = {}
    for key, (content, message) in files.items():
        write_folder(folder / key, content)
        messages[key] = message
    good = saved(parts())
    for key, (content, message) in yamls().items():
        write_folder(folder / key, good, content)
        messages[key] = message
    large = settings(has_decoder=True, decoder={"_target_": VQVAE, "channel": 9000})
    for key, (part, message) in decoders().items():
        write_folder(
            folder / f"decoder_{key}", saved(parts() | {"decoder": part}), yaml.safe_dump(large)
        )
        messages[f"decoder_{key}"] = message
    return messages


def main():
    from quantwm.errors import QuantWMError
    from quantwm.loading import load

    folder, events = Path(sys.argv[1]), []
    load(folder / "good")  # imports what loading imports, and shows that it can succeed

    def watch(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if writes or event in _WATCHED:
            events.append(f"{event} {arguments[:1]}")

    sys.addaudithook(watch)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used = int(status["VmSize"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + _ALLOWED_BYTES, used + _ALLOWED_BYTES))
    before, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
    for path in sorted(folder.iterdir()):
        try:
            load(path)
            outcomes[path.name] = "loaded"
        except QuantWMError as error:
            outcomes[path.name] = f"refused: {error}"
        except BaseException as error:
            outcomes[path.name] = f"failed with {type(error).__name__}: {error}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    json.dump({"outcomes": outcomes, "events": events, "grown": grown}, sys.stdout)


if __name__ == "__main__":
    main()
