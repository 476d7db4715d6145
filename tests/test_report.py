import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from quantwm.envs.wall import Wall
from quantwm.errors import MismatchError, UsageError
from quantwm.report import render, write_report
from quantwm.report.arms import arms_of, choose_episode, worst_arm
from quantwm.report.filmstrip import MOST_FRAMES, strips
from quantwm.report.plots import success_plot
from quantwm.report.text import signed
from quantwm.study.store import ResultsFolder
from quantwm.study.summary import COLUMNS, arm_summary

ITERATIONS = 6
TASK = Wall()
ENVIRONMENT = {"python": "3.11.9", "torch": "2.13.0", "processor": "A <fast> CPU", "commit": None}

# Successes of 16 episodes, and stored bytes, as a study might find them.
STUDY = {
    "oracle-state": ("1111111111111111", None),
    "oracle-latent": ("1111111111111101", None),
    "float": ("1111111111111101", 96_400_000),
    "w8a8": ("1111111111111101", 27_312_448),
    "w4": ("1111011101110101", 16_120_832),
    "w4g128": ("1111111101111101", 16_804_112),
    "w4a4-token": ("1101011101110001", 16_120_832),
    "w3": ("0001000000000000", 13_322_240),
    "w2": ("0000000000000000", 10_524_160),
}


def make_rows(arm, solved, failure="not_reached"):
    """Episodes that walk through the door to the goal, or get stuck on the way."""
    episodes = TASK.episodes(range(100, 100 + len(solved)))
    return [
        make_row(arm, index, success == "1", failure, episodes)
        for index, success in enumerate(solved)
    ]


def make_row(arm, index, success, failure, episodes):
    first = 1 + (index + len(arm)) % 3 if success else None
    iterations = first or ITERATIONS
    start, goal = episodes.start[index], episodes.goal[index]
    door = np.array([32.0, 30.0])
    states = [start]
    for step in range(1, iterations + 1):
        share = step / iterations if success else min(0.42, 0.2 * step)
        to_door, beyond = min(1.0, 2 * share), max(0.0, 2 * share - 1)
        states.append(start + (door - start) * to_door + (goal - door) * beyond)
    distances = [float(TASK.distance(state, goal)) for state in states]
    return {
        "schema_version": 1,
        "cell": f"cell-{arm}",
        "arm": arm,
        "task": "wall",
        "layout": json.dumps({"door_y": 30, "wall_x": 32}),
        "block": "evaluation",
        "seed": 1,
        "episode": index,
        "episode_seed": 100 + index,
        "success": success,
        "success_by_iteration": [success and i >= iterations for i in range(ITERATIONS + 1)],
        "first_success": first,
        "iterations": iterations,
        "failure": None if success else failure,
        "final_distance": distances[-1],
        "distance_by_iteration": distances,
        "cost_by_iteration": distances[1:],
        "states": [state.tolist() for state in states],
        "goal": goal.tolist(),
        "plan_seconds": 1.5,
        "peak_memory_mb": 900.0,
        "provenance": json.dumps({"torch": "2.13.0", "dtype": "bfloat16", "threads": 2}),
    }


def make_study(arms):
    """Rows and summary of `arms`, given as {name: (successes, bytes)}."""
    rows = {name: make_rows(name, solved) for name, (solved, _) in arms.items()}
    reference = rows.get("float")
    summary = [
        arm_summary(
            name,
            rows[name],
            reference if name != "float" else None,
            bytes=stored,
            seconds=40.0 + 3 * len(name),
        )
        for name, (_, stored) in arms.items()
    ]
    return [row for one in rows.values() for row in one], summary


def make_config(names):
    kinds = {name: name if name == "float" or "oracle" in name else "quantized" for name in names}
    return {
        "version": 1,
        "name": "quick",
        "task": {"name": "wall", "wall_x": 32, "door_y": 30, "version": 1},
        "model": "wall",
        "arms": [{"name": name, "kind": kind} for name, kind in kinds.items()],
        "episodes": 16,
        "seed": 1,
        "block": "evaluation",
        "mpc_iterations": ITERATIONS,
        "planner": {"samples": 64, "elites": 8, "horizon": 5, "noise": "ar1", "correlation": 0.8},
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": 2,
        "gate": 0.7,
    }


def rendered(arms):
    rows, summary = make_study(arms)
    return render(rows, summary, make_config(arms), ENVIRONMENT, TASK)


@pytest.fixture(scope="module")
def page():
    return rendered(STUDY)
