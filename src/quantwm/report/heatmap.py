"""The heat map of layer sensitivity."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.patches import Rectangle

from quantwm.report.svg import ACCENT, INK, MUTED, SURFACE, drawing, inline, panel, plain, shortened

_CELL = (40.0, 26.0)
_STRONGEST = 0.92


def sensitivity_map(
    layers: Sequence[Mapping[str, Any]], bounds: tuple[float, float], name: str, description: str
) -> str:
    """Blocks from left to right, the layers of a block from top to bottom, darker for more error.

    Args:
        layers: of one part of the model, in forward order: `layer`, `block`, `error`.
        bounds: least and largest error of all parts, which the shades span logarithmically.
        name: keeps the ids of the page's SVGs apart.
        description: the plot in words.
    """
    blocks = list(dict.fromkeys(str(one["block"]) for one in layers))
    kinds = list(dict.fromkeys(_kind(one) for one in layers))
    left, top = 18 + 6.4 * max(len(shortened(kind)) for kind in kinds), 6.0
    width, height = left + _CELL[0] * len(blocks) + 8, top + _CELL[1] * len(kinds) + 36
    with drawing():
        figure, axes = panel(width, height, left=left, right=8, top=top, bottom=36)
        axes.set_xlim(0, len(blocks))
        axes.set_ylim(len(kinds), 0)
        for one in layers:
            error = float(one["error"])
            x, y = blocks.index(str(one["block"])), kinds.index(_kind(one))
            strength = _strength(error, bounds)
            size = (0.96, 0.94)
            place = (x + 0.02, y + 0.03)
            axes.add_patch(Rectangle(place, *size, color=ACCENT, alpha=strength, linewidth=0))
            axes.text(
                x + 0.5,
                y + 0.5,
                _brief(error),
                ha="center",
                va="center",
                fontsize=10,
                color=SURFACE if strength > 0.55 else INK,
            )
        axes.set_xticks([x + 0.5 for x in range(len(blocks))], [_number(block) for block in blocks])
        axes.set_yticks([y + 0.5 for y in range(len(kinds))], [shortened(kind) for kind in kinds])
        for label in axes.get_yticklabels():
            plain(label)
        axes.tick_params(axis="y", labelcolor=INK, pad=8)
        axes.set_xlabel("block", labelpad=4, color=MUTED)
        return inline(figure, name, description)


def _kind(layer: Mapping[str, Any]) -> str:
    """A layer's name within its block."""
    return str(layer["layer"]).removeprefix(str(layer["block"])).strip(".") or str(layer["layer"])


def _number(block: str) -> str:
    last = block.rpartition(".")[2]
    return last if len(last) <= 5 else shortened(last, 5)


def _brief(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    if value >= 0.1:
        return f"{value:.2f}" if value < 10 else f"{value:.3g}"
    return f"{value:#.2g}".replace("e-0", "e-").lstrip("0")


def _strength(value: float, bounds: tuple[float, float]) -> float:
    """Opacity of a cell: what is not finite is the strongest."""
    low, high = bounds
    if not math.isfinite(value) or high <= low:
        return _STRONGEST
    if value <= low:
        return 0.06
    return 0.06 + (_STRONGEST - 0.06) * math.log(value / low) / math.log(high / low)
