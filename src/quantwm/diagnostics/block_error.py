"""How far quantized blocks' outputs are from float ones for the same inputs."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantwm.errors import UsageError
from quantwm.protocols import WorldModel
from quantwm.quant.block_inputs import whole_windows
from quantwm.quant.observers import CalibrationData


@dataclass
class _Sums:
    """Squared norms of one block's calls."""

    error: float = 0.0
    added: float = 0.0


@dataclass
class BlockErrors:
    """Relative errors of a quantized model's blocks.

    Attributes:
        by_block: ‖quantized - float‖ / ‖float output - input‖ over all calls of a block: relative
            to what the block adds to the residual stream, whose own outliers would hide an error.
            Blocks that add to nothing, such as a patch embedding, are left out.
    """

    by_block: dict[str, float] = field(default_factory=dict)

    def of(self, part: str) -> float:
        """Root mean square over the blocks whose names start with `part`.

        Raises:
            UsageError: there is none.
        """
        chosen = [v for name, v in self.by_block.items() if name.startswith(part)]
        if not chosen:
            raise UsageError(f"no block's name starts with {part!r}")
        return float(torch.tensor(chosen, dtype=torch.float64).square().mean().sqrt())


def block_errors(
    reference: WorldModel, quantized: WorldModel, calibration: CalibrationData
) -> BlockErrors:
    """Run every block of both models on what the float model's blocks read.

    Args:
        reference: a float model; if a rotation was folded into `quantized`, its transformed twin
            (`quantwm.methods.transformed`), whose blocks read rotated tokens.
        quantized: made from it.
        calibration: inputs to replay on `reference`.
    """
    blocks = dict.fromkeys(group.block for group in reference.quantizable_groups())
    sums = {name: _Sums() for name in blocks}
    with ExitStack() as stack:
        # Without it a block's result would depend on keys and values kept from earlier calls.
        stack.enter_context(whole_windows(reference))
        for name, own in sums.items():
            module, twin = reference.get_submodule(name), quantized.get_submodule(name)
            handle = module.register_forward_hook(_compare(twin, own), with_kwargs=True)
            stack.callback(handle.remove)
        with torch.no_grad():
            calibration.roll_out(reference, calibration.encode(reference))
    return BlockErrors(
        {name: (own.error / own.added) ** 0.5 for name, own in sums.items() if own.added > 0}
    )


def _compare(twin: nn.Module, sums: _Sums) -> Callable[..., None]:
    def hook(
        _module: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Any], output: Tensor
    ) -> None:
        x = inputs[0]
        if x.shape[-1] != output.shape[-1] or x.ndim != output.ndim:
            return
        own = twin(*inputs, **named)
        sums.error += float((own - output).double().square().sum())
        # A block may return the newest tokens only.
        sums.added += float((output - x[..., -output.shape[-2] :, :]).double().square().sum())

    return hook
