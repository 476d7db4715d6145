"""What the study found, in sentences that go no further than the intervals do."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantwm.report.arms import Arm, kinds_of, number
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


def lead(arms: Sequence[Arm], task: str) -> str:
    """One sentence on what was studied."""
    counts = sorted({arm.episodes for arm in arms})
    each = (
        plural(counts[0], "episode")
        if len(counts) == 1
        else f"{counts[0]} to {counts[-1]} episodes"
    )
    most = max((len(arm.curve) for arm in arms), default=0) - 1
    length = f" of at most {plural(most, 'MPC iteration')}" if most >= 0 else ""
    oracles = sum(arm.role == "oracle" for arm in arms)
    models = plural(len(arms) - oracles, "arm")
    beside = f"; {plural(oracles, 'oracle arm')} for reference" if oracles else ""
    same = "the same " if len(arms) > 1 and len(counts) == 1 else ""
    return (
        f"Closed-loop planning in {escape(task)} with a world model at different bit widths: "
        f"{models} on {same}{each}{length}{beside}."
    )


def findings(arms: Sequence[Arm], config: Mapping[str, Any]) -> list[str]:
    """HTML sentences: the float arm, what is separable from it and what is not."""
    sentences = [_float_sentence(arms, number(config.get("gate")))]
    quantized = [arm for arm in arms if arm.role == "quantized"]
    for verdict in ("lower", "higher"):
        found = [arm for arm in quantized if arm.verdict == verdict]
        if found:
            sentences.append(f"<b>Separably {verdict} than float:</b> {_listed(found)}.")
    open_arms = [arm for arm in quantized if arm.verdict == "not separable"]
    if open_arms:
        sentences.append(_not_separable(open_arms))
        sentences.extend(_smallest(arms, open_arms))
    missing = [arm for arm in quantized if arm.verdict == "not compared"]
    if missing:
        names = ", ".join(
            f"{_name(arm)} {decimal(arm.success)} {interval(arm.low, arm.high)}" for arm in missing
        )
        sentences.append(f"<b>Not compared with float:</b> {names}.")
    finished = {arm.name for arm in arms}
    unfinished = [escape(name) for name in kinds_of(config) if name not in finished]
    if unfinished:
        sentences.append(f"<b>Not run:</b> {', '.join(unfinished)}.")
    return sentences


def _float_sentence(arms: Sequence[Arm], gate: float | None) -> str:
    reference = next((arm for arm in arms if arm.role == "float"), None)
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


def _not_separable(arms: Sequence[Arm]) -> str:
    differences = [(arm.difference.low, arm) for arm in arms if arm.difference]
    low, widest = min(differences, key=lambda pair: pair[0])
    caution = "That is not evidence of equality"
    if low < 0:
        allowed = f"{decimal(-low)} ({_name(widest)})" if len(arms) > 1 else decimal(-low)
        caution += f": losses of up to {allowed} fit these episodes too"
    return f"<b>Not separable from float:</b> {_listed(arms)}. {caution}."


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
    return [f"The smallest of these {verb} {listed(smallest)}, at {megabytes(stored)}{against}."]


def _listed(arms: Sequence[Arm]) -> str:
    return listed(
        [
            f"{_name(arm)} {signed(arm.difference.difference)} "
            f"{signed_interval(arm.difference.low, arm.difference.high)}"
            for arm in arms
            if arm.difference
        ]
    )


def _name(arm: Arm) -> str:
    return f'<span class="arm">{escape(arm.name)}</span>'
