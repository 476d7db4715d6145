"""Imports run one way, so that the parts stay strangers to each other."""

import ast
from pathlib import Path

import pytest

import quantwm

ROOT = Path(quantwm.__file__).parent
BASE = {
    "errors",
    "checks",
    "seeds",
    "statistics",
    "protocols",
    "files",
    "storage",
    "fingerprint",
    "compute",
}
LAYERS = [
    BASE,
    {"models", "envs", "planning", "quant"},
    {"methods", "data", "training", "evaluation", "calibration", "loading", "deploy"},
    {"diagnostics", "study", "bench"},
    {"report", "describe", "console", "cli", "__main__"},
]
STRANGERS = LAYERS[1]


def modules():
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "quantwm" and len(parts) > 1:
                yield parts[1]


def level(part):
    levels = [number for number, layer in enumerate(LAYERS) if part in layer]
    assert levels, f"{part} belongs to no layer: enter it in LAYERS"
    return levels[0]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_its_own_layer_and_below(path):
    own = part_of(path)
    for other in imported_parts(path):
        assert level(other) <= level(own), f"{own} imports {other}"
        if own in STRANGERS and other in STRANGERS:
            assert own == other, f"{own} imports {other}: they may only share protocols"


def test_the_planner_never_names_quantization():
    for path in (ROOT / "planning").glob("*.py"):
        assert "quant." not in path.read_text().replace("quantwm.", "")
