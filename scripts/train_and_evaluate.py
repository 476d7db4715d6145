"""Collect, train, evaluate in closed loop and keep the rows, for a machine lent for minutes.

    python scripts/train_and_evaluate.py wall --scale paper --work /tmp/wall --out results/paper

runs `quantwm collect`, `train`, `diagnose` and `study` one after the other in `--work`, where each
goes on from where an interrupted run left it, and copies what is small to `--out`: settings, the
validation curve, the diagnosis, the study's rows, summary and report, and the model if asked. What
every command took is in `seconds.json`. Success on the tuning block is for choosing settings;
`--block held_out` is for once, when nothing is left to choose.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

KEPT = ("episodes.parquet", "summary.csv", "config.yaml", "report.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("--scale", default="paper")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and latents, GBs")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is kept")
    parser.add_argument("--trajectories", type=int, default=4000)
    parser.add_argument("--validation", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument(
        "--train", nargs="*", default=[], metavar="OPTION=VALUE", help="of quantwm train: seed=1"
    )
    parser.add_argument("--arms", default="oracle-state,float,w8a8,w4g128,w4")
    parser.add_argument(
        "--study", nargs="*", default=[], metavar="KEY=VALUE", help="of the study: threads=1"
    )
    parser.add_argument("--block", default="tuning")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--keep-model", action="store_true")
    arguments = parser.parse_args()
    work, out = arguments.work, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    def quantwm(*words: object, to: Path | None = None) -> None:
        command = [sys.executable, "-m", "quantwm.cli", *map(str, words)]
        print("$ quantwm", *map(str, words), flush=True)
        begin = time.monotonic()
        done = subprocess.run(command, check=True, stdout=None if to is None else subprocess.PIPE)
        if to is not None:
            to.write_bytes(done.stdout)
        seconds[str(words[0])] = round(time.monotonic() - begin, 1)
        (out / "seconds.json").write_text(json.dumps(seconds, indent=2) + "\n")

    task, model = arguments.task, work / "run/model"
    counts = ("--train", arguments.trajectories, "--validation", arguments.validation)
    quantwm("collect", task, "--out", work / "data", *counts)
    folders = ("--data", work / "data", "--out", work / "run", "--cache", work / "latents")
    scale = ("--scale", arguments.scale, "--steps", arguments.steps)
    quantwm("train", task, *folders, *scale, *(f"--{option}" for option in arguments.train))
    shutil.copy(work / "run/curve.jsonl", out)
    shutil.copy(model / "quantwm.json", out)
    if arguments.keep_model:
        shutil.copytree(model, out / "model", dirs_exist_ok=True)
    quantwm("diagnose", model, "--episodes", 8, "--json", to=out / "diagnosis.json")
    study = (f"arms={arguments.arms}", f"block={arguments.block}", f"episodes={arguments.episodes}")
    quantwm("study", task, f"model={model}", *study, *arguments.study, "--out", work / "study")
    for name in KEPT:
        shutil.copy(work / "study" / name, out)


if __name__ == "__main__":
    main()
