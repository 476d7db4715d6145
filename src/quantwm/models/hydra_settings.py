"""The `hydra.yaml` of a DINO-WM training run: the settings that change the model.

The public code writes it with every reference resolved; `${name}` and `${group.name}` that stand
alone are followed all the same, because runs configured by hand have them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantwm.errors import CorruptFileError, QuantWMError, UsageError, unknown_name
from quantwm.models.config import DecoderConfig, EncoderConfig, PredictorConfig

PROPRIO_WEIGHTS = {"wall": 1.0, "pusht": 1.0, "point_maze": 0.0}
"""α of the objective that the public code plans with, by task; also the tasks that are known."""
ACTION_SCALES = {"wall": 1.0, "pusht": 100.0, "point_maze": 1.0}
RENDERED_SIZE = 224

_MAX_BYTES = 256 * 1024
_MAX_COUNT = 10_000
_DECODER_SCALE = 16
"""The public code makes as many patches a side as a decoder of this stride makes pixels."""
_ENCODER_KEYS = ("_target_", "name", "feature_key")
_ENCODERS: Mapping[tuple[str, ...], str] = {
    ("models.dino.DinoV2Encoder", "dinov2_vits14", "x_norm_patchtokens"): "patch",
    ("models.dino.DinoV2Encoder", "dinov2_vits14", "x_norm_clstoken"): "cls",
}
_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
_MISSING: Any = object()
_VQVAE = {"channel": 128, "n_res_block": 2, "n_res_channel": 32, "n_embed": 512}
_TRANSPOSED_CONV = {"depth": 32, "kernel_size": 5, "stride": 3}
"""Defaults of the public classes, which a run's settings may leave out."""


@dataclass(frozen=True)
class HydraSettings:
    """What a training run's settings say of its model.

    Attributes:
        task: quantwm's name of the environment.
        image_size: side that the encoder sees.
        frame_size: side that frames are resized to before that; None for the rendered 224.
        num_hist, concat_dim, frameskip, action_emb_dim, proprio_emb_dim, num_action_repeat,
            num_proprio_repeat: as in `DINOWMConfig`.
        feature: which of the encoder's tokens, as in `DINOWMConfig`.
        predictor: its shape.
        decoder: its shape; None if the run has none.
        trained_encoder: whether the checkpoint holds an encoder of its own.
        normalize: whether actions and proprioception were normalised.
        rollouts: the run used so many trajectories of its data set; None for all.
    """

    task: str
    image_size: int
    frame_size: int | None
    num_hist: int
    concat_dim: int
    frameskip: int
    action_emb_dim: int
    proprio_emb_dim: int
    num_action_repeat: int
    num_proprio_repeat: int
    feature: str
    predictor: PredictorConfig
    decoder: DecoderConfig | None
    trained_encoder: bool
    normalize: bool
    rollouts: int | None

    @property
    def tokens(self) -> int:
        """Tokens of a frame's latent."""
        side = self.image_size // EncoderConfig().patch_size
        return 1 if self.feature == "cls" else side**2


def read_settings(path: Path) -> HydraSettings:
    """Read and check a `hydra.yaml`.

    Raises:
        CorruptFileError: it is no plain YAML, or is too large; no tag in it is ever followed.
        UsageError: it lacks a setting, has an impossible one, or describes a model that quantwm
            does not have; the message lists everything.
    """
    return _Reader(path).settings()


