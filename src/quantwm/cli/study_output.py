"""What a study prints: progress, arms as they finish, what is planned and how far it is."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.progress import Progress, TaskID
from rich.text import Text

from quantwm.console import columns, out, print_whole, right

if TYPE_CHECKING:
    from quantwm.study.dry_run import CellPlan
    from quantwm.study.status import StudyStatus


class StudyBar:
    """A study's progress: one bar a stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def start(self, label: str, index: int, count: int) -> None:
        """A stage begins."""
        place = f"{label} ({index} of {count})" if index else label
        self._task = self._progress.add_task(place, total=None, note="")

    def update(self, done: int, total: int) -> None:
        """Episode-iterations done, of how many."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def finish(self) -> None:
        """The stage is over."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


class ArmLines:
    """Prints a study's table line by line, as arms finish."""

    _WIDTHS = (18, 22, 26, 9, 9)

    def __init__(self) -> None:
        self._headed = False

    def __call__(self, arm: Mapping[str, Any]) -> None:
        """One arm's summary row."""
        if not self._headed:
            self._line("arm", "success", "against float", "MB", "seconds")
            self._headed = True
        success = f"{arm['success']:.2f} [{arm['low']:.2f}, {arm['high']:.2f}]"
        difference = ""
        if arm["difference"] is not None:
            parts = [arm["difference"], arm["difference_low"], arm["difference_high"]]
            shown = [f"{part:+.2f}" for part in parts]
            difference = f"{shown[0]} [{shown[1]}, {shown[2]}]"
        size = "" if arm["bytes"] is None else f"{arm['bytes'] / 1e6:.1f}"
        self._line(str(arm["arm"]), success, difference, size, f"{arm['seconds']:.1f}")
        if arm["note"]:
            out.print(f"  {arm['note']}", style="dim", markup=False, highlight=False)

    def _line(self, *cells: str) -> None:
        first, *rest = cells
        padded = [first.ljust(self._WIDTHS[0])]
        padded += [cell.rjust(width) for cell, width in zip(rest, self._WIDTHS[1:], strict=True)]
        out.print(" ".join(padded), markup=False, highlight=False, soft_wrap=True)


def print_cells(plans: Iterable["CellPlan"]) -> None:
    """A dry run's list."""
    table = columns("arm", "cell", "state", right("estimate"))
    total = 0.0
    for plan in plans:
        state = "done" if plan.done else f"as {plan.shares}" if plan.shares else "to run"
        table.add_row(Text(plan.arm), plan.cell, state, f"{plan.seconds:.0f} s")
        total += plan.seconds
    print_whole(table)
    out.print(f"estimate: at most {total:.0f} s, good to a factor of two or three", highlight=False)


def print_status(studies: Iterable["StudyStatus"]) -> None:
    """Counts of each study, and its arms that are running, have failed or are half done."""
    for one in studies:
        out.print(str(one), markup=False, highlight=False, soft_wrap=True)
        shown = [arm for arm in one.arms if arm.note]
        if not shown:
            continue
        table = columns("arm", "state", right("seconds"), "")
        for arm in shown:
            seconds = "" if arm.seconds is None else f"{arm.seconds:.0f}"
            table.add_row(Text(arm.arm), arm.state, seconds, Text(arm.note))
        print_whole(table)
