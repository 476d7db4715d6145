"""Success of PushT's float model where its imagined final latents are drawn towards the true ones.

    python scripts/partly_true_dynamics.py --share 0.5 --seed 1 --episodes 30 --rounds 2

plans with latents that are `share` true (the simulator's final frame, encoded) and otherwise
imagined, so that the model errs by 1 - share of what it does: between the arms float (share 0) and
oracle-latent (share 1) of a study of the same block and seed, how much of its error a model may
keep. On the CPU, one core.
"""

import argparse
import sys

import numpy as np
import torch

from quantwm.compute import placed, resolve_dtype
from quantwm.envs import get_task
from quantwm.loading import load
from quantwm.planning.defaults import default_planner
from quantwm.planning.mpc import run_episodes
from quantwm.planning.objective import Objective, as_parts, like
from quantwm.planning.oracles import OracleStateCost
from quantwm.planning.rollout import StateEncoder, padded
from quantwm.seeds import episode_seeds
from success_after import print_success


class PartlyTrue(OracleStateCost):
    """The model's objective of latents between the imagined and the true final ones."""

    def __init__(self, world_model, task, episodes, share):
        super().__init__(task, episodes, world_model.action_spec)
        self._model, self._share = world_model, share
        self._objective = Objective(world_model.objective_weights)
        self._encoder = StateEncoder(world_model, task, episodes)
        self._goals = self._encoder(np.arange(len(episodes)), episodes.goal)
        self._current = {}

    def observe(self, index, states):
        """Remember the true states and encode them."""
        super().observe(index, states)
        self._current.update(zip(index.tolist(), self._encoder(index, states), strict=True))

    @torch.inference_mode()
    def __call__(self, index, actions):
        """Costs (B, N)."""
        final = self._final_states(index, actions)
        rows = zip(index.tolist(), final, actions, strict=True)
        return torch.stack([self._costs(*row) for row in rows])

    def _costs(self, episode, states, actions):
        """Costs (N,) of one episode's candidates, actions (N, H, D), that end in states (N, S)."""
        layout = self._episodes.select(np.full(len(states), episode)).layout
        seen = self._task.observe(states[:, None], layout)
        size, costs = self._model.rollout_chunk, []
        for begin in range(0, len(states), size):
            part = slice(begin, begin + size)
            frames = {
                name: padded(torch.from_numpy(values[part]), size).numpy()
                for name, values in seen.items()
            }
            true = as_parts(self._model.encode(frames))
            candidates = padded(actions[part], size)[None]
            imagined = self._model.rollout(self._current[episode], candidates, last_only=True)
            mixed = {
                # lerp in float32: the two differ by little where bfloat16 is coarse.
                name: torch.lerp(values.float(), true[name][None].float(), self._share)
                for name, values in as_parts(imagined).items()
            }
            goal = self._goals[episode]
            costs.append(self._objective(like(mixed, goal), goal)[0].float())
        return torch.cat(costs)[: len(states)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--episodes", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="number of the first episode")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--block", default="evaluation")
    parser.add_argument("--seed", type=int, default=1, help="1 is that of the findings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, planner = get_task("pusht"), default_planner("pusht")
    cpu = torch.device("cpu")
    model = placed(load("pusht"), cpu, resolve_dtype("auto", cpu))
    wanted = (arguments.block, arguments.seed, arguments.episodes, arguments.first)
    seeds, traces = episode_seeds(*wanted), []
    for begin in range(0, len(seeds), 5):  # few at a time, so that a long run can be watched
        episodes = task.episodes(seeds[begin : begin + 5])
        cost = PartlyTrue(model, task, episodes, arguments.share)
        traces += run_episodes(task, episodes, cost, planner, model.action_spec, arguments.rounds)
        won = [arguments.first + number for number, trace in enumerate(traces) if trace.success[-1]]
        print(f"of {len(traces)} episodes these are reached: {won}", file=sys.stderr, flush=True)
    print_success([trace.success for trace in traces])


if __name__ == "__main__":
    main()
