"""The tables that the documentation shows are those of the rows beside it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantwm.report.verdicts import is_tested
from quantwm.study.evidence import Arms, keeps
from quantwm.study.findings import findings_of
from quantwm.study.results import origin_of, results_of
from quantwm.study.rows import read_parquet, write_parquet
from quantwm.study.spec import load_preset

ROOT = Path(__file__).parents[1]
ROWS = [ROOT / f"docs/results/{task}-findings.parquet" for task in ("wall", "pusht", "point_maze")]
SECOND = ROOT / "docs/results/wall-second-seed.parquet"


@pytest.mark.parametrize(
    ("script", "rows"), [("findings_tables.py", ROWS), ("two_models.py", [ROWS[0], SECOND])]
)
def test_the_results_page_shows_what_the_rows_say(script, rows):
    printed = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *rows],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    page = (ROOT / "docs/results.md").read_text()
    assert "| `float` |" in printed
    assert printed.strip() in page


def test_the_page_of_the_findings_has_the_verdicts_that_the_rows_give():
    findings = findings_of(
        [results_of(load_preset("findings", task(r)), r) for r in map(read_parquet, ROWS)]
    )
    page = (ROOT / "docs/findings.html").read_text()
    blocks = re.split(r'<div class="finding" id="finding-(\d)">', page)[1:]
    shown = {
        int(number): re.findall(r'<summary><span class="chip (\w+)">', block)
        for number, block in zip(blocks[::2], blocks[1::2], strict=True)
    }
    for number, verdicts in shown.items():
        assert sorted(verdicts) == sorted(
            one.verdict for one in findings if one.number == number and is_tested(one)
        )
    assert set(shown) == {1, 2, 3, 4, 5, 6}


def task(rows):
    return rows[0]["task"]


def test_packing_keeps_what_the_tables_are_made_of(tmp_path):
    packed = tmp_path / "packed.parquet"
    script = ROOT / "scripts/pack_rows.py"
    subprocess.run([sys.executable, script, ROWS[1], "--out", packed], check=True)
    assert packed.stat().st_size < 1.05 * ROWS[1].stat().st_size
    before, after = read_parquet(ROWS[1]), read_parquet(packed)
    assert [row["arm"] for row in before] == [row["arm"] for row in after]
    for old, new in zip(before, after, strict=True):
        for name in ("success_by_iteration", "first_success", "cell", "provenance"):
            assert old[name] == new[name]
        np.testing.assert_allclose(new["states"], old["states"], rtol=2**-13)
        np.testing.assert_allclose(new["cost_by_iteration"], old["cost_by_iteration"], rtol=2**-10)


def test_packing_can_say_the_arithmetic_of_rows_from_before_rows_said_it(tmp_path):
    rows = [row for row in read_parquet(ROWS[1]) if row["arm"] == "float"][:3]
    said = json.loads(rows[0]["provenance"])
    said.pop("arithmetic", None)
    for row, commit, device in zip(
        rows, ("abc123", "def456", "abc123"), ("cpu", "cpu", "cuda"), strict=True
    ):
        row["provenance"] = json.dumps(said | {"commit": commit, "device": device})
    write_parquet(tmp_path / "rows.parquet", rows)
    packed = tmp_path / "packed.parquet"
    command = [sys.executable, ROOT / "scripts/pack_rows.py", tmp_path / "rows.parquet"]
    subprocess.run([*command, "--out", packed, "--arithmetic", "abc=amx"], check=True)
    found = [json.loads(row["provenance"]) for row in read_parquet(packed)]
    assert sorted(one.get("arithmetic", "") for one in found) == ["", "", "amx"]
    assert {one["commit"] for one in found if "arithmetic" in one} == {"abc123"}


def test_arms_are_compared_with_float_of_the_same_device():
    """PushT's arms were computed on two, each with a float arm of its own."""
    rows = read_parquet(ROWS[1])
    results = results_of(load_preset("findings", "pusht"), rows)
    assert len({origin_of(row) for row in rows}) > 1
    for name in ("w4", "w4a4", "oracle-state"):
        reference = results.float_rows(name)
        assert len(reference) == 50
        if name != "oracle-state":
            assert origin_of(reference[0]) == origin_of(results.rows[name][0])
    one, other = results.together("w4", "w8")
    assert origin_of(one[0]) == origin_of(other[0])
    assert results.together("w4", "w4a4") is None
    assert results.together("w4a4", "random") is not None
    found = Arms(results).difference("w4", "w4a4", keeps())
    assert "computed alike" in found.evidence.note


def test_packing_takes_an_arm_from_the_first_source_and_rounds(tmp_path):
    rows = [row for row in read_parquet(ROWS[1]) if row["arm"] in ("float", "w4")]
    elsewhere = [row for row in rows if origin_of(row) != origin_of(rows[0])]
    rows = [row for row in rows if row not in elsewhere]
    changed = [
        row | {"states": [[300.3] * 7], "cost_by_iteration": [0.3]}
        for row in rows
        if row["arm"] == "float"
    ]
    sources = [tmp_path / "first.parquet", tmp_path / "second.parquet"]
    write_parquet(sources[0], changed)
    write_parquet(sources[1], [*rows, *elsewhere])
    packed = tmp_path / "packed.parquet"
    script = ROOT / "scripts/pack_rows.py"
    subprocess.run([sys.executable, script, *sources, "--out", packed], check=True)
    found = read_parquet(packed)
    assert [row["arm"] for row in found] == ["float"] * 100 + ["w4"] * 50
    assert {origin_of(row) for row in found[50:100]} == {origin_of(elsewhere[0])}
    assert found[0]["states"] == [[300.5] * 7]
    assert found[0]["cost_by_iteration"] == [614 / 2048]
    assert found[-1]["states"] == rows[-1]["states"]
