"""Loading and saving world models, float or quantized, by name or folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantwm import storage
from quantwm.compute import resolve_device, resolve_dtype
from quantwm.data.dino_wm_layout import PUSHT_STATISTICS, task_of
from quantwm.data.sources import SPLITS, open_data, stored_task
from quantwm.data.statistics import Statistics
from quantwm.envs import get_task
from quantwm.errors import MismatchError, UsageError, unknown_name
from quantwm.models import checkpoint
from quantwm.models.bundled import bundled_folder, bundled_names
from quantwm.models.config import DINOWMConfig
from quantwm.models.dino_wm import DINOWM
from quantwm.models.dino_wm_checkpoint import Checkpoint, read_checkpoint
from quantwm.models.formats import stored_format
from quantwm.models.prejepa_checkpoint import read_prejepa
from quantwm.protocols import ActionSpec
from quantwm.quant import artifact
from quantwm.quant.apply import quantization_of


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    task: str | None = None,
    data: str | Path | None = None,
    stats: str | Path | None = None,
) -> DINOWM:
    """A world model in evaluation mode.

    Args:
        source: the name of a bundled model, or a folder: that `save` or `quantwm train` wrote, the
            output folder of DINO-WM's public `train.py`, or a DINO-WM (`PreJEPA`) checkpoint of
            stable-worldmodel. Nothing that it holds is executed.
        device: where to put it; "auto" takes a GPU where there is one.
        dtype: cast to this type. Default: float32, the type to quantize from; `evaluate` casts a
            copy to its own compute type.
        task: that it was trained in; needed where the folder does not say and `data` is not given.
        data: the data set that the model was trained on, to compute statistics from; for a model
            that carries none, which otherwise encodes and predicts but cannot plan.
        stats: a JSON file of them instead, as `Statistics.to_dict` has them.

    Raises:
        UsageError: neither a bundled model's name nor a model's folder, or statistics for a model
            that has its own.
        CorruptFileError: a file is damaged.
        MismatchError: the model or the data set is another task's, or the data set has other
            statistics than the model is known to have been trained with.
    """
    folder = _folder_of(source)
    if data is not None and stats is not None:
        raise UsageError("give either a data set or a statistics file, not both")
    kind = stored_format(folder)
    if kind is None:
        raise UsageError(
            f"{folder} holds no saved model: neither {storage.METADATA_FILE} and "
            f"{storage.TENSORS_FILE}, as quantwm saves one, nor hydra.yaml and "
            "checkpoints/model_latest.pth, as DINO-WM does, nor a PreJEPA's config.json and "
            "weights.pt, as stable-worldmodel does"
        )
    if kind == "dino_wm":
        world_model, statistics, rollouts = _of_dino_wm(folder)
    else:
        world_model = _of_prejepa(folder, task, data) if kind == "prejepa" else _own(folder)
        statistics, rollouts = None, None
    if task not in (None, world_model.config.task):
        raise MismatchError(f"{source} was trained in {world_model.config.task}, not in {task}")
    if data is not None or stats is not None:
        if world_model.action_spec.mean is not None:
            raise UsageError(f"{source} carries statistics of its own: leave data and stats out")
        given = _given_statistics(world_model.config.task, data, stats, rollouts)
        if data is not None and statistics not in (None, given):
            raise MismatchError(
                f"{source} was trained with the statistics {statistics}, {data} has others: leave "
                "data out, or give a statistics file if you know better"
            )
        if kind == "dino_wm" and data is not None and task_of(Path(data)) is None:
            raise MismatchError(
                f"{source} was trained on a data set of DINO-WM, {data} is none: give that one, or "
                "a statistics file"
            )
        statistics = given
    if statistics is not None:
        _set_statistics(world_model, statistics)
    resolved = resolve_device(device)
    world_model = world_model.to(resolved)
    return world_model if dtype is None else world_model.to(resolve_dtype(dtype, resolved))


def save(world_model: DINOWM, folder: str | Path) -> None:
    """Write a world model, float or quantized; `load` gives it back bit for bit.

    Raises:
        UsageError: the folder holds something else than a saved model.
        QuantWMError: it cannot be written.
    """
    if quantization_of(world_model) is None:
        checkpoint.save_world_model(world_model, folder)
    else:
        artifact.save_quantized(world_model, folder)


def _folder_of(source: str | Path) -> Path:
    folder = Path(source)
    if isinstance(source, str) and source in bundled_names():
        return bundled_folder(source)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UsageError(
            f"{source} is a file: give the model's folder, for a checkpoint of DINO-WM the one "
            "that holds hydra.yaml"
        )
    if isinstance(source, Path) or "/" in source:
        raise UsageError(f"there is no folder {source}")
    raise unknown_name("world model", source, bundled_names())


def _own(folder: Path) -> DINOWM:
    if storage.read_metadata(folder).get("format") == artifact.FORMAT:
        return _load_quantized(folder)
    return checkpoint.load_world_model(folder)


def _of_prejepa(folder: Path, task: str | None, data: str | Path | None) -> DINOWM:
    """stable-worldmodel's; the task is the one named, or else that of the data set."""
    if task is None and data is not None and (stored := stored_task(Path(data))) is not None:
        task = stored["name"]
    if task is None:
        raise UsageError(
            f"{folder} is a PreJEPA checkpoint, which does not say what it was trained in: name "
            "it, task='pusht' (--task pusht)"
        )
    known = get_task(task)
    return read_prejepa(folder, known.name, known.action_dim, known.proprio_dim)


