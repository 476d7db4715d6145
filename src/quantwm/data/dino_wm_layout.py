"""DINO-WM's own data sets, read without executing anything that is in them.

Their folders (github.com/gaoyuezhou/dino_wm, `datasets/`) hold, n trajectories of at most T steps:

    Wall        states.pth (n, T, 2), actions.pth, door_locations.pth and wall_locations.pth (n, T)
    PointMaze   states.pth (n, T, 4), actions.pth, seq_lengths.pth (n,)
    PushT       train/ and val/, each with states.pth (n, T, 5), rel_actions.pth (100 times what the
                task takes), velocities.pth (n, T, 2), seq_lengths.pkl and, in some, shapes.pkl
    obses/      episode_000.pth, ...: uint8 frames, (T, H, W, 3) or, for Wall, (T, 3, H, W);
                episode_000.mp4, ... for PushT

Action t lies between frames t and t + 1, so each trajectory's last action leads nowhere. Wall and
PointMaze are split as there: nine tenths to train, by torch's permutation of seed 42.

Statistics are those that the public code normalises with: PushT has constants, the others' are
computed from all trajectories, both splits, the last actions included.
"""

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantwm.data.statistics import Statistics
from quantwm.data.trajectories import Trajectories
from quantwm.data.video import read_video
from quantwm.errors import CorruptFileError, MismatchError, UsageError
from quantwm.files import sha256_file
from quantwm.protocols import Task

PUSHT_STATISTICS = Statistics(
    action_mean=(-0.0087, 0.0068),
    action_std=(0.2019, 0.2002),
    proprio_mean=(236.6155, 264.5674, -2.93032027, 2.54307914),
    proprio_std=(101.1202, 87.0112, 74.84556075, 74.14009094),
)
_PUSHT_ACTION_SCALE = 100.0
_PUSHT_POSE_WIDTH, _PUSHT_VELOCITY_WIDTH = 5, 2
_TRAIN_FRACTION, _SPLIT_SEED = 0.9, 42
_DISTINCTIVE = {
    "pusht": ("rel_actions.pth", "velocities.pth", "seq_lengths.pkl"),
    "wall": ("wall_locations.pth", "door_locations.pth"),
    "point_maze": ("seq_lengths.pth",),
}
"""Files of one task alone: any of them tells which it is, so that a missing one can be named."""


@dataclass
class Part:
    """One split: its trajectories, and the folder and numbers of their episodes' frames."""

    trajectories: Trajectories
    folder: Path
    episodes: npt.NDArray[np.int64]
    _open: tuple[int, npt.NDArray[np.uint8]] | None = field(default=None, repr=False)

    def frames(
        self, trajectory: npt.NDArray[np.int64], steps: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint8]:
        """Frames (n, H, W, 3) of trajectories (n,) at steps (n,).

        Raises:
            CorruptFileError: an episode's file is missing, damaged or too short; names it.
        """
        return np.stack(
            [self._episode(int(i))[int(t)] for i, t in zip(trajectory, steps, strict=True)]
        )

    def _episode(self, index: int) -> npt.NDArray[np.uint8]:
        if self._open is None or self._open[0] != index:
            frames, path = _read_frames(self.folder, int(self.episodes[index]))
            needed = int(self.trajectories.lengths[index]) + 1
            if len(frames) < needed:
                raise CorruptFileError(
                    f"{path} holds {len(frames)} frames, the trajectory has {needed} states: the "
                    "file is truncated, or belongs to other states"
                )
            self._open = (index, frames)
        return self._open[1]


def task_of(folder: Path) -> str | None:
    """Name of the task whose data set lies in a folder; None if none does."""
    parts = (folder, folder / "train", folder / "val")
    for task, names in _DISTINCTIVE.items():
        if any((part / name).is_file() for part in parts for name in names):
            return task
    if (folder / "states.pth").is_file():
        return "point_maze"
    return "pusht" if (folder / "train" / "states.pth").is_file() else None


