"""The predictor's training loop: resumable, bit-reproducible from its step number."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantwm.errors import MismatchError, NonFiniteError, UsageError
from quantwm.files import atomic_path
from quantwm.models.dino_wm import DINOWM
from quantwm.training.batches import Batch, Windows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        steps: optimiser steps in all.
        batch_size: windows a step.
        learning_rate: peak of AdamW's rate, after `warmup` steps; cosine decay to zero.
        weight_decay: AdamW's, on matrices only.
        unroll: predictions a window feeds back into the model; 1 is DINO-WM's one-step loss.
        ema: decay of the averaged weights that are kept.
        clip: largest gradient norm.
        checkpoint_every, validate_every: steps.
        seed: of initialisation and shuffling.
    """

    steps: int = 12_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.01
    unroll: int = 1
    ema: float = 0.998
    clip: float = 1.0
    checkpoint_every: int = 500
    validate_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.unroll < 1:
            raise UsageError("steps, batch_size and unroll must be at least 1")


Report = Callable[[int, int, dict[str, float]], None]
"""(step, of how many, figures)"""


def train(
    world_model: DINOWM,
    windows: Windows,
    validation: Windows,
    folder: Path,
    settings: TrainingSettings,
    *,
    report: Report | None = None,
) -> DINOWM:
    """Train predictor and embeddings; the encoder is left alone.

    Checkpoints and a validation curve (`curve.jsonl`) go to `folder`; started again with the same
    settings, training continues from the last checkpoint and ends with the same weights.

    Returns:
        the model with the averaged weights.

    Raises:
        MismatchError: the folder holds a run of other settings or another model.
        NonFiniteError: the loss became NaN or infinite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = trainable(world_model)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = _optimizer(parameters, settings)
    identity = {"settings": asdict(settings), "model": world_model.config.to_dict()}
    step = _resume(folder, identity, parameters, average, optimizer)
    device = world_model.device.type
    world_model.train()
    batches = windows.shuffled(settings.batch_size, settings.seed, step)
    while step < settings.steps:
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, settings)
        with torch.autocast(device, torch.bfloat16):
            loss = window_loss(world_model, batch, settings.unroll)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the training loss is {loss.item()} at step {step}; lower the "
                                 "learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
        optimizer.step()
        step += 1
        _update_average(average, parameters, min(settings.ema, step / (step + 10)))
        figures = {"loss": loss.item()}
        if step % settings.validate_every == 0 or step == settings.steps:
            with _weights(parameters, average):
                figures |= validate(world_model, validation)
            with (folder / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps({"step": step, **figures}) + "\n")
            logger.info("step %d: %s", step, figures)
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            _save(folder, identity, step, parameters, average, optimizer)
        if report is not None:
            report(step, settings.steps, figures)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
    return world_model.eval()


def trainable(world_model: DINOWM) -> dict[str, nn.Parameter]:
    """The parameters that training changes: all but the encoder's."""
    return {n: p for n, p in world_model.named_parameters() if not n.startswith("encoder.")}


def window_loss(world_model: DINOWM, batch: Batch, unroll: int) -> Tensor:
    """MSE of the predicted visual and proprio parts, averaged over `unroll` fed-back steps.

    A window has num_hist + unroll frames. With `unroll` 1 this is DINO-WM's loss.
    """
    history = world_model.config.num_hist
    frames, target = embedded_frames(world_model, batch)
    window = [frames[:, t] for t in range(history)]
    action = world_model.embed_actions(batch.actions)
    width = world_model.config.action_width
    losses = []
    for ahead in range(unroll):
        predicted = world_model.predict(torch.stack(window[-history:], dim=1))
        if ahead == 0:
            goal = target[:, 1 : history + 1]
            losses.append(_observation_error(predicted, goal, world_model))
        else:
            goal = target[:, history + ahead]
            losses.append(_observation_error(predicted[:, -1], goal, world_model))
        if ahead + 1 < unroll:
            newest = predicted[:, -1].float()
            if world_model.config.concat_dim == 0:
                follow = torch.cat([newest[:, :-1], action[:, history + ahead, None]], dim=1)
            else:
                repeated = action[:, history + ahead].repeat(
                    1, world_model.config.num_action_repeat)
                tiled = repeated[:, None].expand(-1, newest.shape[1], -1)
                follow = torch.cat([newest[..., :-width], tiled], dim=-1)
            window.append(follow)
    return torch.stack(losses).mean()


