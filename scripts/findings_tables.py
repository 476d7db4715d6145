"""Markdown tables of a findings study, from its rows: verdicts, every arm, and what decided.

python scripts/findings_tables.py docs/results/wall-findings.parquet

Takes one file a task, `episodes.parquet` of a study of the `findings` preset; finding 6, which
compares tasks, is judged from all of them. Brackets are 95% intervals.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from quantwm.evaluation import Row
from quantwm.report.text import decimal, signed
from quantwm.study.findings import Evidence, Finding, findings_of
from quantwm.study.results import TaskResults, results_of
from quantwm.study.rows import read_parquet
from quantwm.study.spec import load_preset
from quantwm.study.summary import arm_summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", help="episodes.parquet of each task")
    print("\n".join(tables(parser.parse_args().rows)))


def tables(paths: Sequence[Path]) -> list[str]:
    """The lines of all tables: verdicts, then a section a task, then what concerns all tasks."""
    results = [read(path) for path in paths]
    findings = findings_of(results)
    lines = verdicts_table(findings, [one.task for one in results])
    for one in results:
        own = [finding for finding in findings if finding.task == one.task]
        lines += ["", f"## {one.task}", "", *arms_table(one), "", *evidence_table(own)]
    across = [finding for finding in findings if finding.task is None]
    return [*lines, "", "## Across tasks", "", *evidence_table(across)]


def read(path: Path) -> TaskResults:
    """Rows with what the preset's arms are."""
    rows = read_parquet(path)
    return results_of(load_preset("findings", rows[0]["task"]), rows)


def arms_table(results: TaskResults) -> list[str]:
    """Success after some replans and at the cap, and against the float arm."""
    every = [row for rows in results.rows.values() for row in rows]
    cap = max(len(row["success_by_iteration"]) - 1 for row in every)
    shown = [count for count in (1, 2, 3) if count < cap]
    head = ["arm", *(f"after {count}" for count in shown), "success", "against float", "s"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, rows in results.rows.items():
        success, against = compared(results, name)
        seconds = sum(row["plan_seconds"] for row in rows) / len(rows)
        early = [decimal(sum(solved_by(row, count) for row in rows) / len(rows)) for count in shown]
        cells = [f"`{name}`", *early, success, against, decimal(seconds, 1)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def solved_by(row: Row, count: int) -> bool:
    """Whether an episode had succeeded after so many replans."""
    return row["first_success"] is not None and row["first_success"] <= count


def compared(results: TaskResults, name: str) -> tuple[str, str]:
    """An arm's success, and its paired difference against its float arm; "" without one."""
    reference = results.float_rows(name)
    found = arm_summary(name, results.rows[name], reference, bytes=None, seconds=0.0)
    success = f"{decimal(found['success'])} [{decimal(found['low'])}, {decimal(found['high'])}]"
    if found["difference"] is None:
        return success, ""
    low, high = signed(found["difference_low"]), signed(found["difference_high"])
    return success, f"{signed(found['difference'])} [{low}, {high}]"


def verdicts_table(findings: Sequence[Finding], tasks: Sequence[str]) -> list[str]:
    """A line a statement, a column a task; what concerns all tasks stands in the first."""
    lines = [f"| finding | {' | '.join(tasks)} |", "| --- " * (1 + len(tasks)) + "|"]
    statements = {one.number: one.statement for one in findings}
    for number, statement in sorted(statements.items()):
        by_task = {one.task: one.verdict for one in findings if one.number == number}
        if None in by_task:
            cells = [f"all: {by_task[None]}", *[""] * (len(tasks) - 1)]
        else:
            cells = [by_task.get(task, "") for task in tasks]
        lines.append(f"| {number}. {statement} | {' | '.join(cells)} |")
    return lines


def evidence_table(findings: Sequence[Finding]) -> list[str]:
    """A line a finding with the comparisons that it rests on."""
    lines = ["| finding | verdict | seen |", "| --- | --- | --- |"]
    for one in findings:
        seen = "; ".join(told(clause) for clause in one.evidence if clause.n)
        if one.missing:
            lacking = ", ".join(f"`{name}`" for name in one.missing)
            seen = f"{seen}; lacks {lacking}" if seen else f"lacks {lacking}"
        elif one.episodes_needed is not None:
            seen += f"; {one.episodes_needed} episodes would decide it"
        lines.append(f"| {one.number} | {one.verdict} | {seen} |")
    return lines


def told(clause: Evidence) -> str:
    """One comparison: what, how much, and its verdict."""
    space = "" if clause.estimate is None else " "
    return f"{clause.text}{space}{measured(clause)}"


def measured(clause: Evidence) -> str:
    """How much, and the verdict on it."""
    text = ""
    if clause.estimate is not None:
        text += signed(clause.estimate)
    if clause.low is not None and clause.high is not None:
        text += f" [{signed(clause.low)}, {signed(clause.high)}]"
    return f"{text}: {clause.verdict}"


if __name__ == "__main__":
    main()
