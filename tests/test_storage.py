import json

import pytest
import torch
from torch import nn

from quantwm.errors import CorruptFileError, MismatchError, QuantWMError, UsageError
from quantwm.storage import (
    METADATA_FILE,
    TENSORS_FILE,
    assign,
    read_folder,
    read_metadata,
    restore,
    shrink,
    smallest_float,
    stored_size,
    write_folder,
)

METADATA = {"format": "test", "format_version": 3, "note": "ü"}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, 0.5, -3.25], torch.float16),
        ([0.0, float("inf"), 6e-8 * 0], torch.float16),
        ([1e30 * 0 + 2.0**100], torch.bfloat16),
        ([0.1], torch.float32),
        ([65504.0, 0.1], torch.float32),
        ([float("nan")], torch.float32),
    ],
)
def test_smallest_float_that_loses_nothing(values, dtype):
    tensor = torch.tensor(values)
    smaller = smallest_float(tensor)
    assert smaller.dtype == dtype
    assert torch.equal(smaller.float().view(torch.int32), tensor.view(torch.int32))


def test_shrinking_is_undone_bit_for_bit():
    tensors = {
        "half": torch.tensor([0.5, -0.0]),
        "full": torch.tensor([0.1]),
        "double": torch.tensor([0.25], dtype=torch.float64),
        "bfloat": torch.tensor([3.0], dtype=torch.bfloat16),
        "whole": torch.tensor([7]),
    }
    stored, dtypes = shrink(tensors)
    assert dtypes == {"half": "float32", "double": "float64"}
    for name, tensor in restore(stored, dtypes).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
        assert torch.equal(torch.signbit(tensor), torch.signbit(tensors[name]))


def test_folder_round_trips(tmp_path):
    write_folder(tmp_path / "new" / "model", TENSORS, METADATA)
    tensors, metadata = read_folder(tmp_path / "new" / "model", "test", 3)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert metadata["note"] == "ü"
    assert sorted(entry.name for entry in (tmp_path / "new").iterdir()) == ["model"]


def test_tensors_that_share_memory_or_are_views_can_be_written(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    write_folder(tmp_path / "model", {"a": base, "b": base, "t": base.t()}, METADATA)
    tensors, _ = read_folder(tmp_path / "model", "test", 3)
    assert torch.equal(tensors["t"], base.t())
    assert torch.equal(tensors["a"], tensors["b"])


def test_size_counts_what_the_file_holds(tmp_path):
    write_folder(tmp_path / "model", TENSORS, METADATA)
    content = (tmp_path / "model" / TENSORS_FILE).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - header == stored_size(TENSORS) == 6 * 4 + 2


@pytest.mark.parametrize("name", [TENSORS_FILE, METADATA_FILE])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty"])
def test_damage_is_found(tmp_path, name, damage):
    folder = tmp_path / "model"
    write_folder(folder, TENSORS, METADATA)
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[:-3])
    elif damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    expected = CorruptFileError
    if damage == "remove" and name == METADATA_FILE:
        expected = UsageError
    with pytest.raises(expected, match=name):
        read_folder(folder, "test", 3)


def test_an_edited_field_is_found(tmp_path):
    write_folder(tmp_path / "model", TENSORS, METADATA)
    path = tmp_path / "model" / METADATA_FILE
    document = json.loads(path.read_text()) | {"note": "other"}
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptFileError, match="own checksum"):
        read_metadata(tmp_path / "model")
    path.write_text("[]")
    with pytest.raises(CorruptFileError):
        read_metadata(tmp_path / "model")


def test_other_formats_and_versions_are_refused(tmp_path):
    write_folder(tmp_path / "model", TENSORS, METADATA)
    with pytest.raises(UsageError, match="'test' version 3; expected 'test' version 4"):
        read_folder(tmp_path / "model", "test", 4)
    with pytest.raises(UsageError, match="expected 'other'"):
        read_folder(tmp_path / "model", "other", 3)


def test_a_model_folder_is_replaced_whole(tmp_path):
    write_folder(tmp_path / "model", TENSORS, METADATA)
    write_folder(tmp_path / "model", {"c": torch.ones(1)}, METADATA)
    assert list(read_folder(tmp_path / "model", "test", 3)[0]) == ["c"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_foreign_content_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        write_folder(tmp_path, TENSORS, METADATA)
    with pytest.raises(UsageError, match="is a file"):
        write_folder(tmp_path / "thesis.tex", TENSORS, METADATA)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, existing, error):
    folder = tmp_path / "model"
    if existing:
        write_folder(folder, TENSORS, METADATA)

    def fail(_descriptor):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises((QuantWMError, KeyboardInterrupt)) as caught:
            write_folder(folder, {"c": torch.ones(1)}, METADATA)
    assert caught.type is KeyboardInterrupt or "No space left" in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == (["model"] if existing else [])
    if existing:
        assert set(read_folder(folder, "test", 3)[0]) == set(TENSORS)


def test_assigning_replaces_tensors_and_writes_into_none():
    module = nn.Linear(2, 1)
    old, old_value = module.weight, module.weight.detach().clone()
    new = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0], dtype=torch.float16)}
    assign(module, new)
    assert module.weight.tolist() == [[1.0, 2.0]]
    assert module.bias.dtype == torch.float16
    assert torch.equal(old, old_value)


def test_assigning_lists_all_differences():
    with pytest.raises(MismatchError) as caught:
        assign(nn.Linear(2, 1), {"weight": torch.zeros(3, 1), "other": torch.zeros(1)})
    message = str(caught.value)
    assert "3 differences" in message
    assert "missing: bias" in message
    assert "unexpected: other" in message
    assert "weight: shape (3, 1), the model has (1, 2)" in message
