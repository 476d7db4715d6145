"""Rows, cell files and tables of a results folder."""

import json
import logging
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantwm.errors import CorruptFileError, MismatchError, QuantWMError
from quantwm.study import rows as rows_module
from quantwm.study.rows import (
    SCHEMA,
    comparable,
    decode_row,
    encode_row,
    read_parquet,
    write_parquet,
)
from quantwm.study.store import FinishedCell, ResultsFolder


def row(**changes):
    return {
        "schema_version": 2,
        "cell": "",
        "arm": "model",
        "task": "point",
        "layout": "{}",
        "block": "evaluation",
        "seed": 1,
        "episode": 0,
        "episode_seed": (4 << 28) + 4096,
        "success": False,
        "success_by_iteration": [False, False],
        "first_success": None,
        "iterations": 1,
        "failure": "not_reached",
        "final_distance": 0.1 + 0.2,
        "distance_by_iteration": [1.5, 0.1 + 0.2],
        "cost_by_iteration": [0.25],
        "cost_by_step": [[0.5, 0.25]],
        "states": [[0.0, 1.0], [2.0, 1 / 3]],
        "goal": [1.0, 1.0],
        "plan_seconds": 0.5,
        "peak_memory_mb": 1.0,
        "provenance": "{}",
    } | changes


def finished(**changes):
    return FinishedCell.from_rows("ab12", {"kind": "float"}, [row(**changes)], bytes=9, seconds=2.5)


floats = st.floats(allow_nan=True, allow_infinity=True)


@settings(deadline=None)  # a busy machine is no failure
@given(distance=floats, cost=st.lists(floats), states=st.lists(st.lists(floats)))
def test_rows_survive_json_exactly(distance, cost, states):
    original = row(final_distance=distance, cost_by_iteration=cost, states=states)
    text = json.dumps(encode_row(original), allow_nan=False)
    back = decode_row(json.loads(text), cell="c", arm="a")
    assert list(back) == SCHEMA.names
    # repr tells NaN apart from nothing else and compares every bit of the other floats.
    assert repr(back) == repr(original | {"cell": "c", "arm": "a"})


def test_rows_survive_parquet(tmp_path):
    rows = [row(final_distance=math.inf, failure=None, first_success=2), row(cost_by_iteration=[])]
    write_parquet(tmp_path / "e.parquet", rows)
    assert read_parquet(tmp_path / "e.parquet") == rows
    assert pq.read_schema(tmp_path / "e.parquet").remove_metadata() == SCHEMA


def test_parquet_of_others_is_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "e.parquet")
    with pytest.raises(CorruptFileError, match=r"e.parquet is no study's: its rows have no 'cell'"):
        read_parquet(tmp_path / "e.parquet")


def test_parquet_of_no_rows_keeps_the_schema(tmp_path):
    write_parquet(tmp_path / "e.parquet", [])
    assert read_parquet(tmp_path / "e.parquet") == []
    assert pq.read_schema(tmp_path / "e.parquet").names == SCHEMA.names


def test_truncated_parquet(tmp_path):
    path = tmp_path / "e.parquet"
    write_parquet(path, [row()])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptFileError, match=r"e\.parquet"):
        read_parquet(path)


@pytest.mark.parametrize("change", [{"cost": 1.0}, {"goal": ...}])
def test_rows_with_other_columns_are_refused(change):
    changed = {key: value for key, value in (row() | change).items() if value is not ...}
    with pytest.raises(QuantWMError, match="columns"):
        encode_row(changed)


def test_comparable_leaves_out_what_may_differ():
    one = row(plan_seconds=1.0, peak_memory_mb=2.0, provenance="x", arm="a")
    assert comparable(one) == comparable(row(arm="b"))
    assert comparable(one) != comparable(row(iterations=2))


def upgrade_from_0(old):
    """A made-up version 0: `solved` instead of `success`, and no costs."""
    new = dict(old)
    new["success"] = new.pop("solved")
    return new | {"cost_by_iteration": []}


