"""What the study found, in sentences that go no further than the intervals do."""

from collections.abc import Sequence

from quantwm.report.arms import Arm
from quantwm.report.arms import number as finite
from quantwm.report.load import TaskReport
from quantwm.report.text import (
    decimal,
    escape,
    interval,
    listed,
    megabytes,
    plural,
    signed,
    signed_interval,
)

_MOST_NAMED = 8


def study_lead(tasks: Sequence[TaskReport]) -> str:
    """One sentence on what was studied."""
    arms = [arm for task in tasks for arm in task.arms]
    counts = sorted({arm.episodes for arm in arms})
    each = (
        plural(counts[0], "episode")
        if len(counts) == 1
        else f"{counts[0]} to {counts[-1]} episodes"
    )
    most = max(len(arm.curve) for arm in arms) - 1
    bounds = sum(arm.role == "bound" for arm in arms)
    beside = f"; {plural(bounds, 'reference arm')} beside them" if bounds else ""
    same = "the same " if len(arms) > 1 and len(counts) == 1 and len(tasks) == 1 else ""
    places = listed([escape(task.title) for task in tasks])
    models = "a world model" if len(tasks) == 1 else "world models"
    return (
        f"Closed-loop planning in {places} with {models} at different bit widths: "
        f"{plural(len(arms) - bounds, 'arm')} on {same}{each} of at most "
        f"{plural(most, 'MPC iteration')}{beside}."
    )


def headline(task: TaskReport) -> str:
    """A list: the float arm, what is separable from it and what is not."""
    return f"<ul>{''.join(f'<li>{sentence}</li>' for sentence in _sentences(task))}</ul>"


def _sentences(task: TaskReport) -> list[str]:
    arms = task.arms
    sentences = [_float_sentence(task.reference, finite(task.config.get("gate")))]
    quantized = [arm for arm in arms if arm.role == "quantized"]
    for verdict in ("lower", "higher"):
        found = [arm for arm in quantized if arm.verdict == verdict]
        if found:
            sentences.append(f"<b>Separably {verdict} than float:</b> {_listed(found, quantized)}.")
    open_arms = [arm for arm in quantized if arm.verdict == "not separable"]
    if open_arms:
        sentences.append(_not_separable(open_arms, quantized))
        sentences.extend(_smallest(arms, open_arms))
    missing = [arm for arm in quantized if arm.verdict == "not compared"]
    if missing:
        shown = [
            f"{_name(arm)} {decimal(arm.success)} {interval(arm.low, arm.high)}" for arm in missing
        ]
        sentences.append(f"<b>Not compared with float:</b> {_some(shown)}.")
    finished = {arm.name for arm in arms}
    lacking = [name for name in task.planned if name not in finished]
    unfinished = [f'<span class="arm">{escape(name)}</span>' for name in lacking]
    if unfinished:
        sentences.append(f"<b>Not run:</b> {_some(unfinished)}.")
    return sentences


def _float_sentence(reference: Arm | None, gate: float | None) -> str:
    if reference is None:
        return "The study has no float arm, so it reports no differences."
    below = ""
    if gate is not None and reference.success < gate:
        below = (
            f" That is below the study's gate of {decimal(gate)}: a model that fails in float "
            "says nothing about quantization."
        )
    return (
        f"<b>{_name(reference)}</b> reaches the goal in {reference.successes} of "
        f"{plural(reference.episodes, 'episode')}: {decimal(reference.success)} "
        f"{interval(reference.low, reference.high)}.{below}"
    )


def _not_separable(arms: Sequence[Arm], quantized: Sequence[Arm]) -> str:
    differences = [(arm.difference.low, arm) for arm in arms if arm.difference]
    low, widest = min(differences, key=lambda pair: pair[0])
    caution = "That is not evidence of equality"
    if low < 0:
        allowed = f"{decimal(-low)} ({_name(widest)})" if len(arms) > 1 else decimal(-low)
        caution += f": losses of up to {allowed} fit these episodes too"
    return f"<b>Not separable from float:</b> {_listed(arms, quantized)}. {caution}."


def _smallest(arms: Sequence[Arm], candidates: Sequence[Arm]) -> list[str]:
    stored = min((arm.bytes for arm in candidates if arm.bytes), default=None)
    if stored is None:
        return []
    smallest = [_name(arm) for arm in candidates if arm.bytes == stored]
    reference = next((arm.bytes for arm in arms if arm.role == "float"), None)
    against = ""
    if reference:
        against = f" against {megabytes(reference)} ({reference / stored:.1f} times smaller)"
    verb = "is" if len(smallest) == 1 else "are"
    return [f"The smallest of these {verb} {_some(smallest)}, at {megabytes(stored)}{against}."]


def _listed(arms: Sequence[Arm], quantized: Sequence[Arm]) -> str:
    """All of a few arms, with their differences; the extremes of many."""
    compared = [(arm.difference.difference, arm) for arm in arms if arm.difference]
    if len(compared) <= _MOST_NAMED:
        return listed([_against(arm) for _, arm in compared])
    least = min(compared, key=lambda pair: pair[0])[1]
    most = max(compared, key=lambda pair: pair[0])[1]
    count = f"{len(compared)} of {len(quantized)} quantized arms"
    return f"{count}, from {_against(least)} to {_against(most)}"


def _against(arm: Arm) -> str:
    if arm.difference is None:
        return _name(arm)
    one = arm.difference
    return f"{_name(arm)} {signed(one.difference)} {signed_interval(one.low, one.high)}"


def _some(texts: Sequence[str]) -> str:
    """All of a few texts; the first of many, and how many more there are."""
    if len(texts) > _MOST_NAMED:
        return listed([*texts[: _MOST_NAMED - 1], f"{len(texts) - _MOST_NAMED + 1} more"])
    return listed(list(texts))


def _name(arm: Arm) -> str:
    return f'<span class="arm">{escape(arm.name)}</span>'
