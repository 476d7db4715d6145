"""Synthetic results: rows with chosen successes under an arm's short form."""

from quantwm.study.arms import Arm
from quantwm.study.labels import labels_of
from quantwm.study.results import TaskResults

N = 100


def row(arm, episode, success, *, iterations=2, cost=1.0, falls=True, success_at=None):
    """An episode that is planned `iterations` times, or until it succeeds in the last of them."""
    reached = [False] * iterations + [success]
    if success_at is not None:
        reached = [number >= success_at for number in range(iterations + 1)]
    planned = reached.index(True) if True in reached else iterations
    last = 0.5 if falls else 1.5
    return {
        "arm": arm,
        "episode": episode,
        "episode_seed": 1000 + episode,
        "success": reached[-1],
        "success_by_iteration": reached,
        "cost_by_iteration": [cost] * planned,
        "distance_by_iteration": [5.0] + [0.1 if ok else 4.0 for ok in reached[1 : planned + 1]],
        "cost_by_step": [[2 * cost, cost, 2 * cost * last]] * planned,
    }


def rows(arm, successes, n=N, **settings):
    """`successes` is a count, of the first episodes, or one boolean an episode."""
    if isinstance(successes, int):
        successes = [episode < successes for episode in range(n)]
    return [row(arm, i, bool(ok), **settings) for i, ok in enumerate(successes)]


def results(arms, task="wall", n=N, falls=True):
    """Results of one task from successes by short form; `name=form` calls an arm otherwise."""
    parsed = {form: Arm.parse(form) for form in arms}
    return TaskResults(
        task,
        {arm.name: labels_of(arm) for arm in parsed.values()},
        {arm.name: rows(arm.name, arms[form], n, falls=falls) for form, arm in parsed.items()},
        next((arm.name for arm in parsed.values() if arm.kind == "float"), None),
    )
