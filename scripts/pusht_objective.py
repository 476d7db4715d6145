"""How the planning objective sees PushT: its visual part as agent and block move off the goal.

python scripts/pusht_objective.py 98:1 196:2 224:2

Each argument is IMAGE_SIZE:TOKEN_POOL of a model around the bundled encoder. From goals of the
tuning block the agent or the block is moved, or the block is turned, by growing steps; printed are
the mean squared error of the patch tokens against the goal's, the coefficient of variation over
goals, and the share of steps that raise it. A planner needs a cost that rises with the distance.
"""

import argparse

import numpy as np

from objective_support import VIEW, latents, model_of
from quantwm.envs import get_task
from quantwm.seeds import episode_seeds, keyed_generator

STEPS = np.array([0.0, 5, 10, 20, 40, 80])
MOVED = {"agent, px": 0, "block, px": 2, "angle, degrees": 4}
LOW, HIGH = 120, 390


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar=VIEW)
    parser.add_argument("--goals", type=int, default=8)
    arguments = parser.parse_args()
    task = get_task("pusht")
    goals = task.episodes(episode_seeds("tuning", 0, arguments.goals)).goal
    goals[:, :4] = np.clip(goals[:, :4], LOW, HIGH)  # so that no step leaves the board
    for view in arguments.models:
        world_model = model_of(view, task)
        for what, first in MOVED.items():
            curves = np.array(
                [_curve(world_model, task, goal, first, i) for i, goal in enumerate(goals)]
            )
            mean, rises = curves.mean(0), (np.diff(curves, axis=1) > 0).mean()
            variation = (curves.std(0)[1:] / mean[1:]).mean()
            shown = " ".join(f"{value:.3f}" for value in mean)
            print(f"{view:>6}  {what:15} {shown}  varies {variation:.2f}  rises {rises:.2f}")


def _curve(world_model, task, goal, first, key):
    """MSE of the tokens (6,) after each of `STEPS` in a random direction."""
    states = np.repeat(goal[None], len(STEPS), axis=0)
    if first == MOVED["angle, degrees"]:
        states[:, first] += np.radians(STEPS)
    else:
        angle = keyed_generator(11, key).uniform(0, 2 * np.pi)
        states[:, first : first + 2] += STEPS[:, None] * [np.cos(angle), np.sin(angle)]
    tokens = latents(world_model, task, states)
    return ((tokens - tokens[:1]) ** 2).mean((1, 2)).numpy()


if __name__ == "__main__":
    main()
