"""Calibration data: what the planner really feeds the model.

The float model plans on calibration goals; the frames it sees (observations and goals) and a
sample of the candidate action sequences it considers are kept. A file stores these inputs, not
activations, so one file serves every method, and methods replay it in chunks of bounded memory.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quantwm.compute import (
    device_of,
    dtype_name,
    parse_bytes,
    placed,
    resolve_device,
    resolve_dtype,
)
from quantwm.envs import get_task
from quantwm.errors import CorruptFileError, UsageError
from quantwm.evaluation import Progress, check_fits
from quantwm.files import atomic_path
from quantwm.fingerprint import model_hash
from quantwm.planning.defaults import default_iterations, default_planner
from quantwm.planning.mpc import run_episodes
from quantwm.planning.objective import Objective, as_parts, like
from quantwm.planning.rollout import ModelCost
from quantwm.protocols import Episodes, FloatArray, Latent, Planner, Task, WorldModel
from quantwm.quant.apply import check_is_float
from quantwm.seeds import episode_seeds, keyed_generator

FORMAT_VERSION = 1
DEFAULT_EPISODES, DEFAULT_SAMPLES = 8, 128
CHUNK = 16
"""Frames or sequences that a replay computes at a time."""
_STREAM = 20


@dataclass(frozen=True)
class Calibration:
    """Inputs of a world model as the planner produces them.

    Attributes:
        visual: distinct frames (F, H, W, 3), uint8.
        proprio: of these frames, (F, P) float32, raw.
        actions: candidate action sequences (S, H, D), normalised, no two alike.
        frame: (S,) the frame each sequence starts from.
        model_hash: of the float model that planned.
        origin: task settings, seed, episodes, planner: how to make it again.
    """

    visual: npt.NDArray[np.uint8]
    proprio: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    frame: npt.NDArray[np.int64]
    model_hash: str
    origin: dict[str, Any]

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def hash(self) -> str:
        """Digest of the content."""
        digest = hashlib.sha256(self.model_hash.encode())
        digest.update(json.dumps(self.origin, sort_keys=True).encode())
        for values in (self.visual, self.proprio, self.actions, self.frame):
            digest.update(str(values.shape).encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def subset(self, samples: int) -> "Calibration":
        """The first `samples` sequences with the frames they need.

        Raises:
            UsageError: fewer than one, or more than there are.
        """
        if not 1 <= samples <= len(self):
            raise UsageError(f"samples must be 1 to {len(self)}, got {samples}")
        used = np.unique(self.frame[:samples])
        position = {int(old): new for new, old in enumerate(used)}
        frame = np.array([position[int(f)] for f in self.frame[:samples]], np.int64)
        return Calibration(
            self.visual[used],
            self.proprio[used],
            self.actions[:samples],
            frame,
            self.model_hash,
            {**self.origin, "subset": samples},
        )

    @torch.no_grad()
    def encode(self, world_model: WorldModel) -> Latent:
        """Latents (F, 1, ...) of all frames, `CHUNK` encoded at a time."""
        latents = []
        for begin in range(0, len(self.visual), CHUNK):
            part = slice(begin, begin + CHUNK)
            latents.append(
                world_model.encode(
                    {"visual": self.visual[part, None], "proprio": self.proprio[part, None]}
                )
            )
        names = as_parts(latents[0])
        joined = {name: torch.cat([as_parts(one)[name] for one in latents]) for name in names}
        return like(joined, latents[0])

    @torch.no_grad()
    def roll_out(self, world_model: WorldModel, latents: Latent) -> None:
        """Roll every sequence out once from the latents of all frames, `CHUNK` at a time."""
        device, parts = device_of(world_model), as_parts(latents)
        for begin in range(0, len(self.actions), CHUNK):
            index = torch.from_numpy(self.frame[begin : begin + CHUNK]).to(device)
            actions = torch.from_numpy(self.actions[begin : begin + CHUNK]).to(device)
            start = like({name: part[index] for name, part in parts.items()}, latents)
            world_model.rollout(start, actions[:, None], last_only=True)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "model_hash": self.model_hash,
            "origin": json.dumps(self.origin, sort_keys=True),
            "hash": self.hash,
        }
        tensors = {
            "visual": self.visual,
            "proprio": self.proprio,
            "actions": self.actions,
            "frame": self.frame,
        }
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        with atomic_path(Path(path)) as temporary:
            save_file(contiguous, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a file that `save` wrote.

        Raises:
            UsageError: there is no such file, or it is of another format version.
            CorruptFileError: it is cut off, or its content does not match its checksum.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"there is no calibration file {path}")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format_version") != str(FORMAT_VERSION):
                raise UsageError(
                    f"{path} is no calibration file of format version {FORMAT_VERSION}"
                )
            loaded = cls(
                **tensors, model_hash=metadata["model_hash"], origin=json.loads(metadata["origin"])
            )
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise CorruptFileError(f"{path} is cut off or no calibration file: {error}") from error
        if loaded.hash != metadata.get("hash"):
            raise CorruptFileError(f"{path} does not match its checksum; calibrate again")
        return loaded


def calibrate(
    world_model: WorldModel,
    task: str | Task,
    *,
    episodes: int = DEFAULT_EPISODES,
    seed: int = 0,
    samples: int = DEFAULT_SAMPLES,
    planner: Planner | None = None,
    mpc_iterations: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    memory_budget: int | str | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Let the float model plan on calibration goals and keep what it was fed.

    Calibration seeds come from a block of their own: no evaluation goal is ever seen.

    Args:
        world_model: the float model that is to be quantized.
        episodes, seed: calibration episodes.
        samples: candidate sequences to keep, spread evenly over observations.
        planner, mpc_iterations, device, dtype, memory_budget: as in `evaluate`.

    Raises:
        UsageError: a quantized model, a number out of range, or fewer distinct sequences than
            `samples`.
        MismatchError: the model was trained in another task.
        MissingStatisticsError: the model carries no action statistics.
    """
    check_is_float(world_model)
    if samples < 1:
        raise UsageError(f"samples must be at least 1, got {samples}")
    resolved_task = get_task(task) if isinstance(task, str) else task
    check_fits(world_model, resolved_task)
    planner = planner or default_planner(resolved_task.name)
    iterations = mpc_iterations
    if iterations is None:
        iterations = default_iterations(resolved_task.name)
    resolved_device = resolve_device(device)
    compute_dtype = resolve_dtype(dtype, resolved_device)
    placed_model = placed(world_model, resolved_device, compute_dtype)
    goals = resolved_task.episodes(episode_seeds("calibration", seed, episodes))
    cost = ModelCost(
        placed_model,
        resolved_task,
        goals,
        Objective(world_model.objective_weights),
        memory_budget=None if memory_budget is None else parse_bytes(memory_budget),
    )
    recording = _Recording(cost, resolved_task, goals)
    run_episodes(
        resolved_task,
        goals,
        recording,
        planner,
        world_model.action_spec,
        iterations,
        progress=progress,
    )
    origin = calibration_origin(
        resolved_task, seed, episodes, samples, planner, iterations, compute_dtype
    )
    return recording.calibration(samples, seed, model_hash(world_model), origin)


