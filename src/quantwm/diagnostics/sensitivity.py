"""Which layers a world model can least afford to have rounded.

Each layer is quantized alone, the others stay float. What counts is what planning reads: the last
imagined latent and the costs of candidates, against the float model's. Candidates are those of
`quantwm.diagnostics.fidelity`; what the float model makes of them is computed once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantwm.compute import placed, resolve_device, resolve_dtype
from quantwm.diagnostics.candidates import (
    CHUNK,
    Case,
    Cases,
    Imagination,
    planned_populations,
    rank_correlation,
    relative_error,
    squares_by_frame,
)
from quantwm.errors import MismatchError, PlanError, UsageError
from quantwm.fingerprint import model_hash
from quantwm.methods import get_method, quantize, resolve_plan
from quantwm.planning.objective import as_parts
from quantwm.planning.population import PopulationPlanner
from quantwm.protocols import FloatArray, Latent, Task, WorldModel
from quantwm.quant.apply import calibration_problems
from quantwm.quant.observers import CalibrationData
from quantwm.quant.plan import QuantPlan
from quantwm.seeds import SeedBlock

CANDIDATES = CHUNK


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer does.

    Attributes:
        layer, block: dotted names.
        error: relative L2 error of the last imagined latent, √(Σ‖a − float‖² / Σ‖float‖²) over
            episodes, candidates and all parts of the latent.
        rank_correlation: Spearman's of the candidates' costs and the float model's, mean over
            episodes and populations.
    """

    layer: str
    block: str
    error: float
    rank_correlation: float

    @property
    def part(self) -> str:
        """First of the layer's dotted name, such as "encoder"."""
        return self.layer.partition(".")[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "part": self.part}


@dataclass(frozen=True)
class Sensitivity:
    """All layers of a model, one at a time.

    Attributes:
        scheme, method: how each was quantized.
        layers: in forward order.
    """

    scheme: str
    method: str
    layers: tuple[LayerSensitivity, ...]

    def ranked(self) -> list[LayerSensitivity]:
        """The most sensitive first, by error."""
        return sorted(self.layers, key=lambda layer: -layer.error)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, layers in forward order."""
        return {
            "kind": "sensitivity",
            "scheme": self.scheme,
            "method": self.method,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def diagnose_sensitivity(
    world_model: WorldModel,
    task: str | Task,
    scheme: str = "w3",
    *,
    method: str = "rtn",
    options: Mapping[str, Any] | None = None,
    calibration: CalibrationData | None = None,
    episodes: int = 4,
    seed: int = 0,
    block: SeedBlock = "tuning",
    planner: PopulationPlanner | None = None,
    candidates: int = CANDIDATES,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Quantize each quantizable linear alone and see what it does to rollouts and costs.

    Only layers that encoding runs through make the model encode again.

    Args:
        world_model: a float model; left unchanged.
        task: a task, or the name of one.
        scheme: short name, such as "w3" or "w8a8-token".
        method, options: as in a `QuantPlan`.
        calibration: where scheme or method need it; of this very model.
        episodes, seed, block: whose starts and goals; by default none of the evaluation's.
        planner: that asks about candidates; default: the compact settings' CEM.
        candidates: the first of each population that are rolled out, at least 2.
        device, dtype: as in `evaluate`.
        progress: called with (layers done, of how many).

    Raises:
        UsageError: an unknown scheme or method, a model that is quantized already, a planner that
            has no population, or a number out of range.
        PlanError: layers that scheme or method cannot apply to, each alone, or calibration data
            that are lacking.
        MismatchError: model and task, or model and calibration, do not belong together.
        NonFiniteError: costs are NaN or infinite.
    """
    plans = _plans(world_model, scheme, method, options, calibration)
    if candidates < 2:
        raise UsageError(f"candidates must be at least 2 to be ranked, got {candidates}")
    cases = Cases.resolve(world_model, task, planner, episodes, seed, block)
    target = resolve_device(device)
    compute = resolve_dtype(dtype, target)
    model = placed(world_model, target, compute)
    probes = [_Probe.of(model, case, cases.planner, candidates) for case in cases]
    encoding = _called_in_encoding(model, next(iter(cases)), plans)
    blocks = {n: g.block for g in world_model.quantizable_groups() for n in g.layers}
    found: list[LayerSensitivity] = []
    for name, plan in plans.items():
        alone = placed(quantize(world_model, plan, calibration), target, compute)
        measured = _measure(f"{name} at {scheme}", alone, probes, encode=name in encoding)
        found.append(LayerSensitivity(name, blocks[name], *measured))
        if progress is not None:
            progress(len(found), len(plans))
    return Sensitivity(str(scheme), get_method(method, options).name, tuple(found))


