"""The report's tables: one definition gives both the page's table and its CSV beside the page."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from quantwm.report.text import escape

FOLDER = "report-tables"
"""Where the CSV files lie, beside the page."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: its name in the CSV and in `Line.cells`.
        head: HTML of its heading; None keeps it out of the page.
        kind: CSS class of heading and cells.
        stored: whether the CSV has it.
    """

    key: str
    head: str | None = None
    kind: str = ""
    stored: bool = True


@dataclass(frozen=True)
class Cell:
    """What a table shows at one place, and the value behind it.

    Attributes:
        html: escaped by whoever makes it; "" for what only the CSV has.
        value: as the CSV has it; None is an empty field.
        kind: CSS class, beside the column's.
        share: 0 to 1, how strongly the cell is tinted; None for not at all.
    """

    html: str = ""
    value: Any = None
    kind: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Line:
    """One row.

    Attributes:
        cells: by the key of their column; what is missing is shown as absent.
        group: HTML of the heading above this and its neighbours of the same group.
        data: what the page's filter goes by: task, arm, method, width.
    """

    cells: Mapping[str, Cell]
    group: str = ""
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        name: of its CSV, without the ending; unique in the page.
        label: what a screen reader calls it.
        columns: the first one that is shown holds the rows' headings.
        lines: in the order shown.
        kind: CSS class.
    """

    name: str
    label: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    kind: str = "wide"

    def html(self, *, linked: bool = True) -> str:
        """The table in a frame that scrolls sideways, with the link to its CSV if `linked`."""
        shown = [column for column in self.columns if column.head is not None]
        heads = "".join(f'<th scope="col"{_class(c.kind)}>{c.head}</th>' for c in shown)
        bodies = []
        for group, lines in groupby(self.lines, key=lambda line: line.group):
            span = (
                f'<tr><th class="group" scope="rowgroup" colspan="{len(shown)}">{group}</th></tr>'
            )
            rows = "".join(_line(line, shown) for line in lines)
            bodies.append(f"<tbody data-group>{span if group else ''}{rows}</tbody>")
        table = (
            f"<table{_class(self.kind)}><thead><tr>{heads}</tr></thead>{''.join(bodies)}</table>"
        )
        path = escape(f"{FOLDER}/{self.name}.csv")
        link = f'<p class="csv"><a href="{path}" download>{path}</a></p>' if linked else ""
        return (
            f'<div class="table" data-group>'
            f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(self.label)}">'
            f"{table}</div>{link}</div>"
        )

    def csv(self) -> str:
        """The table as CSV with a head line."""
        stored = [column.key for column in self.columns if column.stored]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(stored)
        for line in self.lines:
            writer.writerow(line.cells[key].value if key in line.cells else None for key in stored)
        return buffer.getvalue()


def number(value: float | None, text: str, *, share: float | None = None) -> Cell:
    """A number with its exact value where the text rounds it; absent if None."""
    if value is None:
        return Cell()
    exact = text.isascii() and text.replace(".", "", 1).isdigit() and float(text) == value
    shown = text if exact else f'<data value="{value!r}">{text}</data>'
    return Cell(shown, value, share=share)


def words(text: str, kind: str = "") -> Cell:
    """Plain text."""
    return Cell(escape(text), text, kind)


def data_attributes(data: Mapping[str, str]) -> str:
    """HTML of the attributes that the filter goes by, with a space before each."""
    return "".join(f' data-{key}="{escape(value)}"' for key, value in data.items() if value)


def _line(line: Line, shown: Sequence[Column]) -> str:
    first, *rest = shown
    head = line.cells.get(first.key, Cell())
    title = f' title="{escape(str(head.value))}"' if head.value is not None else ""
    cells = [f'<th scope="row"{_class(first.kind)}{title}>{head.html}</th>']
    for column in rest:
        cell = line.cells.get(column.key, Cell())
        tint = "" if cell.share is None else f' style="--share: {cell.share:.2f}"'
        kind = _class(column.kind, cell.kind, "tinted" if tint else "")
        cells.append(f"<td{kind}{tint}>{cell.html or '–'}</td>")
    return f"<tr{data_attributes(line.data)}>{''.join(cells)}</tr>"


def _class(*kinds: str) -> str:
    named = " ".join(kind for kind in kinds if kind)
    return f' class="{named}"' if named else ""


def tables_in(parts: Iterable[object]) -> list[Table]:
    """The tables among the parts of a section."""
    return [part for part in parts if isinstance(part, Table)]
