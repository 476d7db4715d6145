"""Where PointMaze's ball is in imagined frames, against where the plan takes it.

    python scripts/imagined_ball.py w8 w4 encoder:w4 predictor:w4 w4g128

rolls random plans out with the float model and with each arm, and finds in each imagined frame the
ball: the place at which a resting ball, seen and encoded by the same model, looks most like it,
which is how the objective compares. Printed are the mean and the deviation of its error, after one,
three and five model steps.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from quantwm.calibration import Calibration
from quantwm.envs import get_task
from quantwm.loading import load
from quantwm.methods import quantize
from quantwm.study.arms import Arm

STEPS, STARTS, PLANS, BATCH = (1, 3, 5), 16, 16, 64
LOW, HIGH, APART = 0.4, 3.2, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--calibration", type=Path, help="of a study, for methods that need one")
    arguments = parser.parse_args()
    calibration = Calibration.load(arguments.calibration) if arguments.calibration else None
    task, model = get_task("point_maze"), load("point_maze")
    start = task.episodes(range(100, 100 + STARTS)).start
    shape = (STARTS, PLANS, max(STEPS), model.action_spec.model_dim)
    plans = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    raw = model.action_spec.denormalize(plans).reshape(STARTS * PLANS, -1, task.action_dim)
    true = task.rollout(np.repeat(start, PLANS, axis=0), {}, raw)[..., :2]
    true = true[:, [step * model.action_spec.frameskip - 1 for step in STEPS]]
    axis = np.arange(LOW, HIGH + APART / 2, APART)
    places = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    resting = np.concatenate([places, np.zeros_like(places)], axis=1)

    @torch.inference_mode()
    def imagined(world_model):
        """Places (STARTS · PLANS, len(STEPS), 2) of the ball."""
        known = torch.cat(
            [
                world_model.encode(task.observe(resting[i : i + BATCH, None], {}))["visual"]
                for i in range(0, len(resting), BATCH)
            ]
        ).flatten(1)
        frames = world_model.rollout(world_model.encode(task.observe(start[:, None], {})), plans)
        seen = frames["visual"].flatten(0, 1)
        found = [torch.cdist(seen[:, step].flatten(1), known).argmin(1) for step in STEPS]
        return np.stack([places[rows.numpy()] for rows in found], axis=1)

    report("the mean of all plans", true.mean(0) - true)
    report("float", imagined(model) - true)
    for name in arguments.arms:
        arm = Arm.parse(name)
        if arm.plan is None:
            parser.error(f"{name} quantizes nothing")
        report(name, imagined(quantize(model, arm.plan, calibration)) - true)


def report(name: str, error: np.ndarray) -> None:
    """One line: (x, y) of an error (rows, len(STEPS), 2) after each step."""
    parts = [f"{name:24}"]
    for what, values in (("mean", error.mean(0)), ("deviation", error.std(0))):
        parts.append(f"{what} " + ", ".join(f"({x:.2f}, {y:.2f})" for x, y in values))
    print("  ".join(parts), flush=True)


if __name__ == "__main__":
    main()
