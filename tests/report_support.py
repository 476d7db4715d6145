"""Results folders as studies leave them, made up: rows that walk through Wall, and diagnoses."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from quantwm.envs.wall import Wall
from quantwm.evaluation import REFERENCES
from quantwm.report import task_report
from quantwm.seeds import keyed_generator
from quantwm.study.arms import parse_arms
from quantwm.study.store import ResultsFolder
from quantwm.study.summary import COLUMNS, arm_summary

TASK = Wall()
ITERATIONS = 6
ENVIRONMENT = {"python": "3.11.9", "torch": "2.13.0", "processor": "A <fast> CPU", "commit": None}
DOOR = np.array([32.0, 30.0])

# A whole study in the short forms of arms.
WHOLE = (
    "oracle-state,oracle-latent,oracle-latent:w3,float,w{8,4,3,2},"
    "w{4,3}{,g128}@{omse,awq,gptq,rotation,rotation+gptq},w{4,3}g128,"
    "w8a8,w4a4{,-token},w4a4{,-token}@{gptq,smoothquant,percentile},"
    "{encoder,predictor}:w{4,3},encoder.blocks.{0,11}:w3,w3/steps=20,w3/mpc_iterations=12"
)


def make_rows(arm, solved, failure="not_reached", task="wall", iterations=ITERATIONS):
    """Episodes that walk through the door to the goal ("1"), or get stuck on the way ("0")."""
    episodes = TASK.episodes(range(100, 100 + len(solved)))
    return [
        make_row(arm, index, success == "1", failure, episodes, task, iterations)
        for index, success in enumerate(solved)
    ]


def make_row(arm, index, success, failure, episodes, task="wall", most=ITERATIONS):
    first = 1 + (index + len(arm)) % 3 if success else None
    iterations = first or most
    start, goal = episodes.start[index], episodes.goal[index]
    states = [start]
    for step in range(1, iterations + 1):
        share = step / iterations if success else min(0.42, 0.2 * step)
        to_door, beyond = min(1.0, 2 * share), max(0.0, 2 * share - 1)
        states.append(start + (DOOR - start) * to_door + (goal - DOOR) * beyond)
    distances = [float(TASK.distance(state, goal)) for state in states]
    costs = [distance / 40 + 0.02 for distance in distances[1:]]
    return {
        "schema_version": 2,
        "cell": f"cell-{arm}",
        "arm": arm,
        "task": task,
        "layout": json.dumps({"door_y": 30, "wall_x": 32}),
        "block": "evaluation",
        "seed": 1,
        "episode": index,
        "episode_seed": 100 + index,
        "success": success,
        "success_by_iteration": [success and i >= iterations for i in range(most + 1)],
        "first_success": first,
        "iterations": iterations,
        "failure": None if success else failure,
        "final_distance": distances[-1],
        "distance_by_iteration": distances,
        "cost_by_iteration": costs,
        "cost_by_step": [[3 * cost, 2 * cost, cost] for cost in costs],
        "states": [state.tolist() for state in states],
        "goal": goal.tolist(),
        "plan_seconds": 1.5,
        "peak_memory_mb": 900.0,
        "provenance": json.dumps({"torch": "2.13.0", "dtype": "bfloat16", "threads": 2}),
    }


def make_summary(rows, sizes):
    """The summary of rows by arm."""
    return [
        arm_summary(
            name,
            rows[name],
            float_of(name, rows),
            bytes=stored,
            seconds=40.0 + 3 * len(name),
        )
        for name, stored in sizes.items()
    ]


def float_of(name, rows):
    """Rows of the float arm that an arm is compared with: that of its budget, else the study's."""
    if name == "float":
        return None
    kind, _, budget = name.partition("/")
    own = rows.get("float")
    return own if kind == "float" else rows.get(f"float/{budget}", own)


def make_study(arms):
    """Rows and summary of `arms`, given as {name: (successes, bytes)}."""
    rows = {name: make_rows(name, solved) for name, (solved, _) in arms.items()}
    summary = make_summary(rows, {name: stored for name, (_, stored) in arms.items()})
    return [row for one in rows.values() for row in one], summary


def make_config(names, kinds=None, task="wall"):
    """A study with arms of these names; what is no short form is a plan of 4 bits."""
    arms = []
    for name in names:
        kind = (kinds or {}).get(name)
        try:
            parsed = parse_arms([{"name": name, "kind": kind}] if kind else [name])
        except Exception:
            parsed = parse_arms([{"name": name, "plan": "w4"}])
        arms += [arm.to_dict() for arm in parsed]
    return {
        "version": 1,
        "name": "quick",
        "task": {"name": task, "wall_x": 32, "door_y": 30, "version": 1},
        "model": task,
        "arms": arms,
        "episodes": 16,
        "seed": 1,
        "block": "evaluation",
        "mpc_iterations": ITERATIONS,
        "planner": {"samples": 64, "elites": 8, "horizon": 5, "noise_correlation": 0.8},
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": 2,
        "gate": 0.7,
    }


