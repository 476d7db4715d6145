"""How well the visual objective tells states of a task apart, at several sizes of image and token.

    python scripts/objective_views.py pusht 98:1 196:2 224:4
    python scripts/objective_views.py point_maze 98:1 168:3

Each argument is IMAGE_SIZE:TOKEN_POOL of a model around the bundled encoder. States come from the
scripted policy on tuning seeds, goals from tuning episodes. Printed are, over goals: Spearman's
rank correlation of the visual cost with the distance to the goal; the mean visual cost of the
nearest tenth of states and of the others, between which a predictor must tell; and the encoder's
milliseconds a frame on this machine.
"""

import argparse
import time

import numpy as np
import torch
from scipy.stats import spearmanr

from objective_support import VIEW, latents, model_of
from quantwm.envs import get_task
from quantwm.seeds import episode_seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("models", nargs="+", metavar=VIEW)
    parser.add_argument("--goals", type=int, default=12)
    parser.add_argument("--states", type=int, default=60)
    arguments = parser.parse_args()
    task = get_task(arguments.task)
    goals = task.episodes(episode_seeds("tuning", 0, arguments.goals)).goal
    seeds = episode_seeds("tuning", 1, arguments.states)
    trajectories, _ = task.scripted(seeds, task.trajectory_steps)
    steps = np.arange(arguments.states) * 7 % (task.trajectory_steps + 1)
    states = trajectories[np.arange(arguments.states), steps]
    distances = task.distance(states[None], goals[:, None])
    nearest = np.argsort(distances, axis=1)[:, : max(1, arguments.states // 10)]
    print(" model  tokens  rank correlation   near    far  ms a frame")
    for view in arguments.models:
        world_model = model_of(view, task)
        begin = time.perf_counter()
        tokens = latents(world_model, task, np.concatenate([goals, states])).flatten(1)
        milliseconds = 1000 * (time.perf_counter() - begin) / len(tokens)
        squares = torch.cdist(tokens[: len(goals)], tokens[len(goals) :]) ** 2
        costs = (squares / tokens.shape[1]).numpy()
        ranks = [spearmanr(*pair).statistic for pair in zip(costs, distances, strict=True)]
        close = np.zeros(costs.shape, bool)
        np.put_along_axis(close, nearest, True, axis=1)
        near, far, count = costs[close].mean(), costs[~close].mean(), world_model.config.num_patches
        print(
            f"{view:>6} {count:7} {np.mean(ranks):17.2f} {near:6.3f} {far:6.3f} "
            f"{milliseconds:11.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
