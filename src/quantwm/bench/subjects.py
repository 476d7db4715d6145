"""What is measured: a world model, and the first optimisation step of a replan with it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from quantwm.calibration import Calibration
from quantwm.envs import get_task
from quantwm.errors import UsageError, unknown_name
from quantwm.fingerprint import model_hash
from quantwm.loading import load
from quantwm.models.checkpoint import new_world_model
from quantwm.models.config import DINOWMConfig
from quantwm.models.dino_wm import DINOWM
from quantwm.protocols import Observation
from quantwm.seeds import episode_seeds, keyed_generator

HORIZON = 5
_TASK = "wall"
_STREAM = 30
_CALIBRATION_SAMPLES = 4


@dataclass(frozen=True)
class Subject:
    """A model, where its episodes are, where they should go, and what is considered.

    Attributes:
        scale: its name.
        world_model: float32, in evaluation mode, on the CPU.
        observation, goal: one raw frame of each of B episodes.
        actions: normalised candidates (B, N, H, frameskip·dim).
        literal_candidates: of each episode, how many the literal order computes before its time
            is scaled to all; None computes all.
    """

    scale: str
    world_model: DINOWM
    observation: Observation
    goal: Observation
    actions: Tensor
    literal_candidates: int | None = None

    @classmethod
    def of(
        cls,
        scale: str,
        world_model: DINOWM,
        *,
        candidates: int,
        episodes: int = 1,
        literal_candidates: int | None = None,
    ) -> Self:
        """Episodes of Wall from the tuning block, candidates as CEM first draws them.

        Raises:
            UsageError: a number below one.
        """
        if candidates < 1:
            raise UsageError(f"candidates must be at least 1, got {candidates}")
        task = get_task(_TASK)
        goals = task.episodes(episode_seeds("tuning", 0, episodes))
        shape = (episodes, candidates, HORIZON, world_model.action_spec.model_dim)
        noise = keyed_generator(_STREAM).standard_normal(shape, dtype=np.float32)
        noise[:, 0] = 0.0
        return cls(
            scale,
            world_model,
            task.observe(goals.start[:, None], goals.layout),
            task.observe(goals.goal[:, None], goals.layout),
            torch.from_numpy(noise),
            literal_candidates,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Episodes, candidates of each, horizon."""
        episodes, candidates, horizon, _ = self.actions.shape
        return episodes, candidates, horizon

    def calibration(self, samples: int | None = None) -> Calibration:
        """Some of the candidates, from the episodes in turn, and all episodes' frames.

        Args:
            samples: how many; by default a few, which is enough for input ranges.

        Raises:
            UsageError: more than there are.
        """
        episodes, available = self.actions.shape[:2]
        samples = min(_CALIBRATION_SAMPLES, available) if samples is None else samples
        if not 1 <= samples <= episodes * available:
            raise UsageError(f"samples must be 1 to {episodes * available}, got {samples}")
        owners = np.arange(samples) % episodes
        seen = self.actions[owners, np.arange(samples) // episodes].numpy()
        return Calibration(
            np.concatenate([self.observation["visual"][:, 0], self.goal["visual"][:, 0]]),
            np.concatenate([self.observation["proprio"][:, 0], self.goal["proprio"][:, 0]]),
            seen,
            owners.astype(np.int64),
            model_hash(self.world_model),
            {"bench": self.scale},
        )

    def resized(self, *, candidates: int | None = None, episodes: int | None = None) -> Self:
        """The same model with other numbers of candidates or episodes; None keeps them."""
        own_episodes, own_candidates, _ = self.shape
        other = type(self).of(
            self.scale,
            self.world_model,
            candidates=own_candidates if candidates is None else candidates,
            episodes=own_episodes if episodes is None else episodes,
        )
        return replace(other, literal_candidates=self.literal_candidates)


def _paper() -> Subject:
    """DINO-WM's own size: the bundled encoder at 196 pixels, a random predictor of a fixed seed.

    What a product costs does not depend on what is multiplied.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = DINOWMConfig(task=_TASK, action_dim=2, proprio_dim=2)
        world_model = new_world_model(config)
    return Subject.of("paper", world_model, candidates=300, literal_candidates=8)


def _compact() -> Subject:
    """The bundled Wall model with the compact planner's candidates."""
    return Subject.of("compact", load(_TASK), candidates=64, episodes=4)


SCALES: dict[str, Callable[[], Subject]] = {"paper": _paper, "compact": _compact}


def subject_of(scale: str, candidates: int | None = None) -> Subject:
    """The subject of a scale.

    Args:
        scale: "paper" or "compact".
        candidates: other than the scale's own.

    Raises:
        UsageError: an unknown scale, or fewer candidates than one.
    """
    if scale not in SCALES:
        raise unknown_name("scale", scale, [*SCALES, "all"])
    if candidates is not None and candidates < 1:
        raise UsageError(f"candidates must be at least 1, got {candidates}")
    subject = SCALES[scale]()
    return subject if candidates is None else subject.resized(candidates=candidates)
