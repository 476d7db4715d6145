"""Layers quantized one at a time: a defect that is put into one of them is found there."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from foreign import Field, PointWorld
from quant_support import TinyWorldModel
from quantwm.calibration import calibrate
from quantwm.diagnostics.sensitivity import diagnose_sensitivity
from quantwm.errors import MismatchError, PlanError, UsageError
from quantwm.fingerprint import model_hash
from quantwm.methods import quantize
from quantwm.planning.cem import CEM
from quantwm.protocols import ActionSpec, LinearGroup
from quantwm.seeds import episode_seeds
from study_support import PointModel, PointTask

PLANNER = CEM(samples=20, elites=4, steps=2, horizon=3)
QUICK = {"episodes": 2, "planner": PLANNER, "dtype": "float32", "device": "cpu"}
WIDTH = 8


class Chain(nn.Module):
    """Linears that permute and flip what they read: any width of bits holds them exactly."""

    encoded = 0

    def __init__(self, depth=4):
        super().__init__()
        self.action_spec = ActionSpec(2, 1, (0.0, 0.0), (1.0, 1.0))
        self.objective_weights = {"": 1.0}
        generator = torch.Generator().manual_seed(0)
        self.encoder = nn.ModuleList(self._linear(generator) for _ in range(depth))
        self.predictor = nn.ModuleList(self._linear(generator) for _ in range(depth))

    @staticmethod
    def _linear(generator):
        linear = nn.Linear(WIDTH, WIDTH, bias=False)
        signs = torch.randint(0, 2, (WIDTH, 1), generator=generator) * 2.0 - 1
        with torch.no_grad():
            linear.weight.copy_(torch.eye(WIDTH)[torch.randperm(WIDTH, generator=generator)])
            linear.weight *= signs
        return linear

    def encode(self, observation):
        Chain.encoded += 1
        x = torch.from_numpy(observation["proprio"])
        x = torch.cat([x, x.square() / 5, x.flip(-1), x.sin()], dim=-1)
        for layer in self.encoder:
            x = layer(x)
        return x

    def rollout(self, latent, actions, *, last_only=False):
        frames = [latent[:, -1:].expand(-1, actions.shape[1], -1)]
        for step in range(actions.shape[2]):
            x = frames[-1] + nn.functional.pad(actions[:, :, step], (0, WIDTH - 2))
            for layer in self.predictor:
                x = layer(x)
            frames.append(x)
        stacked = torch.stack(frames, 2)
        return stacked[:, :, -1:] if last_only else stacked

    def quantizable_groups(self):
        return tuple(
            LinearGroup((f"{part}.{i}",), None, f"{part}.{i}", tokens_per_frame=1)
            for part in ("encoder", "predictor")
            for i in range(len(self.encoder))
        )


@pytest.mark.parametrize("spoilt", ["encoder.0", "encoder.3", "predictor.1", "predictor.3"])
def test_noise_in_one_layer_is_found_there(spoilt):
    model = Chain()
    noise = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.get_submodule(spoilt).weight += 0.2 * noise
    found = diagnose_sensitivity(model, PointTask(), "w3", **QUICK)
    worst, *others = found.ranked()
    assert worst.layer == spoilt
    assert worst.error > 0.01
    assert worst.rank_correlation < 1
    assert len(others) == 7
    for layer in others:
        assert layer.error < 1e-6, layer
        assert layer.rank_correlation == pytest.approx(1)


def test_the_error_is_that_of_the_model_with_this_layer_quantized():
    """Computed here from the planner's candidates and the quantized model's own rollout."""
    model, planner = PointModel(), CEM(samples=6, elites=2, steps=1, horizon=3)
    found = diagnose_sensitivity(model, PointTask(), "w2", **QUICK | {"planner": planner})
    assert [layer.layer for layer in found.layers] == ["encoder.0", "predictor.0"]
    drawn = PointTask().episodes(episode_seeds("tuning", 0, 2))
    observed = {"proprio": drawn.start[:, None].astype(np.float32)}
    shape = (planner.horizon, 2)
    mean, deviation = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    spec = model.action_spec
    actions = torch.from_numpy(
        np.stack([planner.candidates(mean, deviation, int(s), 0, 0, spec) for s in drawn.seeds])
    )
    with torch.no_grad():
        expected = model.rollout(model.encode(observed), actions, last_only=True)
        for layer in found.layers:
            alone = quantize(model, {layer.layer: "w2"})
            got = alone.rollout(alone.encode(observed), actions, last_only=True)
            error = (got - expected).norm() / expected.norm()
            assert layer.error == pytest.approx(float(error), rel=1e-4)
            assert layer.error > 0


def test_layers_of_the_predictor_do_not_encode_again():
    def encodings(depth):
        Chain.encoded = 0
        diagnose_sensitivity(Chain(depth), PointTask(), "w3", **QUICK)
        return Chain.encoded

    each = 2 * QUICK["episodes"]
    assert encodings(4) - encodings(2) == 2 * each, "start and goal for an encoder layer, no more"


def test_fewer_bits_make_larger_errors_in_a_foreign_model():
    model = PointWorld()
    before = model_hash(model)
    errors = []
    for scheme in ("w8", "w4", "w2"):
        found = diagnose_sensitivity(model, Field(), scheme, **QUICK)
        assert [layer.layer for layer in found.layers] == ["look", "move"]
        errors.append([layer.error for layer in found.layers])
    assert (np.diff(errors, axis=0) > 0).all()
    assert model_hash(model) == before


def test_static_activations_and_methods_take_calibration_data():
    model = PointWorld()
    data = calibrate(model, Field(), episodes=1, samples=16, planner=PLANNER, dtype="float32")
    found = diagnose_sensitivity(
        model, Field(), "w4a8", method="gptq", calibration=data, candidates=4, **QUICK
    )
    assert found.method == "gptq"
    assert all(0 < layer.error < 1 for layer in found.layers)


def test_the_result_is_written_as_json():
    seen = []
    found = diagnose_sensitivity(
        PointModel(), PointTask(), "w2", progress=lambda *at: seen.append(at), **QUICK
    )
    facts = json.loads(json.dumps(found.to_dict()))
    assert (facts["kind"], facts["scheme"], facts["method"]) == ("sensitivity", "w2", "rtn")
    assert facts["layers"] == [
        {
            "layer": f"{part}.0",
            "part": part,
            "block": part,
            "error": layer.error,
            "rank_correlation": layer.rank_correlation,
        }
        for part, layer in zip(("encoder", "predictor"), found.layers, strict=True)
    ]
    assert seen == [(1, 2), (2, 2)]


class Untouched(PointModel):
    """A model that no check may run."""

    def encode(self, observation):
        raise AssertionError("computed before everything was checked")


def test_mistakes_are_refused_before_anything_is_computed():
    def refused(error, match, model=None, **arguments):
        with pytest.raises(error, match=match):
            diagnose_sensitivity(model or Untouched(), PointTask(), **QUICK | arguments)

    refused(UsageError, "w3x", scheme="w3x")
    refused(UsageError, "did you mean 'gptq'", method="gptx")
    refused(PlanError, "static activations need calibration data", scheme="w8a8")
    refused(PlanError, "'gptq' needs calibration data", method="gptq")
    refused(PlanError, "group size 128", scheme="w3g128")
    both = r"encoder\.block\.fc2 alone: smoothquant(.|\n)*predictor\.fc2 alone: smoothquant"
    refused(PlanError, both, method="smoothquant", model=TinyWorldModel())
    refused(UsageError, "quantizes nothing", scheme="float")
    refused(UsageError, "candidates must be at least 2", candidates=1)
    refused(UsageError, "quantized already", model=quantize(PointModel(), "w4"))
    data = calibrate(
        PointModel(), PointTask(), episodes=1, samples=4, planner=PLANNER, dtype="float32"
    )
    refused(MismatchError, "another model", model=PointModel(speed=2), calibration=data)
