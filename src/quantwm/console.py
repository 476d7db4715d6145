"""How the command line talks: progress bars with time left, tables, and errors with exit codes."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from quantwm.errors import QuantWMError, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2
_UNBOUNDED = 10_000
"""Columns: more than any table needs."""

out = Console()
"""What a command was asked for."""
err = Console(stderr=True)
"""Everything else: progress, notices, errors."""


@contextmanager
def bars() -> Iterator[Progress]:
    """A progress display on standard error; silent where that is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield progress


def counter(progress: Progress, description: str) -> Callable[[int, int], None]:
    """A bar as the (done, total) callback that the library's functions take."""
    task = progress.add_task(description, total=None, note="")

    def update(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    return update


@contextmanager
def exit_codes(resume_hint: str = "") -> Iterator[None]:
    """Turn quantwm's errors and Ctrl-C into a message and an exit code.

    Exit 2 for bad usage, 1 for everything else that failed; an unexpected error keeps its
    traceback.

    Args:
        resume_hint: what to tell somebody who pressed Ctrl-C.
    """
    try:
        yield
    except UsageError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_USAGE)
    except QuantWMError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or f"interrupted. {resume_hint}".strip()
        err.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_FAILED)


def columns(*headers: Column | str) -> Table:
    """A table without lines."""
    return Table(*headers, box=None, pad_edge=False, collapse_padding=True)


def right(header: str) -> Column:
    """A column of numbers."""
    return Column(header, justify="right")


def print_whole(table: Table) -> None:
    """As wide as its content, because a name that is cut says nothing: where the console is
    narrower, it wraps the lines."""
    unbounded = out.options.update(width=_UNBOUNDED)
    table.width = out.measure(table, options=unbounded).maximum
    out.print(table, crop=False)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Nested facts, one a line."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in _flat(facts):
        table.add_row(Text(key, style="bold"), Text(str(value), overflow="fold"))
    out.print(table)


def print_json(value: Any) -> None:
    """JSON on standard output, nothing else."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
