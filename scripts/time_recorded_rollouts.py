"""What replaying a recorded rollout saves on a GPU, and that it changes nothing.

    python scripts/time_recorded_rollouts.py wall point_maze --scheme w8a8-token

prints, for each world model, milliseconds a chunk of candidates launched kernel by kernel and
replayed (medians over rounds), and whether all costs are the same bit for bit.
"""

import argparse
from statistics import median
from time import perf_counter

import numpy as np
import torch

from quantwm.compute import placed
from quantwm.envs import get_task
from quantwm.loading import load
from quantwm.methods import QuantPlan, quantize
from quantwm.planning.objective import Objective
from quantwm.planning.rollout import CUDA_CHUNK, Rollouts
from quantwm.seeds import episode_seeds

EPISODES, ROUNDS, HORIZON = 8, 7, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--scheme", help="quantize first; without calibration, so no static ones")
    parser.add_argument("--chunk", type=int, default=CUDA_CHUNK, help="candidates of an episode")
    parser.add_argument("--together", type=int, help="chunks at once; default as in planning")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for name in arguments.models:
        model = load(name)
        if arguments.scheme:
            model = quantize(model, QuantPlan({"*": arguments.scheme}))
        model = placed(model, device, torch.bfloat16)
        episodes = get_task(model.config.task).episodes(episode_seeds("tuning", 0, EPISODES))
        task = get_task(model.config.task)
        with torch.inference_mode():
            starts, goals = (
                [
                    model.encode(
                        task.observe(states[i : i + 1, None], episodes.select(np.array([i])).layout)
                    )
                    for i in range(EPISODES)
                ]
                for states in (episodes.start, episodes.goal)
            )
        generator = torch.Generator().manual_seed(0)
        shape = (EPISODES, arguments.chunk, HORIZON, model.action_spec.model_dim)
        actions = torch.randn(shape, generator=generator)
        costs, milliseconds = {}, {}
        for recorded in (False, True):
            objective = Objective(model.objective_weights)
            rollouts = Rollouts(
                model,
                objective,
                chunk=arguments.chunk,
                together=arguments.together,
                recorded=recorded,
            )
            costs[recorded] = rollouts.costs(starts, goals, actions)
            milliseconds[recorded] = _milliseconds(rollouts, starts, goals, actions)
        same = torch.equal(costs[False], costs[True])
        print(
            f"{name}: launched {milliseconds[False]:.2f} ms, replayed {milliseconds[True]:.2f} ms "
            f"for {arguments.chunk} candidates, {rollouts.together} episodes at once; "
            f"costs {'the same' if same else 'DIFFER'}"
        )


def _milliseconds(rollouts: Rollouts, starts: list, goals: list, actions: torch.Tensor) -> float:
    seconds = []
    for _ in range(ROUNDS):
        began = perf_counter()
        rollouts.costs(starts, goals, actions)  # on the CPU, so nothing is left to wait for
        seconds.append(perf_counter() - began)
    return median(seconds) / EPISODES * 1e3


if __name__ == "__main__":
    main()