def embedded_frames(world_model: DINOWM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Tokens of every frame (B, W, tokens, width), and the same detached, as targets."""
    proprio = world_model.embed_proprio(batch.proprio).float()
    action = world_model.embed_actions(batch.actions).float()
    frames = [
        world_model.tokens(batch.visual[:, t], proprio[:, t], action[:, t])
        for t in range(batch.visual.shape[1])
    ]
    stacked = torch.stack(frames, dim=1)
    return stacked, stacked.detach()


@torch.no_grad()
def validate(world_model: DINOWM, windows: Windows, samples: int = 256) -> dict[str, float]:
    """Rollout error on the first `samples` windows, against repeating the first frame.

    Returns:
        one_step and rollout (mean squared error of the visual latent one and all steps ahead),
        one_step_ratio and rollout_ratio (those over copying the last observed frame).
    """
    training = world_model.training
    world_model.eval()
    history = world_model.config.num_hist
    sums: dict[str, float] = {"one_step": 0, "rollout": 0, "copy_one": 0, "copy_all": 0}
    import numpy as np

    chosen = np.linspace(0, len(windows) - 1, min(samples, len(windows))).astype(np.int64)
    for begin in range(0, len(chosen), 32):
        batch = windows.batch(chosen[begin : begin + 32])
        with torch.autocast(world_model.device.type, torch.bfloat16):
            latent = {
                "visual": batch.visual[:, :history],
                "proprio": world_model.embed_proprio(batch.proprio[:, :history]),
            }
            ahead = batch.visual.shape[1] - 1
            predicted = world_model.rollout(latent, batch.actions[:, None, :ahead])["visual"][:, 0]
        last, truth = batch.visual[:, history - 1], batch.visual
        sums["one_step"] += _sum_mse(predicted[:, history], truth[:, history])
        sums["rollout"] += _sum_mse(predicted[:, -1], truth[:, -1])
        sums["copy_one"] += _sum_mse(last, truth[:, history])
        sums["copy_all"] += _sum_mse(last, truth[:, -1])
    world_model.train(training)
    count = len(chosen)
    return {
        "one_step": sums["one_step"] / count,
        "rollout": sums["rollout"] / count,
        "one_step_ratio": sums["one_step"] / sums["copy_one"],
        "rollout_ratio": sums["rollout"] / sums["copy_all"],
    }


@torch.no_grad()
def initialize(world_model: DINOWM, windows: Windows, seed: int, samples: int = 256) -> None:
    """Start as a model that repeats its last frame, so that no step is spent on learning that.

    The final LayerNorm's weight and bias are the least-squares fit from normalised to raw tokens,
    and the residual branches' output projections start at a tenth of their usual size.
    """
    import numpy as np

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainable(world_model).items():
        if name.endswith("pos_embedding"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif parameter.ndim >= 2:
            nn.init.trunc_normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
            if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                parameter.mul_(0.1)
        elif ".norm" in name or name.endswith("norm.weight"):
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.zero_()
    rows = np.linspace(0, len(windows) - 1, min(samples, len(windows))).astype(np.int64)
    frames, _ = embedded_frames(world_model, windows.batch(rows))
    tokens = frames[:, 0].reshape(-1, frames.shape[-1]).float()
    normalized = nn.functional.layer_norm(tokens, tokens.shape[-1:])
    centred = normalized - normalized.mean(0)
    slope = (centred * tokens).mean(0) / (centred**2).mean(0).clamp_min(1e-6)
    world_model.predictor.norm.weight.copy_(slope)
    world_model.predictor.norm.bias.copy_(tokens.mean(0) - slope * normalized.mean(0))


def _observation_error(predicted: Tensor, target: Tensor, world_model: DINOWM) -> Tensor:
    """MSE without the action part (the last token or the last channels)."""
    difference = predicted.float() - target
    if world_model.config.concat_dim == 0:
        return (difference[..., :-1, :] ** 2).mean()
    return (difference[..., : -world_model.config.action_width] ** 2).mean()


def _sum_mse(a: Tensor, b: Tensor) -> float:
    return float(((a.float() - b.float()) ** 2).flatten(1).mean(1).sum())


def _optimizer(
    parameters: dict[str, nn.Parameter], settings: TrainingSettings
) -> torch.optim.AdamW:
    matrices = [p for n, p in parameters.items() if p.ndim >= 2 and "pos_embedding" not in n]
    others = [p for n, p in parameters.items() if p.ndim < 2 or "pos_embedding" in n]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def _learning_rate(step: int, settings: TrainingSettings) -> float:
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _update_average(
    average: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float
) -> None:
    names = list(average)
    torch._foreach_lerp_([average[n] for n in names], [parameters[n].data for n in names],
                         1 - decay)


class _weights:
    """Puts the averaged weights in for the length of a block."""

    def __init__(self, parameters: dict[str, nn.Parameter], average: dict[str, Tensor]) -> None:
        self._parameters, self._average = parameters, average

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self._average[name] = self._average[name], parameter.data


def _save(
    folder: Path,
    identity: dict[str, Any],
    step: int,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    state = {
        "identity": identity,
        "step": step,
        "parameters": {n: p.detach() for n, p in parameters.items()},
        "average": average,
        "optimizer": optimizer.state_dict(),
    }
    with atomic_path(folder / "checkpoint.pt") as temporary:
        torch.save(state, temporary)


def _resume(
    folder: Path,
    identity: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    if state["identity"] != identity:
        raise MismatchError(f"{folder} holds a training run of other settings or another model; "
                            "choose another --out, or delete it to start anew")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
            average[name].copy_(state["average"][name])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
