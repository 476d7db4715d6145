"""One row an episode: its columns, its files, and reading rows of earlier versions.

Rows come from `quantwm.evaluation`; here is what they look like once stored.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from quantwm.errors import CorruptFileError, MismatchError, QuantWMError
from quantwm.evaluation import SCHEMA_VERSION, Row
from quantwm.files import atomic_path

_FLOATS = pa.list_(pa.float64())
SCHEMA = pa.schema(
    [
        pa.field("schema_version", pa.int32(), nullable=False),
        pa.field("cell", pa.string(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("layout", pa.string(), nullable=False),
        pa.field("block", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("episode", pa.int64(), nullable=False),
        pa.field("episode_seed", pa.int64(), nullable=False),
        pa.field("success", pa.bool_(), nullable=False),
        pa.field("success_by_iteration", pa.list_(pa.bool_()), nullable=False),
        pa.field("first_success", pa.int64()),
        pa.field("iterations", pa.int64(), nullable=False),
        pa.field("failure", pa.string()),
        pa.field("final_distance", pa.float64()),
        pa.field("distance_by_iteration", _FLOATS, nullable=False),
        pa.field("cost_by_iteration", _FLOATS, nullable=False),
        pa.field("cost_by_step", pa.list_(_FLOATS), nullable=False),
        pa.field("states", pa.list_(_FLOATS), nullable=False),
        pa.field("goal", _FLOATS, nullable=False),
        pa.field("plan_seconds", pa.float64()),
        pa.field("peak_memory_mb", pa.float64()),
        pa.field("provenance", pa.string(), nullable=False),
    ]
)
"""Columns of an episode's row, in order."""

MEASUREMENTS = ("plan_seconds", "peak_memory_mb", "provenance")
"""Columns that may differ between two runs of one cell."""

LABELS = ("cell", "arm")
"""Columns that a reader adds: a cell's file says what was computed, not under which name."""

Upgrader: TypeAlias = Callable[[Row], Row]
UPGRADERS: dict[int, Upgrader] = {1: lambda row: row | {"cost_by_step": []}}
"""How a row of schema version v becomes one of version v + 1, by v. A change of `SCHEMA` raises
`evaluation.SCHEMA_VERSION` and adds an entry here."""


def comparable(row: Mapping[str, Any]) -> Row:
    """The row without the measurement columns and the arm's name: what one cell id fixes."""
    return {key: row[key] for key in SCHEMA.names if key not in (*MEASUREMENTS, "arm")}


def encode_row(row: Mapping[str, Any]) -> Row:
    """A row as JSON values, without labels; NaN and infinities as the strings "nan", "inf".

    Raises:
        QuantWMError: the row lacks a column or has one too many.
    """
    names = [name for name in SCHEMA.names if name not in LABELS]
    missing = [name for name in names if name not in row]
    extra = [name for name in row if name not in SCHEMA.names]
    if missing or extra:
        raise QuantWMError(
            f"an episode's row does not have the columns of schema version {SCHEMA_VERSION}: "
            f"missing {missing}, not known {extra}"
        )
    return {name: _encode(row[name], SCHEMA.field(name).type) for name in names}


def decode_row(stored: Mapping[str, Any], *, cell: str, arm: str) -> Row:
    """The row that `encode_row` made, upgraded to the current schema and labelled.

    Raises:
        MismatchError: a newer quantwm wrote it, or no reader for its version is left.
        CorruptFileError: it lacks columns.
    """
    row = _upgrade(dict(stored))
    labelled = row | {"cell": cell, "arm": arm}
    missing = [name for name in SCHEMA.names if name not in labelled]
    if missing:
        raise CorruptFileError(f"an episode's row of cell {cell} lacks the columns {missing}")
    return {name: _decode(labelled[name], SCHEMA.field(name).type) for name in SCHEMA.names}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows atomically, with the explicit schema.

    Raises:
        QuantWMError: the file cannot be written.
    """
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_parquet(path: Path) -> list[Row]:
    """Rows of an `episodes.parquet`, upgraded to the current schema.

    Raises:
        CorruptFileError: the file is cut off, no parquet file, or not a study's.
        MismatchError: a newer quantwm wrote it.
    """
    try:
        stored: Iterable[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptFileError(
            f"cannot read {path}: {error}; run the study's command again to write it anew"
        ) from error
    try:
        return [decode_row(row, cell=row["cell"], arm=row["arm"]) for row in stored]
    except KeyError as error:
        raise CorruptFileError(f"{path} is no study's: its rows have no {error}") from error


def _upgrade(row: Row) -> Row:
    version = int(row.get("schema_version", -1))
    if version > SCHEMA_VERSION:
        raise MismatchError(
            f"rows have schema version {version}, this quantwm reads up to {SCHEMA_VERSION}; "
            "install the newer quantwm that wrote them"
        )
    while version < SCHEMA_VERSION:
        if version not in UPGRADERS:
            raise MismatchError(
                f"rows have schema version {version}, which this quantwm no longer reads "
                f"(it reads {sorted(UPGRADERS)} and {SCHEMA_VERSION}); use another folder"
            )
        row = UPGRADERS[version](row)
        version += 1
        row["schema_version"] = version
    return row


def _encode(value: Any, kind: pa.DataType) -> Any:
    """Plain Python of exactly the column's type, so that JSON reads back what was written."""
    if value is None:
        return None
    if pa.types.is_list(kind):
        return [_encode(item, kind.value_type) for item in value]
    if pa.types.is_boolean(kind):
        return bool(value)
    if pa.types.is_integer(kind):
        return int(value)
    if pa.types.is_string(kind):
        return str(value)
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _decode(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_list(kind):
        return [_decode(item, kind.value_type) for item in value]
    return float(value) if pa.types.is_floating(kind) else value
