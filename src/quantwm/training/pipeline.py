"""From a trajectory folder to a world model that plans: statistics, latents, training, export."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantwm import storage
from quantwm.compute import resolve_device
from quantwm.data.latents import EndToEnd, FrameIndex, encode_split
from quantwm.data.sources import SPLITS, DataSet, Split, end_to_end, open_data
from quantwm.data.statistics import Statistics
from quantwm.errors import MismatchError, UsageError, unknown_name
from quantwm.fingerprint import model_hash
from quantwm.models.checkpoint import (
    BUNDLED_ENCODER,
    ENCODER_SHA256,
    new_world_model,
    save_world_model,
)
from quantwm.models.config import DecoderConfig, DINOWMConfig, EncoderConfig, PredictorConfig
from quantwm.models.dino_wm import DINOWM
from quantwm.models.encoder_weights import Progress, open_encoder
from quantwm.protocols import Task
from quantwm.quant.apply import quantization_of
from quantwm.training.batches import Windows, window_starts
from quantwm.training.decoder import DecoderSettings, Frames, train_decoder
from quantwm.training.initialization import copy_trainable, initialize
from quantwm.training.loop import Report
from quantwm.training.loss import window_length
from quantwm.training.train import TrainingSettings, train

MODEL_FOLDER = "model"
"""Where in a run's folder the finished model is."""
HORIZON = 5
"""Model steps of a plan: how far validation rolls out."""

SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "compact": {
        "wall": {
            "image_size": 98,
            "num_hist": 1,
            "predictor": PredictorConfig(3, 4, 64, 512, dropout=0.0),
        },
        # At 98 pixels the objective hardly sees a block that is off (docs/tasks.md); the averaged
        # tokens of a large image do, at the predictor's price of a small one.
        "pusht": {
            "image_size": 196,
            "token_pool": 2,
            "num_hist": 3,
            "predictor": PredictorConfig(2, 4, 64, 512, dropout=0.0),
        },
        "point_maze": {
            "image_size": 112,
            "num_hist": 3,
            "proprio_weight": 0.0,
            "predictor": PredictorConfig(2, 4, 64, 512, dropout=0.0),
        },
    },
    "paper": {
        "wall": {"image_size": 196, "num_hist": 1, "predictor": PredictorConfig()},
        "pusht": {"image_size": 196, "num_hist": 3, "predictor": PredictorConfig()},
        "point_maze": {
            "image_size": 196,
            "num_hist": 3,
            "proprio_weight": 0.0,
            "predictor": PredictorConfig(),
        },
    },
}
"""What each scale changes of `DINOWMConfig`'s defaults, by task."""
_SEEN_THROUGH = (
    "frameskip",
    "token_pool",
    "frame_size",
    "pixel_mean",
    "pixel_std",
    "position_offset",
)
"""Options of `DINOWMConfig`, beside the image's size, that latents depend on."""
DECODER_SIZES: dict[str, dict[str, Any]] = {
    "compact": {"channel": 128, "n_res_block": 2, "n_res_channel": 32},
    "paper": {},
}
"""What each scale changes of `DecoderConfig`'s defaults."""


def model_config(
    task: Task,
    statistics: Statistics,
    scale: str,
    encoder: EncoderConfig | None = None,
    decoder: str | None = None,
) -> DINOWMConfig:
    """The configuration of a scale with the statistics of a data set.

    Args:
        encoder: another size than ViT-S/14; the predictor's token width follows it.
        decoder: kind of the decoder that it gets; None for none.

    Raises:
        UsageError: an unknown scale, or a task that has none of that name.
    """
    if scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    if task.name not in SCALES[scale]:
        raise unknown_name(f"task of scale {scale!r}", task.name, SCALES[scale])
    return DINOWMConfig(
        task=task.name,
        action_dim=task.action_dim,
        proprio_dim=task.proprio_dim,
        encoder=encoder or EncoderConfig(),
        decoder=_decoder_config(decoder, scale),
        **statistics.to_dict(),
        **SCALES[scale][task.name],
    )


def latents_key(data: DataSet, encoder: str, config: DINOWMConfig) -> dict[str, Any]:
    """What the cached latents of a data set depend on (`encode_split`).

    Args:
        encoder: SHA-256 of its weights.
    """
    usual = {field.name: field.default for field in fields(config)}
    chosen = {name: getattr(config, name) for name in _SEEN_THROUGH}
    # What is as usual is left out, so that a cache outlives the options that come later.
    changed = {name: value for name, value in chosen.items() if value != usual[name]}
    # As JSON gives it back.
    own = {n: list(v) if isinstance(v, tuple) else v for n, v in changed.items()}
    return {**data.key, "encoder": encoder, "image_size": config.image_size, **own}


