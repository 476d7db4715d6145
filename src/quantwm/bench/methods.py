"""What each post-training method does to a model's blocks, how long it takes and how much memory.

Every row is measured in a process of its own, so that its peak memory is its own.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from quantwm.bench.subjects import subject_of
from quantwm.calibration import Calibration
from quantwm.compute import peak_memory_mb
from quantwm.diagnostics.block_error import block_errors
from quantwm.errors import UsageError
from quantwm.loading import load
from quantwm.methods import get_method, quantize, transformed
from quantwm.methods.roles import BlockLearning
from quantwm.models.dino_wm import DINOWM
from quantwm.quant import QuantLinear, QuantPlan

Progress = Callable[[int, int], None]
PAPER = "paper"
_PAPER_EPISODES = 8
"""Episodes whose frames calibrate it: methods that hold a part out need some."""
PARTS = ("encoder", "predictor")
DEFAULT_METHODS = (
    "rtn",
    "omse",
    "percentile",
    "smoothquant",
    "awq",
    "gptq",
    "rotation",
    "omniquant",
)
DEFAULT_PLANS = ("w4", "w4g128", "w3", "w3g128", "w8a8", "w4a4", "w4a4-token")


@dataclass(frozen=True)
class MethodRow:
    """One method under one plan.

    Attributes:
        method, plan: as plans write them.
        refused: why the method does not apply to the plan; the other fields are None then.
        seconds: of quantizing the whole model.
        peak_mb: most memory of the process, the model and calibration data included, in MiB.
        encoder, predictor: root mean square over the part's blocks of the block output error on
            held-out calibration data; None where nothing was held out.
        encoder_weights, predictor_weights: ‖Ŵ - W‖ / ‖W‖ over the part's weights, W as the
            method's transforms left them; None for a method that learns transform and grid at
            once.
    """

    method: str
    plan: str
    refused: str | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    encoder: float | None = None
    predictor: float | None = None
    encoder_weights: float | None = None
    predictor_weights: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def bench_methods(
    source: str,
    calibration: Path | None = None,
    held_out: Path | None = None,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    plans: Sequence[str] = DEFAULT_PLANS,
    samples: int | None = None,
    progress: Progress | None = None,
) -> Iterator[MethodRow]:
    """Measure methods on a model, row by row: plan after plan, every method under each.

    What was asked for is checked at once, before the first row is.

    Args:
        source: as `load` takes it, or "paper": a model of DINO-WM's size whose predictor is
            random, with candidates that it considers first, for times and memory alone.
        calibration: file to quantize with; not for "paper".
        held_out: file of other episodes, to measure errors on.
        methods, plans: as plans write them.
        samples: candidate sequences of the calibration file to use; None takes all (paper: 32).
        progress: called with rows done and in total.

    Raises:
        UsageError: an unknown method, or files that are missing.
    """
    for method in methods:
        get_method(method)
    if source != PAPER and calibration is None:
        raise UsageError(
            "give a calibration file, such as 'quantwm calibrate wall --out calibration' writes"
        )
    jobs = [(method, plan) for plan in plans for method in methods]
    measure = partial(_measured, source, calibration, held_out, samples, torch.get_num_threads())
    return _rows(jobs, measure, progress)


def _rows(
    jobs: Sequence[tuple[str, str]],
    measure: Callable[[str, str], MethodRow],
    progress: Progress | None,
) -> Iterator[MethodRow]:
    for done, job in enumerate(jobs, start=1):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            row = pool.submit(measure, *job).result()
        if progress is not None:
            progress(done, len(jobs))
        yield row


def _measured(
    source: str,
    calibration_file: Path | None,
    held_out_file: Path | None,
    samples: int | None,
    threads: int,
    method: str,
    plan: str,
) -> MethodRow:
    torch.set_num_threads(threads)
    world_model, calibration = _subject(source, calibration_file, samples)
    quant_plan = QuantPlan.parse(plan, method)
    begin = time.perf_counter()
    try:
        small = quantize(world_model, quant_plan, calibration)
    except UsageError as error:
        return MethodRow(method, plan, refused=str(error).splitlines()[-1].strip(" -"))
    seconds = time.perf_counter() - begin
    peak = peak_memory_mb(torch.device("cpu"))
    if held_out_file is None:
        return MethodRow(method, plan, None, seconds, peak)
    twin = transformed(world_model, quant_plan, calibration)
    errors = block_errors(twin, small, Calibration.load(held_out_file))
    learns = any(isinstance(part, BlockLearning) for part in get_method(method).parts)
    weights = [None if learns else weight_error(twin, small, part) for part in PARTS]
    blocks = [errors.of(part) for part in PARTS]
    return MethodRow(method, plan, None, seconds, peak, *blocks, *weights)


def weight_error(reference: DINOWM, quantized: DINOWM, part: str) -> float | None:
    """‖Ŵ - W‖ / ‖W‖ over the quantized weights of a part; None where there is none."""
    error = norm = 0.0
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantLinear) and name.startswith(part):
            old = reference.get_submodule(name).get_parameter("weight").detach().double()
            error += float((layer.weight.detach().double() - old).square().sum())
            norm += float(old.square().sum())
    return (error / norm) ** 0.5 if norm > 0 else None


def _subject(
    source: str, calibration_file: Path | None, samples: int | None
) -> tuple[DINOWM, Calibration]:
    if source == PAPER:
        subject = subject_of(PAPER).resized(episodes=_PAPER_EPISODES)
        return subject.world_model, subject.calibration(samples or 32)
    assert calibration_file is not None
    calibration = Calibration.load(calibration_file)
    return load(source), calibration if samples is None else calibration.subset(samples)
