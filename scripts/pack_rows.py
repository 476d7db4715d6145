"""One small Parquet file of the finished cells of results folders, for keeping beside documents.

    python scripts/pack_rows.py results/pusht-findings more.parquet --out pusht-findings.parquet

Cells of unfinished studies count too, and folders and earlier files may share a study's arms among
them, each arm being taken from the first that has it; one that was computed on several devices is
kept of each. Arms come in the order of the preset (`--preset`), others after them. Distances and
goals keep 13 binary digits (0.03 of PushT's pixels), the states on the way 10 (0.25), a plan's cost
10 (0.1%) and those of its steps 8; every column is stored in the encoding in which it is smallest.
"""

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quantwm.evaluation import Row
from quantwm.study.results import Origin, origin_of
from quantwm.study.rows import SCHEMA, read_parquet
from quantwm.study.spec import load_preset
from quantwm.study.tables import Tables

BITS = {
    "final_distance": 13,
    "distance_by_iteration": 13,
    "cost_by_iteration": 10,
    "cost_by_step": 8,
    "states": 10,
    "goal": 13,
}
ENCODINGS = ("PLAIN", "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "DELTA_BYTE_ARRAY")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+", help="results folders, or rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="findings", help="in whose order arms come")
    parser.add_argument(
        "--arithmetic",
        metavar="COMMIT=NAME",
        action="append",
        default=[],
        help="of CPU rows of a commit from before rows said it, such as 10647c5=amx; repeatable",
    )
    arguments = parser.parse_args()
    known = dict(said.split("=", 1) for said in arguments.arithmetic)
    arms = joined(arguments.sources, arguments.preset, known)
    rows = [rounded_row(row) for rows in arms.values() for row in rows]
    arguments.out.write_bytes(packed(pa.Table.from_pylist(rows, schema=SCHEMA)))
    size = arguments.out.stat().st_size
    print(f"{len(rows)} rows, {size} bytes: {', '.join(name for name, _ in arms)}")


def joined(
    sources: Sequence[Path], preset: str, arithmetic: Mapping[str, str]
) -> dict[tuple[str, Origin], list[Row]]:
    """Rows by arm and origin, of the first source that has them; the first source's come first."""
    found: dict[tuple[str, Origin], list[Row]] = {}
    for path in sources:
        own: dict[tuple[str, Origin], list[Row]] = {}
        for row in read_parquet(path) if path.is_file() else rows_of_folder(path):
            row["provenance"] = completed(row["provenance"], arithmetic)
            own.setdefault((row["arm"], origin_of(row)), []).append(row)
        found |= {key: rows for key, rows in own.items() if key not in found}
    task = next(iter(found.values()))[0]["task"]
    order = {arm.name: place for place, arm in enumerate(load_preset(preset, task).arms)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0][0], len(order))))


def completed(provenance: str, arithmetic: Mapping[str, str]) -> str:
    """A row's provenance with the arithmetic of its commit, where it is a CPU's and lacks it."""
    said = json.loads(provenance)
    for commit, name in arithmetic.items():
        if said["device"] == "cpu" and str(said["commit"]).startswith(commit):
            said.setdefault("arithmetic", name)
    return json.dumps(said)


def rows_of_folder(path: Path) -> list[Row]:
    tables = Tables.of_folder(path)
    tables.look()
    return [row for name in tables.names for row in tables.rows(name)]


def rounded_row(row: Row) -> Row:
    return {
        name: rounded(value, BITS[name]) if name in BITS else value for name, value in row.items()
    }


def rounded(value: Any, bits: int) -> Any:
    """Numbers, in lists of any depth, to `bits` binary digits."""
    if isinstance(value, list | tuple | np.ndarray):
        return [rounded(part, bits) for part in value]
    if value is None:
        return None
    mantissa, exponent = np.frexp(value)
    return float(np.ldexp(np.round(mantissa * 2.0**bits), exponent - bits))


def packed(table: pa.Table) -> bytes:
    """The table as Parquet, each column tried in every encoding."""
    dictionary: list[str] = []
    encodings: dict[str, str] = {}
    for leaf in leaves(table):
        alone = table.select([leaf.partition(".")[0]])
        sizes = {None: len(written(alone, use_dictionary=True))}
        for encoding in ENCODINGS:
            try:
                chosen = {leaf: encoding}
                sizes[encoding] = len(written(alone, use_dictionary=False, column_encoding=chosen))
            except (OSError, pa.ArrowException):
                continue  # not for this type
        best = min(sizes, key=lambda name: sizes[name])
        if best is None:
            dictionary.append(leaf)
        else:
            encodings[leaf] = best
    return written(table, use_dictionary=dictionary, column_encoding=encodings)


def leaves(table: pa.Table) -> list[str]:
    schema = pq.ParquetFile(io.BytesIO(written(table))).schema
    return [schema.column(index).path for index in range(len(schema))]


def written(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression="brotli", compression_level=11, write_statistics=False, **options
    )
    return buffer.getvalue()


if __name__ == "__main__":
    main()
