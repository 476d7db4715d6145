"""What training minimises, and the rollout errors that validation reports."""

import numpy as np
import torch
from torch import Tensor

from quantwm.models.dino_wm import DINOWM
from quantwm.training.batches import Batch, Windows


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
                    1, world_model.config.num_action_repeat
                )
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
    chosen = np.linspace(0, len(windows) - 1, min(samples, len(windows))).astype(np.int64)
    for begin in range(0, len(chosen), 32):
        batch = windows.batch(chosen[begin : begin + 32]).to(world_model.device)
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


def _observation_error(predicted: Tensor, target: Tensor, world_model: DINOWM) -> Tensor:
    """MSE without the action part (the last token or the last channels)."""
    difference = predicted.float() - target
    if world_model.config.concat_dim == 0:
        return (difference[..., :-1, :] ** 2).mean()
    return (difference[..., : -world_model.config.action_width] ** 2).mean()


def _sum_mse(a: Tensor, b: Tensor) -> float:
    return float(((a.float() - b.float()) ** 2).flatten(1).mean(1).sum())
