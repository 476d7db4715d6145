"""Training a decoder of pictures on a world model that is finished: nothing else changes.

As in DINO-WM, the loss is the mean squared error of pictures made from encoded frames and from
predicted ones, and no gradient reaches what made the latents. There both are trained in one loop,
which for the decoder is the same but for the predictor's being unfinished at first.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from quantwm.compute import fast_products
from quantwm.data.latents import FrameIndex
from quantwm.data.sources import Split
from quantwm.errors import UsageError
from quantwm.files import make_folder
from quantwm.fingerprint import model_hash
from quantwm.models.decoder import new_decoder
from quantwm.models.dino_wm import DINOWM
from quantwm.seeds import keyed_generator
from quantwm.training.batches import Windows
from quantwm.training.loop import Report, Schedule, optimize
from quantwm.training.state import TrainingState

_SHUFFLE = 4
_VALIDATED = 64


@dataclass(frozen=True)
class DecoderSettings:
    """How to train a decoder.

    Attributes:
        steps, batch_size: of AdamW; a step sees `batch_size` frames twice, encoded and predicted.
        learning_rate: DINO-WM's.
        seed: of initialisation and shuffling.
        checkpoint_every: steps.
    """

    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 3e-4
    seed: int = 0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.checkpoint_every < 1:
            raise UsageError(
                "a decoder's steps, batch_size and checkpoint_every must be at least 1"
            )
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate must be above 0, got {self.learning_rate}")


class Frames:
    """Pictures of the frames that windows are made of, as a decoder should draw them."""

    def __init__(self, world_model: DINOWM, split: Split) -> None:
        self._index = FrameIndex.every(world_model.config.frameskip, split.trajectories)
        self._split, self._device = split, world_model.device

    def images(self, rows: np.ndarray, side: int) -> Tensor:
        """(B, 3, side, side), −1 to 1, of frames by their row in the latents."""
        index = self._index
        frames = self._split.frames(index.trajectory[rows], index.steps[rows])
        images = torch.from_numpy(frames).to(self._device).permute(0, 3, 1, 2).float()
        images = images / 127.5 - 1
        if images.shape[-1] == side:
            return images
        return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def train_decoder(
    world_model: DINOWM,
    windows: Windows,
    frames: Frames,
    validation: tuple[Windows, Frames],
    folder: Path,
    settings: DecoderSettings,
    *,
    report: Report | None = None,
) -> None:
    """Train the decoder that the model's configuration describes, in place; resumable.

    Args:
        world_model: trained; in evaluation mode.
        windows, frames: of the training split.
        validation: the same of the other split.
        folder: receives `checkpoint.pt` and `curve.jsonl`.

    Raises:
        MismatchError: the folder holds a run of other settings or of another model.
        NonFiniteError: the loss became NaN or infinite.
    """
    assert world_model.config.decoder is not None
    make_folder(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        decoder = new_decoder(world_model.config.encoder.width, world_model.config.decoder)
    world_model.decoder = decoder.to(world_model.device, world_model.dtype)
    state = TrainingState(
        {name: p for name, p in world_model.named_parameters() if name.startswith("decoder.")},
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        decay=0.998,
    )
    identity: dict[str, Any] = {
        "decoder": asdict(settings),
        "model": world_model.config.to_dict(),
        "weights": model_hash(world_model),
    }
    state.resume(folder, identity)

    def loss() -> Tensor:
        generator = keyed_generator(settings.seed, _SHUFFLE, state.step)
        chosen = np.sort(generator.choice(len(windows), settings.batch_size))
        return _loss(world_model, windows, frames, chosen)

    optimize(
        state,
        Schedule(
            settings.steps,
            lambda _: settings.learning_rate,
            clip=1.0,
            validate_every=settings.checkpoint_every,
            checkpoint_every=settings.checkpoint_every,
        ),
        loss,
        lambda: {"validation": _validate(world_model, *validation)},
        folder,
        identity,
        name="decoder",
        report=report,
    )


def _loss(world_model: DINOWM, windows: Windows, frames: Frames, chosen: np.ndarray) -> Tensor:
    """Mean squared error of pictures of a window's second frame, encoded and predicted."""
    assert world_model.decoder is not None
    batch = windows.batch(chosen)
    with fast_products(world_model.device):
        with torch.no_grad():
            latent = {
                "visual": batch.visual[:, :1],
                "proprio": world_model.embed_proprio(batch.proprio[:, :1]),
            }
            imagined = world_model.rollout(latent, batch.actions[:, None, :1])["visual"][:, 0, 1]
        latents = torch.cat([batch.visual[:, 1], imagined])
        drawn = world_model.decoder(latents)
    target = frames.images(windows.starts[chosen] + 1, drawn.shape[-1])
    return F.mse_loss(drawn.float(), target.repeat(2, 1, 1, 1))


@torch.no_grad()
def _validate(world_model: DINOWM, windows: Windows, frames: Frames) -> float:
    chosen = np.linspace(0, len(windows) - 1, min(_VALIDATED, len(windows))).astype(np.int64)
    parts = np.array_split(chosen, max(1, len(chosen) // 16))
    losses = [_loss(world_model, windows, frames, part).item() * len(part) for part in parts]
    return sum(losses) / len(chosen)
