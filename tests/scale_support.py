"""Models with channels that stand out, what their layers read, and quantizers in numpy."""

import numpy as np
import torch
from torch import nn

from dino_wm_support import observation, relative, tiny_model
from quant_support import HIDDEN, WIDTH, Block, TinyCalibration, TinyWorldModel
from quantwm.calibration import Calibration
from quantwm.fingerprint import model_hash
from quantwm.protocols import LinearGroup
from quantwm.quant.primitives import code_range
from quantwm.quant.scheme import LayerScheme, PerGroup, PerTensor

FED = {"encoder.block.fc1": "encoder.block.norm", "predictor.fc1": "predictor.norm"}
"""Layers of the tiny world model that a normalisation feeds."""


def calibration_of(model, seed=0):
    """Real calibration data for a tiny DINO-WM: two frames, three sequences."""
    seen = observation(seed=seed)
    generator = np.random.default_rng(seed)
    actions = generator.standard_normal((3, 3, model.action_spec.model_dim), np.float32)
    return Calibration(
        seen["visual"][:, 0], seen["proprio"][:, 0], actions, np.array([0, 1, 1]),
        model_hash(model), {},
    )  # fmt: skip


def outlier_model(factor=30.0, **changes):
    """A tiny DINO-WM, three channels of whose normalisations stand out."""
    model = tiny_model(**changes)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(1 + 0.1 * module.weight)
                if ".blocks." in name:
                    module.weight[[1, 7, 12]] *= factor
    return model


def outlier_world_model(factor=8.0, seed=0):
    """The tiny world model, two channels of whose normalisations stand out."""
    model = TinyWorldModel(seed)
    with torch.no_grad():
        for norm in set(FED.values()):
            model.get_submodule(norm).weight[[2, 9]] *= factor
    return model


def inputs_of(model, calibration, names):
    """All that layers read in a replay: name → (frames or rows, tokens, width)."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(inputs[0].detach())
        )
        for name in names
    ]
    calibration.roll_out(model, calibration.encode(model))
    for handle in handles:
        handle.remove()
    return seen


def greatest_change(model, changed):
    """Largest relative change of what a DINO-WM encodes and predicts, part by part."""
    generator = torch.Generator().manual_seed(2)
    actions = torch.randn(2, 3, 3, model.action_spec.model_dim, generator=generator)
    with torch.no_grad():
        latents = [m.encode(observation(seed=1)) for m in (model, changed)]
        futures = [m.rollout(latents[0], actions) for m in (model, changed)]
    return max(
        relative(own[part], value)
        for exact, own in (latents, futures)
        for part, value in exact.items()
    )


def folded_scale(model, changed, norm):
    """What the outputs of a normalisation were divided by, from its weights."""
    old, new = (m.get_submodule(norm).weight.detach().double() for m in (model, changed))
    return old / new


def output_error(model, small, calibration):
    """Relative squared error of what layers behind normalisations give, for the same tokens."""
    groups = [g for g in model.quantizable_groups() if g.producer is not None]
    seen = inputs_of(model, calibration, [g.producer for g in groups])
    total = 0.0
    with torch.no_grad():
        for group in groups:
            for layer in group.layers:
                error = norm = 0.0
                for x in seen[group.producer]:
                    exact, own = (
                        m.get_submodule(layer)(m.get_submodule(group.producer)(x))
                        for m in (model, small)
                    )
                    error += (own - exact).square().sum().item()
                    norm += exact.square().sum().item()
                total += error / norm
    return total


def rounded(values, low, high, scheme, rule="absmax"):
    """Values on the grid that covers [low, high], which broadcast."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    bottom, top = code_range(scheme.bits, symmetric=scheme.symmetric)
    if scheme.symmetric:
        steps = top if rule == "absmax" else (2**scheme.bits - 1) / 2
        scale, zero = np.maximum(-low, high) / steps, 0
    else:
        scale = (high - low) / top
        zero = np.clip(np.rint(-low / np.where(scale > 0, scale, 1)), 0, top)
    scale = np.where(scale > 0, scale, 1)
    return scale * (np.clip(np.rint(values / scale) + zero, bottom, top) - zero)


def segments(scheme, width):
    """Columns that share a scale, as slices."""
    if not isinstance(scheme.granularity, PerGroup):
        return [slice(0, width)]
    size = scheme.granularity.size
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]


def rounded_weight(weight, scheme, ratio=1.0, extent_of=None):
    """A weight (out, in) on its grid; `extent_of` is the matrix whose ranges are taken."""
    source, out = weight if extent_of is None else extent_of, np.empty_like(weight)
    axis = None if isinstance(scheme.granularity, PerTensor) else 1
    for part in segments(scheme, weight.shape[1]):
        low, high = (
            ratio * np.asarray(f(source[:, part], axis=axis, keepdims=True))
            for f in (np.min, np.max)
        )
        out[:, part] = rounded(weight[:, part], low, high, scheme, scheme.scale_rule)
    return out


def rounded_input(x, scheme):
    """Inputs (frames, tokens, width) on their grids, static ones over all that `x` spans."""
    if scheme is None:
        return x
    axes = {"per_tensor_static": None, "per_tensor_dynamic": (1, 2), "per_token": 2}
    low, high = (f(x, axis=axes[scheme.granularity], keepdims=True) for f in (np.min, np.max))
    return rounded(x, low, high, scheme)


def scaled_error(x, weight, scale, plan, stale=False, round_weight=rounded_weight):
    """‖X Wᵀ - X̂ Ŵᵀ‖², in float64, for inputs divided by `scale`.

    With `stale` the weight's grid is that of the unscaled weight, as in the published code.
    """
    scheme = LayerScheme.parse(plan)
    x, weight, scale = (np.asarray(value, np.float64) for value in (x, weight, scale))
    known = {"extent_of": weight} if stale else {}
    own = weight * scale
    if scheme.weight is not None:
        own = round_weight(own, scheme.weight, **known)
    return np.square(x @ weight.T - rounded_input(x / scale, scheme.activation) @ own.T).sum()


class GatedBlock(Block):
    """Two linears read one normalisation."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        hidden = self.norm(x)
        return x + self.fc2(torch.tanh(self.fc1(hidden)) * self.gate(hidden))


class GatedWorldModel(TinyWorldModel):
    """The tiny world model with a gated predictor."""

    def __init__(self, seed=0):
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.predictor = GatedBlock()

    def quantizable_groups(self):
        both = LinearGroup(("predictor.fc1", "predictor.gate"), "predictor.norm", "predictor")
        alone = LinearGroup(("predictor.fc2",), None, "predictor")
        return [both, alone]


def tiny_inputs(world_model):
    """(frames, tokens, width) float64 of the fed layers of a tiny world model."""
    calibration = TinyCalibration.of(world_model)
    seen = inputs_of(world_model, calibration, FED)
    return {
        name: np.concatenate([x.double().reshape(-1, 4, WIDTH).numpy() for x in several])
        for name, several in seen.items()
    }
