"""Trajectory data sets on disk.

A data set is a folder of shards, each one safetensors file, and a `dataset.json`. Trajectories
may differ in length, so a shard stores them end to end:

    states   (Σ(T+1), S) float64     actions  (ΣT, A) float32     lengths (n,) int64, the Ts
    layout.<name> (n,)               seeds    (n,) int64

Frames are not stored: a task renders them from states and layout, bit for bit the same each time.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from quantwm.errors import CorruptFileError, MismatchError, QuantWMError, UsageError
from quantwm.files import atomic_path, sha256_file, write_json
from quantwm.protocols import FloatArray

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Trajectories:
    """Some trajectories, end to end.

    Attributes:
        states: (Σ(T+1), S) float64.
        actions: (ΣT, A) float32, raw.
        lengths: (n,) number of actions of each trajectory.
        layout: named arrays (n,).
        seeds: (n,) the seed each trajectory derives from.
    """

    states: FloatArray
    actions: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int64]
    layout: dict[str, npt.NDArray[Any]]
    seeds: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        total, count = int(self.lengths.sum()), len(self.lengths)
        if len(self.actions) != total or len(self.states) != total + count:
            raise UsageError(
                f"lengths add up to {total} actions of {count} trajectories, "
                f"but there are {len(self.actions)} actions and {len(self.states)} states"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def state_offsets(self) -> npt.NDArray[np.int64]:
        """(n,) row of each trajectory's first state."""
        return np.concatenate([[0], np.cumsum(self.lengths + 1)[:-1]]).astype(np.int64)

    @property
    def action_offsets(self) -> npt.NDArray[np.int64]:
        """(n,) row of each trajectory's first action."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)

    def digest(self) -> str:
        """SHA-256 of states, actions and lengths; 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for values in (self.lengths, self.states, self.actions):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    @staticmethod
    def concatenate(parts: list["Trajectories"]) -> "Trajectories":
        """All trajectories of `parts`, in order."""
        return Trajectories(
            np.concatenate([p.states for p in parts]),
            np.concatenate([p.actions for p in parts]),
            np.concatenate([p.lengths for p in parts]),
            {k: np.concatenate([p.layout[k] for p in parts]) for k in parts[0].layout},
            np.concatenate([p.seeds for p in parts]),
        )


class TrajectoryFolder:
    """A data set folder: reads it, and appends shards to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def index_path(self) -> Path:
        """The `dataset.json`."""
        return self.folder / "dataset.json"

    def exists(self) -> bool:
        """Whether a data set was begun here."""
        return self.index_path.is_file()

    def index(self) -> dict[str, Any]:
        """The content of `dataset.json`.

        Raises:
            UsageError: there is none, or it is of another format version.
            CorruptFileError: it is no JSON, or not a data set's.
        """
        if not self.exists():
            raise UsageError(f"{self.folder} holds no data set (no dataset.json)")
        try:
            index = json.loads(self.index_path.read_text("utf-8"))
        except ValueError as error:  # also of text that is not UTF-8
            raise CorruptFileError(f"{self.index_path} is no valid JSON: {error}") from error
        if not isinstance(index, dict):
            raise CorruptFileError(f"{self.index_path} holds a {type(index).__name__}, not a dict")
        if index.get("format_version") != FORMAT_VERSION:
            raise UsageError(
                f"{self.index_path} has format version {index.get('format_version')}, "
                f"this quantwm reads {FORMAT_VERSION}"
            )
        for key, needed in {"task": {"name"}, "origin": set(), "shards": set()}.items():
            value = index.get(key)
            if not isinstance(value, dict) or not needed <= value.keys():
                raise CorruptFileError(f"{self.index_path} is damaged: its {key!r} is {value!r}")
        return index

    def begin(self, task: dict[str, Any], origin: dict[str, Any]) -> None:
        """Start a data set, or check that the one here has the same task and origin.

        Args:
            task: the task's settings.
            origin: how the trajectories come about: policy, seed, counts.

        Raises:
            UsageError: the folder is a file.
            MismatchError: the folder holds other data.
            QuantWMError: the folder cannot be written.
        """
        if self.folder.is_file():
            raise UsageError(f"{self.folder} is a file, not a folder; choose another place")
        wanted = {"format_version": FORMAT_VERSION, "task": task, "origin": origin}
        if not self.exists():
            write_json(self.index_path, {**wanted, "shards": {}})
            return
        index = self.index()
        for key, value in wanted.items():
            if index.get(key) != value:
                raise MismatchError(
                    f"{self.folder} holds data of another {key} ({index.get(key)!r}, not "
                    f"{value!r}); choose another folder"
                )

    def has_shard(self, name: str) -> bool:
        """Whether shard `name` is there and as it was written."""
        entry = self.index()["shards"].get(name)
        path = self._path(name)
        return entry is not None and path.is_file() and sha256_file(path) == entry["sha256"]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def add_shard(self, name: str, split: str, part: Trajectories) -> None:
        """Write one shard and then enter it into the index; each step is atomic."""
        path = self._path(name)
        tensors = {
            "states": part.states,
            "actions": part.actions,
            "lengths": part.lengths,
            "seeds": part.seeds,
            **{f"layout.{key}": value for key, value in part.layout.items()},
        }
        with atomic_path(path) as temporary:
            save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary)
        index = self.index()
        index["shards"][name] = {
            "split": split,
            "trajectories": len(part),
            "sha256": sha256_file(path),
        }
        write_json(self.index_path, index)

    def load(self, split: str) -> Trajectories:
        """All trajectories of a split ("train" or "validation").

        Raises:
            UsageError: there is no data set or no such split.
            QuantWMError: there are fewer than were to be collected.
            CorruptFileError: a shard is missing or damaged; names it.
        """
        parts = list(self._shards(split))
        count, wanted = sum(map(len, parts)), self.index()["origin"].get(split, 0)
        if count < wanted:
            raise QuantWMError(
                f"{self.folder} is incomplete: {count} of {wanted} {split} trajectories; run the "
                "same 'quantwm collect' again"
            )
        if not parts:
            raise UsageError(f"{self.folder} holds no {split} trajectories")
        return Trajectories.concatenate(parts)

    def _shards(self, split: str) -> Iterator[Trajectories]:
        for name, entry in sorted(self.index()["shards"].items()):
            if entry["split"] != split:
                continue
            path = self._path(name)
            if not path.is_file():
                raise CorruptFileError(f"{path} is missing; collect again to write it anew")
            if sha256_file(path) != entry["sha256"]:
                raise CorruptFileError(
                    f"{path} does not match its checksum; collect again to write it anew"
                )
            tensors = load_file(path)
            layout = {
                key.removeprefix("layout."): value
                for key, value in tensors.items()
                if key.startswith("layout.")
            }
            yield Trajectories(
                tensors["states"], tensors["actions"], tensors["lengths"], layout, tensors["seeds"]
            )
