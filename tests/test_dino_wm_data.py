"""DINO-WM's own data sets: what is read, what is refused, and that nothing in them is executed."""

import os
import pickle

import av
import numpy as np
import pytest
import torch

from quantwm.data.latents import FrameIndex
from quantwm.data.sources import open_data, stored_task
from quantwm.describe import contact_sheet, describe
from quantwm.envs import PointMaze, PushT, Wall
from quantwm.errors import CorruptFileError, MismatchError, UsageError

COUNT, STEPS = 10, 12


def frames(episode, steps=STEPS, side=16):
    """Frames whose grey level tells episode and step."""
    levels = 20 * episode + np.arange(steps)
    return np.repeat(levels, side * side * 3).reshape(steps, side, side, 3).astype(np.uint8)


def write_point_maze(folder, seed=0):
    generator = torch.Generator().manual_seed(seed)
    (folder / "obses").mkdir(parents=True)
    lengths = torch.tensor([STEPS - i % 3 for i in range(COUNT)])
    torch.save(torch.randn(COUNT, STEPS, 4, generator=generator), folder / "states.pth")
    torch.save(torch.randn(COUNT, STEPS, 2, generator=generator) * 0.5, folder / "actions.pth")
    torch.save(lengths, folder / "seq_lengths.pth")
    for i in range(COUNT):
        saved = torch.from_numpy(frames(i)[: lengths[i]])
        torch.save(saved, folder / "obses" / f"episode_{i:03d}.pth")
    return folder


def write_wall(folder):
    (folder / "obses").mkdir(parents=True)
    torch.save(torch.rand(COUNT, STEPS, 2) * 40 + 10, folder / "states.pth")
    torch.save(torch.randn(COUNT, STEPS, 2), folder / "actions.pth")
    torch.save(torch.full((COUNT, STEPS), 30), folder / "door_locations.pth")
    torch.save(torch.arange(COUNT)[:, None].repeat(1, STEPS) + 20, folder / "wall_locations.pth")
    for i in range(COUNT):
        saved = torch.from_numpy(frames(i)).permute(0, 3, 1, 2)
        torch.save(saved, folder / "obses" / f"episode_{i:03d}.pth")
    return folder


def write_video(path, images):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=10, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = images.shape[2], images.shape[1], "rgb24"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_pusht(folder, shapes=None):
    for split in ("train", "val"):
        part = folder / split
        (part / "obses").mkdir(parents=True)
        torch.save(torch.rand(4, STEPS, 5) * 400, part / "states.pth")
        torch.save(torch.randn(4, STEPS, 2), part / "velocities.pth")
        torch.save(torch.randn(4, STEPS, 2) * 20, part / "rel_actions.pth")
        (part / "seq_lengths.pkl").write_bytes(pickle.dumps([STEPS, STEPS - 1, 6, STEPS]))
        if shapes:
            (part / "shapes.pkl").write_bytes(pickle.dumps(shapes))
        for i in range(4):
            write_video(part / "obses" / f"episode_{i:03d}.mp4", frames(i))
    return folder


