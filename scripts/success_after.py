"""Success after each plan, as scripts print it."""

from collections.abc import Sequence

from quantwm.statistics import wilson_interval


def print_success(reached: Sequence[Sequence[bool]]) -> None:
    """A line a plan, of whether each episode is reached at its start and after each plan."""
    for number in range(1, max(map(len, reached))):
        won = sum(any(one[: number + 1]) for one in reached)
        low, high = wilson_interval(won, len(reached))
        print(f"after {number}: {won / len(reached):.2f} [{low:.2f}, {high:.2f}]")
