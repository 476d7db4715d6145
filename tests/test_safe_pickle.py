"""Checkpoints that attack or are broken: each is refused, in words, and nothing of it happens."""

import json
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import attacks
from attack_programs import name, program, programs
from checkpoint_support import parts, saved, write_folder
from quantwm.errors import CorruptFileError
from quantwm.models.safe_pickle import Inert, parse
from quantwm.models.torch_archive import TorchArchive


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What one process made of all attacks, what it ought to say, and the canary's path."""
    folder = tmp_path_factory.mktemp("attacks")
    canary = tmp_path_factory.mktemp("canary") / "sang"
    messages = attacks.write_all(folder, canary)
    write_folder(folder / "good", saved(parts()))
    ran = subprocess.run(
        [sys.executable, attacks.__file__, str(folder)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(ran.stdout), messages, canary


def test_every_attack_is_refused_with_a_message_that_says_why(refused):
    outcomes, messages = refused[0]["outcomes"], refused[1]
    assert outcomes.pop("good") == "loaded"
    assert outcomes.keys() == messages.keys()
    assert len(messages) > 100
    wrong = {
        key: outcome
        for key, outcome in outcomes.items()
        if not outcome.startswith("refused") or messages[key] not in outcome
    }
    assert not wrong
    assert max(map(len, outcomes.values())) < 2500


def test_no_attack_runs_anything_or_writes_a_file(refused):
    report, _, canary = refused
    assert not canary.exists()
    assert report["events"] == []


def test_no_attack_takes_much_memory(refused):
    assert refused[0]["grown"] < 400 * 2**20


def test_the_canary_would_sing(tmp_path):
    """The payload does work where it is executed."""
    import pickle

    canary = tmp_path / "sang"
    content, _ = programs(canary)["os_system"]
    pickle.loads(content)
    assert canary.exists()


def test_a_saved_module_is_read_without_its_class(tmp_path):
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 2)
    torch.save({"layer": linear, "view": linear.weight[:, 1:].detach()}, tmp_path / "x.pth")
    with TorchArchive(tmp_path / "x.pth") as archive:
        layer = archive.root["layer"]
        assert isinstance(layer, Inert)
        assert str(layer.kind) == "torch.nn.modules.linear.Linear"
        assert layer.state["in_features"] == 3
        weight = archive.tensor(layer.state["_parameters"]["weight"])
        view = archive.tensor(archive.root["view"])
    assert torch.equal(weight, linear.weight)
    assert torch.equal(view, linear.weight[:, 1:])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_and_numbers_come_back_as_they_were(tmp_path, protocol):
    content = {
        "numbers": [0, -1, 255, 70_000, 2**40, -(2**70), 1.5, True, None],
        "text": ("a", "ä" * 300, ()),
        "nested": {"x": [{}, (1, 2, 3, 4)], 3: {"y"}},
        "ordered": OrderedDict(a=1, b=2),
        "frozen": frozenset({1, 2}),
    }
    content["again"] = content["numbers"]
    torch.save(content, tmp_path / "x.pth", pickle_protocol=protocol)
    with TorchArchive(tmp_path / "x.pth") as archive:
        assert archive.root == content
        assert archive.root["again"] is archive.root["numbers"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_tensors_of_every_type_are_read_bit_for_bit(tmp_path, dtype):
    values = (torch.arange(24).reshape(4, 6) % 7).to(dtype)
    tensors = {"t": values.T, "part": values[1:3, ::2], "none": values[:0], "one": values[0, 0]}
    torch.save(tensors, tmp_path / "x.pth")
    with TorchArchive(tmp_path / "x.pth") as archive:
        for key, value in tensors.items():
            read = archive.tensor(archive.root[key])
            assert read.dtype == dtype
            assert torch.equal(read, value)


def test_a_program_that_names_something_else_is_refused_by_that_name():
    with pytest.raises(CorruptFileError, match=r"here: .*'os\.system'.*nothing of it was executed"):
        parse(program(name("os", "system")), lambda _: None, "here")


def test_random_damage_is_refused_or_harmless(tmp_path):
    """Whatever bytes a program has, the only error is the one that says that it is damaged."""
    torch.save({"layer": torch.nn.Linear(3, 2), "x": [1, 2.0, ("a", {3})]}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        good = archive.read("x/data.pkl")
    generator, refusals = np.random.default_rng(0), 0
    for _ in range(500):
        damaged = bytearray(good)
        for position in generator.integers(0, len(good), generator.integers(1, 4)):
            damaged[position] = generator.integers(0, 256)
        try:
            parse(bytes(damaged), lambda _: None, "here")
        except CorruptFileError:
            refusals += 1
    assert refusals > 100


def test_what_is_not_asked_for_is_never_read(tmp_path):
    """A damaged decoder harms nobody who does not want it."""
    path = tmp_path / "x.pth"
    torch.save({"wanted": torch.ones(64), "decoder": torch.full((64,), 3.0)}, path)
    content = Path(path).read_bytes()
    three = torch.full((64,), 3.0).numpy().tobytes()
    path.write_bytes(content.replace(three, bytes(len(three))))
    with TorchArchive(path) as archive:
        assert torch.equal(archive.tensor(archive.root["wanted"]), torch.ones(64))
        with pytest.raises(CorruptFileError, match="CRC"):
            archive.tensor(archive.root["decoder"])