def test_point_maze_is_split_and_normalised_as_the_public_code_does(tmp_path):
    folder = write_point_maze(tmp_path / "data")
    data = open_data(folder, PointMaze())
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(42)).tolist()
    train, validation = (data.splits[k].trajectories for k in ("train", "validation"))
    assert train.seeds.tolist() == order[:9]
    assert validation.seeds.tolist() == order[9:]
    states, actions = (torch.load(folder / f"{n}.pth") for n in ("states", "actions"))
    lengths = torch.load(folder / "seq_lengths.pth")
    flat = torch.cat([actions[i, :t] for i, t in enumerate(lengths)])
    np.testing.assert_allclose(data.statistics.action_mean, flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(data.statistics.action_std, flat.std(0), rtol=1e-5)
    flat = torch.cat([states[i, :t] for i, t in enumerate(lengths)])
    np.testing.assert_allclose(data.statistics.proprio_std, flat.std(0), rtol=1e-5)
    second = order[1]
    offset = train.state_offsets[1]
    length = int(lengths[second])
    np.testing.assert_array_equal(
        train.states[offset : offset + length], states[second, :length].double()
    )
    assert train.lengths[1] == length - 1


def test_frames_are_those_of_the_episodes_file_at_the_raw_step(tmp_path):
    data = open_data(write_point_maze(tmp_path / "data"), PointMaze())
    split = data.splits["train"]
    index = FrameIndex.every(5, split.trajectories)
    shown = split.frames(index.trajectory, index.steps)
    expected = 20 * split.trajectories.seeds[index.trajectory] + index.steps
    np.testing.assert_array_equal(shown[:, 3, 3, 1], expected)


def test_wall_brings_its_layout_and_its_frames_channel_last(tmp_path):
    data = open_data(write_wall(tmp_path / "data"), Wall())
    train = data.splits["train"]
    np.testing.assert_array_equal(
        train.trajectories.layout["wall_x"], train.trajectories.seeds + 20
    )
    assert set(train.trajectories.layout["door_y"]) == {30}
    assert train.frames(np.array([0]), np.array([2])).shape == (1, 16, 16, 3)


def test_pusht_has_published_constants_scaled_actions_and_videos(tmp_path):
    folder = write_pusht(tmp_path / "data")
    data = open_data(folder, PushT())
    assert data.statistics.action_std == (0.2019, 0.2002)
    assert data.statistics.proprio_mean == (236.6155, 264.5674, -2.93032027, 2.54307914)
    train = data.splits["train"].trajectories
    assert train.lengths.tolist() == [STEPS - 1, STEPS - 2, 5, STEPS - 1]
    raw = torch.load(folder / "train" / "rel_actions.pth")
    np.testing.assert_allclose(train.actions[: STEPS - 1], raw[0, :-1] / 100, rtol=1e-6)
    velocities = torch.load(folder / "train" / "velocities.pth")
    np.testing.assert_array_equal(train.states[:STEPS, 5:], velocities[0])
    shown = data.splits["validation"].frames(np.array([1, 1, 3]), np.array([0, 5, 10]))
    np.testing.assert_allclose(shown[:, 4, 4, 0], [20, 25, 70], atol=2)


def test_a_run_is_of_its_actions_and_its_latents_of_the_states_alone(tmp_path):
    folder = write_pusht(tmp_path / "data")
    before = open_data(folder, PushT())
    path = folder / "train" / "rel_actions.pth"
    torch.save(torch.load(path) + 1, path)
    after = open_data(folder, PushT())
    assert after.key == before.key
    assert after.identity != before.identity


def test_blocks_of_other_shapes_are_refused(tmp_path):
    folder = write_pusht(tmp_path / "data", shapes=["T", "L", "T", "T"])
    with pytest.raises(MismatchError, match="shape L, the task's is 'T'"):
        open_data(folder, PushT())


def test_data_of_another_task_are_refused(tmp_path):
    folder = write_point_maze(tmp_path / "data")
    with pytest.raises(MismatchError, match="of 'point_maze', not of 'wall'"):
        open_data(folder, Wall())
    with pytest.raises(UsageError, match=r"neither dataset\.json"):
        open_data(tmp_path, Wall())


@pytest.mark.parametrize("name", ["actions.pth", "seq_lengths.pth"])
def test_a_missing_or_truncated_file_is_named(tmp_path, name):
    folder = write_point_maze(tmp_path / "data")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match=f"{name} cannot be read"):
        open_data(folder, PointMaze())
    (folder / name).unlink()
    with pytest.raises(CorruptFileError, match=f"{name} is missing"):
        open_data(folder, PointMaze())