def single_layer_plans(
    world_model: WorldModel,
    scheme: str,
    method: str = "rtn",
    options: Mapping[str, Any] | None = None,
) -> dict[str, QuantPlan]:
    """A plan for each layer alone, checked as far as can be before calibration.

    Raises:
        UsageError: an unknown scheme or method, a scheme that quantizes nothing, or a model that is
            quantized already.
        PlanError: lists the layers that the scheme or method cannot apply to.
    """
    everything = QuantPlan({"*": scheme}, method, options=options)
    schemes = resolve_plan(everything, world_model)
    if not schemes:
        raise UsageError(f"{scheme!r} quantizes nothing: give a scheme such as 'w3'")
    recipe, groups = get_method(method, options), tuple(world_model.quantizable_groups())
    problems = [
        f"{name} alone: {problem}"
        for name, own in schemes.items()
        for problem in recipe.problems(world_model, {name: own}, groups)
    ]
    if problems:
        raise everything.error(problems)
    return {name: QuantPlan({name: scheme}, method, options=options) for name in schemes}


def check_sensitivity(schemes: Iterable[str], world_model: WorldModel) -> None:
    """Refuse schemes that a study's diagnoses cannot give to each layer alone.

    Raises:
        PlanError: lists the problems of all of them.
    """
    problems = []
    for scheme in schemes:
        try:
            single_layer_plans(world_model, scheme)
        except UsageError as error:
            problems.append(f"diagnostics.sensitivity {scheme!r}: {error}")
    if problems:
        raise PlanError("\n".join(problems))


def _plans(
    world_model: WorldModel,
    scheme: str,
    method: str,
    options: Mapping[str, Any] | None,
    calibration: CalibrationData | None,
) -> dict[str, QuantPlan]:
    """A plan for each layer, checked as far as can be without computing."""
    plans = single_layer_plans(world_model, scheme, method, options)
    everything = QuantPlan({"*": scheme}, method, options=options)
    schemes = everything.resolve(world_model)
    problems = calibration_problems(schemes, get_method(method, options), calibration)
    if problems:
        raise everything.error(problems)
    if calibration is not None and calibration.model_hash != model_hash(world_model):
        raise MismatchError(
            "the calibration data were gathered with another model: calibrate this one"
        )
    return plans


@dataclass(frozen=True)
class _Population:
    """Candidates (N, H, D), and last latents (N, 1, ...) and costs (N,) by the float model."""

    actions: Tensor
    latents: list[Latent]
    costs: FloatArray


@dataclass(frozen=True)
class _Probe:
    """An episode, start and goal as the float model encodes them, and candidates."""

    case: Case
    own: Imagination
    populations: tuple[_Population, _Population]

    @classmethod
    def of(
        cls, model: WorldModel, case: Case, planner: PopulationPlanner, candidates: int
    ) -> "_Probe":
        own = Imagination.of(model, case)
        planned = planned_populations(planner, model, case)
        first, last = (_imagine(own, p[:candidates]) for p in (planned.first, planned.last))
        return cls(case, own, (first, last))


def _imagine(own: Imagination, actions: Tensor) -> _Population:
    latents = [own.imagine(chunk, last_only=True) for chunk in torch.split(actions, CHUNK)]
    costs = np.concatenate([own.costs(one) for one in latents])
    return _Population(actions, latents, costs)


def _measure(
    called: str, model: WorldModel, probes: Sequence[_Probe], *, encode: bool
) -> tuple[float, float]:
    """Relative error and rank correlation of a model; `encode`: start and goal anew."""
    wrong, size = np.zeros(1), np.zeros(1)
    correlations = []
    for probe in probes:
        if encode:
            own = Imagination.of(model, probe.case, called)
        else:
            own = Imagination(model, probe.own.observed, probe.own.goal, called)
        for expected in probe.populations:
            found = _imagine(own, expected.actions)
            for ours, theirs in zip(found.latents, expected.latents, strict=True):
                for name, target in as_parts(theirs).items():
                    wrong += squares_by_frame(as_parts(ours)[name] - target)
                    size += squares_by_frame(target)
            correlations.append(rank_correlation(found.costs, expected.costs))
    return float(relative_error(wrong, size)[0]), float(np.mean(correlations))


def _called_in_encoding(model: WorldModel, case: Case, layers: Iterable[str]) -> set[str]:
    """Those of the layers that run when a frame is encoded."""
    called: set[str] = set()
    with ExitStack() as stack:
        for name in layers:

            def note(*_: object, name: str = name) -> None:
                called.add(name)

            handle = model.get_submodule(name).register_forward_hook(note)
            stack.callback(handle.remove)
        case.observed(model)
    return called