def test_rows_of_version_1_had_no_costs_of_steps():
    old = {k: v for k, v in encode_row(row()).items() if k != "cost_by_step"}
    old["schema_version"] = 1
    read = decode_row(old, cell="c", arm="a")
    assert read == row(cost_by_step=[], cell="c", arm="a")


def test_previous_versions_are_read_through_the_table(monkeypatch, tmp_path):
    gone = ("success", "cost_by_iteration", "cost_by_step")
    old = {k: v for k, v in encode_row(row()).items() if k not in gone}
    old |= {"schema_version": 0, "solved": True}
    monkeypatch.setitem(rows_module.UPGRADERS, 0, upgrade_from_0)
    read = decode_row(old, cell="c", arm="a")
    assert read == row(success=True, cost_by_iteration=[], cost_by_step=[], cell="c", arm="a")
    # A parquet file of that version, whose columns differ, is read alike.
    table = pa.Table.from_pylist([old | {"cell": "c", "arm": "a"}])
    pq.write_table(table, tmp_path / "old.parquet")
    assert read_parquet(tmp_path / "old.parquet") == [read]


@pytest.mark.parametrize(("version", "said"), [(3, "newer"), (0, "no longer reads")])
def test_versions_that_cannot_be_read(version, said):
    with pytest.raises(MismatchError, match=said):
        decode_row(encode_row(row(schema_version=version)), cell="c", arm="a")


def test_cells_are_stored_and_labelled(tmp_path):
    folder = ResultsFolder(tmp_path / "new" / "out")
    assert folder.load_cell("ab12") is None
    folder.save_cell(finished())
    loaded = folder.load_cell("ab12")
    assert loaded == finished()
    assert loaded.labelled("w4") == [row(cell="ab12", arm="w4")]


def damage_cut(text):
    return text[: len(text) // 2]


def damage_edit(text):
    return text.replace('"success": false', '"success": true', 1)


def damage_other(text):
    return "[]"


def damage_nan(text):
    return text.replace("2.5", "NaN", 1)


def damage_empty(text):
    return ""


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_edit, damage_other, damage_nan, damage_empty]
)
def test_damaged_cells_are_set_aside(tmp_path, caplog, damage):
    folder = ResultsFolder(tmp_path)
    path = folder.cell_path("ab12")
    for number in (1, 2):
        folder.save_cell(finished())
        damaged = damage(path.read_text())
        assert damaged != path.read_text()
        path.write_text(damaged)
        assert folder.peek_cell("ab12") is None
        assert path.exists()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert folder.load_cell("ab12") is None
        aside = tmp_path / "cells" / f"ab12.json.corrupt-{number}"
        assert aside.read_text() == damaged
        assert not path.exists()
        assert aside.name in caplog.text


def test_a_cell_under_another_name_is_damage(tmp_path):
    folder = ResultsFolder(tmp_path)
    folder.save_cell(finished())
    folder.cell_path("ab12").rename(folder.cell_path("cd34"))
    assert folder.load_cell("cd34") is None


def test_config_round_trip_and_damage(tmp_path):
    folder = ResultsFolder(tmp_path)
    assert folder.read_config() is None
    folder.write_config({"b": [1, 2.5], "a": {"x": None}})
    assert folder.read_config() == {"b": [1, 2.5], "a": {"x": None}}
    (tmp_path / "config.yaml").write_text("b: [1,")
    with pytest.raises(CorruptFileError, match="delete it to go on"):
        folder.read_config()


def test_a_folder_of_other_things_is_not_overwritten(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(MismatchError, match=r"report\.html"):
        ResultsFolder(tmp_path).check_usable()
    assert (tmp_path / "report.html").read_text() == "mine"


def test_unwritable_folder(tmp_path):
    # Tests may run as root, whom permissions do not stop; nobody writes below a file.
    (tmp_path / "file").write_text("")
    folder = ResultsFolder(tmp_path / "file" / "out")
    for write in (folder.check_writable, lambda: folder.save_cell(finished())):
        with pytest.raises(QuantWMError, match="cannot write"):
            write()
