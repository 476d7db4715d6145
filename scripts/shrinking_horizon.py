"""Success where every model step is planned anew, over what is left of a plan's five.

    python scripts/shrinking_horizon.py pusht --episodes 24 --rounds 3

asks whether a model fails because it executes its plans blindly: instead of executing all five
model steps of a plan, it executes the first, looks, plans the remaining four, and so on. A round
takes as many environment steps as a plan does elsewhere; success is read after each model step.
Tuning episodes.
"""

import argparse
import dataclasses

import quantwm as qwm
from quantwm.planning.defaults import default_planner
from success_after import print_success


@dataclasses.dataclass(frozen=True)
class Shrinking:
    """Plans what is left of a round's horizon, and gives only the first action away."""

    planner: qwm.CEM

    def plan(self, cost, seeds, iteration, action_spec):
        """A plan of one model step."""
        left = self.planner.horizon - iteration % self.planner.horizon
        shorter = dataclasses.replace(self.planner, horizon=left)
        found = shorter.plan(cost, seeds, iteration, action_spec)
        return dataclasses.replace(found, actions=found.actions[:, :1])

    def settings(self):
        """Those of the other planner."""
        return self.planner.settings()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    planner = default_planner(arguments.task)
    outcome = qwm.evaluate(
        qwm.load(arguments.task),
        arguments.task,
        episodes=arguments.episodes,
        seed=0,
        block="tuning",
        planner=Shrinking(planner),
        mpc_iterations=arguments.rounds * planner.horizon,
    )
    print_success([row["success_by_iteration"][:: planner.horizon] for row in outcome.rows])


if __name__ == "__main__":
    main()
