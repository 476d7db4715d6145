"""Oracles' simulations, shared among processes or not."""

import multiprocessing

import numpy as np
import pytest

from quantwm.envs import Wall, get_task
from quantwm.planning import simulators
from quantwm.planning.simulators import Simulators


def candidates(task, count):
    episodes = task.episodes(range(2)).select(np.arange(count) % 2)
    actions = np.random.default_rng(0).normal(size=(count, 10, 2))
    return episodes.start, episodes.layout, actions


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wall", "pusht"])
def test_other_processes_simulate_the_same_states_in_order(name, monkeypatch):
    monkeypatch.setattr(simulators, "_WORTH", 0.0)
    task = get_task(name)
    shared = Simulators(task, 2)
    arguments = candidates(task, 21)
    here = shared.final_states(*arguments)
    assert shared._pool is None
    there = shared.final_states(*arguments)
    assert shared._pool is not None
    np.testing.assert_array_equal(there, here)
    np.testing.assert_array_equal(here, task.rollout(*arguments)[:, -1])


def test_a_fast_simulator_stays_in_this_process():
    task = Wall()
    alone = Simulators(task, 2)
    for _ in range(3):
        alone.final_states(*candidates(task, 4))
    assert alone._pool is None


def in_a_daemon(queue):
    simulators._WORTH = 0.0
    task = Wall()
    alone = Simulators(task, 2)
    states = [alone.final_states(*candidates(task, 4)) for _ in range(2)]
    queue.put((alone._pool is None, states[1]))


@pytest.mark.slow
def test_a_daemon_which_may_have_no_children_simulates_by_itself():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_a_daemon, args=(queue,), daemon=True)
    process.start()
    alone, states = queue.get(timeout=60)
    process.join()
    assert alone
    np.testing.assert_array_equal(states, Wall().rollout(*candidates(Wall(), 4))[:, -1])
