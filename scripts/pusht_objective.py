"""How the planning objective sees PushT: its visual part as agent and block move off the goal.

python scripts/pusht_objective.py 98:1 196:2 224:2

Each argument is IMAGE_SIZE:TOKEN_POOL of a model around the bundled encoder. From goals of the
tuning block the agent or the block is moved, or the block is turned, by growing steps; printed are
the mean squared error of the patch tokens against the goal's, the coefficient of variation over
goals, and the share of steps that raise it. A planner needs a cost that rises with the distance.
"""

import argparse

import numpy as np
import torch

from quantwm.envs import get_task
from quantwm.models.checkpoint import new_world_model
from quantwm.models.config import DINOWMConfig
from quantwm.seeds import episode_seeds, keyed_generator

STEPS = np.array([0.0, 5, 10, 20, 40, 80])
MOVED = {"agent, px": 0, "block, px": 2, "angle, degrees": 4}
LOW, HIGH = 120, 390


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="IMAGE_SIZE:TOKEN_POOL")
    parser.add_argument("--goals", type=int, default=8)
    arguments = parser.parse_args()
    task = get_task("pusht")
    goals = task.episodes(episode_seeds("tuning", 0, arguments.goals)).goal
    goals[:, :4] = np.clip(goals[:, :4], LOW, HIGH)  # so that no step leaves the board
    for model in arguments.models:
        size, _, pool = model.partition(":")
        config = DINOWMConfig(
            "pusht", 2, task.proprio_dim, image_size=int(size), token_pool=int(pool or 1)
        )
        world_model = new_world_model(config)
        for what, first in MOVED.items():
            curves = np.array(
                [_curve(world_model, task, goal, first, i) for i, goal in enumerate(goals)]
            )
            mean, rises = curves.mean(0), (np.diff(curves, axis=1) > 0).mean()
            variation = (curves.std(0)[1:] / mean[1:]).mean()
            shown = " ".join(f"{value:.3f}" for value in mean)
            print(f"{model:>6}  {what:15} {shown}  varies {variation:.2f}  rises {rises:.2f}")


@torch.inference_mode()
def _curve(world_model, task, goal, first, key):
    """MSE of the tokens (6,) after each of `STEPS` in a random direction."""
    states = np.repeat(goal[None], len(STEPS), axis=0)
    if first == MOVED["angle, degrees"]:
        states[:, first] += np.radians(STEPS)
    else:
        angle = keyed_generator(11, key).uniform(0, 2 * np.pi)
        states[:, first : first + 2] += STEPS[:, None] * [np.cos(angle), np.sin(angle)]
    visual = task.observe(states[:, None], {})["visual"][:, 0]
    tokens = world_model.encode_images(world_model.preprocess(visual))
    return ((tokens - tokens[:1]) ** 2).mean((1, 2)).numpy()


if __name__ == "__main__":
    main()
