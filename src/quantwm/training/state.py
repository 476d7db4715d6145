"""What a training run carries from step to step, and its checkpoint."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantwm.errors import CorruptFileError, MismatchError
from quantwm.files import atomic_path


class TrainingState:
    """Parameters, their running average, the optimiser and the step.

    Args:
        parameters: what is trained, by name.
        learning_rate, weight_decay: AdamW's; decay on matrices only.
        decay: of the running average, once it has warmed up.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        decay: float,
    ) -> None:
        self.parameters = parameters
        self.average = {name: p.detach().clone() for name, p in parameters.items()}
        self.decay = decay
        self.step = 0
        decayed = [p for n, p in parameters.items() if p.ndim >= 2 and "pos_embedding" not in n]
        plain = [p for n, p in parameters.items() if p.ndim < 2 or "pos_embedding" in n]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))

    def apply_gradients(self, learning_rate: float, clip: float) -> None:
        """One optimiser step with the gradients at hand, and one of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        nn.utils.clip_grad_norm_(self.parameters.values(), clip)
        self.optimizer.step()
        self.step += 1
        decay = min(self.decay, self.step / (self.step + 10))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter.data, 1 - decay)

    def swap(self) -> None:
        """Exchange the parameters and their average; twice is nothing."""
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def save(self, folder: Path, identity: dict[str, Any]) -> None:
        """Write `checkpoint.pt`, atomically; `identity` is what a resumed run must share.

        Raises:
            QuantWMError: the folder cannot be written, or the disk is full.
        """
        state = {
            "identity": identity,
            "step": self.step,
            "parameters": {n: p.detach() for n, p in self.parameters.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_path(folder / "checkpoint.pt") as temporary:
            # Not by torch itself, which hides a full disk behind an error of its own zip writer.
            content = io.BytesIO()
            torch.save(state, content)
            temporary.write_bytes(content.getbuffer())

    def resume(self, folder: Path, identity: dict[str, Any]) -> None:
        """Continue from `checkpoint.pt` where there is one.

        Raises:
            MismatchError: it belongs to a run of another identity.
            CorruptFileError: it cannot be read.
        """
        path = folder / "checkpoint.pt"
        if not path.is_file():
            return
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            names: dict[str, dict[str, Tensor]] = {k: state[k] for k in ("parameters", "average")}
        except Exception as error:
            raise CorruptFileError(f"{path} cannot be read ({error}); delete it") from error
        if state["identity"] != identity:
            raise MismatchError(
                f"{folder} holds a training run of other settings, another model or other data; "
                "choose another --out, or delete it to start anew"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(names["parameters"][name])
                self.average[name].copy_(names["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