def train_task(
    task: Task,
    data: Path | Sequence[Path],
    out: Path,
    cache: Path,
    settings: TrainingSettings,
    *,
    scale: str | None = None,
    init: DINOWM | None = None,
    encoder: str | Path = BUNDLED_ENCODER,
    download: bool = False,
    decoder: str | None = None,
    decoder_settings: DecoderSettings | None = None,
    device: str = "auto",
    downloading: Progress | None = None,
    encoding: Callable[[int, int], None] | None = None,
    report: Report | None = None,
    decoder_report: Report | None = None,
) -> DINOWM:
    """Train a world model for a task and write it to `out`; resumable at every stage.

    Args:
        task: must be the one the data were collected in.
        data: a folder that `quantwm collect` wrote, or DINO-WM's own data set; or several, of
            which the first one's statistics normalise all.
        out: receives `checkpoint.pt`, `curve.jsonl` and, at the end, the model in `model/`; a
            decoder's in `decoder/`.
        cache: receives the latents; a few GB, best outside of any synchronised folder. Those of a
            second data set go to a folder `2` in it, and so on.
        scale: "compact" (None too) or "paper"; beside `init`, of the decoder alone.
        init: a float model to go on training from, on these data or others; the new one has its
            configuration and statistics.
        encoder: a released encoder's name or a file of weights, see `open_encoder`.
        download: fetch the encoder's weights if this machine has none.
        decoder: kind of decoder to train as well, for pictures of latents: "vqvae"; None for
            none. A finished run gets one without being trained again.
        decoder_settings: how; None for the defaults.
        device: "auto" takes a GPU where there is one.
        downloading, encoding, report, decoder_report: progress of the stages.

    Raises:
        UsageError: no data there, an unknown scale, no such encoder, or a scale beside an `init`
            that has its own.
        MismatchError: the folders belong to other data, another task, another encoder or other
            settings, or `init` is another task's or has another encoder.
        CorruptFileError: the data or the encoder's weights are damaged.
    """
    if init is not None and scale is not None and decoder is None:
        raise UsageError("the model to go on from has a size of its own: leave the scale out")
    scale = scale or "compact"
    folders = [data] if isinstance(data, Path) else list(data)
    data_sets = [open_data(folder, task) for folder in folders]
    weights = open_encoder(encoder, download=download, progress=downloading)
    if init is None:
        config = model_config(task, data_sets[0].statistics, scale, weights.config, decoder)
    else:
        config = _config_of(init, task, weights.state, scale, decoder)
    world_model = new_world_model(config, weights.state)
    world_model = world_model.to(resolve_device(device))
    for parameter in world_model.encoder.parameters():
        parameter.requires_grad_(False)
    lengths = {
        "train": window_length(world_model, settings.unroll),
        "validation": HORIZON + 1,
    }
    # What can be refused is refused before hours of encoding and training.
    storage.check_replaceable(out / MODEL_FOLDER)
    splits = {name: end_to_end([each.splits[name] for each in data_sets]) for name in SPLITS}
    named = ", ".join(map(str, folders))
    _check_windows(named, splits, config.frameskip, lengths, settings.batch_size)
    windows = {}
    for split in SPLITS:
        parts = [
            encode_split(
                world_model,
                data_set.splits[split],
                cache / str(number) if number > 1 else cache,
                split,
                key=latents_key(data_set, weights.sha256, config),
                progress=encoding,
            )
            for number, data_set in enumerate(data_sets, 1)
        ]
        windows[split] = Windows(
            config,
            task,
            splits[split].trajectories,
            EndToEnd(parts) if len(parts) > 1 else parts[0],
            lengths[split],
            world_model.device,
        )
    if init is None:
        initialize(world_model, windows["train"], settings.seed)
    else:
        copy_trainable(init, world_model)
    trained = train(
        world_model,
        windows["train"],
        windows["validation"],
        out,
        settings,
        encoder=None if weights.sha256 == ENCODER_SHA256 else weights.sha256,
        init=None if init is None else model_hash(init),
        data=_identity_of(data_sets),
        report=report,
    )
    if decoder is not None:
        pictured = {name: (windows[name], Frames(trained, splits[name])) for name in windows}
        train_decoder(
            trained,
            *pictured["train"],
            pictured["validation"],
            out / "decoder",
            decoder_settings or DecoderSettings(),
            report=decoder_report,
        )
    for parameter in trained.encoder.parameters():
        parameter.requires_grad_(True)
    save_world_model(trained, out / MODEL_FOLDER, half=True)
    return trained


def _check_windows(
    named: str,
    splits: Mapping[str, Split],
    frameskip: int,
    lengths: Mapping[str, int],
    batch_size: int,
) -> None:
    """Refuse splits of which no window, or no batch to train on, can be made.

    Args:
        named: the data, for the message.
        lengths: frames in a window of each split.
    """
    counts = {}
    for split, part in splits.items():
        try:
            frames = FrameIndex.every(frameskip, part.trajectories)
            counts[split] = len(window_starts(frames, lengths[split]))
        except ValueError as error:
            raise UsageError(f"{named} ({split}): {error}; collect longer trajectories") from error
    if counts["train"] < batch_size:
        raise UsageError(
            f"{named} has {counts['train']} windows to train on, fewer than a batch of "
            f"{batch_size}: collect more trajectories, or give a smaller --batch-size"
        )


def _identity_of(data_sets: Sequence[DataSet]) -> Mapping[str, Any]:
    """What a run that goes on must share of its data."""
    if len(data_sets) == 1:
        return data_sets[0].identity
    return {"several": [dict(data_set.identity) for data_set in data_sets]}


def _config_of(
    init: DINOWM, task: Task, encoder: Mapping[str, Tensor], scale: str, decoder: str | None
) -> DINOWMConfig:
    """The configuration of a model to go on from, with the decoder that is asked for."""
    if init.config.task != task.name:
        raise MismatchError(
            f"the model to go on from was trained in {init.config.task}, not in {task.name}"
        )
    if quantization_of(init) is not None:
        raise UsageError("the model to go on from is quantized: give the float model")
    if init.config.action_mean is None:
        raise UsageError(
            "the model to go on from carries no statistics: convert it with its data set first"
        )
    own = init.encoder.state_dict()
    if own.keys() != encoder.keys() or not all(
        torch.equal(own[name].float().cpu(), value.float()) for name, value in encoder.items()
    ):
        raise MismatchError("the model to go on from has another encoder: name that one")
    return replace(init.config, decoder=_decoder_config(decoder, scale))


def _decoder_config(kind: str | None, scale: str) -> DecoderConfig | None:
    if scale not in DECODER_SIZES:
        raise unknown_name("scale", scale, DECODER_SIZES)
    return None if kind is None else DecoderConfig(kind, **DECODER_SIZES[scale])
