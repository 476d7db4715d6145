"""The report's plots of one arm a line, and of one arm a panel."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from quantwm.report.arms import Arm
from quantwm.report.svg import (
    ACCENT,
    INK,
    MUTED,
    RULE,
    SURFACE,
    WARN,
    drawing,
    inline,
    panel,
    plain,
    quiet,
    shortened,
)
from quantwm.report.text import decimal, megabytes, plural, signed
from quantwm.statistics import wilson_interval

_WIDTH, _ROW, _TOP, _BOTTOM = 360.0, 23.0, 6.0, 38.0
_VALUE_COLUMN = 58.0
_GROUP_GAP = 0.6


def success_plot(arms: Sequence[Arm], name: str) -> str:
    """Success rate with its interval, one line an arm; float's rate as a dashed line."""
    with drawing():
        figure, axes, positions = _lines(arms)
        for arm, y in zip(arms, positions, strict=True):
            _interval(axes, arm, y, (arm.low, arm.success, arm.high))
            _value(axes, y, decimal(arm.success))
        for arm in arms:
            if arm.role == "float":
                axes.axvline(arm.success, color=MUTED, linewidth=1, dashes=(3, 3), zorder=0)
        _x_axis(axes, (0.0, 1.0), [0, 0.25, 0.5, 0.75, 1], "success rate, 95% interval")
        text = "; ".join(
            f"{arm.name} {decimal(arm.success)} ({decimal(arm.low)} to {decimal(arm.high)})"
            for arm in arms
        )
        return inline(figure, f"{name}-success", f"Success by arm. {text}.")


def difference_plot(arms: Sequence[Arm], name: str) -> str:
    """Paired difference against float with its interval, on the same lines as `success_plot`."""
    compared = [arm for arm in arms if arm.difference]
    with drawing():
        figure, axes, positions = _lines(arms)
        axes.axvline(0, color=MUTED, linewidth=1, dashes=(3, 3), zorder=0)
        ends = [0.1]
        for arm, y in zip(arms, positions, strict=True):
            if arm.difference:
                one = arm.difference
                _interval(axes, arm, y, (one.low, one.difference, one.high))
                ends += [abs(one.low), abs(one.high)]
            shown = signed(arm.difference.difference) if arm.difference else "–"
            _value(axes, y, "reference" if arm.role == "float" else shown)
        limit = 1.0 if max(ends) > 0.5 else 0.5
        ticks = [-limit, -limit / 2, 0, limit / 2, limit]
        _x_axis(axes, (-limit, limit), ticks, "success minus float, 95% interval", _signed_tick)
        text = "; ".join(
            f"{arm.name} {signed(arm.difference.difference)} "
            f"({signed(arm.difference.low)} to {signed(arm.difference.high)}, {arm.verdict})"
            for arm in compared
            if arm.difference
        )
        return inline(figure, f"{name}-difference", f"Difference against float. {text}.")


def bytes_plot(arms: Sequence[Arm], name: str) -> str:
    """Stored bytes, on the same lines as `success_plot`; arms without bytes are left empty."""
    with drawing():
        figure, axes, positions = _lines(arms)
        largest = max((arm.bytes for arm in arms if arm.bytes), default=1) / 1e6
        for arm, y in zip(arms, positions, strict=True):
            if arm.bytes is None:
                _value(axes, y, "–")
                continue
            colour = INK if arm.labels.kind == "float" else ACCENT
            axes.barh(y, arm.bytes / 1e6, height=0.5, color=colour)
            _value(axes, y, megabytes(arm.bytes))
        ticks = [t for t in MaxNLocator(3).tick_values(0, largest) if 0 <= t <= largest]
        _x_axis(axes, (0.0, largest), ticks, "stored model, MB", lambda x: f"{x:.3g}")
        shown = [f"{arm.name} {megabytes(arm.bytes)}" for arm in arms if arm.bytes is not None]
        return inline(figure, f"{name}-bytes", f"Bytes by arm. {'; '.join(shown)}.")