class _PlainLoader(yaml.SafeLoader):
    """Plain values only. Aliases are refused: merged often enough, they grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which DINO-WM's settings never have")
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise QuantWMError(f"cannot read {path}: {error}") from error
    if len(text) > _MAX_BYTES:
        raise CorruptFileError(f"{path} has more than {_MAX_BYTES} bytes: it is no hydra.yaml")
    try:
        values = yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is no plain YAML: {str(error)[:300]}") from error
    if not isinstance(values, dict):
        raise CorruptFileError(f"{path} holds a {type(values).__name__}, not settings by name")
    return values


class _Reader:
    """Looks settings up and collects what is wrong with them."""

    def __init__(self, path: Path) -> None:
        self._path, self._values = path, _read_yaml(path)
        self._problems: list[str] = []

    def settings(self) -> HydraSettings:
        task, size, feature = self._task(), self._size(), self._feature()
        self._check_parts()
        if self._count("num_pred", 1) != 1:
            self._problems.append("num_pred must be 1")
        result = {
            name: self._count(name)
            for name in ("num_hist", "frameskip", "action_emb_dim", "proprio_emb_dim")
        }
        result |= {
            name: self._count(name, 1) for name in ("num_action_repeat", "num_proprio_repeat")
        }
        concat_dim = self._count("concat_dim", least=0)
        if concat_dim not in (0, 1):
            self._problems.append(f"concat_dim must be 0 or 1, not {concat_dim}")
        if concat_dim == 0:
            self._check_token_widths(result)
        settings = HydraSettings(
            task=task,
            image_size=size // _DECODER_SCALE * EncoderConfig().patch_size,
            frame_size=None if size == RENDERED_SIZE else size,
            concat_dim=concat_dim,
            feature=feature,
            predictor=self._predictor(),
            decoder=self._decoder(size),
            trained_encoder=bool(self._get("model.train_encoder", False)),
            normalize=self._normalize(task),
            rollouts=self._rollouts(),
            **result,
        )
        if self._problems:
            listed = "\n".join(f"  - {problem}" for problem in self._problems)
            raise UsageError(f"{self._path} describes no model that quantwm can load:\n{listed}")
        return settings

    def _task(self) -> str:
        name = self._text("env.name")
        if name not in PROPRIO_WEIGHTS and name:
            self._problems.append(str(unknown_name("task (env.name)", name, PROPRIO_WEIGHTS)))
        return name

    def _size(self) -> int:
        size = self._count("img_size")
        for name in ("model.image_size", "env.dataset.transform.img_size"):
            other = self._get(name, size)
            if other != size:
                self._problems.append(f"{name} {_shown(other)} contradicts img_size {size}")
        if size < _DECODER_SCALE:
            self._problems.append(f"img_size must be at least {_DECODER_SCALE}, not {size}")
        return size

    def _feature(self) -> str:
        """Which tokens of the encoder, if it is the one that quantwm has."""
        found = tuple(self._text(f"encoder.{key}", "nothing") for key in _ENCODER_KEYS)
        if found not in _ENCODERS:
            self._problems.append(
                f"the encoder is {found[0]} ({found[1]}, {found[2]}); quantwm has "
                "models.dino.DinoV2Encoder (dinov2_vits14, x_norm_patchtokens or x_norm_clstoken)"
            )
        return _ENCODERS.get(found, "patch")

    def _check_parts(self) -> None:
        expected = {
            "predictor": "models.vit.ViTPredictor",
            "action_encoder": "models.proprio.ProprioceptiveEmbedding",
            "proprio_encoder": "models.proprio.ProprioceptiveEmbedding",
        }
        for part, target in expected.items():
            found = self._text(f"{part}._target_")
            if found and found != target:
                self._problems.append(f"the {part} is {found}; quantwm has {target}")
        for part in ("action_encoder", "proprio_encoder"):
            if self._count(f"{part}.tubelet_size", 1) != 1:
                self._problems.append(f"{part}.tubelet_size must be 1")
        if self._get("has_predictor", True) is not True:
            self._problems.append("has_predictor is false: the run trained no predictor")

    def _check_token_widths(self, widths: Mapping[str, int]) -> None:
        width = EncoderConfig().width
        for name in ("action_emb_dim", "proprio_emb_dim"):
            if widths[name] != width:
                self._problems.append(
                    f"concat_dim 0 makes tokens of the embeddings, so {name} must be {width}, not "
                    f"{widths[name]}"
                )

    def _predictor(self) -> PredictorConfig:
        dropout = self._get("predictor.dropout", 0.0)
        if type(dropout) not in {int, float} or not 0 <= dropout < 1:
            self._problems.append("predictor.dropout must be a number from 0 to 1")
            dropout = 0.0
        return PredictorConfig(
            depth=self._count("predictor.depth"),
            heads=self._count("predictor.heads"),
            head_dim=self._count("predictor.dim_head", PredictorConfig().head_dim),
            mlp_width=self._count("predictor.mlp_dim"),
            dropout=float(dropout),
        )

    def _decoder(self, size: int) -> DecoderConfig | None:
        if self._get("has_decoder", False) is not True:
            return None
        target = self._text("decoder._target_")
        if target == "models.vqvae.VQVAE":
            if self._count("decoder.in_channel", 3) != 3:
                self._problems.append("decoder.in_channel must be 3, the colours of a picture")
            quantize = self._get("decoder.quantize", True)
            if type(quantize) is not bool:
                self._problems.append("decoder.quantize must be true or false")
            channel, blocks, hidden, codes = (
                self._count(f"decoder.{name}", default) for name, default in _VQVAE.items()
            )
            return DecoderConfig("vqvae", channel, blocks, hidden, codes, quantize=bool(quantize))
        if target == "models.decoder.transposed_conv.TransposedConvDecoder":
            observed = self._get("decoder.observation_shape", [3, RENDERED_SIZE, RENDERED_SIZE])
            if observed != [3, size, size]:
                self._problems.append(
                    f"decoder.observation_shape is {_shown(observed)}; quantwm's decoders make "
                    f"pictures of the run's size, [3, {size}, {size}]"
                )
            depth, kernel_size, stride = (
                self._count(f"decoder.{name}", default)
                for name, default in _TRANSPOSED_CONV.items()
            )
            return DecoderConfig(
                "transposed_conv",
                depth=depth,
                kernel_size=kernel_size,
                stride=stride,
                image_size=size,
            )
        if target:
            self._problems.append(
                f"the decoder is {target}; quantwm has models.vqvae.VQVAE and "
                "models.decoder.transposed_conv.TransposedConvDecoder"
            )
        return None

    def _normalize(self, task: str) -> bool:
        scale = self._get("env.dataset.action_scale", ACTION_SCALES.get(task))
        if task in ACTION_SCALES and scale != ACTION_SCALES[task]:
            self._problems.append(
                f"env.dataset.action_scale is {_shown(scale)}; quantwm's {task} takes actions of "
                f"scale {ACTION_SCALES[task]:g}"
            )
        if self._get("env.dataset.relative", True) is not True:
            self._problems.append("env.dataset.relative is false; quantwm's PushT takes offsets")
        normalize = self._get("env.dataset.normalize_action", self._get("normalize_action", True))
        if type(normalize) is not bool:
            self._problems.append("normalize_action must be true or false")
        return bool(normalize)

    def _rollouts(self) -> int | None:
        if self._get("env.dataset.n_rollout", None) is None:
            return None
        return self._count("env.dataset.n_rollout", most=2**40)

    def _count(
        self, name: str, default: Any = _MISSING, *, least: int = 1, most: int = _MAX_COUNT
    ) -> int:
        value = self._get(name, default)
        if value is _MISSING:
            return least
        if type(value) is not int or not least <= value <= most:
            self._problems.append(
                f"{name} must be a whole number of {least} to {most}, not {_shown(value)}"
            )
            return least
        return value

    def _text(self, name: str, default: Any = _MISSING) -> str:
        value = self._get(name, default)
        if value is _MISSING:
            return ""
        if not isinstance(value, str):
            self._problems.append(f"{name} must be text, not {_shown(value)}")
            return ""
        return value[:100]

    def _get(self, name: str, default: Any = _MISSING) -> Any:
        """A setting by its dotted name; `_MISSING`, and a problem, where it has to be there."""
        value = self._lookup(name)
        for _ in range(10):
            reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
            if reference is None:
                break
            value = self._lookup(reference[1])
        if isinstance(value, str) and "${" in value:
            self._problems.append(
                f"{name} is {_shown(value)}, which cannot be resolved here: write its value there"
            )
            return _MISSING if default is _MISSING else default
        if value is _MISSING and default is _MISSING:
            self._problems.append(f"{name} is missing")
        return default if value is _MISSING else value

    def _lookup(self, name: str) -> Any:
        value: Any = self._values
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                return _MISSING
            value = value[key]
        return value


def _shown(value: Any) -> str:
    """A value for a message, never longer than a line."""
    if isinstance(value, str | float | bool) or value is None:
        return repr(value)[:80]
    if isinstance(value, list) and len(value) <= 4 and all(type(v) is int for v in value):
        return str(value)[:80]
    return str(value) if isinstance(value, int) and abs(value) < 10**9 else type(value).__name__
