"""How the report writes numbers."""

from html import escape as escape  # noqa: PLC0414  every section escapes through this name


def decimal(value: float | None, digits: int = 2) -> str:
    """A plain number, or a dash for what is absent."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    """A difference with its sign; a zero has none."""
    text = f"{abs(value):.2f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def interval(low: float, high: float) -> str:
    """An interval of rates."""
    return _together(f"[{decimal(low)}, {decimal(high)}]")


def signed_interval(low: float, high: float) -> str:
    """An interval of differences."""
    return _together(f"[{signed(low)}, {signed(high)}]")


def _together(text: str) -> str:
    """Text that a line never breaks."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def megabytes(count: int | None) -> str:
    """Bytes in units of 10^6."""
    return "–" if count is None else f"{count / 1e6:.1f} MB"


def probability(value: float | None) -> str:
    """A p value to three digits."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listed(items: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