def iteration_plot(arm: Arm, reference: Arm | None, index: int, name: str) -> str:
    """Success rate against MPC iteration of one arm with its 95% band, and float's behind it.

    Args:
        arm: an arm with a curve.
        reference: the float arm, or None.
        index: which panel this is.
        name: of the section; keeps the ids of the SVGs apart.
    """
    iterations = range(len(arm.curve))
    episodes = len(arm.rows)
    bounds = [wilson_interval(round(rate * episodes), episodes) for rate in arm.curve]
    colour = _colour(arm)
    with drawing():
        figure, axes = panel(172, 130, left=26, right=34, top=10, bottom=24)
        lows, highs = [low for low, _ in bounds], [high for _, high in bounds]
        axes.fill_between(iterations, lows, highs, color=colour, alpha=0.16, linewidth=0)
        if reference and reference.curve and reference is not arm:
            behind = reference.curve
            axes.plot(range(len(behind)), behind, color=MUTED, linewidth=1, dashes=(1.5, 2))
        axes.plot(
            iterations,
            arm.curve,
            color=colour,
            linewidth=1.6,
            linestyle=(0, (4, 2)) if arm.role == "bound" else "-",
            marker="o" if len(arm.curve) <= 12 else "",
            markersize=3.2,
            clip_on=False,
        )
        last = len(arm.curve) - 1
        end = (last, arm.curve[-1])
        axes.annotate(decimal(end[1]), end, (7, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, max(last, 1))
        axes.set_ylim(0, 1)
        axes.set_xticks(sorted({0, last // 2, last}))
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.grid(axis="y", color=RULE, linewidth=1)
        axes.tick_params(axis="x", pad=7)
        values = ", ".join(decimal(rate) for rate in arm.curve)
        return inline(
            figure,
            f"{name}-iterations-{index}",
            f"Success of {arm.name} after 0 to {plural(last, 'MPC iteration')}: {values}.",
        )


def _lines(arms: Sequence[Arm]) -> tuple[Figure, Axes, list[float]]:
    """An empty plot with a line an arm, bounds set apart; returns the lines' positions too."""
    positions, at = [], 0.0
    for index, arm in enumerate(arms):
        follows = index > 0 and arm.role == "bound" and arms[index - 1].role != "bound"
        at += _GROUP_GAP if follows else 0.0
        positions.append(at)
        at += 1.0
    height = _TOP + at * _ROW + _BOTTOM
    names = [shortened(arm.name) for arm in arms]
    left = 18.0 + 6.4 * max([8, *(len(name) for name in names)])
    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    width = _WIDTH - left - _VALUE_COLUMN
    box = (left / _WIDTH, _BOTTOM / height, width / _WIDTH, at * _ROW / height)
    axes = figure.add_axes(box)
    axes.set_ylim(at - 0.5, -0.5)
    axes.set_yticks(positions, names)
    for label in axes.get_yticklabels():
        plain(label)
    quiet(axes)
    axes.grid(axis="x", color=RULE, linewidth=1)
    axes.tick_params(axis="y", labelcolor=INK, labelsize=11.5, pad=10)
    return figure, axes, positions


def _colour(arm: Arm) -> str:
    if arm.role == "quantized":
        return WARN if arm.verdict == "lower" else ACCENT
    return MUTED if arm.role == "bound" else INK


def _interval(axes: Axes, arm: Arm, y: float, shown: tuple[float, float, float]) -> None:
    """A marker in its interval (low, value, high): shape says the role, filling separability."""
    low, value, high = shown
    marker = {"bound": "D", "quantized": "o"}.get(arm.role, "s")
    separable = arm.verdict in ("lower", "higher")
    colour = _colour(arm)
    style = (0, (2, 2)) if arm.role == "bound" else "-"
    axes.plot([low, high], [y, y], color=colour, linewidth=1.8, linestyle=style, clip_on=False)
    axes.plot(
        [value],
        [y],
        marker=marker,
        markersize=6 if marker == "D" else 7,
        color=colour,
        markerfacecolor=colour if separable or arm.role == "float" else SURFACE,
        markeredgewidth=1.6,
        clip_on=False,
        zorder=3,
    )


def _value(axes: Axes, y: float, text: str) -> None:
    transform = axes.get_yaxis_transform()
    x = 1 + _VALUE_COLUMN / (axes.get_position().width * _WIDTH)
    label = axes.text(x, y, text, transform=transform, ha="right", va="center", fontsize=11.5)
    plain(label)


def _x_axis(
    axes: Axes,
    limits: tuple[float, float],
    ticks: Sequence[float],
    label: str,
    form: object = None,
) -> None:
    axes.set_xlim(*limits)
    write = form if callable(form) else lambda x: f"{x:g}"
    axes.set_xticks(ticks, [write(tick) for tick in ticks])
    axes.set_xlabel(label, fontsize=10.5, labelpad=5)


def _signed_tick(value: float) -> str:
    return f"{value:+g}".replace("-", "−") if value else "0"
