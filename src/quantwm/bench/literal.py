"""DINO-WM's planning cost in its literal order: the measure for every saving.

Re-stated from the published description (arXiv 2411.04983, its appendix on planning, and DINOv2,
arXiv 2304.07193) in plain PyTorch, sharing nothing with this package's own forward but the
weights. Every candidate encodes the observation for itself; every predicted frame computes its
whole window; attention forms its logits, masks them and takes their softmax; episodes follow each
other in a Python loop; everything is float32.

The image is preprocessed once an episode, not once a candidate, which spares the literal order a
resize; what it is compared with is never flattered.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from quantwm.errors import UsageError
from quantwm.models.dino_wm import DINOWM
from quantwm.protocols import Observation

ENCODER_EPS, PREDICTOR_EPS = 1e-6, 1e-5
_GRID_OFFSET = 0.1
"""DINOv2 adds this to the grid before it forms the interpolation's scale factor."""


class LiteralDINOWM:
    """The literal order, on the weights of one of our models.

    Args:
        world_model: a float model; its tensors are read, as float32 on its device.

    Raises:
        UsageError: a quantized model, which has no weights to read.
    """

    def __init__(self, world_model: DINOWM) -> None:
        self.config = world_model.config
        self._preprocess, self._normalize = world_model.preprocess, world_model.normalize_proprio
        if getattr(world_model, "quantization", None) is not None:
            raise UsageError(
                "the literal order needs the float model's weights; this model is quantized: "
                "measure the model that it was made from"
            )
        self.state: dict[str, Tensor] = {
            name: value.float() for name, value in world_model.state_dict().items()
        }
        frame = torch.arange(self.config.num_hist).repeat_interleave(self.config.frame_tokens)
        self.mask = (frame[:, None] >= frame[None, :]).to(world_model.device)
        """(tokens, tokens) of a full window: True where a token may look."""

    @torch.inference_mode()
    def costs(
        self,
        observation: Observation,
        goals: Sequence[tuple[Tensor, Tensor]],
        actions: Tensor,
        *,
        chunk: int,
    ) -> Tensor:
        """Costs of candidates.

        Args:
            observation: one frame of B episodes, raw.
            goals: of each episode, as `encode` returns them, (1, 1, ...).
            actions: normalised, (B, N, H, frameskip·dim).
            chunk: candidates computed at once.

        Returns:
            (B, N) float32 on the CPU.

        Raises:
            UsageError: a chunk below one.
        """
        if chunk < 1:
            raise UsageError(f"chunk must be at least 1, got {chunk}")
        rows = []
        for episode, candidates in enumerate(actions.to(self.mask.device)):
            images, proprio = self.inputs(observation, episode)
            costs = []
            for some in candidates.split(chunk):
                frames = self.rollout(
                    images.expand(len(some), -1, -1, -1, -1),
                    proprio.expand(len(some), -1, -1),
                    some,
                )
                costs.append(self.objective(frames, goals[episode]).cpu())
            rows.append(torch.cat(costs))
        return torch.stack(rows)

    @torch.inference_mode()
    def goals(self, observation: Observation) -> list[tuple[Tensor, Tensor]]:
        """Encoded goals (1, 1, ...) of raw observations of one frame of B episodes."""
        count = len(observation["visual"])
        return [self.encode(*self.inputs(observation, episode)) for episode in range(count)]

    def inputs(self, observation: Observation, episode: int) -> tuple[Tensor, Tensor]:
        """Images (1, T, 3, S, S) and normalised proprioception (1, T, P) of one episode."""
        one = slice(episode, episode + 1)
        return (
            self._preprocess(observation["visual"][one]),
            self._normalize(torch.as_tensor(observation["proprio"][one])),
        )

    def encode(self, images: Tensor, proprio: Tensor) -> tuple[Tensor, Tensor]:
        """Images (rows, T, 3, S, S) and proprioception (rows, T, P) → patch tokens
        (rows, T, patches, width) and embeddings (rows, T, E)."""
        visual = self.dino(images.flatten(0, 1))
        return visual.view(*images.shape[:2], *visual.shape[1:]), self.embed("proprio", proprio)

    def embed(self, name: str, values: Tensor) -> Tensor:
        """A convolution of kernel one along time: (rows, T, in) → (rows, T, out)."""
        weight, bias = (self.state[f"{name}_embed.{part}"] for part in ("weight", "bias"))
        return F.conv1d(values.transpose(1, 2), weight, bias).transpose(1, 2)

    def rollout(self, images: Tensor, proprio: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Predict frame after frame from the window's whole latents.

        Args:
            images: (rows, 1, 3, S, S).
            proprio: normalised, (rows, 1, P).
            actions: normalised, (rows, H, frameskip·dim).

        Returns:
            visual and proprio latents of the H + 1 frames.
        """
        visual, proprio = self.encode(images, proprio)
        frames = self.join(visual, proprio, self.embed("action", actions[:, :1]))
        for step in range(1, actions.shape[1] + 1):
            window = frames[:, -self.config.num_hist :]
            newest = self.predict(window)[:, -1:]
            if step < actions.shape[1]:
                self.put_action(newest, self.embed("action", actions[:, step : step + 1]))
            frames = torch.cat([frames, newest], dim=1)
        return self.split(frames)

    def join(self, visual: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
        """Latent parts of T frames → tokens (rows, T, frame_tokens, token_width)."""
        if self.config.concat_dim == 0:
            return torch.cat([visual, proprio[:, :, None], action[:, :, None]], dim=2)
        tiled = [
            part[:, :, None].repeat(1, 1, visual.shape[2], times)
            for part, times in (
                (proprio, self.config.num_proprio_repeat),
                (action, self.config.num_action_repeat),
            )
        ]
        return torch.cat([visual, *tiled], dim=3)

    def put_action(self, frames: Tensor, action: Tensor) -> None:
        """Overwrite the action of frames (rows, T, frame_tokens, token_width) in place."""
        if self.config.concat_dim == 0:
            frames[:, :, -1] = action
        else:
            repeated = action.repeat(1, 1, self.config.num_action_repeat)
            frames[..., -self.config.action_width :] = repeated[:, :, None]

    def split(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (rows, T, frame_tokens, token_width) → visual and proprio latents."""
        if self.config.concat_dim == 0:
            return frames[:, :, :-2], frames[:, :, -2]
        width = self.config.encoder.width
        proprio = frames[:, :, 0, width : width + self.config.proprio_emb_dim]
        return frames[..., :width], proprio

    def objective(self, frames: tuple[Tensor, Tensor], goal: tuple[Tensor, Tensor]) -> Tensor:
        """MSE(visual) + α·MSE(proprio) of the last frame: (rows,)."""
        visual, proprio = (
            (part[:, -1:] - wanted).square().flatten(1).mean(1)
            for part, wanted in zip(frames, goal, strict=True)
        )
        return visual + self.config.proprio_weight * proprio

    def dino(self, images: Tensor) -> Tensor:
        """DINOv2's normalised patch tokens: (rows, 3, S, S) → (rows, patches, width)."""
        e, state = self.config.encoder, self.state
        weight, bias = (state[f"encoder.patch_embed.proj.{part}"] for part in ("weight", "bias"))
        patches = F.conv2d(images, weight, bias, stride=e.patch_size)
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([state["encoder.cls_token"].expand(len(x), -1, -1), x], dim=1)
        x = x + self.dino_positions(patches.shape[-2], patches.shape[-1])
        for number in range(e.depth):
            x = self.block(f"encoder.blocks.{number}", x, e.heads, ENCODER_EPS, None)
        return self.norm("encoder.norm", x, ENCODER_EPS)[:, 1:]

    def dino_positions(self, rows: int, columns: int) -> Tensor:
        """The position grid, interpolated bicubically: (1, 1 + rows·columns, width)."""
        positions, side = self.state["encoder.pos_embed"], self.config.encoder.pretrained_grid
        if rows == columns == side:
            return positions
        grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factors = ((rows + _GRID_OFFSET) / side, (columns + _GRID_OFFSET) / side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def predict(self, frames: Tensor) -> Tensor:
        """Each frame's successor: (rows, T, frame_tokens, token_width) → the same shape."""
        x = frames.flatten(1, 2)
        count = x.shape[1]
        x = x + self.state["predictor.pos_embedding"][:, :count]
        mask, p = self.mask[:count, :count], self.config.predictor
        for number in range(p.depth):
            x = self.block(f"predictor.blocks.{number}", x, p.heads, PREDICTOR_EPS, mask)
        return self.norm("predictor.norm", x, PREDICTOR_EPS).view_as(frames)

    def block(self, name: str, x: Tensor, heads: int, eps: float, mask: Tensor | None) -> Tensor:
        """A pre-LayerNorm transformer block; DINOv2's scale both branches."""
        mixed = self.attention(f"{name}.attn", self.norm(f"{name}.norm1", x, eps), heads, mask)
        x = x + self.scale(f"{name}.ls1", mixed)
        hidden = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x, eps)))
        return x + self.scale(f"{name}.ls2", self.linear(f"{name}.mlp.fc2", hidden))

    def attention(self, name: str, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
        """softmax(QKᵀ/√d, where the mask allows)V, every factor formed."""
        q, k, v = (
            part.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
            for part in self.linear(f"{name}.qkv", x).chunk(3, dim=-1)
        )
        logits = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        mixed = torch.matmul(logits.softmax(dim=-1), v)
        return self.linear(f"{name}.proj", mixed.transpose(1, 2).flatten(2))

    def linear(self, name: str, x: Tensor) -> Tensor:
        """(..., in) → (..., out); the predictor's qkv has no bias."""
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        """LayerNorm over the last dimension."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def scale(self, name: str, x: Tensor) -> Tensor:
        """LayerScale where the block has one."""
        gamma = self.state.get(f"{name}.gamma")
        return x if gamma is None else x * gamma