def test_frames_that_are_missing_or_too_few_are_named(tmp_path):
    folder = write_point_maze(tmp_path / "data")
    split = open_data(folder, PointMaze()).splits["train"]
    episode = folder / "obses" / f"episode_{split.trajectories.seeds[0]:03d}.pth"
    torch.save(torch.load(episode)[:4], episode)
    with pytest.raises(CorruptFileError, match=rf"{episode.name} holds 4 frames.*truncated"):
        split.frames(np.array([0]), np.array([0]))
    episode.unlink()
    with pytest.raises(CorruptFileError, match=f"{episode.name} is missing"):
        split.frames(np.array([0]), np.array([0]))
    video = write_pusht(tmp_path / "pusht") / "train" / "obses" / "episode_000.mp4"
    video.write_bytes(video.read_bytes()[:200])
    with pytest.raises(CorruptFileError, match=r"episode_000.mp4 cannot be read"):
        open_data(tmp_path / "pusht", PushT()).splits["train"].frames(np.array([0]), np.array([0]))


def test_states_and_actions_of_different_sets_are_refused(tmp_path):
    folder = write_point_maze(tmp_path / "data")
    torch.save(torch.zeros(COUNT - 1, STEPS, 2), folder / "actions.pth")
    with pytest.raises(CorruptFileError, match=r"actions.pth holds 9 .*, states.pth 10"):
        open_data(folder, PointMaze())
    torch.save(torch.zeros(COUNT, STEPS, 2), folder / "actions.pth")
    torch.save(torch.full((COUNT,), STEPS + 1), folder / "seq_lengths.pth")
    with pytest.raises(CorruptFileError, match="lengths"):
        open_data(folder, PointMaze())


WRITERS = {"wall": (write_wall, Wall()), "point_maze": (write_point_maze, PointMaze())}
WRITERS |= {"pusht": (write_pusht, PushT())}
NAN = torch.full((4, STEPS, 2), float("nan"))


@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        ("pusht", "train/states.pth", torch.zeros(4, STEPS, 7)),
        ("pusht", "train/states.pth", torch.full((4, STEPS, 5), float("inf"))),
        ("pusht", "val/velocities.pth", torch.zeros(3, STEPS, 2)),
        ("pusht", "val/velocities.pth", torch.zeros(4, STEPS - 1, 2)),
        ("pusht", "val/velocities.pth", NAN),
        ("pusht", "train/rel_actions.pth", torch.zeros(4, STEPS, 10)),
        ("pusht", "train/rel_actions.pth", NAN),
        ("wall", "states.pth", torch.zeros(COUNT, 2)),
        ("wall", "states.pth", torch.zeros(1, STEPS, 2)),
        ("wall", "actions.pth", torch.zeros(COUNT, STEPS - 1, 2)),
        ("wall", "door_locations.pth", torch.zeros(COUNT - 1, STEPS)),
        ("wall", "door_locations.pth", torch.zeros(COUNT + 1, STEPS)),
        ("wall", "door_locations.pth", torch.zeros(COUNT)),
        ("point_maze", "seq_lengths.pth", torch.full((COUNT - 1,), STEPS)),
        ("point_maze", "seq_lengths.pth", torch.full((COUNT,), float("inf"))),
    ],
)
def test_a_file_of_another_shape_or_not_finite_is_named(tmp_path, task, name, value):
    write, opened = WRITERS[task]
    folder = write(tmp_path / "data")
    torch.save(value, folder / name)
    with pytest.raises(CorruptFileError, match=rf"^\S*/data/{name}\b"):
        open_data(folder, opened)


