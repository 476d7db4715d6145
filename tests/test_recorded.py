"""Rollouts that a GPU replays; and what happens where nothing can be recorded."""

import logging

import pytest
import torch

from quantwm.planning.recorded import Recorded


def score(latent, chunk):
    return (latent["visual"].sum() + chunk).square()


def test_what_cannot_be_recorded_is_called(caplog):
    with caplog.at_level(logging.WARNING):
        recorded = Recorded(score)
        for value in (1.0, 2.0):
            latent = {"visual": torch.full((2,), value)}
            assert recorded(latent, torch.ones(3)).tolist() == [(2 * value + 1) ** 2] * 3
    if not torch.cuda.is_available():
        assert len(caplog.records) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replay_reads_new_inputs_and_keeps_its_results():
    calls = []

    def counted(latent, chunk):
        calls.append(1)
        return score(latent, chunk)

    recorded = Recorded(counted)
    results, called = [], []
    for value in (1.0, 2.0, 3.0):
        latent = {"visual": torch.full((2,), value, device="cuda")}
        results.append(recorded(latent, torch.ones(3, device="cuda")))
        called.append(len(calls))
    assert [r.tolist() for r in results] == [[9.0] * 3, [25.0] * 3, [49.0] * 3]
    assert len(set(called)) == 1
