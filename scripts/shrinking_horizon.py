"""Success where every model step is planned anew, over what is left of a plan's five.

    python scripts/shrinking_horizon.py pusht --episodes 24 --rounds 3

asks whether a model fails because it executes its plans blindly: instead of executing all five
model steps of a plan, it executes the first, looks, plans the remaining four, and so on. A round
takes as many environment steps as a plan does elsewhere, and success is read where it is read
elsewhere. Tuning episodes, on the CPU in bfloat16.
"""

import argparse
import dataclasses

import numpy as np
import torch

from quantwm.compute import placed
from quantwm.envs import get_task
from quantwm.loading import load
from quantwm.planning.defaults import default_planner
from quantwm.planning.objective import Objective
from quantwm.planning.rollout import ModelCost
from quantwm.seeds import episode_seeds
from quantwm.statistics import wilson_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, planner = get_task(arguments.task), default_planner(arguments.task)
    model = placed(load(arguments.task), torch.device("cpu"), torch.bfloat16)
    episodes = task.episodes(episode_seeds("tuning", 0, arguments.episodes))
    cost = ModelCost(model, task, episodes, Objective(model.objective_weights))
    simulation = task.start(episodes)
    reached = task.success(simulation.states, episodes.goal)
    for number in range(arguments.rounds):
        index = np.flatnonzero(~reached)
        for horizon in range(planner.horizon if len(index) else 0, 0, -1):
            cost.observe(index, simulation.states[index])
            shorter = dataclasses.replace(planner, horizon=horizon)
            plan = shorter.plan(
                lambda position, actions, index=index: cost(index[position], actions),
                episodes.seeds[index],
                number * planner.horizon + planner.horizon - horizon,
                model.action_spec,
            )
            simulation.step(index, model.action_spec.denormalize(plan.actions[:, :1]))
        reached |= task.success(simulation.states, episodes.goal)
        low, high = wilson_interval(int(reached.sum()), len(reached))
        print(f"round {number + 1}: {reached.mean():.2f} [{low:.2f}, {high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