def test_padding_beyond_a_trajectorys_length_may_be_anything(tmp_path):
    folder = write_point_maze(tmp_path / "data")
    before = open_data(folder, PointMaze()).statistics
    for name in ("states.pth", "actions.pth"):
        values = torch.load(folder / name)
        values[2, STEPS - 2 :] = float("nan")
        torch.save(values, folder / name)
    assert open_data(folder, PointMaze()).statistics == before


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("pusht", "train/states.pth"),
        ("wall", "wall_locations.pth"),
        ("wall", "door_locations.pth"),
        ("point_maze", "states.pth"),
    ],
)
def test_without_a_file_the_task_is_known_and_the_file_named(tmp_path, task, name):
    write, opened = WRITERS[task]
    folder = write(tmp_path / "data")
    (folder / name).unlink()
    assert stored_task(folder) == {"name": task}
    with pytest.raises(CorruptFileError, match=f"data/{name} is missing"):
        open_data(folder, opened)


def test_walls_data_in_two_folders_are_not_taken_for_pushts(tmp_path):
    for name in ("train", "val"):
        write_wall(tmp_path / name)
    assert stored_task(tmp_path) == {"name": "wall"}
    with pytest.raises(UsageError, match=r"give .*train"):
        open_data(tmp_path, Wall())
    assert len(open_data(tmp_path / "train", Wall()).splits["train"].trajectories) == 9


def test_frames_that_are_not_bytes_are_refused(tmp_path):
    folder = write_wall(tmp_path / "data")
    for episode in (folder / "obses").iterdir():
        torch.save(torch.load(episode) / 255, episode)
    with pytest.raises(CorruptFileError, match=r"episode_\d+.pth holds frames of torch.float32"):
        open_data(folder, Wall()).splits["train"].frames(np.array([0]), np.array([0]))


class Bomb:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"
    folder = write_pusht(tmp_path / "pusht")
    (folder / "train" / "seq_lengths.pkl").write_bytes(pickle.dumps([Bomb(canary)]))
    with pytest.raises(CorruptFileError, match=r"seq_lengths.pkl.*refused"):
        open_data(folder, PushT())
    maze = write_point_maze(tmp_path / "maze")
    torch.save(Bomb(canary), maze / "states.pth")
    with pytest.raises(CorruptFileError, match=r"states.pth cannot be read"):
        open_data(maze, PointMaze())
    assert not canary.exists()


class Forged:
    """Numpy's type of objects, of which the pickle says that it holds none."""

    def __reduce__(self):
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


class ForgedArray:
    """Bytes as pointers; null pointers, which do no harm where the array is made."""

    def __reduce__(self):
        reconstruct = np.zeros(1).__reduce__()[0]
        return reconstruct, (np.ndarray, (0,), b"b"), (1, (4,), Forged(), False, bytes(32))


class ForgedNumber:
    def __reduce__(self):
        return np.int64(1).__reduce__()[0], (Forged(), bytes(8))


@pytest.mark.parametrize("name", ["seq_lengths.pkl", "shapes.pkl"])
@pytest.mark.parametrize("forged", [ForgedArray(), [ForgedNumber()]])
def test_pickled_pointers_are_refused(tmp_path, forged, name):
    folder = write_pusht(tmp_path / "pusht")
    (folder / "train" / name).write_bytes(pickle.dumps(forged))
    with pytest.raises(CorruptFileError, match=rf"train/{name} .*type 'O8', which is refused"):
        open_data(folder, PushT())


def test_lengths_pickled_from_numpy_are_read(tmp_path):
    folder = write_pusht(tmp_path / "data")
    for value in (np.full(4, 6), np.full(4, 6, ">i4"), [np.int64(6)] * 4):
        (folder / "train" / "seq_lengths.pkl").write_bytes(pickle.dumps(value))
        assert open_data(folder, PushT()).splits["train"].trajectories.lengths.tolist() == [5] * 4


def test_info_describes_a_public_data_set_and_shows_its_frames(tmp_path):
    folder = write_point_maze(tmp_path / "data")
    facts = describe(str(folder))
    assert facts["task"]["name"] == "point_maze"
    assert facts["train"]["trajectories"] == 9
    assert facts["validation"]["trajectories"] == 1
    contact_sheet(str(folder), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0
