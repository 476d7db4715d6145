"""What training minimises, and the rollout errors that validation reports."""

import numpy as np
import torch
from torch import Tensor

from quantwm.compute import fast_products
from quantwm.models.dino_wm import DINOWM
from quantwm.models.predictor import Window
from quantwm.training.batches import Batch, Windows


def window_length(world_model: DINOWM, unroll: int) -> int:
    """Frames that `window_loss` reads."""
    return max(world_model.config.num_hist, unroll) + 1


def window_loss(
    world_model: DINOWM, batch: Batch, unroll: int, proprio_weight: float | None = None
) -> Tensor:
    """MSE of the predicted visual and proprio parts.

    With a `proprio_weight` w it is MSE(visual) + w · MSE(proprio), as in the planning objective;
    without, one mean over all channels, as in DINO-WM, in which the few proprio channels hardly
    count. Where velocity can be seen only there, rollouts need them.

    The mean of `unroll` losses: that of all frames predicted from true ones before them, which is
    DINO-WM's loss, and of each further frame imagined as planning does it: from the first frame
    on, predictions fed back, the window growing to `num_hist` frames.
    """
    history = world_model.config.num_hist
    frames, target = embedded_frames(world_model, batch)
    action = world_model.embed_actions(batch.actions)
    predicted = world_model.predict(frames[:, :history])
    losses = [
        _observation_error(predicted, target[:, 1 : history + 1], world_model, proprio_weight)
    ]
    if unroll > 1:
        # Its first frame's successor is known from above; the window wants its keys and values.
        window = Window(world_model.predictor)
        newest = window.successor([frames[:, 0]])
        for ahead in range(1, unroll):
            fed = _with_action(world_model, newest.float(), action[:, ahead])
            newest = window.successor([fed])
            error = _observation_error(newest, target[:, ahead + 1], world_model, proprio_weight)
            losses.append(error)
    return torch.stack(losses).mean()


def _with_action(world_model: DINOWM, tokens: Tensor, action: Tensor) -> Tensor:
    """A frame's tokens (B, tokens, width) with their action part replaced by (B, E)."""
    config = world_model.config
    if config.concat_dim == 0:
        return torch.cat([tokens[:, :-1], action[:, None]], dim=1)
    repeated = action.repeat(1, config.num_action_repeat)
    tiled = repeated[:, None].expand(-1, tokens.shape[1], -1)
    return torch.cat([tokens[..., : -config.action_width], tiled], dim=-1)


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
    """Error of rollouts from one frame, as planning has it, against repeating that frame.

    Args:
        samples: windows, spread evenly over all.

    Returns:
        one_step and rollout (mean squared error of the visual latent one and all steps ahead),
        one_step_ratio and rollout_ratio (those over copying the observed frame).
    """
    training = world_model.training
    world_model.eval()
    sums: dict[str, float] = {"one_step": 0, "rollout": 0, "copy_one": 0, "copy_all": 0}
    chosen = np.linspace(0, len(windows) - 1, min(samples, len(windows))).astype(np.int64)
    for begin in range(0, len(chosen), 32):
        batch = windows.batch(chosen[begin : begin + 32])
        with fast_products(world_model.device):
            latent = {
                "visual": batch.visual[:, :1],
                "proprio": world_model.embed_proprio(batch.proprio[:, :1]),
            }
            ahead = batch.visual.shape[1] - 1
            predicted = world_model.rollout(latent, batch.actions[:, None, :ahead])["visual"][:, 0]
        first, truth = batch.visual[:, 0], batch.visual
        sums["one_step"] += _sum_mse(predicted[:, 1], truth[:, 1])
        sums["rollout"] += _sum_mse(predicted[:, -1], truth[:, -1])
        sums["copy_one"] += _sum_mse(first, truth[:, 1])
        sums["copy_all"] += _sum_mse(first, truth[:, -1])
    world_model.train(training)
    count = len(chosen)
    return {
        "one_step": sums["one_step"] / count,
        "rollout": sums["rollout"] / count,
        "one_step_ratio": sums["one_step"] / sums["copy_one"],
        "rollout_ratio": sums["rollout"] / sums["copy_all"],
    }


def _observation_error(
    predicted: Tensor, target: Tensor, world_model: DINOWM, proprio_weight: float | None
) -> Tensor:
    """MSE without the action part (the last token or the last channels)."""
    config = world_model.config
    squares = (predicted.float() - target) ** 2
    if config.concat_dim == 0:
        squares = squares[..., :-1, :]
        visual, proprio = squares[..., :-1, :], squares[..., -1:, :]
    else:
        squares = squares[..., : -config.action_width]
        visual, proprio = squares[..., : config.encoder.width], squares[..., config.encoder.width :]
    if proprio_weight is None:
        return squares.mean()
    return visual.mean() + proprio_weight * proprio.mean()


def _sum_mse(a: Tensor, b: Tensor) -> float:
    return float(((a.float() - b.float()) ** 2).flatten(1).mean(1).sum())
