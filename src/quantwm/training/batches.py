"""Windows of cached latents as training batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantwm.compute import available_memory
from quantwm.data.latents import EndToEnd, FrameIndex
from quantwm.data.trajectories import Trajectories
from quantwm.models.config import DINOWMConfig
from quantwm.protocols import Task
from quantwm.seeds import keyed_generator

_SHUFFLE = 3
_UPLOAD = 4096
"""Frames that go to a GPU at once."""


@dataclass(frozen=True)
class Batch:
    """B windows of W frames, on one device.

    Attributes:
        visual: (B, W, P, D) latents, float32.
        proprio: (B, W, P') normalised proprioception, float32.
        actions: (B, W, frameskip·A) normalised model actions, float32; the last one is unused.
    """

    visual: Tensor
    proprio: Tensor
    actions: Tensor


class Windows:
    """All windows of `length` consecutive frames of a split.

    Args:
        config: with statistics, which normalise actions and proprioception.
        task: whose observation gives the proprioception of a state.
        trajectories, latents: a split and its cached latents (F, P, D).
        length: frames in a window.
        device: where batches are wanted. A GPU with room for them gets all latents at once.
    """

    def __init__(
        self,
        config: DINOWMConfig,
        task: Task,
        trajectories: Trajectories,
        latents: npt.NDArray[np.float16] | EndToEnd,
        length: int,
        device: torch.device | None = None,
    ) -> None:
        index = FrameIndex.every(config.frameskip, trajectories)
        self.starts = window_starts(index, length)
        self.length = length
        self._device = device or torch.device("cpu")
        self._latents = _held(latents, self._device) if _fits(latents, self._device) else latents
        self.proprio = _normalized_proprio(config, task, trajectories, index)
        self.actions = _model_actions(config, trajectories, index)

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, index: npt.NDArray[np.int64]) -> Batch:
        """The windows at `index`."""
        rows = self.starts[index][:, None] + np.arange(self.length)
        if isinstance(self._latents, Tensor):
            visual = self._latents[torch.from_numpy(rows).to(self._device)]
        else:
            visual = torch.from_numpy(self._latents[rows]).to(self._device)
        return Batch(
            visual.float(),
            torch.from_numpy(self.proprio[rows]).to(self._device),
            torch.from_numpy(self.actions[rows]).to(self._device),
        )

    def shuffled(self, size: int, seed: int, first_step: int) -> Iterator[Batch]:
        """Endless shuffled batches from step `first_step` on; resuming gives the same ones."""
        per_epoch = len(self) // size
        if per_epoch == 0:
            raise ValueError(f"{len(self)} windows do not fill a batch of {size}")
        step = first_step
        while True:
            epoch = step // per_epoch
            order = keyed_generator(seed, _SHUFFLE, epoch).permutation(len(self))
            for position in range(step % per_epoch, per_epoch):
                yield self.batch(np.sort(order[position * size : (position + 1) * size]))
                step += 1


def window_starts(index: FrameIndex, length: int) -> npt.NDArray[np.int64]:
    """Each window's first frame (n,), for windows of `length` frames of one trajectory.

    Raises:
        ValueError: no trajectory has so many.
    """
    first = np.concatenate([[0], np.cumsum(index.frames)[:-1]])
    starts = np.concatenate(
        [f + np.arange(max(0, n - length + 1)) for f, n in zip(first, index.frames, strict=True)]
    )
    if len(starts) == 0:
        raise ValueError(f"no trajectory has {length} frames")
    return starts


def _fits(latents: npt.NDArray[np.float16] | EndToEnd, device: torch.device) -> bool:
    """Whether a GPU can hold the latents and leave as much again to what is trained with them."""
    return device.type == "cuda" and latents.nbytes < available_memory(device) // 2


def _held(latents: npt.NDArray[np.float16] | EndToEnd, device: torch.device) -> Tensor:
    held = torch.empty(latents.shape, dtype=torch.float16, device=device)
    for begin in range(0, len(latents), _UPLOAD):
        part = slice(begin, begin + _UPLOAD)
        # A copy: torch refuses what it must not write to.
        held[part] = torch.from_numpy(np.array(latents[part]))
    return held


def _normalized_proprio(
    config: DINOWMConfig, task: Task, trajectories: Trajectories, index: FrameIndex
) -> npt.NDArray[np.float32]:
    proprio = task.proprio(trajectories.states[index.state_rows])
    mean, std = np.asarray(config.proprio_mean), np.asarray(config.proprio_std)
    return np.asarray((proprio - mean) / std, np.float32)


def _model_actions(
    config: DINOWMConfig, trajectories: Trajectories, index: FrameIndex
) -> npt.NDArray[np.float32]:
    """(F, frameskip·A): the actions that lead from each frame to the next; zeros at the end."""
    mean, std = np.asarray(config.action_mean), np.asarray(config.action_std)
    normalized = (trajectories.actions - mean) / std
    skip, width = config.frameskip, normalized.shape[1]
    blocks = []
    for offset, frames in zip(trajectories.action_offsets, index.frames, strict=True):
        used = (frames - 1) * skip
        block = normalized[offset : offset + used].reshape(frames - 1, skip * width)
        blocks.append(np.concatenate([block, np.zeros((1, skip * width))]))
    return np.concatenate(blocks).astype(np.float32)
