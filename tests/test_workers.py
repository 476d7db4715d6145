"""Chunks in flight: order, memory, errors; and sizes in words."""

import threading

import pytest
import torch

from quantwm.compute import available_memory, parse_bytes, shown_bytes
from quantwm.errors import UsageError
from quantwm.planning import workers
from quantwm.planning.workers import AllocationMeter, Workers

CPU = torch.device("cpu")


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_keep_the_order_and_every_job_has_one_core(four_threads):
    def job(number):
        return number * number, torch.get_num_threads()

    assert Workers(CPU).map(job, range(20)) == [(n * n, 1) for n in range(20)]
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("budget", "expected"), [(None, 4), (10**9, 4), (2_500_000, 2), (1_100_000, 1)]
)
def test_as_many_jobs_run_together_as_the_budget_allows(four_threads, budget, expected):
    lock, running, most = threading.Lock(), 0, 0
    barrier = threading.Barrier(expected)

    def job(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        total = torch.ones(250_000).sum()
        if number:
            barrier.wait(timeout=20)
        with lock:
            running -= 1
        return total.item()

    pool = Workers(CPU, budget)
    assert pool.map(job, range(1 + 3 * expected)) == [250_000.0] * (1 + 3 * expected)
    assert pool.in_flight == most == expected


def test_the_default_budget_is_half_of_what_is_free(four_threads, monkeypatch):
    monkeypatch.setattr(workers, "available_memory", lambda device: 6_100_000)
    pool = Workers(CPU)
    pool.map(lambda _: torch.ones(250_000).sum(), range(2))
    assert pool.in_flight == 3
    monkeypatch.setattr(workers, "available_memory", lambda device: 10**6)
    with pytest.raises(UsageError, match="half of what is free is 500 kB"):
        Workers(CPU).map(lambda _: torch.ones(250_000).sum(), range(2))


def test_an_error_of_a_job_reaches_the_caller():
    def job(number):
        if number == 2:
            raise RuntimeError("job 2 broke")
        return number

    with pytest.raises(RuntimeError, match="job 2 broke"):
        Workers(CPU).map(job, range(5))
    assert Workers(CPU).map(job, range(2)) == [0, 1]
    assert Workers(CPU).map(job, []) == []


@pytest.mark.parametrize("inference", [False, True])
def test_the_meter_finds_the_peak(inference):
    with torch.inference_mode(inference), AllocationMeter() as meter:
        a = torch.empty(1000, dtype=torch.uint8)
        b = a.clone()
        view = b[:500]
        del a
        c = view.float()
        del c
        b.add_(1)
    assert meter.peak == 1000 + 500 * 4


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("500MB", 5 * 10**8), ("7", 7), (9, 9)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", 0, "-1", "2 TBs", "many", "GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="such as 2GB"):
        parse_bytes(text)


def test_sizes_are_shown_and_free_memory_is_plausible():
    assert [shown_bytes(n) for n in (12, 1234, 5_600_000, 7 * 10**9)] == [
        "12 bytes",
        "1.23 kB",
        "5.6 MB",
        "7 GB",
    ]
    assert 2**20 < available_memory(CPU) < 2**50
