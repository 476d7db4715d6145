"""What a model, data set, calibration file or results folder holds, as plain facts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from quantwm.calibration import Calibration
from quantwm.compute import dtype_name, package_version, resolve_device, resolve_dtype
from quantwm.data.sources import DataSet, open_data, stored_task
from quantwm.data.trajectories import Trajectories
from quantwm.envs import TASKS
from quantwm.errors import UsageError
from quantwm.files import atomic_path
from quantwm.fingerprint import model_hash
from quantwm.loading import load
from quantwm.methods import method_names
from quantwm.models.bundled import bundled_names
from quantwm.models.formats import Format, stored_format
from quantwm.protocols import Task
from quantwm.quant import quantization_of, stored_bytes
from quantwm.quant.structure import added_multiply_adds
from quantwm.study.prepare import build_task
from quantwm.study.spec import RECORD, presets
from quantwm.study.store import ResultsFolder

_ORIGINS: Mapping[Format, str] = {
    "quantwm": "",
    "dino_wm": ", in a checkpoint of DINO-WM's public code",
    "prejepa": ", in a checkpoint of stable-worldmodel",
}
_SHEET_ROWS, _SHEET_COLUMNS, _THUMBNAIL = 4, 6, 112


def describe_installation() -> dict[str, Any]:
    """What this installation offers and what it would compute with."""
    device = resolve_device("auto")
    return {
        "version": package_version(),
        "torch": torch.__version__,
        "device": str(device),
        "dtype": dtype_name(resolve_dtype("auto", device)),
        "threads": torch.get_num_threads(),
        "tasks": ", ".join(TASKS),
        "world models": ", ".join(bundled_names()),
        "methods": ", ".join(method_names()),
        "presets": ", ".join(presets()),
    }


def describe(source: str, task: str | None = None) -> dict[str, Any]:
    """Facts about a bundled model's name, a folder or a file.

    Args:
        task: a model's, where its folder does not say.

    Raises:
        UsageError: it is none of those.
        CorruptFileError: it is damaged.
    """
    path = Path(source)
    if source in bundled_names() or stored_format(path) is not None:
        return _describe_model(source, task)
    if task is not None and path.exists():
        raise UsageError(f"--task is about a model, and {source} is none: leave it out")
    if stored_task(path) is not None:
        return _describe_data(path)
    if path.is_dir() and ResultsFolder(path).read_config() is not None:
        return _describe_results(ResultsFolder(path))
    if path.is_file() and path.suffix == ".safetensors":
        return _describe_calibration(Calibration.load(path))
    raise UsageError(
        f"{source!r} is neither a bundled model ({', '.join(bundled_names())}) nor the folder of "
        "a model, a data set or a study, nor a calibration file"
    )


def contact_sheet(source: str, path: Path) -> None:
    """Write a PNG of frames of a data set: a trajectory a row, evenly spaced in time.

    Raises:
        UsageError: `source` is no data set's folder, or the file's name does not end in .png.
        QuantWMError: the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"a contact sheet is a PNG: {path} must end in .png")
    split = _open(Path(source))[1].splits["train"]
    lengths = split.trajectories.lengths
    chosen = np.linspace(0, len(lengths) - 1, _SHEET_ROWS).astype(np.int64)
    sheet = Image.new("RGB", (_SHEET_COLUMNS * _THUMBNAIL, _SHEET_ROWS * _THUMBNAIL))
    for row, trajectory in enumerate(chosen):
        steps = np.linspace(0, lengths[trajectory], _SHEET_COLUMNS).astype(np.int64)
        frames = split.frames(np.full(_SHEET_COLUMNS, trajectory), steps)
        for column, frame in enumerate(frames):
            thumbnail = Image.fromarray(frame).resize((_THUMBNAIL, _THUMBNAIL))
            sheet.paste(thumbnail, (column * _THUMBNAIL, row * _THUMBNAIL))
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


def _describe_model(source: str, task: str | None) -> dict[str, Any]:
    world_model = load(source, task=task)
    record = quantization_of(world_model)
    sizes = {
        part: sum(p.numel() for n, p in world_model.named_parameters() if n.startswith(part))
        for part in ("encoder.", "predictor.", "decoder.")
        if part != "decoder." or world_model.config.decoder is not None
    }
    kind = "world model, float" if record is None else "world model, quantized"
    if source not in bundled_names():
        kind += _ORIGINS[stored_format(Path(source)) or "quantwm"]
    facts: dict[str, Any] = {"kind": kind, "bytes": stored_bytes(world_model)}
    if record is None:
        facts["hash"] = model_hash(world_model)
        facts["parameters"] = {name.rstrip("."): count for name, count in sizes.items()}
    else:
        facts["plan"] = str(record.plan)
        facts["method"] = record.method
        facts["quantized layers"] = len(record.layers)
        facts["float model's hash"] = record.source_model_hash
        if added := added_multiply_adds(record.structure):
            facts["added multiply-adds a token"] = added
    if world_model.action_spec.mean is None:
        facts["statistics"] = "none: give the data set or a statistics file to plan with it"
    return facts | {"config": world_model.config.to_dict()}


def _open(folder: Path) -> tuple[Task, DataSet]:
    settings = stored_task(folder)
    if settings is None:
        raise UsageError(f"{folder} holds no data set")
    task = build_task(settings)
    return task, open_data(folder, task)


def _describe_data(folder: Path) -> dict[str, Any]:
    task, data = _open(folder)
    facts: dict[str, Any] = {"kind": "trajectories", "task": task.settings()}
    facts["origin"] = dict(data.origin)
    for name, split in data.splits.items():
        facts[name] = _statistics(split.trajectories)
    return facts


def _statistics(trajectories: Trajectories) -> dict[str, Any]:
    actions = trajectories.actions.astype(np.float64)
    states = trajectories.states
    return {
        "trajectories": len(trajectories),
        "actions": int(trajectories.lengths.sum()),
        "length": f"{trajectories.lengths.min()} to {trajectories.lengths.max()}",
        "action mean": _rounded(actions.mean(0)),
        "action std": _rounded(actions.std(0)),
        "state minimum": _rounded(states.min(0)),
        "state mean": _rounded(states.mean(0)),
        "state maximum": _rounded(states.max(0)),
        "layouts": len({tuple(v) for v in zip(*trajectories.layout.values(), strict=True)}) or 1,
    }


def _describe_results(folder: ResultsFolder) -> dict[str, Any]:
    config = folder.read_config() or {}
    record: Mapping[str, Any] = config.pop(RECORD, None) or {}
    cells: Mapping[str, str] = record.get("cells") or {}
    state = {
        arm: "finished" if folder.peek_cell(cell) is not None else "missing"
        for arm, cell in cells.items()
    }
    return {"kind": "study", "cells": state, "config": config}


def _describe_calibration(calibration: Calibration) -> dict[str, Any]:
    return {
        "kind": "calibration",
        "samples": len(calibration),
        "frames": len(calibration.visual),
        "model": calibration.model_hash,
        "hash": calibration.hash,
        "origin": calibration.origin,
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 3) for value in values]
