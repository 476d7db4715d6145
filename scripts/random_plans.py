"""What plans that nothing chose reach: the floor that a success rate is to be read against.

    python scripts/random_plans.py wall pusht point_maze --episodes 50

executes, on the evaluation episodes of a study, a candidate of the shipped planner's first step
(its noise, seeded alike), and the data's mean action all along. Success is looked at after each
executed plan, as everywhere.
"""

import argparse

import numpy as np
import torch

from quantwm.envs import get_task
from quantwm.loading import load
from quantwm.planning.defaults import default_iterations, default_planner
from quantwm.seeds import episode_seeds
from quantwm.statistics import wilson_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iterations", type=int, help="default: as often as the task replans")
    arguments = parser.parse_args()
    for name in arguments.tasks:
        for scale, what in ((1.0, "random plans"), (0.0, "the mean action")):
            seeds = episode_seeds("evaluation", arguments.seed, arguments.episodes)
            count = arguments.iterations or default_iterations(name)
            reached = reach(name, seeds, scale, count)
            low, high = wilson_interval(int(reached[-1].sum()), arguments.episodes)
            after = ", ".join(f"{part.mean():.2f}" for part in reached[:7])
            print(
                f"{name}, {what}: {after} after 0 to 6 plans, "
                f"{reached[-1].mean():.2f} [{low:.2f}, {high:.2f}] after {len(reached) - 1}"
            )


def reach(name: str, seeds: list[int], scale: float, count: int) -> list[np.ndarray]:
    """Whether each episode has succeeded, at the start and after each plan."""
    task, planner, spec = get_task(name), default_planner(name), load(name).action_spec
    episodes = task.episodes(seeds)
    simulation = task.start(episodes)
    index = np.arange(len(seeds))
    reached = [task.success(simulation.states, episodes.goal)]
    mean = np.zeros((planner.horizon, spec.model_dim), np.float32)
    deviation = np.full_like(mean, scale * planner.sigma)
    for iteration in range(count):
        # Candidate 0 is the mean itself.
        plans = [planner.candidates(mean, deviation, seed, iteration, 0, spec)[1] for seed in seeds]
        simulation.step(index, spec.denormalize(torch.from_numpy(np.stack(plans))))
        reached.append(reached[-1] | task.success(simulation.states, episodes.goal))
    return reached


if __name__ == "__main__":
    main()
