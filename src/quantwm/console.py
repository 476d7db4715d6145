"""How the command line talks: progress bars with time left, and errors with exit codes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quantwm.errors import QuantWMError, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2

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
    except KeyboardInterrupt:
        message = f"interrupted. {resume_hint}".strip()
        err.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_FAILED)
