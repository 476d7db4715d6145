"""Matrix rates and the comparison of attention kernels."""

import pytest
import torch

from bench_support import one_thread  # noqa: F401
from dino_wm_support import relative, tiny_model
from quantwm.bench import machine
from quantwm.bench.machine import AttentionRow, MatrixRates, attention_rows

CPU = torch.device("cpu")


def test_a_matrix_rate_is_the_median_of_the_rounds_best(monkeypatch):
    monkeypatch.setitem(machine._SIDE, "cpu", 8)
    seconds = iter([8, 4, 5, 6, 7, 9, 9, 9, 9, 2, 1, 3, 3, 3, 3])
    monkeypatch.setattr(machine, "timed", lambda device, multiply: (next(seconds), multiply()))
    rates = MatrixRates(CPU, {torch.float32})
    for _ in range(3):
        rates.measure()
    assert rates.to_dict() == {"float32": 2 * 8**3 / 2}


def test_attention_has_the_newest_frames_queries_and_the_windows_keys():
    config = tiny_model(num_hist=3, concat_dim=0).config
    rows = attention_rows("tiny", config, 7, CPU, {torch.float32, torch.bfloat16})
    assert [(row.dtype, row.rows, row.heads, row.queries, row.keys) for row in rows] == [
        (dtype, 7, 2, 6, keys) for dtype in ("float32", "bfloat16") for keys in (6, 12, 18)
    ]


@torch.inference_mode()
@pytest.mark.parametrize("kernel", machine._KERNELS, ids=["fused", "products", "blocked"])
def test_the_kernels_compared_are_all_attention(kernel):
    packed = torch.randn(5, 21, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    q = q[:, :, -7:]
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) / 8**0.5).softmax(-1)
    expected = torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2)
    assert relative(kernel(q, k, v), expected) < 1e-6


@pytest.mark.parametrize("fastest", ["fused", "products", "blocked"])
def test_the_fastest_kernel_takes_the_fewest_seconds(fastest):
    seconds = {"fused": 2.0, "products": 3.0, "blocked": 4.0} | {fastest: 1.0}
    row = AttentionRow("tiny", "float32", 7, 2, 6, 12, **seconds)
    assert row.to_dict()["fastest"] == fastest
