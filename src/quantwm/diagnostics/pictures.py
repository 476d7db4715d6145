"""What a world model imagines, drawn by its decoder beside what really happens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from quantwm.compute import device_of
from quantwm.data.collect import Scripted
from quantwm.errors import UsageError
from quantwm.models.dino_wm import DINOWM
from quantwm.protocols import FloatArray, Layout, Task
from quantwm.seeds import episode_seeds

Frames = npt.NDArray[np.uint8]
"""(E, T, H, W, 3)."""

SIDE = 112
TRUE = "true"
"""Label of what really happens."""
_LABEL = 72
"""Least width of the labels' column."""
_GAP = 4
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True)
class Excerpts:
    """Pieces of scripted trajectories that no model was trained on.

    Attributes:
        task: that they come from.
        states: (E, T·frameskip + 1, S).
        actions: (E, T·frameskip, A), raw.
        layout: of the E worlds.
    """

    task: Task
    states: FloatArray
    actions: FloatArray
    layout: Layout


def validation_excerpts(task: Task, *, episodes: int, steps: int, seed: int = 0) -> Excerpts:
    """The beginnings of validation trajectories, `steps` raw actions long.

    Raises:
        UsageError: the task has no scripted policy, or its trajectories are shorter.
    """
    if not isinstance(task, Scripted):
        raise UsageError(f"task {task.name!r} has no scripted policy to show")
    if not 1 <= steps <= task.trajectory_steps:
        raise UsageError(
            f"{steps} raw actions are asked for, trajectories of {task.name} have "
            f"{task.trajectory_steps}: take fewer steps"
        )
    seeds = episode_seeds("validation", seed, episodes)
    states, actions = task.scripted(seeds, task.trajectory_steps)
    layout = dict(task.sample_layout(seeds))
    return Excerpts(task, states[:, : steps + 1], actions[:, :steps], layout)


def true_frames(excerpts: Excerpts, frameskip: int, side: int = SIDE) -> Frames:
    """Frames at every model step, the first included."""
    visual = excerpts.task.observe(excerpts.states[:, ::frameskip], excerpts.layout)["visual"]
    resized = [
        np.asarray(Image.fromarray(frame).resize((side, side)))
        for frame in np.asarray(visual).reshape(-1, *visual.shape[-3:])
    ]
    return np.stack(resized).reshape(*visual.shape[:2], side, side, 3)


@torch.inference_mode()
def imagined_frames(world_model: DINOWM, excerpts: Excerpts, side: int = SIDE) -> Frames:
    """What the model makes of the first frame and the actions; the first frame is decoded too.

    Raises:
        UsageError: it has no decoder, or the excerpts are no whole number of model actions.
        MissingStatisticsError: it carries no statistics to normalise actions with.
    """
    actions = world_model.action_spec.normalize(excerpts.actions)[:, None]
    first = excerpts.task.observe(excerpts.states[:, :1], excerpts.layout)
    latent = world_model.encode(first)
    rolled = world_model.rollout(latent, actions.to(device_of(world_model)))
    return world_model.decode(rolled["visual"][:, 0], side).cpu().numpy()


def row_labels(models: Sequence[str]) -> list[str]:
    """What to call each model: the end of its path, with as many folders as tell all rows apart.

    Raises:
        UsageError: one is named twice, or has the name of the true frames' row.
    """
    paths = [Path(model).parts for model in models]
    for length in range(1, max(map(len, paths)) + 1):
        ends = ["/".join(parts[-length:]) for parts in paths]
        if len({*ends, TRUE}) == len(ends) + 1:
            return ends
    raise UsageError(f"the same model is named twice, or one is called {TRUE!r}")


def strip(rows: Mapping[str, Frames]) -> Image.Image:
    """One picture: for each excerpt a line of frames from each of `rows`, its label before it."""
    episodes, steps, side = next(iter(rows.values())).shape[:3]
    font = ImageFont.load_default()
    column = max([_LABEL, *(ceil(font.getlength(label)) + 2 * _GAP for label in rows)])
    width = column + steps * (side + _GAP)
    height = episodes * (len(rows) * (side + _GAP) + _GAP) - 2 * _GAP
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for episode in range(episodes):
        for label, frames in rows.items():
            draw.text((_GAP, top + side // 2), label, fill=_INK, font=font)
            for step, frame in enumerate(frames[episode]):
                sheet.paste(Image.fromarray(frame), (column + step * (side + _GAP), top))
            top += side + _GAP
        top += _GAP
    return sheet
