"""One file of encoder weights: both layouts, and files that are not what they say."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from encoder_support import (
    ENCODER_EVERY,
    TINY,
    assert_same,
    hollow_state,
    seeded_images,
    seeded_state,
    shapes_of,
    tiny_state,
    to_hugging_face,
    write,
)
from quantwm.errors import CorruptFileError, MismatchError, UsageError
from quantwm.models.checkpoint import ENCODER_SHA256, bundled_encoder_state
from quantwm.models.config import EncoderConfig
from quantwm.models.dinov2 import vit_base, vit_small
from quantwm.models.encoder_file import config_of, read_encoder, to_meta_names
from quantwm.models.encoder_weights import encoder_sha256, find_encoder, open_encoder
from reference_support import sampled

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("name", ["official.pth", "hf.safetensors", "hf.bin", "half.safetensors"])
def test_every_layout_gives_the_same_tensors(tmp_path, name):
    state = tiny_state()
    stored = to_hugging_face(state) if name.startswith("hf") else dict(state)
    if name.startswith("half"):
        stored = {key: value.half() for key, value in stored.items()}
    assert_same(read_encoder(write(tmp_path / name, stored), TINY), state)


def test_a_pickle_of_old_pytorch_is_read(tmp_path):
    torch.save(tiny_state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(read_encoder(tmp_path / "old.pth", TINY), tiny_state())


def test_the_mask_token_is_no_part_of_the_encoder(tmp_path):
    masked = to_hugging_face(tiny_state() | {"mask_token": torch.ones(1, 24)})
    assert_same(read_encoder(write(tmp_path / "a.safetensors", masked), TINY), tiny_state())
    del masked["embeddings.mask_token"]
    assert_same(read_encoder(write(tmp_path / "b.safetensors", masked), TINY), tiny_state())


def test_query_key_and_value_are_stacked_in_this_order():
    parts = {
        f"encoder.layer.3.attention.attention.{part}.bias": torch.full((2,), value)
        for part, value in (("value", 3.0), ("query", 1.0), ("key", 2.0))
    }
    assert to_meta_names(parts)["blocks.3.attn.qkv.bias"].tolist() == [1, 1, 2, 2, 3, 3]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["official", "hugging-face"])
def test_files_of_the_released_size_compute_what_metas_code_does(tmp_path, layout):
    encoder = vit_small().eval()
    state = seeded_state(shapes_of(encoder))
    file = (
        write(tmp_path / "dinov2_vits14_pretrain.pth", state)
        if layout == "official"
        else write(tmp_path / "snapshot/model.safetensors", to_hugging_face(state)).parent
    )
    found = open_encoder(file)
    assert found.config == EncoderConfig()
    encoder.load_state_dict(found.state)
    with np.load(FIXTURES / "encoder_sizes.npz") as arrays:
        recorded = torch.from_numpy(arrays["vits14/98/values"])
    values = sampled(encoder(seeded_images(98)), ENCODER_EVERY)["values"]
    torch.testing.assert_close(values, recorded, rtol=1e-4, atol=1e-4)


def test_a_file_of_the_bundled_weights_is_known_as_such(tmp_path):
    stored = {k: v.half() for k, v in to_hugging_face(bundled_encoder_state()).items()}
    found = open_encoder(write(tmp_path / "model.safetensors", stored))
    assert_same(found.state, bundled_encoder_state())
    assert found.sha256 == ENCODER_SHA256
    other = {**found.state, "norm.bias": found.state["norm.bias"] + 1e-3}
    assert encoder_sha256(other) != ENCODER_SHA256


def test_a_cut_off_official_file_is_named_with_both_sizes(tmp_path):
    path = write(tmp_path / "dinov2_vits14_pretrain.pth", hollow_state(vit_small()))
    path.write_bytes(path.read_bytes()[:20_000])
    for read in (open_encoder, lambda file: find_encoder("dinov2_vits14", file)):
        with pytest.raises(CorruptFileError, match="stopped early") as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "has 20000 bytes of the official file's 88283115" in str(caught.value)


def test_a_cut_off_pickle_of_old_pytorch_is_named(tmp_path):
    path = tmp_path / "old.pth"
    torch.save(tiny_state(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in (20, 400, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptFileError, match=f"{size} bytes"):
            read_encoder(path, TINY)


def test_a_cut_off_safetensors_file_is_named_with_both_sizes(tmp_path):
    path = write(tmp_path / "model.safetensors", to_hugging_face(tiny_state()))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(
        CorruptFileError,
        match=f"has {len(whole) - 100} bytes, but its header tells of {len(whole)}",
    ):
        read_encoder(path, TINY)
    for size in (5, 200):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptFileError, match=f"{size} bytes"):
            read_encoder(path, TINY)


def test_a_flipped_bit_in_an_official_file_is_found_by_its_checksum(tmp_path):
    path = write(tmp_path / "weights.pth", tiny_state())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # PyTorch itself does not notice
    with pytest.raises(CorruptFileError, match="does not match its checksum"):
        read_encoder(path, TINY)


def test_values_that_are_not_finite_are_named(tmp_path):
    broken = tiny_state()
    broken["blocks.1.mlp.fc1.bias"][3] = float("nan")
    path = write(tmp_path / "a.safetensors", broken)
    with pytest.raises(CorruptFileError, match=r"blocks\.1\.mlp\.fc1\.bias"):
        read_encoder(path, TINY)


@pytest.mark.parametrize(
    ("content", "hint"),
    [(b"", "is empty"), (b"<html>404</html>", "web page"), (b"version https://git-lfs", "LFS")],
)
def test_what_is_no_weights_file_is_recognised(tmp_path, content, hint):
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=hint):
        read_encoder(path)


def test_a_file_of_another_size_is_refused_with_both_widths(tmp_path):
    path = write(tmp_path / "dinov2_vitb14_pretrain.pth", hollow_state(vit_base()))
    with pytest.raises(MismatchError, match="dinov2_vitb14") as caught:
        find_encoder("dinov2_vits14", path)
    assert "dinov2_vitb14 (width 768, 12 blocks)" in str(caught.value)
    assert "dinov2_vits14 (width 384, 12 blocks)" in str(caught.value)
    assert config_of(hollow_state(vit_base())) == EncoderConfig(12, 768, 12)


@pytest.mark.parametrize("layout", ["official", "hugging-face"])
def test_registers_are_refused_by_name(tmp_path, layout):
    state = tiny_state()
    stored = to_hugging_face(state) if layout == "hugging-face" else dict(state)
    prefix = "embeddings." if layout == "hugging-face" else ""
    stored[f"{prefix}register_tokens"] = torch.zeros(1, 4, 24)
    path = write(tmp_path / "dinov2_vits14_reg4_pretrain.safetensors", stored)
    with pytest.raises(UsageError, match="4 register tokens") as caught:
        read_encoder(path, TINY)
    assert path.name in str(caught.value)


class Intruder:
    """What unpickling must not run."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, zipped):
    marker = tmp_path / "was-run"
    state = {**tiny_state(), "extra": Intruder(marker)}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match=r"more than tensors.*mkdir.*not executed"):
        read_encoder(tmp_path / "a.pth", TINY)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ({"teacher": {"backbone.cls_token": torch.zeros(1)}}, "teacher hold no tensors"),
        ([torch.zeros(1)], "holds a list"),
        ({"weight": torch.zeros(1)}, "holds no DINOv2 encoder"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, hint):
    with pytest.raises(UsageError, match=hint):
        read_encoder(write(tmp_path / "a.pth", content))


def test_missing_foreign_and_misshapen_tensors_are_listed(tmp_path):
    state = tiny_state()
    del state["blocks.0.ls1.gamma"]
    state["head.weight"] = torch.zeros(2)
    state["pos_embed"] = torch.zeros(1, 17, 24)
    with pytest.raises(MismatchError) as caught:
        read_encoder(write(tmp_path / "a.pth", state), TINY)
    message = str(caught.value)
    assert "missing: blocks.0.ls1.gamma" in message
    assert "unexpected: head.weight" in message
    assert "pos_embed: shape (1, 17, 24), the model has (1, 1370, 24)" in message
    assert "3 differences" in message


def test_the_heads_of_an_unreleased_size_cannot_be_told(tmp_path):
    with pytest.raises(UsageError, match="width 24 and 2 blocks"):
        open_encoder(write(tmp_path / "a.pth", tiny_state()))
