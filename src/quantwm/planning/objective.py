"""The planning objective: how far predicted latents are from the goal's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from quantwm.errors import UsageError
from quantwm.protocols import Latent

TENSOR_PART = ""
"""The name under which a latent that is one tensor appears in `Objective.weights`."""


@dataclass(frozen=True)
class Objective:
    """Weighted mean squared errors of the latent's parts (DINO-WM's planning cost).

    Attributes:
        weights: of each part; {"visual": 1, "proprio": α} for DINO-WM.
        mode: "last" compares the last predicted frame; "all" averages over the observed and
            predicted frames, frame i weighted with base^i.
        base: of those weights.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {TENSOR_PART: 1.0})
    mode: Literal["last", "all"] = "last"
    base: float = 2.0

    def __post_init__(self) -> None:
        if self.mode not in ("last", "all"):
            raise UsageError(f"objective mode must be 'last' or 'all', got {self.mode!r}")
        if not self.weights or all(w == 0 for w in self.weights.values()):
            raise UsageError("the objective needs at least one part of non-zero weight")

    def settings(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {"weights": dict(self.weights), "mode": self.mode, "base": self.base}

    def __call__(self, predicted: Latent, goal: Latent) -> Tensor:
        """Costs of candidates.

        Args:
            predicted: tensors (B, N, K, ...): K frames, the last one predicted last.
            goal: tensors (B, 1, ...): the encoded goal.

        Returns:
            (B, N) float32, computed in float32 whatever the latents' type.
        """
        predicted_parts, goal_parts = as_parts(predicted), as_parts(goal)
        unknown = set(self.weights) - set(predicted_parts)
        if unknown:
            raise UsageError(
                f"the objective weighs {sorted(unknown)}, the latent has {sorted(predicted_parts)}"
            )
        costs = [
            weight * self._error(predicted_parts[name], goal_parts[name])
            for name, weight in self.weights.items()
            if weight != 0
        ]
        return torch.stack(costs).sum(0)

    def _error(self, predicted: Tensor, goal: Tensor) -> Tensor:
        frames = predicted[:, :, -1:] if self.mode == "last" else predicted
        squared = (frames.float() - goal.float().unsqueeze(1)) ** 2
        if self.mode == "last":
            return squared.flatten(2).mean(-1)
        by_frame = squared.flatten(3).mean(-1) if squared.ndim > 3 else squared
        weights = self.base ** torch.arange(by_frame.shape[2], device=by_frame.device)
        # A mean over frames of weights that add up to one, as in DINO-WM's code: the factor
        # 1/frames is kept, for the same costs.
        return (by_frame * (weights / weights.sum())).mean(-1)


def as_parts(latent: Latent) -> dict[str, Tensor]:
    """A latent as a dict, whether it is a tensor or a dict."""
    return latent if isinstance(latent, dict) else {TENSOR_PART: latent}


def like(parts: dict[str, Tensor], latent: Latent) -> Latent:
    """The inverse of `as_parts`: `parts` in the form that `latent` has."""
    return parts if isinstance(latent, dict) else parts[TENSOR_PART]
