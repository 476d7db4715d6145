"""Markdown tables of a findings study, from its rows: every arm, then the verdict of every finding.

python scripts/findings_tables.py docs/results/wall-findings.parquet

Takes one file a task, `episodes.parquet` of a study of the `findings` preset; finding 6, which
compares tasks, is judged from all of them. Brackets are 95% intervals.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantwm.evaluation import Row
from quantwm.report.text import decimal, signed
from quantwm.study.findings import Evidence, findings_of
from quantwm.study.results import TaskResults, results_of
from quantwm.study.rows import read_parquet
from quantwm.study.spec import load_preset
from quantwm.study.summary import arm_summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", help="episodes.parquet of each task")
    print("\n".join(tables(parser.parse_args().rows)))


def tables(paths: Sequence[Path]) -> list[str]:
    """The lines of all tables."""
    results = [read(path) for path in paths]
    lines: list[str] = []
    for one in results:
        lines += [*arms_table(one), ""]
    return lines + findings_table(results)


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
        reference = results.rows.get(results.compared.get(name, ""))
        seconds = sum(row["plan_seconds"] for row in rows) / len(rows)
        found = arm_summary(name, rows, reference, bytes=None, seconds=seconds)
        early = [decimal(sum(solved_by(row, count) for row in rows) / len(rows)) for count in shown]
        success = f"{decimal(found['success'])} [{decimal(found['low'])}, {decimal(found['high'])}]"
        cells = [f"`{name}`", *early, success, difference(found), decimal(found["seconds"], 1)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def solved_by(row: Row, count: int) -> bool:
    """Whether an episode had succeeded after so many replans."""
    return row["first_success"] is not None and row["first_success"] <= count


def difference(found: Mapping[str, Any]) -> str:
    """The paired difference of `arm_summary`; "" without one."""
    if found["difference"] is None:
        return ""
    low, high = signed(found["difference_low"]), signed(found["difference_high"])
    return f"{signed(found['difference'])} [{low}, {high}]"


def findings_table(results: Sequence[TaskResults]) -> list[str]:
    """A line a finding with the comparisons that it rests on."""
    lines = ["| finding | task | verdict | seen |", "| --- | --- | --- | --- |"]
    for one in findings_of(results):
        seen = "; ".join(told(clause) for clause in one.evidence if clause.n)
        if one.missing:
            lacking = ", ".join(f"`{name}`" for name in one.missing)
            seen = f"{seen}; lacks {lacking}" if seen else f"lacks {lacking}"
        elif one.episodes_needed is not None:
            seen += f"; {one.episodes_needed} episodes would decide it"
        where = one.task or "all"
        lines.append(f"| {one.number}. {one.statement} | {where} | {one.verdict} | {seen} |")
    return lines


def told(clause: Evidence) -> str:
    """One comparison: what, how much, and its verdict."""
    text = clause.text
    if clause.estimate is not None:
        text += f" {signed(clause.estimate)}"
    if clause.low is not None and clause.high is not None:
        text += f" [{signed(clause.low)}, {signed(clause.high)}]"
    return f"{text}: {clause.verdict}"


if __name__ == "__main__":
    main()
