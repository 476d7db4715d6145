"""The ways to compute one optimisation step's costs that are measured against each other."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from quantwm.bench.literal import LiteralDINOWM
from quantwm.bench.operations import Operations, literal_operations, planned_operations
from quantwm.bench.subjects import Subject
from quantwm.compute import placed
from quantwm.errors import NonFiniteError, unknown_name
from quantwm.methods import quantize
from quantwm.planning.objective import Objective
from quantwm.planning.rollout import Rollouts
from quantwm.planning.workers import AllocationMeter, Workers
from quantwm.protocols import Latent, Observation

Result = TypeVar("Result")
_SLOWER = 1.1
"""The search for the literal order's chunk ends once a larger one takes this much longer."""


@dataclass(frozen=True)
class Variant:
    """One way.

    Attributes:
        name: of it.
        dtype: computed in.
        literal: in the literal order rather than in quantwm's.
        plan: that the model is quantized with.
        twin: the variant that differs only by not being quantized.
    """

    name: str
    dtype: torch.dtype
    literal: bool = False
    plan: str | None = None
    twin: str | None = None


LITERAL = "literal-float32"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(LITERAL, torch.float32, literal=True),
        Variant("float32", torch.float32),
        Variant("bfloat16", torch.bfloat16),
        Variant("w8a8-bfloat16", torch.bfloat16, plan="w8a8", twin="bfloat16"),
        Variant("w8a8-float32", torch.float32, plan="w8a8", twin="float32"),
    )
}
DEFAULT_VARIANTS = (LITERAL, "float32", "bfloat16", "w8a8-bfloat16")


def variant_of(name: str) -> Variant:
    """The variant of a name.

    Raises:
        UsageError: there is none; the nearest is suggested.
    """
    if name not in VARIANTS:
        raise unknown_name("variant", name, VARIANTS)
    return VARIANTS[name]


class Prepared(Protocol):
    """A variant with its model in place, warmed up."""

    variant: Variant
    chunk: int
    """Candidates computed at once."""
    memory: int
    """Bytes of tensors alive at the peak, without the weights."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Candidates of each episode to time in every round; the last is scaled to all."""
        ...

    def operations(self) -> Operations:
        """Of one step with all candidates."""
        ...

    def costs(self, count: int) -> Tensor:
        """Encode, roll out and compare the first `count` candidates: (B, count)."""
        ...


class _Literal:
    """The literal order in the chunk that is fastest for it."""

    def __init__(self, variant: Variant, subject: Subject, device: torch.device) -> None:
        self.variant, self._subject = variant, subject
        self._model = LiteralDINOWM(placed(subject.world_model, device, variant.dtype))
        self._goals = self._model.goals(subject.goal)
        self.chunk = 1
        _, candidates, _ = subject.shape
        part = subject.literal_candidates
        self.counts: tuple[int, ...] = (
            (candidates,) if part is None or 2 * part >= candidates else (part, 2 * part)
        )
        self.costs(1)
        self.chunk = self._fastest_chunk(device)
        with AllocationMeter() as meter:
            self.costs(self.chunk)
        self.memory = meter.peak

    def operations(self) -> Operations:
        episodes, candidates, horizon = self._subject.shape
        return literal_operations(self._model.config, candidates, horizon, episodes)

    def costs(self, count: int) -> Tensor:
        actions = self._subject.actions[:, :count]
        return self._model.costs(self._subject.observation, self._goals, actions, chunk=self.chunk)

    def _fastest_chunk(self, device: torch.device) -> int:
        best, fastest, size = 1, float("inf"), 1
        while size <= self.counts[0]:
            self.chunk = size
            each = timed(device, partial(self.costs, size))[0] / size
            if each < fastest:
                best, fastest = size, each
            elif each > _SLOWER * fastest:
                break
            size *= 2
        return best


class _Planned:
    """What `ModelCost` does between an observation and its candidates' costs."""

    def __init__(self, variant: Variant, subject: Subject, device: torch.device) -> None:
        self.variant, self._subject = variant, subject
        world_model = subject.world_model
        if variant.plan is not None:
            world_model = quantize(world_model, variant.plan, subject.calibration())
        self._model = placed(world_model, device, variant.dtype)
        self._encoders = Workers(device, what="encoding an image")
        self._rollouts = Rollouts(self._model, Objective(self._model.objective_weights))
        self._goals = self._encode(subject.goal)
        self.chunk = self._rollouts.chunk
        _, candidates, _ = subject.shape
        self.counts: tuple[int, ...] = (candidates,)
        # The first chunk is the one that a run is measured and its kernels are built by.
        self.costs(min(self.chunk, candidates))
        workers = self._rollouts.workers
        self.memory = (workers.job_bytes or 0) * workers.in_flight

    def operations(self) -> Operations:
        episodes, candidates, horizon = self._subject.shape
        return planned_operations(self._model.config, candidates, horizon, episodes)

    def costs(self, count: int) -> Tensor:
        latents = self._encode(self._subject.observation)
        return self._rollouts.costs(latents, self._goals, self._subject.actions[:, :count])

    def _encode(self, observation: Observation) -> list[Latent]:
        @torch.inference_mode()
        def encode(episode: int) -> Latent:
            one = slice(episode, episode + 1)
            return self._model.encode(
                {"visual": observation["visual"][one], "proprio": observation["proprio"][one]}
            )

        return self._encoders.map(encode, range(len(observation["visual"])))


def prepare(variant: Variant, subject: Subject, device: torch.device) -> Prepared:
    """Put a variant's model in place and warm it up."""
    return (_Literal if variant.literal else _Planned)(variant, subject, device)


def timed_costs(prepared: Prepared, count: int, device: torch.device) -> tuple[float, Tensor]:
    """Seconds for the first `count` candidates, and their costs.

    Raises:
        NonFiniteError: a cost is NaN or infinite.
    """
    seconds, costs = timed(device, partial(prepared.costs, count))
    bad = int((~costs.isfinite()).sum())
    if bad:
        raise NonFiniteError(
            f"{prepared.variant.name}: {bad} of {costs.numel()} candidate costs are NaN or "
            "infinite, so its time says nothing; check the model's weights and compute type"
        )
    return seconds, costs


def timed(device: torch.device, function: Callable[[], Result]) -> tuple[float, Result]:
    """Wall-clock seconds of a call, and what it returned."""
    _wait(device)
    begin = time.perf_counter()
    result = function()
    _wait(device)
    return time.perf_counter() - begin, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
