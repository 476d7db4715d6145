"""GPTQ: each column's rounding error is made up for by the columns that are rounded later."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantwm.checks import is_integer, is_number
from quantwm.compute import cpu_threads
from quantwm.errors import NonFiniteError, UsageError
from quantwm.methods.registry import register
from quantwm.methods.roles import without_weights
from quantwm.methods.work import Work
from quantwm.protocols import LinearGroup, WorldModel
from quantwm.quant.layer_inputs import SecondMoment
from quantwm.quant.modules import QuantizedWeight
from quantwm.quant.primitives import (
    Range,
    code_dtype,
    dequantize,
    quantize,
    weight_parameters,
)
from quantwm.quant.scheme import LayerScheme, PerGroup, WeightScheme

logger = logging.getLogger(__name__)

_LEAST_SHARE = 32
"""A layer must have read at least its width over this many tokens."""
_DAMPING_RAISES = 3
"""How often damping is multiplied by ten before a Hessian is given up."""


@register
@dataclass(frozen=True)
class GPTQ:
    """Codes that minimise tr((W - Ŵ) H (W - Ŵ)ᵀ), H = XᵀX, greedily, column by column.

    arXiv 2210.17323, algorithm 1. A layer's X is what it reads in the model whose earlier blocks
    are quantized already, weights and activations; where its own input is to be rounded as well,
    X is that input before rounding, as in the paper. All of a block's layers are observed at
    once, before any of them is rounded.

    Columns are rounded with the ranges that the method's clipping part chose, one a row and group
    of the weight as it stands ("static groups"), so act-order and groups go together and codes
    stay aligned with rows. An input channel that is always zero says nothing: its column is
    rounded to nearest.

    Attention-matmul taps have no weights, and nothing happens to them here.

    Attributes:
        act_order: round columns in the order of falling diagonal of H, while there are still
            many others to make up for the important ones.
        damping: added to the diagonal, as a fraction of its mean over live channels.
        block_size: columns between two updates of all the later ones; changes speed alone.

    Raises:
        UsageError: an option out of range.
    """

    name: ClassVar[str] = "gptq"
    needs_calibration: ClassVar[bool] = True

    act_order: bool = True
    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.act_order, bool):
            raise UsageError(f"gptq.act_order must be true or false, got {self.act_order!r}")
        if not is_number(self.damping) or self.damping <= 0:
            raise UsageError(
                "gptq.damping must be a number above 0, a fraction of the mean diagonal such as "
                f"0.01, got {self.damping!r}"
            )
        if not is_integer(self.block_size, 1):
            raise UsageError(
                f"gptq.block_size must be an integer of at least 1, got {self.block_size!r}"
            )

    def problems(
        self,
        world_model: WorldModel,  # noqa: ARG002
        schemes: Mapping[str, LayerScheme],
        groups: Sequence[LinearGroup],  # noqa: ARG002
    ) -> list[str]:
        """A plan without any weight to round."""
        return without_weights(schemes, "round")

    @torch.no_grad()
    def codes(self, work: Work, extents: Mapping[str, Range]) -> dict[str, QuantizedWeight]:
        """Codes of one block's layers, their inputs observed in one replay.

        Raises:
            NonFiniteError: a layer's input, its Hessian or its updated weight holds NaN or
                infinite values.
            UsageError: hardly any tokens for a layer's width, or a Hessian that no damping mends.
        """
        moments = {name: SecondMoment(name) for name in extents}
        work.replay.show({name: [moment] for name, moment in moments.items()})
        weights = {name: work.weight(name) for name in extents}
        _check_tokens(weights, moments)
        schemes = work.weighted(extents)
        with cpu_threads(1):
            return {
                name: self.quantized(
                    name, weights[name], moment.value(), extents[name], schemes[name]
                )
                for name, moment in moments.items()
            }

    def quantized(
        self, layer: str, weight: Tensor, hessian: Tensor, extent: Range, scheme: WeightScheme
    ) -> QuantizedWeight:
        """One layer's codes.

        Args:
            layer: dotted name, for messages.
            weight: (out, in), any float type, which becomes the compute type.
            hessian: XᵀX up to a factor, float64 (in, in).
            extent: each group's range, (rows, groups).
            scheme: of the weight.

        Raises:
            NonFiniteError, UsageError: as in `codes`.
        """
        if not hessian.isfinite().all():
            raise NonFiniteError(
                f"gptq: the second moments of the input of {layer} overflow float32; check the "
                "scale of the model's activations"
            )
        scale, zero_point = weight_parameters(extent, scheme)
        order = column_order(hessian, act_order=self.act_order)
        factor = self._factor(layer, hessian[order][:, order])
        codes, error = rounded_columns(
            weight, order, factor, scale, zero_point, scheme, self.block_size
        )
        if not error.isfinite():
            raise NonFiniteError(
                f"gptq: the update of {layer} gave NaN or infinite values; check the size of its "
                f"weights, or raise damping (now {self.damping:g})"
            )
        stored = None if zero_point is None else zero_point.to(torch.uint8)
        return QuantizedWeight(codes, scale, stored, scheme, weight.dtype)

    def _factor(self, layer: str, hessian: Tensor) -> Tensor:
        """`inverse_factor` with the least of a few dampings that makes it exist."""
        dampings = [self.damping * 10**power for power in range(_DAMPING_RAISES + 1)]
        for damping in dampings:
            factor = inverse_factor(hessian, damping)
            if factor is not None:
                return factor
            logger.warning(
                "gptq: the Hessian of %s is not positive definite with damping %g", layer, damping
            )
        raise UsageError(
            f"gptq: the Hessian of {layer} is not positive definite even with damping "
            f"{dampings[-1]:g}; give more calibration samples, or raise damping above "
            f"{self.damping:g}"
        )


def column_order(hessian: Tensor, *, act_order: bool) -> Tensor:
    """The order in which columns are rounded, (in,): falling diagonal, or as they stand."""
    if not act_order:
        return torch.arange(len(hessian), device=hessian.device)
    return hessian.diagonal().argsort(descending=True, stable=True)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor | None:
    """The upper triangular U with Uᵀ U = H⁻¹, H damped.

    It is got without H⁻¹: where H with rows and columns reversed is L Lᵀ, U is the inverse of L
    reversed again, which loses fewer digits.

    Args:
        hessian: (in, in) float64.
        damping: added to the diagonal, as a fraction of its mean over live channels; dead
            channels, of diagonal zero, get 1 instead.

    Returns:
        (in, in) float64, or None if the damped Hessian is not positive definite.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp(min=1)
    damped = hessian + torch.diag(torch.where(dead, 1.0, damping * mean))
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        return None
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor


