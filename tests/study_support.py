"""A task and a world model of the tests' own: a point on a plane, and its linear dynamics."""

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantwm.protocols import ActionSpec, Episodes, LinearGroup
from quantwm.seeds import keyed_generator
from quantwm.study import run_study, work
from quantwm.study.rows import comparable
from quantwm.study.spec import StudySpec
from quantwm.study.store import ResultsFolder


class PointTask:
    """A point moves by its action, clipped to a box; success is being near the goal."""

    name = "point"
    action_dim = 2
    proprio_dim = 2
    position_dims = (0, 1)

    def __init__(self, reach: float = 0.5) -> None:
        self.reach = reach

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "version": 1, "reach": self.reach}

    def episodes(self, seeds: Sequence[int]) -> Episodes:
        drawn = np.stack([keyed_generator(seed, 7).uniform(-5, 5, (2, 2)) for seed in seeds])
        size = np.full(len(seeds), 10)
        return Episodes(np.asarray(seeds, np.int64), drawn[:, 0], drawn[:, 1], {"size": size})

    def start(self, episodes: Episodes) -> "PointSimulation":
        return PointSimulation(self, episodes)

    def rollout(self, states, layout, actions):
        visited, state = [], states
        for step in range(actions.shape[1]):
            state = np.clip(state + actions[:, step], -10, 10)
            visited.append(state)
        return np.stack(visited, axis=1)

    def observe(self, states, layout):
        shape = states.shape[:2]
        return {
            "visual": np.zeros((*shape, 4, 4, 3), np.uint8),
            "proprio": states.astype(np.float32),
        }

    def distance(self, states, goals):
        return np.linalg.norm(states - goals, axis=-1)

    def success(self, states, goals):
        return self.distance(states, goals) < self.reach


class PointSimulation:
    def __init__(self, task: PointTask, episodes: Episodes) -> None:
        self.states, self._task, self._layout = episodes.start.copy(), task, episodes.layout

    def step(self, index, actions):
        visited = self._task.rollout(self.states[index], self._layout, actions)
        self.states[index] = visited[:, -1]
        return visited


class PointModel(nn.Module):
    """Encodes the position linearly and adds the encoded action: exact inside the box."""

    def __init__(self, width: int = 8, speed: float = 1.0) -> None:
        super().__init__()
        self.action_spec = ActionSpec(2, 1, (0.0, 0.0), (1.0, 1.0))
        self.objective_weights = {"": 1.0}
        self.encoder = nn.Sequential(nn.Linear(2, width))
        self.predictor = nn.Sequential(nn.Linear(width + 2, width))
        basis = torch.linalg.qr(torch.randn(width, 2, generator=torch.manual_seed(0)))[0]
        with torch.no_grad():
            self.encoder[0].weight.copy_(basis)
            self.encoder[0].bias.zero_()
            self.predictor[0].weight.copy_(torch.cat([torch.eye(width), speed * basis], 1))
            self.predictor[0].bias.zero_()

    def encode(self, observation) -> Tensor:
        proprio = torch.from_numpy(observation["proprio"])
        return self.encoder(proprio.to(self.encoder[0].bias.dtype))

    def rollout(self, latent: Tensor, actions: Tensor, *, last_only: bool = False) -> Tensor:
        frames = [latent[:, -1:].expand(-1, actions.shape[1], -1)]
        for step in range(actions.shape[2]):
            inputs = torch.cat([frames[-1], actions[:, :, step].to(latent.dtype)], -1)
            frames.append(self.predictor(inputs))
        stacked = torch.stack(frames, 2)
        return stacked[:, :, -1:] if last_only else stacked

    def quantizable_groups(self) -> tuple[LinearGroup, ...]:
        return (
            LinearGroup(("encoder.0",), None, "encoder"),
            LinearGroup(("predictor.0",), None, "predictor"),
        )


class Fragile(PointModel):
    """Divides by the output of a linear whose small weight two bits round to zero."""

    def __init__(self):
        super().__init__()
        self.encoder.append(nn.Linear(2, 1, bias=False))
        with torch.no_grad():
            self.encoder[1].weight.copy_(torch.tensor([[1.0, 0.1]]))

    def encode(self, observation):
        proprio = torch.from_numpy(observation["proprio"]).to(self.encoder[0].bias.dtype)
        one = self.encoder[1](torch.tensor([0.0, 10.0], dtype=proprio.dtype))
        return self.encoder[0](proprio) / one

    def quantizable_groups(self):
        first, second = super().quantizable_groups()
        return (replace(first, layers=("encoder.0", "encoder.1")), second)


class DyingModel(PointModel):
    """Kills its process as soon as that has finished a part of a cell in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.before = folder, None

    def encode(self, observation) -> Tensor:
        kept = ResultsFolder(self.folder).count_parts()
        self.before = kept if self.before is None else self.before
        if kept > self.before:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(observation)


POINT_SETTINGS: dict[str, Any] = {
    "mpc_iterations": 3,
    "planner": {"samples": 16, "elites": 4, "steps": 2, "horizon": 3},
    "calibration": {"episodes": 2, "samples": 8, "seed": 4},
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "gate": 0.5,
}


def point_spec(**changes: Any) -> StudySpec:
    """A study of the point that takes well under a second."""
    values: dict[str, Any] = {
        "task": "point",
        "model": "point",
        "arms": ["oracle-state", "oracle-latent", "float", "w8", "w4", "w2"],
        "episodes": 6,
        "seed": 3,
    }
    return StudySpec.from_dict(POINT_SETTINGS | values | changes)


def study(spec: StudySpec | None = None) -> dict[str, Any]:
    """Keyword arguments of `run_study` and `plan_study` for the point."""
    return {"spec": spec or point_spec(), "world_model": PointModel(), "task": PointTask()}


def study_in_parts(spec: StudySpec, out: Path) -> None:
    """Run a study of the point, keeping every two episodes: what a process is given to do."""
    work.PART = 2
    run_study(**study(spec), out=out)


def by_arm(result):
    """Each arm's rows without measurements."""
    arms = {}
    for row in result.rows:
        arms.setdefault(row["arm"], []).append(comparable(row))
    return arms


def content(folder: Path):
    """Name → bytes and time of change of everything in a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Recorder:
    """Progress that remembers its calls, and can break in on one of them.

    Args:
        break_at: the stage, counted from 1, whose first update raises `error`.
        after: what else must hold then.
    """

    def __init__(self, break_at=None, error=KeyboardInterrupt, after=lambda: True):
        self.calls, self._break_at, self._error, self._after = [], break_at, error, after

    @property
    def started(self):
        return [call[1] for call in self.calls if call[0] == "start"]

    def start(self, label, index, count):
        self.calls.append(("start", label, index, count))

    def update(self, done, total):
        self.calls.append(("update", done, total))
        if len(self.started) == self._break_at and self._after():
            raise self._error

    def finish(self):
        self.calls.append(("finish",))
