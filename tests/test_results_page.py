"""The tables that the documentation shows are those of the rows beside it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = [ROOT / f"docs/results/{task}-findings.parquet" for task in ("wall", "pusht", "point_maze")]


def test_the_results_page_shows_what_the_rows_say():
    script = ROOT / "scripts/findings_tables.py"
    printed = subprocess.run(
        [sys.executable, script, *ROWS], capture_output=True, text=True, check=True
    ).stdout
    page = (ROOT / "docs/results.md").read_text()
    assert "| `float` |" in printed
    assert printed.strip() in page