def rounded_columns(
    weight: Tensor,
    order: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: WeightScheme,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Round column after column, each later one moved to make up for the errors so far.

    With U the factor and eᵢ = (wᵢ - ŵᵢ) / Uᵢᵢ the scaled error of the i-th column in `order`,
    column j is rounded at wⱼ - Σ_{i<j} eᵢ Uᵢⱼ (arXiv 2210.17323, section 3.3). Errors of
    earlier blocks are taken off by one matrix product a block, and those within a block when a
    column's turn comes, so that a column is written once.

    Args:
        weight: (out, in), any float type.
        order: (in,) see `column_order`.
        factor: (in, in) `inverse_factor` of the Hessian in this order.
        scale, zero_point: (rows, groups) as `primitives.weight_parameters` gives them.
        scheme: of the weight.
        block_size: columns a block.

    Returns:
        codes (out, in), int8 if symmetric, else uint8; and Σ eᵢ², the quantization's squared
        output error under the damped Hessian, float64 without dimensions.
    """
    rows = weight.double().T[order].contiguous()
    codes = torch.empty_like(rows, dtype=code_dtype(symmetric=scheme.symmetric))
    size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else len(order)
    group = [index // size for index in order.tolist()]
    scales = scale.T.contiguous()
    zeros = None if zero_point is None else zero_point.T.contiguous()
    total = rows.new_zeros(())
    for start in range(0, len(rows), block_size):
        block = slice(start, min(start + block_size, len(rows)))
        # Row j of the transpose holds what column j takes from each column before it.
        pull = factor[block, block].T.contiguous()
        steps = pull.diagonal().tolist()
        errors = torch.empty_like(rows[block])
        for j, step in enumerate(steps):
            target = torch.addmv(rows[start + j], errors[:j].T, pull[j, :j], alpha=-1)
            own = group[start + j]
            zero = None if zeros is None else zeros[own]
            code = quantize(target, scales[own], zero, scheme.bits, symmetric=scheme.symmetric)
            torch.sub(target, dequantize(code, scales[own], zero), out=errors[j]).div_(step)
            codes[start + j] = code
        rows[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
        total += errors.square().sum()
    unsorted = torch.empty_like(codes)
    unsorted[order] = codes
    return unsorted.T.contiguous(), total


def _check_tokens(weights: Mapping[str, Tensor], moments: Mapping[str, SecondMoment]) -> None:
    """Refuse Hessians that know next to nothing, and warn of those that cannot have full rank.

    Damping makes up for a missing rank: on DINOv2's widest layers (1536 inputs) the codes learnt
    from one frame of 50 tokens still have a fraction of rounding to nearest's error.
    """
    refused = []
    for name, moment in moments.items():
        width = weights[name].shape[1]
        told = f"{name} read {moment.tokens} tokens and is {width} wide"
        if moment.tokens * _LEAST_SHARE < width:
            refused.append(told)
        elif moment.tokens < width:
            logger.info("gptq: %s, so damping decides part of its update", told)
    if refused:
        raise UsageError(
            f"gptq: too few calibration samples: {'; '.join(refused)}, and a layer needs a token "
            f"for every {_LEAST_SHARE} inputs at least; give more calibration samples (more "
            "episodes give more frames to encode, more sequences more to roll out)"
        )
