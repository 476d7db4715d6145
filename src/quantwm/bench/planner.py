"""The planner's benchmark: one optimisation step, in turns, against the literal order."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from quantwm.bench.machine import (
    AttentionRow,
    MatrixRates,
    attention_rows,
    describe_machine,
    load_average,
)
from quantwm.bench.operations import Operations
from quantwm.bench.subjects import SCALES, Subject, subject_of
from quantwm.bench.variants import (
    DEFAULT_VARIANTS,
    LITERAL,
    Prepared,
    Variant,
    prepare,
    timed_costs,
    variant_of,
)
from quantwm.compute import dtype_name, resolve_device
from quantwm.errors import UsageError

Progress = Callable[[int, int], None]
DEFAULT_ROUNDS = 3


@dataclass(frozen=True)
class PlannerRow:
    """One variant at one scale.

    Attributes:
        scale, variant, dtype: which.
        episodes, candidates, horizon: of the step.
        seconds: the median over rounds of encoding the observations and all candidates' costs.
        ratio: the literal order's seconds over these; None where it was not measured.
        twin, twin_ratio: the same model unquantized, and these seconds over its.
        measured_candidates: of each episode; fewer than `candidates` where the time is scaled.
        linearity: how far twice the candidates are from taking twice the time, as a fraction;
            None where nothing is scaled.
        chunk: candidates computed at once.
        linear_multiply_adds, attention_multiply_adds: counted from the shapes.
        flops_per_second: two a multiply-add.
        share: of the measured matrix rate in this type.
        memory_mb: MiB of tensors alive at the peak, without the weights.
        cost_error: relative L2 distance of the costs to the literal order's, where measured.
        rounds: seconds of each round, scaled alike.
    """

    scale: str
    variant: str
    dtype: str
    episodes: int
    candidates: int
    horizon: int
    seconds: float
    ratio: float | None
    twin: str | None
    twin_ratio: float | None
    measured_candidates: int
    linearity: float | None
    chunk: int
    linear_multiply_adds: int
    attention_multiply_adds: int
    flops_per_second: float
    share: float
    memory_mb: float
    cost_error: float | None
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class PlannerReport:
    """A machine's rows."""

    machine: dict[str, Any]
    rows: list[PlannerRow]
    attention: list[AttentionRow]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "machine": self.machine,
            "rows": [asdict(row) for row in self.rows],
            "attention": [row.to_dict() for row in self.attention],
        }


@dataclass
class _Timings:
    """What was seen of one variant: seconds by number of candidates, and its costs."""

    prepared: Prepared
    seconds: dict[int, list[float]] = field(default_factory=dict)
    costs: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def variant(self) -> Variant:
        return self.prepared.variant

    def run(self, device: torch.device) -> None:
        """One round."""
        for count in self.prepared.counts:
            seconds, self.costs = timed_costs(self.prepared, count, device)
            self.seconds.setdefault(count, []).append(seconds)

    def scaled(self, candidates: int) -> tuple[float, ...]:
        """Seconds of each round for all candidates."""
        most = self.prepared.counts[-1]
        return tuple(value * candidates / most for value in self.seconds[most])

    def linearity(self) -> float | None:
        """Relative deviation of the larger count's time from proportionality."""
        if len(self.prepared.counts) == 1:
            return None
        fewer, more = self.prepared.counts
        expected = median(self.seconds[fewer]) * more / fewer
        return median(self.seconds[more]) / expected - 1


def bench_planner(
    scales: Sequence[str] = tuple(SCALES),
    variants: Sequence[str] = DEFAULT_VARIANTS,
    *,
    rounds: int = DEFAULT_ROUNDS,
    candidates: int | None = None,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> PlannerReport:
    """Measure one optimisation step of the planner.

    Args:
        scales: of "paper" and "compact".
        variants: names from `variants.VARIANTS`.
        rounds: each runs every variant once, in turn; medians are reported.
        candidates: of each episode, other than the scale's own.
        device: "auto" takes a GPU where there is one.
        progress: called with measurements done and in total.

    Raises:
        UsageError: an unknown name or a number below one.
        NonFiniteError: a model's costs are not finite.
    """
    _check_rounds(rounds)
    resolved, chosen = resolve_device(device), [variant_of(name) for name in variants]
    subjects = [subject_of(scale, candidates) for scale in scales]
    return measure(subjects, chosen, rounds=rounds, device=resolved, progress=progress)


def measure(
    subjects: Sequence[Subject],
    variants: Sequence[Variant],
    *,
    rounds: int,
    device: torch.device,
    progress: Progress | None = None,
) -> PlannerReport:
    """As `bench_planner`, of any models."""
    _check_rounds(rounds)
    if not subjects or not variants:
        raise UsageError("nothing to measure: give at least one scale and one variant")
    load = load_average()
    dtypes = {variant.dtype for variant in variants}
    rates, done = MatrixRates(device, dtypes), 0
    total = len(subjects) * len(variants) * (rounds + 1)

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    timings: list[list[_Timings]] = []
    attention: list[AttentionRow] = []
    for subject in subjects:
        own = []
        for variant in variants:
            own.append(_Timings(prepare(variant, subject, device)))
            advance()
        for _ in range(rounds):
            rates.measure()
            for one in own:
                one.run(device)
                advance()
        timings.append(own)
        chunk = next(
            (t.prepared.chunk for t in own if not t.variant.literal), own[0].prepared.chunk
        )
        config = subject.world_model.config
        attention += attention_rows(subject.scale, config, chunk, device, dtypes)
    rows = [
        _row(subject, one, own, rates)
        for subject, own in zip(subjects, timings, strict=True)
        for one in own
    ]
    return PlannerReport(describe_machine(device, rates, load), rows, attention)


def _row(
    subject: Subject, one: _Timings, others: Sequence[_Timings], rates: MatrixRates
) -> PlannerRow:
    episodes, candidates, horizon = subject.shape
    seconds = median(one.scaled(candidates))
    by_name = {other.variant.name: other for other in others}
    literal, twin = by_name.get(LITERAL), by_name.get(one.variant.twin or "")
    operations: Operations = one.prepared.operations()
    speed = operations.flops / seconds
    return PlannerRow(
        scale=subject.scale,
        variant=one.variant.name,
        dtype=dtype_name(one.variant.dtype),
        episodes=episodes,
        candidates=candidates,
        horizon=horizon,
        seconds=seconds,
        ratio=None if literal is None else median(literal.scaled(candidates)) / seconds,
        twin=one.variant.twin,
        twin_ratio=None if twin is None else seconds / median(twin.scaled(candidates)),
        measured_candidates=one.prepared.counts[-1],
        linearity=one.linearity(),
        chunk=one.prepared.chunk,
        linear_multiply_adds=operations.linears,
        attention_multiply_adds=operations.attention,
        flops_per_second=speed,
        share=speed / rates[one.variant.dtype],
        memory_mb=one.prepared.memory / 2**20,
        cost_error=None if literal is None else _relative_error(one.costs, literal.costs),
        rounds=one.scaled(candidates),
    )


def _relative_error(costs: Tensor, reference: Tensor) -> float:
    """‖costs − reference‖ / ‖reference‖ over the candidates that both have."""
    count = min(costs.shape[1], reference.shape[1])
    costs, reference = costs[:, :count], reference[:, :count]
    return float((costs - reference).norm() / reference.norm())


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, got {rounds}")
