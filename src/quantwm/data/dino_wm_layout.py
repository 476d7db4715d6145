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
from quantwm.errors import CorruptFileError, MismatchError
from quantwm.files import sha256_file
from quantwm.protocols import Task

PUSHT_STATISTICS = Statistics(
    action_mean=(-0.0087, 0.0068),
    action_std=(0.2019, 0.2002),
    proprio_mean=(236.6155, 264.5674, -2.93032027, 2.54307914),
    proprio_std=(101.1202, 87.0112, 74.84556075, 74.14009094),
)
_PUSHT_ACTION_SCALE = 100.0
_TRAIN_FRACTION, _SPLIT_SEED = 0.9, 42


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
    if (folder / "train" / "states.pth").is_file() or (folder / "rel_actions.pth").is_file():
        return "pusht"
    if not (folder / "states.pth").is_file():
        return None
    return "wall" if (folder / "wall_locations.pth").is_file() else "point_maze"


def read(folder: Path, task: Task) -> tuple[dict[str, Part], Statistics, dict[str, Any]]:
    """The splits "train" and "validation", the statistics, and what identifies the data.

    Raises:
        MismatchError: the data are another task's, or a block shape's that the task has not.
        CorruptFileError: a file is missing or damaged; names it.
    """
    found = task_of(folder)
    if found != task.name:
        raise MismatchError(f"{folder} is DINO-WM's data set of {found!r}, not of {task.name!r}")
    if found == "pusht":
        names = {"train": "train", "validation": "val"}
        parts = {split: _read_pusht(folder / name, task) for split, name in names.items()}
        files = [folder / name / "states.pth" for name in names.values()]
        return parts, PUSHT_STATISTICS, {"dino_wm": [sha256_file(path) for path in files]}
    parts, statistics = _read_unsplit(folder, task)
    return parts, statistics, {"dino_wm": [sha256_file(folder / "states.pth")]}


def _read_unsplit(folder: Path, task: Task) -> tuple[dict[str, Part], Statistics]:
    states, actions = (_tensor(folder / f"{name}.pth").double() for name in ("states", "actions"))
    if task.name == "point_maze":
        name = "seq_lengths.pth"
        lengths, layout = _integers(_tensor(folder / name).tolist(), name, folder), {}
    else:
        lengths, layout = np.full(len(states), states.shape[1]), _wall_layout(folder)
    _check_lengths(folder, lengths, states, actions)
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
    states = torch.cat(
        [_tensor(folder / "states.pth"), _tensor(folder / "velocities.pth")], dim=-1
    ).double()
    actions = _tensor(folder / "rel_actions.pth").double() / _PUSHT_ACTION_SCALE
    name = "seq_lengths.pkl"
    lengths = _integers(_unpickled(folder / name), name, folder)
    _check_lengths(folder, lengths, states, actions)
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


def _wall_layout(folder: Path) -> dict[str, npt.NDArray[np.int64]]:
    names = {"wall_x": "wall_locations.pth", "door_y": "door_locations.pth"}
    located = {key: _tensor(folder / name) for key, name in names.items()}
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


def _check_lengths(
    folder: Path, lengths: npt.NDArray[np.int64], states: Tensor, actions: Tensor
) -> None:
    count, steps = states.shape[:2]
    if len(actions) != count or len(lengths) != count or actions.shape[1] < lengths.max():
        raise CorruptFileError(
            f"{folder}: {count} trajectories of states, {len(actions)} of actions (up to "
            f"{actions.shape[1]} steps) and {len(lengths)} lengths do not belong together; one of "
            "states.pth, the actions and seq_lengths is of other data or incomplete"
        )
    if lengths.min() < 2 or lengths.max() > steps:
        raise CorruptFileError(
            f"{folder}: lengths are {lengths.min()} to {lengths.max()}, states.pth holds {steps} "
            "steps"
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
    return value


def _read_frames(folder: Path, episode: int) -> tuple[npt.NDArray[np.uint8], Path]:
    stem = folder / "obses" / f"episode_{episode:03d}"
    video, saved = stem.with_suffix(".mp4"), stem.with_suffix(".pth")
    if video.is_file():
        return read_video(video), video
    frames = _tensor(saved)
    if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[3]):
        raise CorruptFileError(f"{saved} holds no frames, but a tensor {tuple(frames.shape)}")
    if frames.shape[3] != 3:
        frames = frames.permute(0, 2, 3, 1)
    return frames.to(torch.uint8).contiguous().numpy(), saved


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, text and lists, and numpy's arrays of them; any other global is refused."""

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
        return super().find_class(module, name)


def _unpickled(path: Path) -> list[Any]:
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing: the data set is incomplete")
    try:
        with path.open("rb") as handle:
            value = _PlainUnpickler(handle).load()
    except Exception as error:
        raise CorruptFileError(f"{path} cannot be read: {error}") from error
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise CorruptFileError(f"{path} holds a {type(value).__name__}, not a list")
    return value


def _integers(values: list[Any], name: str, folder: Path) -> npt.NDArray[np.int64]:
    try:
        return np.array([int(value) for value in values], np.int64)
    except (TypeError, ValueError) as error:
        raise CorruptFileError(f"{folder / name} holds no list of lengths: {error}") from error
