"""A data set to train on, whoever wrote it: trajectories, their frames, their statistics."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from quantwm.data import dino_wm_layout
from quantwm.data.statistics import Statistics, of_trajectories
from quantwm.data.trajectories import Trajectories, TrajectoryFolder
from quantwm.errors import MismatchError, UsageError
from quantwm.files import sha256_file
from quantwm.protocols import Task

IntArray: TypeAlias = npt.NDArray[np.int64]
Frames: TypeAlias = Callable[[IntArray, IntArray], npt.NDArray[np.uint8]]
"""(trajectories (n,), their steps (n,)) → frames (n, H, W, 3)."""
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Split:
    """Trajectories and where their frames come from."""

    trajectories: Trajectories
    frames: Frames


@dataclass(frozen=True)
class DataSet:
    """A data set that is ready to be trained on.

    Attributes:
        splits: "train" and "validation".
        statistics: that actions and proprioception are normalised with.
        key: JSON values that say which states these are, and so which frames.
        identity: JSON values that say which data these are, actions and all.
        origin: how they came about.
    """

    splits: Mapping[str, Split]
    statistics: Statistics
    key: Mapping[str, Any]
    identity: Mapping[str, Any]
    origin: Mapping[str, Any]


def stored_task(folder: Path) -> dict[str, Any] | None:
    """The settings of the task that a folder's data are of; None if it holds no data set."""
    store = TrajectoryFolder(folder)
    if store.exists():
        return dict(store.index()["task"])
    name = dino_wm_layout.task_of(folder)
    return None if name is None else {"name": name}


def open_data(folder: Path, task: Task) -> DataSet:
    """A folder that `quantwm collect` wrote, or one of DINO-WM's.

    Raises:
        UsageError: the folder holds neither, or Wall's data in two folders.
        MismatchError: the data are another task's.
        CorruptFileError: a file is missing or damaged; names it.
        QuantWMError: `quantwm collect` was interrupted and has not been run again.
    """
    store = TrajectoryFolder(folder)
    if store.exists():
        index = store.index()
        if index["task"] != task.settings():
            raise MismatchError(
                f"{folder} was collected in {index['task']}, not in {task.settings()}"
            )
        loaded = {name: store.load(name) for name in SPLITS}
        splits = {name: Split(part, Rendered(task, part)) for name, part in loaded.items()}
        statistics = of_trajectories(task, loaded["train"])
        key = {"data": sha256_file(store.index_path)}
        return DataSet(splits, statistics, key, key, index["origin"])
    if dino_wm_layout.task_of(folder) is not None:
        parts, statistics, key = dino_wm_layout.read(folder, task)
        digests = [part.trajectories.digest() for part in parts.values()]
        return DataSet(
            {name: Split(part.trajectories, part.frames) for name, part in parts.items()},
            statistics,
            key,
            {**key, "trajectories": digests},
            {"source": "a data set in DINO-WM's layout"},
        )
    raise UsageError(
        f"{folder} holds no data set: neither dataset.json, as 'quantwm collect' writes it, nor "
        "states.pth, as DINO-WM's data sets have it"
    )


@dataclass(frozen=True)
class _InTurn:
    """Frames of several splits' trajectories, end to end."""

    splits: Sequence[Split]

    def __call__(self, trajectory: IntArray, steps: IntArray) -> npt.NDArray[np.uint8]:
        """Frames (n, H, W, 3) of trajectories (n,) at steps (n,)."""
        counts = [len(split.trajectories) for split in self.splits]
        places, parts = [], []
        for number, own, local in owners(counts, trajectory):
            places.append(np.flatnonzero(own))
            parts.append(self.splits[number].frames(local, steps[own]))
        return np.concatenate(parts)[np.argsort(np.concatenate(places))]


def owners(
    counts: Sequence[int], rows: IntArray
) -> Iterator[tuple[int, npt.NDArray[np.bool_], IntArray]]:
    """Whose rows (...) are, of parts with so many rows each, end to end.

    Yields:
        each part that has some: its number, which of the rows are its own, and their places in it.
    """
    ends = np.cumsum(counts)
    owner = np.searchsorted(ends, rows, side="right")
    for number in np.unique(owner).tolist():
        own = owner == number
        yield number, own, rows[own] - (ends[number] - counts[number])


def end_to_end(splits: Sequence[Split]) -> Split:
    """The trajectories of several splits as one split's."""
    if len(splits) == 1:
        return splits[0]
    trajectories = Trajectories.concatenate([split.trajectories for split in splits])
    return Split(trajectories, _InTurn(splits))


@dataclass(frozen=True)
class Rendered:
    """Frames that a task draws from the states, bit for bit the same each time."""

    task: Task
    trajectories: Trajectories

    def __call__(self, trajectory: IntArray, steps: IntArray) -> npt.NDArray[np.uint8]:
        """Frames (n, H, W, 3) of trajectories (n,) at steps (n,)."""
        rows = self.trajectories.state_offsets[trajectory] + steps
        layout = {name: values[trajectory] for name, values in self.trajectories.layout.items()}
        return self.task.observe(self.trajectories.states[rows][:, None], layout)["visual"][:, 0]
