"""Success of PushT's float model where the agent's part of the objective is not imagined but true.

    python scripts/true_proprioception.py --episodes 24 --rounds 2

takes the visual part of a candidate's cost from the model and the proprioceptive part from the
simulator: what a model would reach that predicts its agent exactly. Tuning episodes, on the CPU in
bfloat16.
"""

import argparse

import torch

from quantwm.compute import placed
from quantwm.envs import get_task
from quantwm.loading import load
from quantwm.planning.defaults import default_planner
from quantwm.planning.mpc import run_episodes
from quantwm.planning.objective import Objective
from quantwm.planning.oracles import OracleStateCost
from quantwm.planning.rollout import ModelCost
from quantwm.seeds import episode_seeds
from success_after import print_success


class TrueAgent(ModelCost):
    """The objective with its proprioceptive part taken where a candidate truly ends."""

    def __init__(self, world_model, task, episodes):
        fast = placed(world_model, torch.device("cpu"), torch.bfloat16)
        visual = Objective({**world_model.objective_weights, "proprio": 0.0})
        super().__init__(fast, task, episodes, visual)
        self._true = TrueProprioception(world_model, task, episodes)

    def observe(self, index, states):
        """As of both costs."""
        super().observe(index, states)
        self._true.observe(index, states)

    def __call__(self, index, actions):
        """Costs (B, N)."""
        return super().__call__(index, actions) + self._true(index, actions)


class TrueProprioception(OracleStateCost):
    """The objective's proprioceptive part, of the state in which a candidate truly ends."""

    def __init__(self, world_model, task, episodes):
        super().__init__(task, episodes, world_model.action_spec)
        self._model = world_model

    def __call__(self, index, actions):
        """Costs (B, N)."""
        final = self._embedded(self._final_states(index, actions))
        goal = self._embedded(self._episodes.goal[index][:, None])
        weight = self._model.objective_weights["proprio"]
        return weight * (final - goal).square().mean(-1)

    @torch.inference_mode()
    def _embedded(self, states):
        proprio = torch.from_numpy(self._task.proprio(states))
        return self._model.embed_proprio(self._model.normalize_proprio(proprio))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    task, planner, model = get_task("pusht"), default_planner("pusht"), load("pusht")
    episodes = task.episodes(episode_seeds("tuning", 0, arguments.episodes))
    traces = run_episodes(
        task,
        episodes,
        TrueAgent(model, task, episodes),
        planner,
        model.action_spec,
        arguments.rounds,
    )
    print_success([trace.success for trace in traces])


if __name__ == "__main__":
    main()
