"""What a study will cost: a dry run's estimate, good to a factor of two or three."""

from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch

from quantwm.compute import cpu_threads, placed, resolve_dtype
from quantwm.diagnostics.fidelity import DRIFT_CANDIDATES
from quantwm.diagnostics.sensitivity import CANDIDATES
from quantwm.errors import UsageError
from quantwm.evaluation import REFERENCES
from quantwm.planning.defaults import default_planner
from quantwm.planning.objective import Objective
from quantwm.planning.oracles import OracleLatentCost
from quantwm.planning.planners import planner_from_settings
from quantwm.planning.population import PopulationPlanner
from quantwm.planning.rollout import ModelCost
from quantwm.seeds import episode_seeds
from quantwm.study.cells import ArmKind, Cell
from quantwm.study.diagnose import Diagnosis
from quantwm.study.prepare import Prepared

Pace: TypeAlias = Mapping[ArmKind, float]
"""Seconds to predict (or simulate, or render and encode) one candidate's frame, by kind of arm."""
SECONDS_PER_FRAME: Pace = {
    "oracle-state": 3e-6,
    "oracle-latent": 6e-4,
    "random": 3e-6,
    "float": 3e-4,
    "quantized": 3e-4,
}
"""A pace to go by where none can be measured, such as for a cluster's machines.

Measured with the bundled compact model on two AMX cores in bfloat16 (the quick study's W2 arm,
whose episodes run to the end). Oracle-latent encodes one image a candidate, which is spread over
the frames of its plan.
"""
ACTIVATION_FACTOR = 2.0
"""How much slower the simulated quantization of layers' inputs makes a prediction."""


_CANDIDATES = 16


def measured_pace(prepared: Prepared) -> Pace:
    """The pace of the study's own model on this machine: a few candidates of one episode."""
    spec, task = prepared.spec, prepared.task
    episode = task.episodes(episode_seeds("tuning", 0, 1))
    model = placed(
        prepared.world_model, prepared.device, resolve_dtype(spec.dtype, prepared.device)
    )
    objective = Objective(model.objective_weights)
    horizon = int(getattr(prepared.planner, "horizon", 5))
    threads = spec.threads or 1
    actions = torch.zeros(1, _CANDIDATES * threads, horizon, model.action_spec.model_dim)
    one = np.zeros(1, np.intp)
    with cpu_threads(threads):
        imagined = ModelCost(model, task, episode, objective)
        imagined.observe(one, episode.start)
        oracle = OracleLatentCost(model, task, episode, objective)
        oracle.observe(one, episode.start)
        seconds = {}
        for name, cost in (("model", imagined), ("oracle", oracle)):
            cost(one, actions)  # the first call measures memory and starts threads
            began = perf_counter()
            cost(one, actions)
            seconds[name] = (perf_counter() - began) / (actions.shape[1] * horizon)
    return {
        **SECONDS_PER_FRAME,
        "float": seconds["model"],
        "quantized": seconds["model"],
        "oracle-latent": seconds["oracle"],
    }


def estimated_seconds(cell: Cell, pace: Pace = SECONDS_PER_FRAME) -> float:
    """Estimated wall-clock time of a cell, as if no episode succeeded before its last iteration.

    A planner that is none of quantwm's counts as the compact default.
    """
    frames = _frames(cell.planner, chosen=cell.kind != "random")
    inputs = any("a" in str(scheme).partition("-")[0] for scheme in cell.plan.values())
    factor = ACTIVATION_FACTOR if inputs else 1.0
    return cell.episodes * cell.mpc_iterations * frames * pace[cell.kind] * factor


def calibrated_seconds(
    cell: Cell, finished: Iterable[tuple[Cell, float]], pace: Pace = SECONDS_PER_FRAME
) -> float:
    """The estimate, scaled by what the study's finished cells took against theirs.

    Args:
        cell: to be estimated.
        finished: cells of the same study with their seconds; only the same reference, or
            other runs of the model, say something about it.
        pace: of this machine.
    """
    same = [(one, seconds) for one, seconds in finished if _pool(one) == _pool(cell)]
    expected = sum(estimated_seconds(one, pace) for one, _ in same)
    took = sum(seconds for _, seconds in same)
    return estimated_seconds(cell, pace) * (took / expected if expected and took else 1.0)


def diagnosis_seconds(diagnosis: Diagnosis, prepared: Prepared, pace: Pace) -> float:
    """Estimated wall-clock time of a diagnosis: float's plans, and each model's rollouts of theirs.

    Args:
        diagnosis: of the study; its planner has a population.
        prepared: the study.
        pace: of this machine.
    """
    planner = prepared.planner
    assert isinstance(planner, PopulationPlanner)
    images = 0
    if diagnosis.scheme is not None:
        groups = prepared.world_model.quantizable_groups()
        models = sum(len(group.layers) for group in groups if group.kind == "linear")
        candidates = min(planner.samples, CANDIDATES)
    else:
        models, candidates = len(diagnosis.arms), planner.samples
        images = 2 * min(candidates, DRIFT_CANDIDATES) * planner.horizon
    frames = (planner.rollouts + 2 * candidates * (1 + models)) * planner.horizon
    # The oracle's pace is of one image a plan, told by the plan's frames.
    seconds = frames * pace["quantized"] + images * planner.horizon * pace["oracle-latent"]
    return prepared.spec.diagnostics.episodes * seconds


def _frames(settings: Mapping[str, Any], *, chosen: bool) -> int:
    """Frames that one plan predicts; those of one candidate where none is chosen."""
    try:
        planner = planner_from_settings(settings)
    except UsageError:
        planner = default_planner("")
    return (planner.rollouts if chosen else 1) * planner.horizon


def _pool(cell: Cell) -> str:
    return cell.kind if cell.kind in REFERENCES else "model"
