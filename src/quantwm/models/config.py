"""Sizes and settings of a DINO-WM world model: everything that planning needs but the weights."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

from quantwm.errors import UsageError, unknown_name

Numbers = tuple[float, ...]
DECODERS = ("vqvae", "transposed_conv")
FEATURES = ("patch", "cls")
_SILENT: Mapping[str, Any] = {
    "frame_size": None,
    "pixel_mean": [0.5] * 3,
    "pixel_std": [0.5] * 3,
    "position_offset": 0.1,
    "feature": "patch",
    "token_pool": 1,
    "decoder": None,
}


@dataclass(frozen=True)
class EncoderConfig:
    """Size of the DINOv2 encoder; the default is ViT-S/14."""

    depth: int = 12
    width: int = 384
    heads: int = 6
    patch_size: int = 14
    pretrained_grid: int = 37


@dataclass(frozen=True)
class PredictorConfig:
    """Size of the predictor's transformer; the default is DINO-WM's."""

    depth: int = 6
    heads: int = 16
    head_dim: int = 64
    mlp_width: int = 2048
    dropout: float = 0.1


@dataclass(frozen=True)
class DecoderConfig:
    """Size of a decoder of pictures; the defaults are DINO-WM's.

    Attributes:
        kind: "vqvae" for a grid of tokens, "transposed_conv" for one token a frame.
        channel, n_res_block, n_res_channel, n_embed, quantize: of the VQ-VAE; with `quantize`,
            tokens are rounded to one of `n_embed` vectors first.
        depth, kernel_size, stride, image_size: of the transposed convolutions.
    """

    kind: str = "vqvae"
    channel: int = 384
    n_res_block: int = 4
    n_res_channel: int = 128
    n_embed: int = 2048
    quantize: bool = False
    depth: int = 64
    kernel_size: int = 5
    stride: int = 3
    image_size: int = 224

    def __post_init__(self) -> None:
        if self.kind not in DECODERS:
            raise unknown_name("decoder", self.kind, DECODERS)


@dataclass(frozen=True)
class DINOWMConfig:
    """Everything that planning needs besides the weights.

    Attributes:
        task: the task it was trained on.
        action_dim, proprio_dim: raw widths.
        image_size: side the encoder sees; a multiple of its patch size (196 in DINO-WM).
        frame_size: side that frames are resized to before that; None: they are taken as they are.
        pixel_mean, pixel_std: of each colour from 0 to 1, that frames are normalised with; 0.5 as
            in DINO-WM.
        position_offset: what Meta's code adds to a grid before it scales the encoder's position
            embedding to it, 0.1; 0 as in Hugging Face's.
        feature: "patch" for the encoder's patch tokens, "cls" for its class token alone.
        token_pool: patch tokens are averaged over squares of this side; 1, as in DINO-WM, leaves
            them. Small objects need a large image, and a cheap predictor few tokens.
        num_hist: frames the predictor sees.
        concat_dim: 1 appends the embeddings to every patch token, 0 adds two tokens a frame.
        frameskip: raw actions in one model action.
        action_emb_dim, proprio_emb_dim: widths of the embeddings; the encoder's width where
            `concat_dim` is 0.
        num_action_repeat, num_proprio_repeat: how often an embedding is repeated along the token.
        proprio_weight: α of the objective MSE(visual) + α·MSE(proprio).
        action_mean, action_std, proprio_mean, proprio_std: statistics of the training data, or
            None: such a model encodes and predicts but cannot plan.
        decoder: of pictures; None if the model has none.
    """

    task: str
    action_dim: int
    proprio_dim: int
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    image_size: int = 196
    frame_size: int | None = None
    pixel_mean: Numbers = (0.5, 0.5, 0.5)
    pixel_std: Numbers = (0.5, 0.5, 0.5)
    position_offset: float = 0.1
    feature: str = "patch"
    token_pool: int = 1
    num_hist: int = 3
    concat_dim: int = 1
    frameskip: int = 5
    action_emb_dim: int = 10
    proprio_emb_dim: int = 10
    num_action_repeat: int = 1
    num_proprio_repeat: int = 1
    proprio_weight: float = 1.0
    action_mean: Numbers | None = None
    action_std: Numbers | None = None
    proprio_mean: Numbers | None = None
    proprio_std: Numbers | None = None
    decoder: DecoderConfig | None = None

    def __post_init__(self) -> None:
        problems = [*self._token_problems(), *self._width_problems()]
        if self.num_hist < 1 or self.frameskip < 1:
            problems.append("num_hist and frameskip must be at least 1")
        if problems:
            raise UsageError("invalid DINO-WM configuration: " + "; ".join(problems))

    def _token_problems(self) -> Iterator[str]:
        if self.feature not in FEATURES:
            yield f"feature must be patch or cls, got {self.feature!r}"
        if self.image_size % self.encoder.patch_size:
            patch = self.encoder.patch_size
            yield f"image_size {self.image_size} is no multiple of the patch {patch}"
        elif self.token_pool < 1 or self._grid % self.token_pool:
            yield f"token_pool {self.token_pool} does not divide the grid of {self._grid} patches"
        elif self.feature == "cls" and self.token_pool != 1:
            yield "token_pool averages patch tokens, which feature 'cls' does not use"
        elif self.decoder is not None and self.decoder.kind != "vqvae" and self.num_patches > 1:
            yield f"decoder {self.decoder.kind!r} takes one token a frame, not {self.num_patches}"

    def _width_problems(self) -> Iterator[str]:
        if self.concat_dim not in (0, 1):
            yield f"concat_dim must be 0 or 1, got {self.concat_dim}"
        if self.concat_dim == 0:
            for name in ("action_emb_dim", "proprio_emb_dim"):
                if getattr(self, name) != self.encoder.width:
                    yield f"concat_dim 0 needs {name} = {self.encoder.width}"
        for name, width in (
            ("action", self.action_dim),
            ("proprio", self.proprio_dim),
            ("pixel", 3),
        ):
            for statistic in ("mean", "std"):
                values = getattr(self, f"{name}_{statistic}")
                if values is not None and len(values) != width:
                    yield f"{name}_{statistic} needs {width} values, got {len(values)}"
                if values is not None and statistic == "std" and min(values) <= 0:
                    yield f"{name}_std must be positive, got {values}"

    @property
    def _grid(self) -> int:
        return self.image_size // self.encoder.patch_size

    @property
    def image_patches(self) -> int:
        """Patch tokens that the encoder computes for a frame."""
        return self._grid**2

    @property
    def num_patches(self) -> int:
        """Tokens of a frame's latent: patches, once they are pooled, or the class token."""
        return 1 if self.feature == "cls" else (self._grid // self.token_pool) ** 2

    @property
    def frame_tokens(self) -> int:
        """Tokens a frame in the predictor: patches, and two more where `concat_dim` is 0."""
        return self.num_patches + (2 if self.concat_dim == 0 else 0)

    @property
    def token_width(self) -> int:
        """Width of a predictor token (404 in DINO-WM)."""
        return self.encoder.width + self.concat_dim * (self.proprio_width + self.action_width)

    @property
    def proprio_width(self) -> int:
        """Width that the repeated proprio embedding takes in a token."""
        return self.proprio_emb_dim * self.num_proprio_repeat

    @property
    def action_width(self) -> int:
        """Width that the repeated action embedding takes in a token."""
        return self.action_emb_dim * self.num_action_repeat

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them back."""
        values = cast(dict[str, Any], _jsonable(asdict(self)))
        # Left out where it says nothing, so that files and hashes stay what they were without it.
        return {k: v for k, v in values.items() if k not in _SILENT or v != _SILENT[k]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DINOWMConfig":
        """Build from `to_dict`'s output.

        Raises:
            UsageError: an unknown or missing key, or values that contradict each other.
        """
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise unknown_name("world-model setting", name, known)
        converted: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        try:
            for name, kind in (
                ("encoder", EncoderConfig),
                ("predictor", PredictorConfig),
                ("decoder", DecoderConfig),
            ):
                if isinstance(converted.get(name), Mapping):
                    converted[name] = kind(**converted[name])
            return cls(**converted)
        except TypeError as error:
            raise UsageError(f"invalid DINO-WM configuration: {error}") from error


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_jsonable(item) for item in value]
    return value
