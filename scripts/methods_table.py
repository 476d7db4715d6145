"""Markdown tables of methods against schemes, from the rows of a study.

python scripts/methods_table.py results/wall-methods/episodes.parquet

Arms are read by their short names, SCHEME or SCHEME@METHOD; each cell of the table is the success
rate with its 95% interval, and a star where the difference to the float arm is separable from zero
(exact McNemar test, p < 0.05, not corrected for the number of arms). Then the arms that are
separable so from rounding to nearest under the same scheme, with the paired difference.
"""

import argparse
from pathlib import Path

from quantwm.statistics import paired_difference, wilson_interval
from quantwm.study.rows import read_parquet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    arms: dict[str, list[dict]] = {}
    for row in read_parquet(parser.parse_args().rows):
        arms.setdefault(row["arm"], []).append(row)
    reference = {row["episode_seed"]: bool(row["success"]) for row in arms["float"]}
    print(f"float: {cell(arms['float'], None)}, {len(reference)} episodes\n")
    names = [name.partition("@") for name in arms if name != "float"]
    methods = list(dict.fromkeys(method or "rtn" for _, _, method in names))
    schemes = list(dict.fromkeys(scheme for scheme, _, _ in names))
    for kind in (
        [scheme for scheme in schemes if "a" not in scheme],
        [scheme for scheme in schemes if "a" in scheme],
    ):
        if not kind:
            continue
        print("| method | " + " | ".join(f"`{scheme}`" for scheme in kind) + " |")
        print("| --- |" + " --- |" * len(kind))
        for method in methods:
            suffix = "" if method == "rtn" else f"@{method}"
            found = [arms.get(scheme + suffix) for scheme in kind]
            if any(found):
                cells = [cell(rows, reference) if rows else "–" for rows in found]
                print(f"| `{method}` | " + " | ".join(cells) + " |")
        print()
    print_gains(arms)


def print_gains(arms: dict[str, list[dict]]) -> None:
    """The methods that differ from rounding to nearest, pair by pair."""
    compared = [name for name in arms if "@" in name]
    print(f"| of {len(compared)} arms | against rounding to nearest | p |")
    print("| --- | --- | --- |")
    for name in compared:
        plain = {row["episode_seed"]: bool(row["success"]) for row in arms[name.split("@")[0]]}
        own = [bool(row["success"]) for row in arms[name]]
        paired = paired_difference(own, [plain[row["episode_seed"]] for row in arms[name]])
        if paired.p_value < 0.05:
            interval = f"[{paired.low:+.2f}, {paired.high:+.2f}]"
            print(f"| `{name}` | {paired.difference:+.2f} {interval} | {paired.p_value:.2g} |")


def cell(rows: list[dict], reference: dict[int, bool] | None) -> str:
    """A success rate with its interval, starred where it differs from the float arm's."""
    successes = [bool(row["success"]) for row in rows]
    low, high = wilson_interval(sum(successes), len(successes))
    star = ""
    if reference is not None:
        paired = paired_difference(successes, [reference[row["episode_seed"]] for row in rows])
        star = "\\*" if paired.p_value < 0.05 else ""
    return f"{sum(successes) / len(successes):.2f}{star} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
