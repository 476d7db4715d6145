"""Multiply-adds from the shapes are those that the processor is asked for."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench_support import one_thread  # noqa: F401
from dino_wm_support import observation, tiny_model
from quantwm.bench.literal import LiteralDINOWM
from quantwm.bench.operations import (
    Operations,
    encoding,
    literal_operations,
    planned_operations,
    whole_window,
)
from quantwm.bench.subjects import Subject
from quantwm.bench.variants import VARIANTS, prepare
from quantwm.models import dino_wm
from quantwm.planning.workers import Workers

CPU = torch.device("cpu")
aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Counts the multiply-adds of every product that runs while it is active, in this thread."""

    def __init__(self):
        super().__init__()
        self.linears = self.attention = 0

    @property
    def seen(self):
        return Operations(self.linears, self.attention)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        operation = func.overloadpacket
        if operation is aten.mm:
            self.linears += result.numel() * args[0].shape[-1]
        elif operation is aten.addmm:
            self.linears += result.numel() * args[1].shape[-1]
        elif operation is aten.convolution:
            self.linears += result.numel() * args[1][0].numel()
        elif operation is aten.bmm:
            # One matrix for the whole batch is a linear's weight.
            shared = args[1].stride(0) == 0 and len(args[1]) > 1
            multiply_adds = result.numel() * args[0].shape[-1]
            self.linears += multiply_adds * shared
            self.attention += multiply_adds * (not shared)
        elif "scaled_dot_product" in str(operation):
            q, k, v = args[:3]
            logits = q.shape[:-1].numel() * k.shape[-2]
            self.attention += logits * (q.shape[-1] + v.shape[-1])
        return result


@pytest.fixture
def small_chunks(monkeypatch):
    """Jobs run in this thread, where they are counted, and a dozen candidates fill chunks."""
    monkeypatch.setattr(Workers, "map", lambda self, function, jobs: [function(j) for j in jobs])
    monkeypatch.setattr(dino_wm, "_TOKENS_A_CHUNK", 24)


def counted(prepared, candidates):
    with Counter() as counter:
        prepared.costs(candidates)
    return counter.seen


def subject(model, candidates=12, horizon=5):
    whole = Subject.of("tiny", model, candidates=candidates, episodes=2)
    return replace(whole, actions=whole.actions[:, :, :horizon])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("variant", ["literal-float32", "float32"])
@pytest.mark.parametrize("concat_dim", [0, 1])
@pytest.mark.parametrize("num_hist", [1, 2, 3])
def test_a_steps_operations_are_those_that_run(num_hist, concat_dim, variant):
    model = tiny_model(num_hist=num_hist, concat_dim=concat_dim)
    prepared = prepare(VARIANTS[variant], subject(model), CPU)
    if variant != "literal-float32":
        assert prepared.chunk == 24 // model.config.frame_tokens
    assert prepared.operations() == counted(prepared, 12)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("variant", ["literal-float32", "float32", "bfloat16"])
@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_the_count_holds_for_any_horizon_and_attention_kernel(horizon, variant):
    prepared = prepare(VARIANTS[variant], subject(tiny_model(num_hist=4), horizon=horizon), CPU)
    assert prepared.operations() == counted(prepared, 12)


@pytest.mark.usefixtures("small_chunks")
def test_copies_that_fill_a_chunk_run_but_are_not_counted():
    model = tiny_model()
    prepared = prepare(VARIANTS["float32"], subject(model, candidates=13), CPU)
    assert prepared.chunk == 6
    assert counted(prepared, 13) == planned_operations(model.config, 18, 5, 2)
    assert prepared.operations() == planned_operations(model.config, 13, 5, 2)


@torch.inference_mode()
@pytest.mark.parametrize("concat_dim", [0, 1])
def test_an_image_and_a_window_cost_what_the_literal_order_computes(concat_dim):
    model = tiny_model(num_hist=3, concat_dim=concat_dim, num_action_repeat=1 + concat_dim)
    config, literal = model.config, LiteralDINOWM(model)
    inputs = literal.inputs(observation(), 0)
    with Counter() as counter:
        literal.encode(*inputs)
    assert encoding(config) == counter.seen
    for frames in (1, 2, 3):
        window = torch.randn(1, frames, config.frame_tokens, config.token_width)
        with Counter() as counter:
            literal.predict(window)
        assert whole_window(config, frames) == counter.seen


def test_operations_add_and_scale():
    some = Operations(3, 5)
    assert some + some * 2 == Operations(9, 15)
    assert some.multiply_adds == 8
    assert some.flops == 16


def test_with_one_frame_of_history_only_encodings_are_saved():
    config = tiny_model(num_hist=1).config
    literal, planned = (count(config, 10, 5) for count in (literal_operations, planned_operations))
    assert literal == planned + encoding(config) * 9
