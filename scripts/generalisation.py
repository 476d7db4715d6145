"""What a bundled model errs by on trajectories that it was trained on, and on others.

    quantwm collect pusht --out data --train 2000 --validation 250
    python scripts/generalisation.py pusht --data data --cache latents

A trajectory depends on its seed alone, so that the first ones of a small collection are those that
the model saw. Errors are those of training's curve: of imagined visual latents one and five steps
ahead, as a fraction of what repeating the observed frame errs by.
"""

import argparse
from pathlib import Path

from quantwm.data.latents import encode_split
from quantwm.data.sources import open_data
from quantwm.envs import get_task
from quantwm.loading import load
from quantwm.models.checkpoint import BUNDLED_ENCODER
from quantwm.models.encoder_weights import open_encoder
from quantwm.training.batches import Windows
from quantwm.training.loss import validate
from quantwm.training.pipeline import HORIZON, latents_key


def main() -> None:
    """Print a row a split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", help="whose bundled model, unless --model names another")
    parser.add_argument("--data", type=Path, required=True, help="what `quantwm collect` wrote")
    parser.add_argument("--cache", type=Path, required=True, help="receives the latents")
    parser.add_argument("--model", help="a model's folder")
    parser.add_argument("--windows", type=int, default=1500, help="of each split")
    args = parser.parse_args()

    task = get_task(args.task)
    model = load(args.model or args.task)
    data = open_data(args.data, task)
    key = latents_key(data, open_encoder(BUNDLED_ENCODER).sha256, model.config)
    print("| trajectories | windows | one step | five steps |\n| --- | --- | --- | --- |")
    for split, part in data.splits.items():
        latents = encode_split(model, part, args.cache, split, key=key)
        windows = Windows(model.config, task, part.trajectories, latents, HORIZON + 1)
        errors = validate(model, windows, args.windows)
        ratios = f"{errors['one_step_ratio']:.3f} | {errors['rollout_ratio']:.3f}"
        print(f"| {split} | {min(args.windows, len(windows))} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
