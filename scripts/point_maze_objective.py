"""What PointMaze's objective allows: the planner with the true dynamics, at several image sizes.

    python scripts/point_maze_objective.py 98:1 168:3 --iterations 6 12

Each argument is IMAGE_SIZE:TOKEN_POOL of a model around the bundled encoder. The arm is
oracle-latent, which no predictor of that representation should beat. Rendering and encoding every
candidate would take hours on a CPU; but there a frame is a smooth function of the ball's position
alone, so latents are looked up: the mean of the four nearest of `--frames` encoded positions,
weighted by inverse squared distance. "lookup error" is what that does to frames left out, over the
variance of frames. Success is of tuning episodes after so many iterations of receding-horizon
control; that of oracle-state, which needs no latent, comes first.
"""

import argparse
from typing import Any

import numpy as np
import torch
from scipy.spatial import KDTree

from objective_support import VIEW, latents, model_of
from quantwm.envs import get_task
from quantwm.evaluation import evaluate_reference
from quantwm.models.dino_wm import DINOWM
from quantwm.seeds import episode_seeds

NEAREST, LEFT_OUT = 4, 300


class LookedUp(DINOWM):
    """A model that looks a frame's latent up by the ball's position, which proprioception gives."""

    def encode(self, observation):
        """As `DINOWM.encode`; `observation["visual"]` is not looked at."""
        proprio = np.asarray(observation["proprio"])
        visual = self.lookup(proprio[..., :2].reshape(-1, 2))
        visual = visual.view(*proprio.shape[:2], *visual.shape[1:])
        normalized = self.normalize_proprio(torch.from_numpy(proprio))
        return {"visual": visual, "proprio": self.embed_proprio(normalized)}

    def lookup(self, positions, skip=0):
        """Latents (B, P, D) at positions (B, 2), without the `skip` nearest frames."""
        distance, row = self.tree.query(positions, k=NEAREST + skip)
        weight = (distance[:, skip:] + 1e-3) ** -2
        weight = torch.from_numpy(weight / weight.sum(1, keepdims=True)).float()
        return torch.einsum("bk,bkpd->bpd", weight, self.latents[row[:, skip:]])


class WithoutFrames:
    """A task whose observations hold proprioception and no picture."""

    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        return getattr(self._task, name)

    def observe(self, states, layout):
        """Proprioception of states (B, T, S), and an empty picture."""
        del layout
        blank = np.zeros((*states.shape[:2], 1, 1, 3), np.uint8)
        return {"visual": blank, "proprio": self._task.proprio(states)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar=VIEW)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--episodes", type=int, default=48)
    parser.add_argument("--iterations", type=int, nargs="+", default=[6])
    arguments = parser.parse_args()
    task = get_task("point_maze")
    seeds = episode_seeds("tuning", 2, arguments.frames // 10)
    states, actions = task.scripted(seeds, task.trajectory_steps)
    states = states[:, ::5][:, :10].reshape(-1, states.shape[-1])
    statistics = {
        "action_mean": tuple(actions.mean((0, 1))),
        "action_std": tuple(actions.std((0, 1))),
        "proprio_mean": tuple(states.mean(0)),
        "proprio_std": tuple(states.std(0)),
    }
    settings: dict[str, Any] = {
        "episodes": arguments.episodes,
        "block": "tuning",
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
    }
    for number, view in enumerate(arguments.models):
        world_model = _looked_up(
            model_of(view, task, proprio_weight=0.0, **statistics), task, states
        )
        left_out = world_model.lookup(states[:LEFT_OUT, :2], skip=1)
        error = (left_out - world_model.latents[:LEFT_OUT]).square().mean()
        error /= world_model.latents.var(0).mean()
        for iterations in arguments.iterations:
            settings["mpc_iterations"] = iterations
            settings["world_model"] = world_model
            if number == 0:
                found = evaluate_reference("oracle-state", task, **settings)
                print(f"oracle-state, {iterations} iterations: {found}", flush=True)
            found = evaluate_reference("oracle-latent", WithoutFrames(task), **settings)
            print(
                f"{view}, {world_model.config.num_patches} tokens, lookup error {error:.3f}, "
                f"{iterations} iterations: {found}",
                flush=True,
            )


def _looked_up(world_model, task, states):
    """The model with latents of the states at rest to look up."""
    resting = np.concatenate([states[:, :2], np.zeros((len(states), 2))], axis=1)
    found = latents(world_model, task, resting)
    world_model.__class__ = LookedUp
    world_model.latents, world_model.tree = found, KDTree(states[:, :2])
    return world_model


if __name__ == "__main__":
    main()
