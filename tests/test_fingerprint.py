import copy
from dataclasses import replace

import torch

from quant_support import TinyWorldModel
from quantwm.fingerprint import model_hash
from quantwm.methods import quantize


def test_equal_models_have_equal_hashes():
    assert model_hash(TinyWorldModel()) == model_hash(copy.deepcopy(TinyWorldModel()))
    assert len(model_hash(TinyWorldModel())) == 64


def test_every_part_changes_the_hash():
    def changed(change):
        world_model = TinyWorldModel()
        change(world_model)
        return model_hash(world_model)

    def one_bit(model):
        weight = model.predictor.fc1.weight.data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))

    def sign_of_zero(model):
        model.predictor.fc1.bias.data[0] = -0.0

    def zero(model):
        model.predictor.fc1.bias.data[0] = 0.0

    def transpose(model):
        model.predictor.fc1.weight.data = model.predictor.fc1.weight.data.reshape(12, 20)

    def statistics(model):
        model.action_spec = replace(model.action_spec, mean=(0.0, 0.1))

    def objective(model):
        model.objective_weights = {"": 2.0}

    class Config:
        def to_dict(self):
            return {"depth": 1}

    def config(model):
        model.config = Config()

    hashes = [
        model_hash(TinyWorldModel()),
        model_hash(TinyWorldModel(seed=1)),
        changed(one_bit),
        changed(zero),
        changed(sign_of_zero),
        changed(transpose),
        changed(statistics),
        changed(objective),
        changed(config),
        changed(lambda model: model.bfloat16()),
        changed(lambda model: model.register_buffer("extra", torch.zeros(1))),
    ]
    assert len(set(hashes)) == len(hashes)


def test_memory_layout_and_derived_buffers_do_not_matter():
    world_model = TinyWorldModel()
    weight = world_model.predictor.fc1.weight
    weight.data = weight.data.t().contiguous().t()
    world_model.register_buffer("cache", torch.ones(3), persistent=False)
    assert model_hash(world_model) == model_hash(TinyWorldModel())


def test_quantized_models_differ_by_plan_even_where_no_tensor_does():
    hashes = {model_hash(quantize(TinyWorldModel(), f"w8a{bits}-token")) for bits in (4, 6, 8)}
    assert len(hashes) == 3
