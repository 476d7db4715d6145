"""Do the findings depend on the training? Two models of one task side by side, as Markdown.

python scripts/two_models.py docs/results/wall-{findings,second-seed}.parquet

Takes rows of the `findings` preset of each; arms that only one of them has are left out. Brackets
are 95% intervals.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from findings_tables import compared, measured
from quantwm.study.findings import Finding, findings_of
from quantwm.study.results import TaskResults, results_of
from quantwm.study.rows import read_parquet
from quantwm.study.spec import load_preset


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    arguments = parser.parse_args()
    print("\n".join(tables(*shared([arguments.first, arguments.second]))))


def shared(paths: Sequence[Path]) -> list[TaskResults]:
    """The results of each file, of the arms that all of them have."""
    files = [read_parquet(path) for path in paths]
    common = set.intersection(*({row["arm"] for row in rows} for rows in files))
    kept = [[row for row in rows if row["arm"] in common] for rows in files]
    return [results_of(load_preset("findings", rows[0]["task"]), rows) for rows in kept]


def tables(first: TaskResults, second: TaskResults) -> list[str]:
    """The lines of both tables: arms, and the comparisons that findings rest on."""
    lines = ["| arm | first | against its float | second | against its float |"]
    lines.append("| --- " * 5 + "|")
    for name in first.rows:
        cells = [cell for results in (first, second) for cell in compared(results, name)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "| comparison | first | second |", "| --- | --- | --- |"]
    for one, other in zip(findings_of([first]), findings_of([second]), strict=True):
        if one.task is not None:
            lines += evidence(one, other)
    return lines


def evidence(one: Finding, other: Finding) -> list[str]:
    """A line a comparison of a finding that both models have episodes for."""
    return [
        f"| {one.number}: {mine.text} | {measured(mine)} | {measured(its)} |"
        for mine, its in zip(one.evidence, other.evidence, strict=True)
        if mine.n and its.n
    ]


if __name__ == "__main__":
    main()
