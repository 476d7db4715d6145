"""Collected data sets on disk: damaged, unfinished, or in a place where nothing can be written."""

import resource

import numpy as np
import pytest

from quantwm.data.collect import collect
from quantwm.data.sources import open_data, stored_task
from quantwm.data.trajectories import Trajectories, TrajectoryFolder
from quantwm.envs import Wall
from quantwm.errors import CorruptFileError, QuantWMError, UsageError


@pytest.mark.parametrize(
    ("train", "says"), [(1001, "1000 of 1001 train"), (2, "0 of 1 validation")]
)
def test_an_unfinished_collection_is_not_trained_on(tmp_path, train, says):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(Wall(), tmp_path, train=train, validation=1, progress=stop)
    with pytest.raises(QuantWMError, match=rf"{says} trajectories; run the same .* again"):
        open_data(tmp_path, Wall())
    assert stored_task(tmp_path) == Wall().settings()
    collect(Wall(), tmp_path, train=train, validation=1)
    assert len(open_data(tmp_path, Wall()).splits["train"].trajectories) == train


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"\xff\xfe{}",
        b'{"format_version": 1, "origin": {}, "shards": {}}',
        b'{"format_version": 1, "task": {}, "origin": {}, "shards": {}}',
        b'{"format_version": 1, "task": {"name": "wall"}, "origin": {}, "shards": []}',
    ],
)
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "dataset.json").write_bytes(content)
    for read in (stored_task, lambda folder: open_data(folder, Wall())):
        with pytest.raises(CorruptFileError, match=r"dataset\.json"):
            read(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_told_and_kept(tmp_path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(UsageError, match="mine is a file, not a folder"):
        collect(Wall(), tmp_path / "mine", train=1, validation=1)
    with pytest.raises(QuantWMError, match="cannot write"):
        collect(Wall(), tmp_path / "mine" / "data", train=1, validation=1)
    assert (tmp_path / "mine").read_text() == "text"


def test_a_full_disk_is_told_and_leaves_no_half_of_a_shard(tmp_path):
    """A limit on file sizes makes writes fail as a full disk does: in the middle of a file."""
    data = TrajectoryFolder(tmp_path)
    data.begin(Wall().settings(), {})
    states, actions = np.zeros((1001, 2)), np.zeros((1000, 2), np.float32)
    part = Trajectories(states, actions, np.array([1000]), {}, np.array([0]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(QuantWMError, match=r"cannot write .*disk has room"):
            data.add_shard("train-0000-1", "train", part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]
