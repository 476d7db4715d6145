"""Plots of several series in one panel: curves with direct labels, and points.

A method looks the same wherever it appears: colour, marker and dashes together tell it apart, so
that no reader depends on colour alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from quantwm.report.svg import (
    INK,
    MUTED,
    RULE,
    SERIES,
    SURFACE,
    drawing,
    inline,
    marked,
    panel,
    plain,
    shortened,
)
from quantwm.report.text import decimal

MOST_SERIES = 9
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5))
_LABEL_GAP = 12.5
_LEFT, _TOP, _BOTTOM = 34.0, 10.0, 38.0


class Style(NamedTuple):
    """How a series is drawn; `dashes` as matplotlib takes them, () for a solid line."""

    colour: str
    marker: str
    dashes: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: written at its end.
        values: at x = 0, 1, ...; NaN leaves a gap.
        style: how it is drawn.
        data: what the page's filter goes by.
    """

    label: str
    values: Sequence[float]
    style: Style
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One point of a scatter plot; `label` "" leaves it without one."""

    x: float
    y: float
    label: str
    style: Style
    data: Mapping[str, str] = field(default_factory=dict)


REFERENCE = Style(INK, "s", (1.5, 2))
BOUND = Style(MUTED, "D", (4, 2))


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    """A style for each name, in the order of the names; no two of the first 18 look alike."""
    return {
        name: Style(
            SERIES[index % len(SERIES)],
            _MARKERS[index % len(_MARKERS)],
            _DASHES[index // len(SERIES) % len(_DASHES)],
        )
        for index, name in enumerate(dict.fromkeys(names))
    }


def curve_plot(
    series: Sequence[Series],
    name: str,
    description: str,
    *,
    x_label: str = "MPC iteration",
    first: int = 0,
    rate: bool = True,
) -> str:
    """Curves with their names at their ends.

    Args:
        series: at most about `MOST_SERIES`.
        name: keeps the ids of the page's SVGs apart.
        description: the plot in words.
        x_label: what x counts.
        first: x of the first value.
        rate: y is a rate, 0 to 1; else it is positive and logarithmic.
    """
    width, height, right = 372.0, 222.0, 132.0
    with drawing():
        figure, axes = panel(width, height, left=_LEFT, right=right, top=_TOP, bottom=_BOTTOM)
        last = max(len(one.values) for one in series) - 1
        axes.set_xlim(first, first + max(last, 1))
        _x_ticks(axes, first, first + last, x_label)
        _y_axis(axes, [value for one in series for value in one.values], rate)
        ends = []
        for one in series:
            ends.append(_curve(axes, one, first, last))
        _end_labels(axes, ends, series, (width - _LEFT - right, height - _TOP - _BOTTOM))
        return inline(figure, name, description)


def scatter_plot(
    points: Sequence[Point],
    name: str,
    description: str,
    *,
    labels: tuple[str, str],
    legend: Mapping[str, Style],
    log_x: bool = False,
) -> str:
    """Points with success, 0 to 1, on the y axis, and a legend of the styles at the right.

    Args:
        points: finite.
        name: keeps the ids of the page's SVGs apart.
        description: the plot in words.
        labels: of the axes.
        legend: name → style.
        log_x: whether x is logarithmic.
    """
    width, height, right = 440.0, 290.0, 106.0
    with drawing():
        figure, axes = panel(width, height, left=42, right=right, top=_TOP, bottom=_BOTTOM)
        if log_x:
            axes.set_xscale("log")
            values = [one.x for one in points]
            _log_ticks(axes, [min(values) / 1.5, *values], "x")  # room for names at the left
        else:
            low, high = min(0.0, *(one.x for one in points)), max(one.x for one in points)
            axes.set_xlim(low, high + 0.04 * (high - low))
            ticks = [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
            axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        axes.grid(color=RULE, linewidth=1)
        axes.set_xlabel(labels[0], labelpad=5)
        axes.set_ylabel(labels[1], labelpad=3)
        for one in points:
            _mark(axes, one.x, one.y, one.style, one.data)
        size = (width - 42 - right, height - _TOP - _BOTTOM)
        _point_labels(axes, [one for one in points if one.label], size)
        _legend(axes, legend, size)
        return inline(figure, name, description)


def agreement_plot(
    x: Sequence[float], y: Sequence[float], name: str, description: str, labels: tuple[str, str]
) -> str:
    """Points of two measures of the same things in the same units, with the line of equality."""
    with drawing():
        figure, axes = panel(232, 214, left=42, right=12, top=8, bottom=_BOTTOM)
        for axis, values in (("x", x), ("y", y)):
            getattr(axes, f"set_{axis}scale")("log")
            _log_ticks(axes, values, axis)
        low, high = min(*x, *y), max(*x, *y)
        axes.plot([low, high], [low, high], color=MUTED, linewidth=1, dashes=(3, 3), zorder=0)
        axes.plot(x, y, "o", color=SERIES[0], alpha=0.45, markersize=3, markeredgewidth=0)
        axes.set_xlabel(labels[0], labelpad=5)
        axes.set_ylabel(labels[1], labelpad=3)
        axes.grid(color=RULE, linewidth=1)
        return inline(figure, name, description)


def _point_labels(axes: Axes, points: Sequence[Point], size: tuple[float, float]) -> None:
    """Names beside their points, moved apart where they would touch."""
    width, height = size
    span = 1.06  # of the y axis, which reaches a little beyond 0 and 1
    places = [(one.y + 0.03) / span * height for one in points]
    for one, before, after in zip(points, places, spread(places, 12.0, height), strict=True):
        # Points that are named tend to have others at their right and none at their left.
        across = axes.transAxes.inverted().transform(axes.transData.transform((one.x, one.y)))[0]
        text = shortened(one.label, 24)
        side = -1 if across * width > 8 + 5.6 * len(text) else 1
        label = axes.annotate(
            text,
            (one.x, one.y),
            (8 * side, after - before),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            va="center",
            fontsize=9.5,
            gid=marked(one.data),
        )
        plain(label)


def _legend(axes: Axes, legend: Mapping[str, Style], size: tuple[float, float]) -> None:
    """Names of the styles at the right of the axes."""
    width, height = size
    for row, (text, style) in enumerate(legend.items()):
        x, y = 1 + 14 / width, 1 - (row + 0.5) * 16 / height
        axes.plot([x], [y], transform=axes.transAxes, clip_on=False, **_look(style))
        label = axes.text(x + 9 / width, y, shortened(text, 14), transform=axes.transAxes)
        label.set_verticalalignment("center")
        plain(label)


def _curve(axes: Axes, one: Series, first: int, last: int) -> tuple[float, float]:
    """Draw a curve; returns where it ends."""
    places = [(first + k, v) for k, v in enumerate(one.values) if math.isfinite(v)]
    if not places:
        return (first, math.nan)
    xs, ys = zip(*places, strict=True)
    every = max(1, last // 10)
    look = _look(one.style) | {"linestyle": "-", "linewidth": 1.6, "markevery": every}
    (line,) = axes.plot(xs, ys, clip_on=False, gid=marked(one.data), **look)
    if one.style.dashes:
        line.set_dashes(one.style.dashes)
    return places[-1]


def _end_labels(
    axes: Axes,
    ends: Sequence[tuple[float, float]],
    series: Sequence[Series],
    size: tuple[float, float],
) -> None:
    """Names beside the ends, moved apart where they would touch, with a thin line to each."""
    width, height = size
    shown = [index for index, end in enumerate(ends) if math.isfinite(end[1])]
    at = [axes.transAxes.inverted().transform(axes.transData.transform(ends[i])) for i in shown]
    heights = spread([float(y) * height for _, y in at], _LABEL_GAP, height + 6)
    for index, (x, y), label_y in zip(shown, at, heights, strict=True):
        one, value = series[index], ends[index][1]
        gid, colour = marked(one.data), one.style.colour
        bend, text_x = 1 + 15 / width, 1 + 19 / width
        axes.plot(
            [x, bend],
            [y, label_y / height],
            transform=axes.transAxes,
            clip_on=False,
            color=colour,
            linewidth=0.8,
            gid=gid,
        )
        text = f"{shortened(one.label, 17)} {decimal(value)}"
        place = (text_x, label_y / height)
        plain(axes.text(*place, text, transform=axes.transAxes, va="center", fontsize=10, gid=gid))


def spread(places: Sequence[float], gap: float, most: float) -> list[float]:
    """Places moved as little as simple sweeps can so that neighbours are `gap` apart.

    Args:
        places: in any order.
        gap: least distance between two.
        most: the largest place; the least is 0, beyond which they only go where all are full.
    """
    order = sorted(range(len(places)), key=lambda i: (-places[i], i))
    moved = [0.0] * len(places)
    above = most + gap
    for index in order:
        above = min(places[index], above - gap)
        moved[index] = above
    # Those pushed below the floor push the ones above them back up.
    below = -gap
    for index in reversed(order):
        if moved[index] >= below + gap:
            break
        below += gap
        moved[index] = below
    return moved


def _look(style: Style) -> dict[str, Any]:
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": 5.2,
        "markerfacecolor": style.colour if not style.dashes else SURFACE,
        "markeredgewidth": 1.3,
        "linestyle": "",
    }


def _mark(axes: Axes, x: float, y: float, style: Style, data: Mapping[str, str]) -> None:
    axes.plot([x], [y], clip_on=False, zorder=3, gid=marked(data), **_look(style))


def _x_ticks(axes: Axes, first: int, last: int, label: str) -> None:
    step = next((step for step in (1, 2, 5, 10, 20) if (last - first) / step <= 8), 50)
    axes.set_xticks(sorted({*range(first, last + 1, step), last}))
    axes.set_xlabel(label, labelpad=4)
    axes.tick_params(axis="x", pad=6)


def _y_axis(axes: Axes, values: Sequence[float], rate: bool) -> None:
    if rate:
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    else:
        axes.set_yscale("log")
        _log_ticks(axes, [value for value in values if math.isfinite(value)], "y")
    axes.grid(axis="y", color=RULE, linewidth=1)


def _log_ticks(axes: Axes, values: Sequence[float], axis: str) -> None:
    """Limits just around the values, and ticks at 1, 2 or 5 times a power of ten within them."""
    low, high = min(values) / 1.15, max(values) * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    within = [tick for tick in ticks if low <= tick <= high]
    if len(within) > 5:
        within = [tick for tick in within if f"{tick:e}".startswith("1.0")] or within[::3]
    getattr(axes, f"set_{axis}lim")(low, high)
    which = getattr(axes, f"{axis}axis")
    which.set_minor_locator(NullLocator())
    which.set_minor_formatter(NullFormatter())
    getattr(axes, f"set_{axis}ticks")(within, [f"{tick:g}" for tick in within])