def _of_dino_wm(folder: Path) -> tuple[DINOWM, Statistics | None, int | None]:
    """A checkpoint of DINO-WM's, statistics that are known of it, trajectories that it saw."""
    read = read_checkpoint(folder)
    config, task = read.world_model.config, get_task(read.settings.task)
    for name, ours in (("action", task.action_dim), ("proprio", task.proprio_dim)):
        if getattr(config, f"{name}_dim") != ours:
            raise UsageError(
                f"{read.file} takes {name}s of width {getattr(config, f'{name}_dim')}, quantwm's "
                f"{task.name} has width {ours}"
            )
    return read.world_model, _known_statistics(read), read.settings.rollouts


def _known_statistics(read: Checkpoint) -> Statistics | None:
    """Those that the public code has without looking at a data set."""
    config = read.world_model.config
    if not read.settings.normalize:
        return Statistics(
            (0.0,) * config.action_dim,
            (1.0,) * config.action_dim,
            (0.0,) * config.proprio_dim,
            (1.0,) * config.proprio_dim,
        )
    return PUSHT_STATISTICS if read.settings.task == "pusht" else None


def _given_statistics(
    task_name: str, data: str | Path | None, stats: str | Path | None, rollouts: int | None
) -> Statistics:
    if stats is not None:
        return Statistics.read(Path(stats))
    assert data is not None
    opened = open_data(Path(data), get_task(task_name))
    count = sum(len(opened.splits[name].trajectories) for name in SPLITS)
    if rollouts is not None and rollouts < count:
        raise UsageError(
            f"the model was trained with statistics of the first {rollouts} trajectories "
            f"(env.dataset.n_rollout), {data} has {count}: give them in a statistics file"
        )
    return opened.statistics


def _set_statistics(world_model: DINOWM, statistics: Statistics) -> None:
    config = replace(world_model.config, **statistics.to_dict())
    world_model.config = config
    world_model.action_spec = ActionSpec(
        config.action_dim, config.frameskip, config.action_mean, config.action_std
    )


def _load_quantized(folder: Path) -> DINOWM:
    metadata: dict[str, Any] = storage.read_metadata(folder)
    if metadata.get("config") is None:
        raise UsageError(
            f"{folder} holds a quantized model of a class that is not quantwm's; "
            "use quantwm.quant.artifact.load_quantized with a model of that class"
        )
    config = DINOWMConfig.from_dict(metadata["config"])
    return artifact.load_quantized(folder, checkpoint.skeleton(config))
