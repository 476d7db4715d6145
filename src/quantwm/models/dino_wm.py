"""DINO-WM: DINOv2 patch tokens, a ViT predictor, rollouts in latent space (arXiv 2411.04983)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantwm.errors import UsageError
from quantwm.models.config import DINOWMConfig
from quantwm.models.decoder import new_decoder, pictures
from quantwm.models.dinov2 import DINOv2
from quantwm.models.predictor import Predictor, Window
from quantwm.protocols import ActionSpec, Latent, LinearGroup, Observation, ResidualStream

_TOKENS_A_CHUNK = 800


class DINOWM(nn.Module):
    """The world model of DINO-WM; satisfies `quantwm.protocols.WorldModel`.

    The latent is {"visual": (B, T, P, D), "proprio": (B, T, E)}.
    """

    def __init__(self, config: DINOWMConfig) -> None:
        super().__init__()
        self.config = config
        e, p = config.encoder, config.predictor
        self.encoder = DINOv2(
            e.depth,
            e.width,
            e.heads,
            patch_size=e.patch_size,
            pretrained_grid=e.pretrained_grid,
            position_offset=config.position_offset,
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
        self.decoder = (
            None if config.decoder is None else new_decoder(config.encoder.width, config.decoder)
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

        Scaled to [0, 1], normalised with the configuration's `pixel_mean` and `pixel_std`, resized.
        """
        frames = torch.as_tensor(visual).to(self.device)
        lead = frames.shape[:-3]
        frames = frames.reshape(-1, *frames.shape[-3:]).permute(0, 3, 1, 2).float()
        mean, std = (
            torch.tensor(values, device=self.device).view(3, 1, 1)
            for values in (self.config.pixel_mean, self.config.pixel_std)
        )
        frames = (frames / 255.0 - mean) / std
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
        """Encoder input (B, 3, S, S) → the latent's tokens (B, P, D)."""
        if self.config.feature == "cls":
            return self.encoder.tokens(images)[:, :1]
        tokens = cast(Tensor, self.encoder(images))
        pool = self.config.token_pool
        if pool == 1:
            return tokens
        side = self.config.image_size // self.config.encoder.patch_size
        grid = tokens.view(len(tokens), side // pool, pool, side // pool, pool, tokens.shape[-1])
        return grid.mean((2, 4)).flatten(1, 2)

    @torch.no_grad()
    def decode(self, visual: Tensor, side: int = 224) -> Tensor:
        """Pictures of a latent's visual part (..., P, D): frames (..., side, side, 3) uint8.

        Raises:
            UsageError: the model has no decoder.
        """
        if self.decoder is None:
            raise UsageError(
                "this world model has no decoder, hence no pictures of latents: train one with "
                "`quantwm train TASK --decoder vqvae`"
            )
        images = self.decoder(visual.flatten(0, -3).to(self.device, self.dtype))
        return pictures(images.view(*visual.shape[:-2], *images.shape[1:]), side)

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
