"""The page's filter: which tasks, methods and widths there are to choose from."""

from collections.abc import Iterable, Mapping, Sequence

from quantwm.report.arms import Arm
from quantwm.report.text import escape


def filter_form(tasks: Mapping[str, str], arms: Iterable[Arm]) -> str:
    """The form that `filter.js` reads, hidden until that runs; "" with nothing to choose from.

    Args:
        tasks: a task's key → its title.
        arms: of all tasks; those that are references belong to no method and stay shown.
    """
    marked = [filter_data(arm) for arm in arms]
    methods = dict.fromkeys(data["method"] for data in marked if "method" in data)
    widths = sorted({data["width"] for data in marked if "width" in data}, key=width_order)
    choices: list[tuple[str, str, Sequence[tuple[str, str]]]] = [
        ("Task", "task", list(tasks.items())),
        ("Method", "method", [(method, method) for method in methods]),
        ("Width", "width", [(width, width) for width in widths]),
    ]
    fields = "".join(_field(*choice) for choice in choices if len(choice[2]) > 1)
    if not fields:
        return ""
    return (
        '<form id="filter" class="filter" hidden autocomplete="off"><details>'
        '<summary>Filter: <output aria-live="polite"></output></summary>'
        f'{fields}</details><button type="reset" hidden>Show all</button></form>'
    )


def filter_data(arm: Arm) -> dict[str, str]:
    """The `data-` attributes of what shows an arm; none for the references."""
    if arm.role != "quantized" or not arm.labels.method:
        return {}
    return {"method": arm.labels.method, "width": arm.labels.width}


def row_data(task: str, arm: Arm) -> dict[str, str]:
    """The `data-` attributes of a table's row of one arm of a task, which the filter counts.

    Args:
        task: its key.
        arm: the row's.
    """
    return filter_data(arm) | {"arm": f"{task} {arm.name}"}


def _field(title: str, name: str, options: Sequence[tuple[str, str]]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" name="{name}" value="{escape(value)}">'
        f"{escape(text)}</label>"
        for value, text in options
    )
    return f"<fieldset><legend>{title}</legend>{boxes}</fieldset>"


def width_order(width: str) -> tuple[int, int, str]:
    """Sorts: fewer bits later, weight-only before weight-activation, what has no width last."""
    if not width.startswith(("W", "A")):
        return (2, 0, width)
    bits = width.removeprefix("W").partition("A")[0] or width.removeprefix("A")
    return (int("A" in width), -int(bits) if bits.isdigit() else 0, width)
