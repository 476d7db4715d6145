"""DINO-WM: DINOv2 patch tokens, a ViT predictor, rollouts in latent space (arXiv 2411.04983)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantwm.errors import UsageError, unknown_name
from quantwm.models.dinov2 import DINOv2
from quantwm.models.predictor import Predictor, Window
from quantwm.protocols import ActionSpec, Latent, LinearGroup, Observation, ResidualStream

Numbers = tuple[float, ...]
_TOKENS_A_CHUNK = 800


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
class DINOWMConfig:
    """Everything that planning needs besides the weights.

    Attributes:
        task: the task it was trained on.
        action_dim, proprio_dim: raw widths.
        image_size: side the encoder sees; a multiple of its patch size (196 in DINO-WM).
        frame_size: side that frames are resized to before that; None: they are taken as they are.
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
    """

    task: str
    action_dim: int
    proprio_dim: int
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    image_size: int = 196
    frame_size: int | None = None
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

    def __post_init__(self) -> None:
        problems = []
        if self.concat_dim not in (0, 1):
            problems.append(f"concat_dim must be 0 or 1, got {self.concat_dim}")
        if self.image_size % self.encoder.patch_size:
            patch = self.encoder.patch_size
            problems.append(f"image_size {self.image_size} is no multiple of the patch {patch}")
        elif self.token_pool < 1 or self._grid % self.token_pool:
            problems.append(
                f"token_pool {self.token_pool} does not divide the grid of {self._grid} patches"
            )
        if self.num_hist < 1 or self.frameskip < 1:
            problems.append("num_hist and frameskip must be at least 1")
        if self.concat_dim == 0:
            for name in ("action_emb_dim", "proprio_emb_dim"):
                if getattr(self, name) != self.encoder.width:
                    problems.append(f"concat_dim 0 needs {name} = {self.encoder.width}")
        for name, width in (("action", self.action_dim), ("proprio", self.proprio_dim)):
            for statistic in ("mean", "std"):
                values = getattr(self, f"{name}_{statistic}")
                if values is not None and len(values) != width:
                    problems.append(f"{name}_{statistic} needs {width} values, got {len(values)}")
                if values is not None and statistic == "std" and min(values) <= 0:
                    problems.append(f"{name}_std must be positive, got {values}")
        if problems:
            raise UsageError("invalid DINO-WM configuration: " + "; ".join(problems))

    @property
    def _grid(self) -> int:
        return self.image_size // self.encoder.patch_size

    @property
    def image_patches(self) -> int:
        """Patch tokens that the encoder computes for a frame."""
        return self._grid**2

    @property
    def num_patches(self) -> int:
        """Patch tokens of a frame's latent, once they are pooled."""
        return (self._grid // self.token_pool) ** 2

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
        silent = {"frame_size": None, "token_pool": 1}
        return {k: v for k, v in values.items() if k not in silent or v != silent[k]}

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
            for name, kind in (("encoder", EncoderConfig), ("predictor", PredictorConfig)):
                if isinstance(converted.get(name), Mapping):
                    converted[name] = kind(**converted[name])
            return cls(**converted)
        except TypeError as error:
            raise UsageError(f"invalid DINO-WM configuration: {error}") from error


class DINOWM(nn.Module):
    """The world model of DINO-WM; satisfies `quantwm.protocols.WorldModel`.

    The latent is {"visual": (B, T, P, D), "proprio": (B, T, E)}.
    """

    def __init__(self, config: DINOWMConfig) -> None:
        super().__init__()
        self.config = config
        e, p = config.encoder, config.predictor
        self.encoder = DINOv2(
            e.depth, e.width, e.heads, patch_size=e.patch_size, pretrained_grid=e.pretrained_grid
        )
        self.proprio_embed = nn.Conv1d(config.proprio_dim, config.proprio_emb_dim, 1)
        model_action = config.action_dim * config.frameskip
        self.action_embed = nn.Conv1d(model_action, config.action_emb_dim, 1)
        self.predictor = Predictor(
            config.frame_tokens,
            config.num_hist,
            config.token_width,
            p.depth,
            p.heads,
            p.head_dim,
            p.mlp_width,
            p.dropout,
        )
        self.action_spec = ActionSpec(
            config.action_dim, config.frameskip, config.action_mean, config.action_std
        )
        self.objective_weights: Mapping[str, float] = {
            "visual": 1.0,
            "proprio": config.proprio_weight,
        }
        self._keep_keys = True

    @property
    def trained_in(self) -> str:
        """Name of the task that the model was trained in."""
        return self.config.task

    @property
    def rollout_chunk(self) -> int:
        """Candidates that a CPU core should roll out at once.

        Enough tokens a frame for the matrix products to reach their speed, few enough for what
        lies between them to stay in a cache.
        """
        return max(1, _TOKENS_A_CHUNK // self.config.frame_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """The compute type: that of the position embedding, which is never quantized."""
        return self.predictor.pos_embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.predictor.pos_embedding.device

    def preprocess(self, visual: Any) -> Tensor:
        """Raw frames (..., H, W, 3) uint8 → encoder input (..., 3, S, S), float32.

        Scaled to [0, 1], normalised with mean 0.5 and standard deviation 0.5, resized.
        """
        frames = torch.as_tensor(visual).to(self.device)
        lead = frames.shape[:-3]
        frames = frames.reshape(-1, *frames.shape[-3:]).permute(0, 3, 1, 2).float()
        frames = (frames / 255.0 - 0.5) / 0.5
        sides = [self.config.image_size]
        if self.config.frame_size not in (None, frames.shape[-1]):
            sides = [self.config.frame_size, *sides]
        for side in sides:
            frames = F.interpolate(
                frames, size=(side, side), mode="bilinear", antialias=True, align_corners=False
            )
        return frames.reshape(*lead, 3, *frames.shape[-2:])

    def encode(self, observation: Observation) -> dict[str, Tensor]:
        """Raw observations of (B, T) frames → {"visual": (B, T, P, D), "proprio": (B, T, E)}."""
        images = self.preprocess(observation["visual"]).to(self.dtype)
        batch, frames = images.shape[:2]
        visual = self.encode_images(images.flatten(0, 1))
        visual = visual.view(batch, frames, *visual.shape[1:])
        proprio = self.normalize_proprio(torch.as_tensor(observation["proprio"]))
        return {"visual": visual, "proprio": self.embed_proprio(proprio)}

    def encode_images(self, images: Tensor) -> Tensor:
        """Encoder input (B, 3, S, S) → the latent's patch tokens (B, P, D)."""
        tokens = cast(Tensor, self.encoder(images))
        pool = self.config.token_pool
        if pool == 1:
            return tokens
        side = self.config.image_size // self.config.encoder.patch_size
        grid = tokens.view(len(tokens), side // pool, pool, side // pool, pool, tokens.shape[-1])
        return grid.mean((2, 4)).flatten(1, 2)

    def normalize_proprio(self, proprio: Tensor) -> Tensor:
        """Raw proprioception (..., P) → normalised float32 on the model's device."""
        proprio = proprio.to(self.device, torch.float32)
        if self.config.proprio_mean is None or self.config.proprio_std is None:
            return proprio
        mean = torch.tensor(self.config.proprio_mean, device=self.device)
        return (proprio - mean) / torch.tensor(self.config.proprio_std, device=self.device)

    def embed_proprio(self, proprio: Tensor) -> Tensor:
        """Normalised proprioception (rows, T, P) → (rows, T, E)."""
        return _embed(self.proprio_embed, proprio.to(self.dtype))

    def embed_actions(self, actions: Tensor) -> Tensor:
        """Normalised model actions (rows, T, frameskip·dim) → (rows, T, E)."""
        return _embed(self.action_embed, actions.to(self.device, self.dtype))

    def tokens(self, visual: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
        """Predictor tokens of one frame.

        Args:
            visual: (rows, P, D).
            proprio: embedded, (rows, E).
            action: embedded, (rows, E').

        Returns:
            (rows, frame_tokens, token_width).
        """
        c = self.config
        if c.concat_dim == 0:
            return torch.cat([visual, proprio[:, None], action[:, None]], dim=1)
        extra = torch.cat(
            [proprio.repeat(1, c.num_proprio_repeat), action.repeat(1, c.num_action_repeat)], dim=1
        )
        return torch.cat([visual, extra[:, None].expand(-1, visual.shape[1], -1)], dim=2)

    def split_tokens(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens (..., frame_tokens, token_width) → the latent's parts, the action dropped."""
        c = self.config
        if c.concat_dim == 0:
            return {"visual": tokens[..., :-2, :], "proprio": tokens[..., -2, :]}
        width = c.encoder.width
        proprio = tokens[..., 0, width : width + c.proprio_emb_dim]
        return {"visual": tokens[..., :width], "proprio": proprio}

    def replace_action(self, tokens: Tensor, action: Tensor) -> Tensor:
        """Overwrite, in place, the action part of predicted tokens (rows, frame_tokens, width)."""
        if self.config.concat_dim == 0:
            tokens[:, -1] = action
        else:
            repeated = action.repeat(1, self.config.num_action_repeat)
            tokens[:, :, -self.config.action_width :] = repeated[:, None]
        return tokens

    def predict(self, frames: Tensor) -> Tensor:
        """Tokens of T ≤ num_hist frames (rows, T, frame_tokens, width) → each one's successor."""
        count = frames.shape[1]
        tokens = cast(Tensor, self.predictor(frames.flatten(1, 2)))
        return tokens.view(len(frames), count, -1, tokens.shape[-1])

    def rollout(
        self, latent: Latent, actions: Tensor, *, last_only: bool = False
    ) -> dict[str, Tensor]:
        """Autoregressive prediction, see `WorldModel.rollout`.

        Returns:
            {"visual": (B, N, K, P, D), "proprio": (B, N, K, E)}, K = H + 1 frames or 1.
        """
        assert isinstance(latent, dict)
        batch, candidates, horizon, _ = actions.shape
        observed = latent["visual"].shape[1]
        if not 1 <= observed <= horizon:
            raise UsageError(f"{observed} observed frames need at least as many actions")
        action = self.embed_actions(actions.flatten(0, 1))
        # A view where there is one episode: the tokens are the first copy.
        parts = {
            name: part.unsqueeze(1).expand(-1, candidates, *part.shape[1:]).flatten(0, 1)
            for name, part in latent.items()
        }
        frames = [
            self.tokens(parts["visual"][:, t], parts["proprio"][:, t], action[:, t])
            for t in range(observed)
        ]
        window, fresh = Window(self.predictor, keep=self._keep_keys), frames
        for t in range(observed, horizon + 1):
            newest = window.successor(fresh)
            if t < horizon:
                newest = self.replace_action(newest, action[:, t])
            fresh = [newest]
            frames = fresh if last_only else [*frames, newest]
        stacked = torch.stack(frames, dim=1)
        return self.split_tokens(stacked.view(batch, candidates, *stacked.shape[1:]))

    @contextmanager
    def whole_windows(self) -> Iterator[None]:
        """Keep no keys and values: a block's output depends on its arguments alone.

        Rollouts are the same up to rounding, at the cost of more operations.
        """
        before, self._keep_keys = self._keep_keys, False
        try:
            yield
        finally:
            self._keep_keys = before

    def quantizable_groups(self) -> Sequence[LinearGroup]:
        """Four groups a block, then the optional patch embedding and attention operands."""
        groups = [
            LinearGroup(
                ("encoder.patch_embed.proj",), None, "encoder.patch_embed", "patch_embedding"
            )
        ]
        for part, depth, tokens in (
            ("encoder", len(self.encoder.blocks), None),
            ("predictor", len(self.predictor.blocks), self.config.frame_tokens),
        ):
            for index in range(depth):
                block = f"{part}.blocks.{index}"
                linears = (
                    ("attn.qkv", "norm1"),
                    ("attn.proj", None),
                    ("mlp.fc1", "norm2"),
                    ("mlp.fc2", None),
                )
                for name, norm in linears:
                    producer = f"{block}.{norm}" if norm else None
                    groups.append(
                        LinearGroup((f"{block}.{name}",), producer, block, tokens_per_frame=tokens)
                    )
                groups.extend(
                    LinearGroup((f"{block}.attn.{tap}",), None, block, "attention_matmul", tokens)
                    for tap in ("q_input", "k_input", "p_input", "v_input")
                )
        return groups

    def residual_streams(self) -> Sequence[ResidualStream]:
        """Those of the encoder and the predictor."""
        return (
            self.encoder.residual_stream("encoder"),
            self.predictor.residual_stream("predictor"),
        )


def _embed(conv: nn.Conv1d, values: Tensor) -> Tensor:
    # A kernel of one is a linear map; F.linear spares two transposes and is the faster kernel.
    return F.linear(values, conv.weight[:, :, 0], conv.bias)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_jsonable(item) for item in value]
    return value