def calibration_origin(
    task: Task,
    seed: int,
    episodes: int,
    samples: int,
    planner: Planner,
    mpc_iterations: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What `Calibration.origin` says of one that `calibrate` made with these arguments."""
    return {
        "task": task.settings(),
        "seed": seed,
        "episodes": episodes,
        "samples": samples,
        "planner": planner.settings(),
        "mpc_iterations": mpc_iterations,
        "dtype": dtype_name(dtype),
    }


class _Recording:
    """A cost that remembers observations and candidates on their way to another cost."""

    def __init__(self, cost: ModelCost, task: Task, episodes: Episodes) -> None:
        self._cost, self._task, self._episodes = cost, task, episodes
        self._states: list[FloatArray] = []
        self._owners: list[int] = []
        self._newest: dict[int, int] = {}
        self._candidates: list[list[npt.NDArray[np.float32]]] = []

    def observe(self, index: npt.NDArray[np.intp], states: FloatArray) -> None:
        for episode, state in zip(index.tolist(), states, strict=True):
            self._newest[episode] = len(self._states)
            self._states.append(state.copy())
            self._owners.append(episode)
            self._candidates.append([])
        self._cost.observe(index, states)

    def __call__(self, index: npt.NDArray[np.intp], actions: torch.Tensor) -> torch.Tensor:
        self._remember(index, actions)
        return self._cost(index, actions)

    def gradient(
        self, index: npt.NDArray[np.intp], actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._remember(index, actions)
        return self._cost.gradient(index, actions)

    def _remember(self, index: npt.NDArray[np.intp], actions: torch.Tensor) -> None:
        for episode, candidates in zip(index.tolist(), actions, strict=True):
            self._candidates[self._newest[episode]].append(candidates.detach().numpy().copy())

    def calibration(
        self, samples: int, seed: int, source: str, origin: dict[str, Any]
    ) -> Calibration:
        """Draw `samples` distinct sequences, observation by observation in turn."""
        pools = []
        for number, steps in enumerate(self._candidates):
            pool = np.unique(np.concatenate(steps), axis=0) if steps else np.empty((0,))
            pools.append(keyed_generator(_STREAM, seed, number).permutation(pool))
        available = sum(len(pool) for pool in pools)
        if available < samples:
            raise UsageError(
                f"{samples} samples were asked for, but planning on these calibration episodes "
                f"considered only {available} distinct sequences; raise episodes or lower samples"
            )
        chosen: list[npt.NDArray[np.float32]] = []
        frame: list[int] = []
        turn = 0
        while len(chosen) < samples:
            for number, pool in enumerate(pools):
                if turn < len(pool) and len(chosen) < samples:
                    chosen.append(pool[turn])
                    frame.append(number)
            turn += 1
        everyone = np.arange(len(self._episodes))
        states = np.concatenate([np.stack(self._states), self._episodes.goal])
        owners = np.concatenate([np.array(self._owners), everyone])
        layout = self._episodes.select(owners).layout
        observation = self._task.observe(states[:, None], layout)
        return Calibration(
            observation["visual"][:, 0],
            observation["proprio"][:, 0],
            np.stack(chosen),
            np.array(frame, np.int64),
            source,
            origin,
        )