def one_task(arms, config=None, **changes):
    """The task of a small study, given as {name: (successes, bytes)}."""
    rows, summary = make_study(arms)
    return task_report(rows, summary, config or make_config(arms), ENVIRONMENT, TASK, **changes)


def chance(name):
    """How often an arm of the whole study succeeds."""
    rate = 0.94
    for bits, factor in (("w2", 0.03), ("w3", 0.35), ("w4", 0.85)):
        if bits in name:
            rate *= factor
    for part, gain in (("gptq", 0.45), ("g128", 0.2), ("awq", 0.3), ("predictor", 0.5)):
        rate += (0.94 - rate) * gain * (part in name)
    return rate * (0.8 if "a4" in name else 1.0)


def whole_study(episodes=24, task="wall"):
    """Rows, summary, configuration and diagnoses of a study of about 60 arms."""
    arms = parse_arms(WHOLE)
    rows, sizes = {}, {}
    for index, arm in enumerate(arms):
        draw = keyed_generator(5, index, len(task)).random(episodes)
        solved = "".join("1" if value < chance(arm.name) else "0" for value in draw)
        most = arm.mpc_iterations or ITERATIONS
        broken = "non_finite: latent of frame 2" if arm.name == "w2" else "not_reached"
        rows[arm.name] = make_rows(arm.name, solved, task=task, iterations=most)
        for row in rows[arm.name][::2]:
            row["failure"] = None if row["success"] else broken
        bits = next((b for b in (8, 4, 3, 2) if f"w{b}" in arm.name), 32)
        size = 3_000_000 * bits + 600_000 * ("g128" in arm.name)
        sizes[arm.name] = None if arm.kind in REFERENCES else size
    config = make_config([arm.name for arm in arms], task=task) | {"episodes": episodes}
    rows_of_all = [row for one in rows.values() for row in one]
    return rows_of_all, make_summary(rows, sizes), config


def fidelity(arm, correlation=0.8, episodes=4):
    """A diagnosis of an arm's costs as its file has it."""
    generator = keyed_generator(9, len(arm))
    reference = np.exp(generator.normal(0, 0.5, 80))
    steps = [0.1, 0.15, 0.2, 0.22, 0.25]
    drift = {"against_float": steps, "against_truth": steps, "float_against_truth": steps}
    return {
        "kind": "fidelity",
        "arm": arm,
        "episodes": episodes,
        "k": 8,
        "rank_correlation": [correlation] * episodes,
        "top_k_overlap": [0.5] * episodes,
        "regret": [0.125] * episodes,
        "drift": {"visual": drift | {"observed": 0.1}, "proprio": drift | {"observed": 0.1}},
        "costs": {
            "float": reference.tolist(),
            "arm": (reference * np.exp(generator.normal(0.2, 0.3, 80))).tolist(),
        },
    }


def sensitivity():
    """A diagnosis of every layer of a model as its file has it."""
    layers = []
    for part, blocks in (("encoder", 12), ("predictor", 6)):
        for block in range(blocks):
            for kind, weight in (("attn.qkv", 3), ("attn.proj", 1), ("mlp.fc1", 2), ("mlp.fc2", 4)):
                error = weight * 0.4 ** (block / 2) * (0.3 if part == "encoder" else 0.05)
                name = f"{part}.blocks.{block}"
                layers.append(
                    {
                        "layer": f"{name}.{kind}",
                        "part": part,
                        "block": name,
                        "error": error,
                        "rank_correlation": 1 - error / 2,
                    }
                )
    return {"kind": "sensitivity", "scheme": "w3", "method": "rtn", "layers": layers}


def write_folder(path, rows, summary, config, diagnoses=()):
    """A results folder as a study leaves it."""
    folder = ResultsFolder(path)
    record = {"model_hash": "ab12", "cells": {"w4": "cd"}, "environment": ENVIRONMENT}
    folder.write_config(config | {"record": record})
    folder.write_episodes(rows)
    folder.write_summary(summary, COLUMNS)
    for one in diagnoses:
        (path / "diagnostics").mkdir(exist_ok=True)
        name = one.get("arm", "sensitivity").replace(":", "-")
        (path / "diagnostics" / f"{one['kind']}-{name}.json").write_text(json.dumps(one))
    return path


class Document(HTMLParser):
    """What the tests look at: table cells by arm, attributes, ids, text and unclosed tags."""

    VOID = {"meta", "link", "img", "br", "input"}  # noqa: RUF012

    def __init__(self, html):
        super().__init__()
        self.tables, self.tags, self.open, self.words, self.lines = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.lines.append(dict(attrs))
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag not in ("span", "b"):
            self.words.append(" ")

    def handle_data(self, data):
        if not {"style", "svg", "script"} & set(self.open):
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th", "data"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).replace("\xa0", " ").split())

    def line(self, arm, table=0):
        return next(line for line in self.tables[table] if line and line[0] == arm)

    def values(self, key):
        return [attributes[key] for _, attributes in self.tags if key in attributes]


needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")


def browse(url, profile, *options):
    """The document as a browser without a network leaves it; no console message is allowed."""
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    done = subprocess.run(
        ["chromium", *always, offline, f"--user-data-dir={profile}", *options, "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    return done.stdout
