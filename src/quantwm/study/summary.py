"""The table of a study: one row an arm."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from quantwm.evaluation import Row
from quantwm.statistics import paired_difference, wilson_interval

COLUMNS = (
    "arm",
    "success",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "p_value",
    "episodes",
    "first_success_median",
    "bytes",
    "seconds",
    "plan_seconds",
    "cell",
    "note",
)
"""Columns of `summary.csv`. `low` and `high` are Wilson's 95% interval of the success rate;
the difference, its 95% interval and the exact McNemar p compare with the float arm on the same
episodes; `first_success_median` is in MPC iterations, over the episodes that succeeded;
`seconds` is what the arm's evaluation took, `plan_seconds` the mean planning time of an episode."""


def arm_summary(
    arm: str,
    rows: Sequence[Row],
    reference: Sequence[Row] | None,
    *,
    bytes: int | None,
    seconds: float,
    same_as: str | None = None,
) -> dict[str, Any]:
    """The summary row of one arm.

    Args:
        arm: its name.
        rows: one an episode.
        reference: the float arm's rows, paired by `episode_seed`; None if there is none, or for
            the float arm itself.
        bytes: stored size of the arm's model; None for an oracle.
        seconds: wall-clock time of the evaluation.
        same_as: an earlier arm with the same cell.
    """
    successes = [bool(row["success"]) for row in rows]
    low, high = wilson_interval(sum(successes), len(rows))
    firsts = [row["first_success"] for row in rows if row["first_success"] is not None]
    summary: dict[str, Any] = dict.fromkeys(COLUMNS)
    summary |= {
        "arm": arm,
        "success": sum(successes) / len(rows),
        "low": low,
        "high": high,
        "episodes": len(rows),
        "first_success_median": float(median(firsts)) if firsts else None,
        "bytes": bytes,
        "seconds": round(seconds, 3),
        "plan_seconds": mean_plan_seconds(rows),
        "cell": rows[0]["cell"],
        "note": _note(rows, same_as),
    }
    if reference is not None:
        paired = {row["episode_seed"]: bool(row["success"]) for row in reference}
        compared = paired_difference(successes, [paired[row["episode_seed"]] for row in rows])
        summary |= {
            "difference": compared.difference,
            "difference_low": compared.low,
            "difference_high": compared.high,
            "p_value": compared.p_value,
        }
    return summary


def mean_plan_seconds(rows: Sequence[Row]) -> float:
    """Planning time in seconds an episode, to the millisecond: the mean over at least one row."""
    return round(fmean(row["plan_seconds"] for row in rows), 3)


def _note(rows: Sequence[Row], same_as: str | None) -> str:
    notes = [f"same model as {same_as}"] if same_as else []
    broken = sorted(
        str(row["failure"]) for row in rows if str(row["failure"] or "").startswith("non_finite")
    )
    if broken:
        notes.append(f"{len(broken)} of {len(rows)} episodes {broken[0]}")
    return "; ".join(notes)
