"""Where one core's time goes in a chunk of rollouts.

python scripts/profile_rollout.py paper bfloat16
"""

import argparse
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from quantwm.bench.subjects import SCALES, subject_of
from quantwm.bench.variants import timed
from quantwm.compute import DTYPES, placed

_REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scale", choices=SCALES)
    parser.add_argument("dtype", choices=DTYPES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, subject = torch.device("cpu"), subject_of(arguments.scale)
    world_model = placed(subject.world_model, device, DTYPES[arguments.dtype])
    actions = subject.actions[:1, : world_model.rollout_chunk]
    with torch.inference_mode():
        latent = world_model.encode({k: v[:1] for k, v in subject.observation.items()})

        def roll_out() -> None:
            world_model.rollout(latent, actions, last_only=True)

        roll_out()
        seconds = median(timed(device, roll_out)[0] for _ in range(_REPEATS))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            roll_out()
    print(f"{actions.shape[1]} candidates: {seconds:.3f} s, median of {_REPEATS}")
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12)
    print(table)


if __name__ == "__main__":
    main()