def read(folder: Path, task: Task) -> tuple[dict[str, Part], Statistics, dict[str, Any]]:
    """The splits "train" and "validation", the statistics, and what identifies the data.

    Raises:
        MismatchError: the data are another task's, or a block shape's that the task has not.
        CorruptFileError: a file is missing, damaged, of another shape than states.pth and the task
            need, or not finite; names it.
        UsageError: Wall's data lie in two folders.
    """
    found = task_of(folder)
    if found != task.name:
        raise MismatchError(f"{folder} is DINO-WM's data set of {found!r}, not of {task.name!r}")
    if found == "wall" and (folder / "train").is_dir() and not (folder / "states.pth").is_file():
        raise UsageError(
            f"{folder} holds Wall's data in train/ and val/, which are not read as one data set: "
            f"give {folder / 'train'}"
        )
    if found == "pusht":
        names = {"train": "train", "validation": "val"}
        parts = {split: _read_pusht(folder / name, task) for split, name in names.items()}
        files = [folder / name / "states.pth" for name in names.values()]
        return parts, PUSHT_STATISTICS, {"dino_wm": [sha256_file(path) for path in files]}
    parts, statistics = _read_unsplit(folder, task)
    return parts, statistics, {"dino_wm": [sha256_file(folder / "states.pth")]}


def _read_unsplit(folder: Path, task: Task) -> tuple[dict[str, Part], Statistics]:
    states = _values(folder / "states.pth", task.proprio_dim)
    count, steps = states.shape[:2]
    if count < 2:
        raise CorruptFileError(f"{folder / 'states.pth'} holds one trajectory, too few to split")
    if task.name == "point_maze":
        path = folder / "seq_lengths.pth"
        lengths, layout = _lengths(path, _tensor(path).tolist(), states), {}
    else:
        lengths, layout = np.full(count, steps), _wall_layout(folder, count)
    _check_finite(folder / "states.pth", states, lengths)
    actions = _steps(folder / "actions.pth", task.action_dim, lengths)
    all_actions, all_states = (
        torch.cat([values[i, :length] for i, length in enumerate(lengths)]).numpy()
        for values in (actions, states)
    )
    statistics = Statistics.of(all_actions, task.proprio(all_states), unbiased=True)
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    first = int(_TRAIN_FRACTION * len(states))
    chosen = {"train": order[:first].numpy(), "validation": order[first:].numpy()}
    parts = {
        split: Part(_trajectories(states, actions, lengths, layout, rows), folder, rows)
        for split, rows in chosen.items()
    }
    return parts, statistics


def _read_pusht(folder: Path, task: Task) -> Part:
    poses = _values(folder / "states.pth", _PUSHT_POSE_WIDTH)
    path = folder / "seq_lengths.pkl"
    lengths = _lengths(path, _unpickled(path), poses)
    _check_finite(folder / "states.pth", poses, lengths)
    velocities = _steps(folder / "velocities.pth", _PUSHT_VELOCITY_WIDTH, lengths)
    states = torch.cat([values[:, : lengths.max()] for values in (poses, velocities)], dim=-1)
    actions = _steps(folder / "rel_actions.pth", task.action_dim, lengths) / _PUSHT_ACTION_SCALE
    shape = task.settings().get("shape")
    if (folder / "shapes.pkl").is_file():
        others = sorted({str(s) for s in _unpickled(folder / "shapes.pkl")} - {shape})
        if others:
            raise MismatchError(
                f"{folder / 'shapes.pkl'} names blocks of shape {', '.join(others)}, the task's "
                f"is {shape!r}"
            )
    rows = np.arange(len(states))
    return Part(_trajectories(states, actions, lengths, {}, rows), folder, rows)


def _wall_layout(folder: Path, count: int) -> dict[str, npt.NDArray[np.int64]]:
    names = {"wall_x": "wall_locations.pth", "door_y": "door_locations.pth"}
    located = {key: _tensor(folder / name) for key, name in names.items()}
    for key, places in located.items():
        if places.ndim < 2 or len(places) != count or not places.numel():
            raise CorruptFileError(
                f"{folder / names[key]} holds a tensor {tuple(places.shape)}, states.pth {count} "
                "trajectories: one of the two is incomplete or of other data"
            )
    return {key: places.flatten(1)[:, 0].long().numpy() for key, places in located.items()}


def _trajectories(
    states: Tensor,
    actions: Tensor,
    lengths: npt.NDArray[np.int64],
    layout: dict[str, npt.NDArray[np.int64]],
    rows: npt.NDArray[np.int64],
) -> Trajectories:
    return Trajectories(
        torch.cat([states[i, : lengths[i]] for i in rows]).numpy(),
        torch.cat([actions[i, : lengths[i] - 1] for i in rows]).float().numpy(),
        (lengths[rows] - 1).astype(np.int64),
        {name: values[rows] for name, values in layout.items()},
        rows.astype(np.int64),
    )


def _values(path: Path, width: int) -> Tensor:
    """The values (n, T, width) of a file, float64."""
    values = _tensor(path)
    if values.ndim != 3 or values.shape[2] != width or not values.numel():
        raise CorruptFileError(
            f"{path} holds a tensor {tuple(values.shape)}, not (trajectories, steps, {width})"
        )
    return values.double()


