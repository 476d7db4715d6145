"""What the machine can do: matrix rates, and which attention kernel is the fastest on it."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantwm.bench.variants import timed
from quantwm.compute import dtype_name, peak_memory_mb
from quantwm.models.attention import blocked_attention
from quantwm.models.config import DINOWMConfig
from quantwm.planning.workers import Workers
from quantwm.study.environment import environment

_SIDE = {"cpu": 2048, "cuda": 8192}
_REPEATS = 5


class MatrixRates:
    """Floating-point operations a second of a large square product, gathered over rounds."""

    def __init__(self, device: torch.device, dtypes: set[torch.dtype]) -> None:
        self._device = device
        self.side = _SIDE["cuda" if device.type == "cuda" else "cpu"]
        self._operands = {
            dtype: torch.full((self.side, self.side), 0.5, dtype=dtype, device=device)
            for dtype in dtypes
        }
        self._seen: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}

    def measure(self) -> None:
        """One round: the best of a few products of each type, after one that is not counted."""
        for dtype, operand in self._operands.items():

            def multiply(operand: Tensor = operand) -> Tensor:
                return operand @ operand

            multiply()
            best = min(timed(self._device, multiply)[0] for _ in range(_REPEATS))
            self._seen[dtype].append(2 * self.side**3 / best)

    def __getitem__(self, dtype: torch.dtype) -> float:
        """The median of the rounds."""
        return median(self._seen[dtype])

    def to_dict(self) -> dict[str, float]:
        """Rates by type."""
        return {dtype_name(dtype): self[dtype] for dtype in self._operands}


def load_average() -> float | None:
    """Processes that ran or waited over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def describe_machine(
    device: torch.device, rates: MatrixRates, load: float | None = None
) -> dict[str, Any]:
    """Versions, processor, threads, matrix rates and this process's peak memory.

    Args:
        load: `load_average` before anything was measured.
    """
    return {
        **environment(device.type),
        "load_average_before": load,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "matrix_flops_per_second": rates.to_dict(),
        "matrix_side": rates.side,
        "process_peak_mb": peak_memory_mb(device),
    }


@dataclass(frozen=True)
class AttentionRow:
    """Seconds of one attention at a predictor's shape, by kernel; on a CPU, on one core.

    Attributes:
        scale: whose shape it is.
        dtype: of the operands.
        rows, heads, queries, keys: the shape.
        fused: `scaled_dot_product_attention`.
        products: two batched products and a softmax over all logits.
        blocked: the same in blocks that stay in the cache.
    """

    scale: str
    dtype: str
    rows: int
    heads: int
    queries: int
    keys: int
    fused: float
    products: float
    blocked: float

    @property
    def fastest(self) -> str:
        """The kernel that took the least."""
        return min(("fused", "products", "blocked"), key=lambda name: float(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "fastest": self.fastest}


def attention_rows(
    scale: str, config: DINOWMConfig, chunk: int, device: torch.device, dtypes: set[torch.dtype]
) -> list[AttentionRow]:
    """Compare the kernels on the newest frame's queries and the keys of 1 to `num_hist` frames.

    Args:
        scale: for the rows.
        config: of the model whose predictor it is.
        chunk: rows, as many as a rollout has at once.
        device: to measure on.
        dtypes: to measure.
    """
    workers = Workers(device, what="an attention")
    shapes = [
        (dtype, frames)
        for dtype in sorted(dtypes, key=str, reverse=True)
        for frames in range(1, config.num_hist + 1)
    ]

    @torch.inference_mode()
    def compare(shape: tuple[torch.dtype, int]) -> AttentionRow:
        dtype, frames = shape
        p, size = config.predictor, config.frame_tokens
        # Heads are strided as a linear's output leaves them.
        wide = torch.ones(chunk, frames * size, 3, p.heads, p.head_dim, dtype=dtype, device=device)
        q, k, v = wide.permute(2, 0, 3, 1, 4).unbind(0)
        q = q[:, :, -size:]
        seconds = [_median_seconds(device, kernel, q, k, v) for kernel in _KERNELS]
        fused, products, blocked = seconds
        return AttentionRow(
            scale,
            dtype_name(dtype),
            chunk,
            p.heads,
            size,
            frames * size,
            fused,
            products,
            blocked,
        )

    # The first job of a pool is watched, which slows it: it is not one that counts. Then one at a
    # time, because kernels side by side would compete for memory.
    workers.map(compare, shapes[:1])
    return [workers.map(compare, [shape])[0] for shape in shapes]


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.matmul(logits.softmax(-1), v).transpose(1, 2).flatten(2)


_KERNELS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    _fused,
    _products,
    blocked_attention,
)


def _median_seconds(
    device: torch.device,
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> float:
    def run() -> Tensor:
        return kernel(q, k, v)

    run()
    return median(timed(device, run)[0] for _ in range(_REPEATS))