def _steps(path: Path, width: int, lengths: npt.NDArray[np.int64]) -> Tensor:
    """The values (n, T, width) of a file that belongs to states of these lengths (n,), float64."""
    values = _values(path, width)
    count, steps = values.shape[:2]
    if count != len(lengths) or steps < lengths.max():
        raise CorruptFileError(
            f"{path} holds {count} trajectories of {steps} steps, states.pth {len(lengths)} of up "
            f"to {lengths.max()}: one of the two is incomplete or of other data"
        )
    _check_finite(path, values, lengths)
    return values


def _check_finite(path: Path, values: Tensor, lengths: npt.NDArray[np.int64]) -> None:
    # What lies beyond a trajectory's length is padding, which nobody reads.
    held = torch.arange(values.shape[1]) < torch.from_numpy(lengths)[:, None]
    faulty = (~values.isfinite().all(-1) & held).any(1)
    if faulty.any():
        raise CorruptFileError(
            f"{path} holds values that are not finite, first in trajectory {faulty.int().argmax()}"
        )


def _tensor(path: Path) -> Tensor:
    """A tensor that torch saved; nothing but tensors and plain containers is unpickled."""
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing: the data set is incomplete")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CorruptFileError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, Tensor):
        raise CorruptFileError(f"{path} holds a {type(value).__name__}, not a tensor")
    return value.detach()


def _read_frames(folder: Path, episode: int) -> tuple[npt.NDArray[np.uint8], Path]:
    stem = folder / "obses" / f"episode_{episode:03d}"
    video, saved = stem.with_suffix(".mp4"), stem.with_suffix(".pth")
    if video.is_file():
        return read_video(video), video
    frames = _tensor(saved)
    if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[3]):
        raise CorruptFileError(f"{saved} holds no frames, but a tensor {tuple(frames.shape)}")
    if frames.dtype != torch.uint8:
        raise CorruptFileError(f"{saved} holds frames of {frames.dtype}, not of torch.uint8")
    if frames.shape[3] != 3:
        frames = frames.permute(0, 2, 3, 1)
    return frames.contiguous().numpy(), saved


class _Inert:
    """Stands in for an object of numpy's: holds what numpy would be given, and never is.

    Numpy believes a pickle: given a type of objects that is said to hold none, it takes bytes for
    pointers.
    """

    state: Any = ()

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, text and lists; numpy's numbers and arrays become inert."""

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype")}
        | {
            (f"numpy.{core}.multiarray", name)
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return _Inert


def _plain(value: Any) -> Any:
    """A number or list for what stands in for numpy's; anything else as it is."""
    if not isinstance(value, _Inert):
        return value
    # An array's state is (version, shape, type, order, bytes); a number is made of (type, bytes).
    kind, data = (value.state[2], value.state[4]) if value.state else value.args
    code, byte_order = kind.args[0], kind.state[1]
    if not re.fullmatch("[biuf][1248]", code):
        raise pickle.UnpicklingError(f"it holds values of numpy's type {code!r}, which is refused")
    values = np.frombuffer(data, np.dtype(code).newbyteorder(byte_order))
    return values.tolist() if value.state else values.item()


def _unpickled(path: Path) -> list[Any]:
    """A list of numbers or text."""
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing: the data set is incomplete")
    try:
        with path.open("rb") as handle:
            value = _plain(_PlainUnpickler(handle).load())
        if isinstance(value, list):
            value = [_plain(item) for item in value]
    except Exception as error:
        raise CorruptFileError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, list) or not all(isinstance(v, int | float | str) for v in value):
        raise CorruptFileError(f"{path} holds no list of numbers or text")
    return value


def _lengths(path: Path, values: list[Any], states: Tensor) -> npt.NDArray[np.int64]:
    """The lengths (n,) that a file has for states (n, T, S)."""
    try:
        lengths = np.array([int(value) for value in values], np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise CorruptFileError(f"{path} holds no list of lengths: {error}") from error
    count, steps = states.shape[:2]
    if len(lengths) != count:
        raise CorruptFileError(
            f"{path} holds {len(lengths)} lengths, states.pth {count} trajectories: one of the two "
            "is incomplete or of other data"
        )
    if lengths.min() < 2 or lengths.max() > steps:
        raise CorruptFileError(
            f"{path} holds lengths {lengths.min()} to {lengths.max()}, states.pth {steps} steps"
        )
    return lengths
