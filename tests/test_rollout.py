"""Rollouts in the fewest operations: the literal order's numbers, and what is not computed."""

from collections import Counter

import numpy as np
import pytest
import torch

from dino_wm_support import literal_rollout, observation, relative, tiny_model
from foreign import Field, PointWorld
from quantwm.errors import UsageError
from quantwm.fingerprint import model_hash
from quantwm.methods import quantize
from quantwm.models import attention
from quantwm.models.attention import KeyValueCache, blocked_attention
from quantwm.planning.objective import Objective
from quantwm.planning.rollout import ModelCost, Rollouts, chunks_together
from quantwm.quant import QuantPlan


class Replay:
    """Calibration data for a tiny model."""

    def __init__(self, model):
        self.model_hash = model_hash(model)

    def __len__(self):
        return 12

    @torch.no_grad()
    def encode(self, model):
        return model.encode(observation(seed=9))

    @torch.no_grad()
    def roll_out(self, model, latents):
        model.rollout(latents, candidates(seed=9))


def candidates(batch=2, number=6, horizon=5, seed=0):
    return torch.randn(batch, number, horizon, 10, generator=torch.Generator().manual_seed(seed))


def ends(model, batch=2):
    """Observed and goal latents, one an episode."""
    with torch.inference_mode():
        return [
            [model.encode({k: v[i : i + 1] for k, v in frames.items()}) for i in range(batch)]
            for frames in (observation(batch, seed=1), observation(batch, seed=2))
        ]


@torch.no_grad()
@pytest.mark.parametrize("concat_dim", [0, 1])
@pytest.mark.parametrize("num_hist", [1, 2, 3, 6])
@pytest.mark.parametrize("observed", [1, 2, 4])
def test_frames_are_those_of_the_literal_order(num_hist, concat_dim, observed):
    model = tiny_model(num_hist=num_hist, concat_dim=concat_dim)
    latent = model.encode(observation(frames=observed))
    literal = literal_rollout(model, latent, candidates())
    ours = model.rollout(latent, candidates())
    for name in literal:
        assert relative(ours[name], literal[name]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("num_hist", [1, 3])
@pytest.mark.parametrize("mode", ["last", "all"])
def test_costs_and_elites_are_those_of_the_literal_order(num_hist, mode):
    model = tiny_model(num_hist=num_hist)
    objective = Objective(model.objective_weights, mode=mode)
    actions = candidates(number=50)
    latents, goals = ends(model)
    costs = Rollouts(model, objective).costs(latents, goals, actions)
    for i in range(2):
        frames = literal_rollout(model, latents[i], actions[i : i + 1])
        literal = objective(frames, goals[i])[0]
        assert relative(costs[i], literal) < 1e-5
        assert set(costs[i].argsort()[:10].tolist()) == set(literal.argsort()[:10].tolist())


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w4a4-token", "w3a8-a_symmetric"])
@pytest.mark.parametrize("include", [(), ("attention_matmul",)])
def test_no_granularity_makes_a_saving_inexact(scheme, include):
    model = tiny_model(num_hist=3)
    layers = {f"*.{name}": scheme for name in ("qkv", "proj", "fc1", "fc2")}
    if include:
        layers["*_input"] = "a8" + scheme.partition("a")[2][1:]
    small = quantize(model, QuantPlan(layers, include=include), Replay(model))
    latent = small.encode(observation())
    literal = literal_rollout(small, latent, candidates())
    ours = small.rollout(latent, candidates())
    unquantized = model.rollout(model.encode(observation()), candidates())
    for name in literal:
        apart = (ours[name] - literal[name]).flatten(2).norm(dim=-1).flatten()
        size = literal[name].flatten(2).norm(dim=-1).flatten()
        # A float32 rounding error may tip a value that lies between two codes, in a few
        # candidates and by one step; scales that differ would move every candidate.
        assert (apart / size).median() < 1e-6
        assert (apart / size).max() < 5e-3
        assert relative(unquantized[name], literal[name]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("num_hist", "computed", "newest"),
    # Windows of 1, 2 and 3 frames compute their newest, then windows slide and compute 3 each.
    [(1, 5, 5), (2, 2 + 3 * 2, 5), (3, 3 + 2 * 3, 5), (6, 5, 5)],
)
def test_only_what_the_next_frame_needs_is_computed(num_hist, computed, newest):
    model = tiny_model(num_hist=num_hist)
    tokens = Counter()

    def count(name):
        def hook(_module, inputs, keywords, output):
            frames = inputs[0].shape[1] // model.config.frame_tokens
            tokens[name] += frames
            tokens[name, "features"] += frames * output.shape[-1]
            assert keywords.get("outputs") is None or name.endswith("qkv")

        return hook

    blocks = [f"predictor.blocks.{i}" for i in range(2)]
    layers = [
        f"{block}.{layer}" for block in blocks for layer in ("attn.qkv", "attn.proj", "mlp.fc1")
    ]
    for name in layers:
        model.get_submodule(name).register_forward_hook(count(name), with_kwargs=True)
    latent = model.encode(observation(batch=1))
    model.rollout(latent, candidates(batch=1), last_only=True)
    width = model.get_submodule(layers[0]).out_features
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1"):
        assert tokens[f"predictor.blocks.0.{layer}"] == computed
    assert tokens["predictor.blocks.1.attn.proj"] == tokens["predictor.blocks.1.mlp.fc1"] == newest
    older = computed - newest
    assert (
        tokens["predictor.blocks.1.attn.qkv", "features"] == newest * width + older * width * 2 // 3
    )


def test_a_cache_refuses_more_than_its_window():
    cache = KeyValueCache(8)
    part = torch.randn(2, 3, 5, 4)
    cache.extend(part, part)
    with pytest.raises(ValueError, match="10 tokens do not fit a window of 8"):
        cache.extend(part, part)


@torch.inference_mode()
@pytest.mark.parametrize("block_bytes", [1, 3000, 2**20])
@pytest.mark.parametrize("keys", [7, 21])
def test_blocked_attention_is_attention(monkeypatch, block_bytes, keys):
    monkeypatch.setattr(attention, "_BLOCK_BYTES", block_bytes)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(5, keys, 3, 2, 8, generator=generator)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    q = q[:, :, -7:]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert relative(blocked_attention(q, k, v), expected) < 1e-6
    rounded = blocked_attention(*(x.bfloat16() for x in (q, k, v))).float()
    assert relative(rounded, expected) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [None, "w4g8", "w8a8-token"])
def test_costs_depend_neither_on_threads_nor_on_the_memory_budget(dtype, plan):
    model = tiny_model(num_hist=3)
    if plan is not None:
        model = quantize(model, QuantPlan({"*": plan}))
    model = model.to(dtype)
    latents, goals = ends(model)
    actions = candidates(number=13)
    before = torch.get_num_threads()
    results = []
    try:
        for threads, budget in ((1, None), (3, None), (2, 10**9)):
            torch.set_num_threads(threads)
            rollouts = Rollouts(
                model, Objective(model.objective_weights), chunk=4, memory_budget=budget
            )
            results.append(rollouts.costs(latents, goals, actions))
            assert torch.get_num_threads() == threads
            assert rollouts.workers.in_flight == threads
        tight = Rollouts(
            model,
            Objective(model.objective_weights),
            chunk=4,
            memory_budget=rollouts.workers.job_bytes + 1,
        )
        results.append(tight.costs(latents, goals, actions))
        assert tight.workers.in_flight == 1
        assert results[-1].shape == (2, 13)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_an_episodes_costs_do_not_depend_on_its_neighbours():
    model = tiny_model()
    latents, goals = ends(model)
    actions = candidates(number=9)
    rollouts = Rollouts(model, Objective(model.objective_weights), chunk=4)
    together = rollouts.costs(latents, goals, actions)
    alone = rollouts.costs(latents[1:], goals[1:], actions[1:])
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize("mode", ["last", "all"])
@pytest.mark.parametrize("together", [2, 3, 7])
def test_chunks_of_several_episodes_in_one_kernel_cost_what_they_cost_alone(together, mode):
    model = tiny_model(num_hist=3)
    objective = Objective(model.objective_weights, mode=mode)
    latents, goals = ends(model)
    actions = candidates(number=9)
    alone = Rollouts(model, objective, chunk=4).costs(latents, goals, actions)
    shapes = Counter()
    rollout = model.rollout

    def counted(latent, chunks, **keywords):
        shapes[len(latent["visual"]), *chunks.shape[:2]] += 1
        return rollout(latent, chunks, **keywords)

    model.rollout = counted
    rollouts = Rollouts(model, objective, chunk=4, together=together)
    packed = rollouts.costs(latents, goals, actions)
    # Nine candidates are three chunks, and two episodes six.
    assert shapes == {(together, together, 4): -(-6 // together)}
    assert relative(packed, alone) < 1e-6
    # Beside another episode, and in another place of the kernel.
    last = rollouts.costs(latents[1:], goals[1:], actions[1:])
    assert torch.equal(packed[1:], last)


def test_a_latent_that_is_one_tensor_is_packed_too():
    task, model = Field(), PointWorld()
    episodes = task.episodes(range(3))
    index = np.arange(3)
    actions = torch.randn(3, 5, 2, model.action_spec.model_dim)
    objective = Objective(model.objective_weights)
    cost = ModelCost(model, task, episodes, objective)
    cost.observe(index, episodes.start)
    latents, goals = cost._ends(index)
    packed = Rollouts(model, objective, chunk=2, together=4)
    torch.testing.assert_close(packed.costs(latents, goals, actions), cost(index, actions))


@pytest.mark.parametrize(("tokens", "expected"), [(49, 4), (196, 1), (4, 50)])
def test_a_gpus_kernel_sees_about_as_many_tokens_whatever_a_frame_has(tokens, expected):
    model = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "rollout_chunk", 800 // tokens)
        assert chunks_together(model, torch.device("cuda"), 64) == expected
        assert chunks_together(model, torch.device("cpu"), 64) == 1


def test_a_budget_for_less_than_a_chunk_is_refused_with_both_numbers():
    model = tiny_model()
    latents, goals = ends(model)
    rollouts = Rollouts(model, Objective(model.objective_weights), memory_budget=1000)
    with pytest.raises(UsageError, match=r"takes \d.* MB of memory and the memory budget is 1 kB"):
        rollouts.costs(latents, goals, candidates())
    with pytest.raises(UsageError, match="chunk must be at least 1, got 0"):
        Rollouts(model, Objective(model.objective_weights), chunk=0)
    with pytest.raises(UsageError, match="together must be at least 1, got 0"):
        Rollouts(model, Objective(model.objective_weights), together=0)


@pytest.mark.parametrize("plan", [None, "w8"])
@pytest.mark.parametrize("num_hist", [1, 3])
def test_gradients_are_those_of_the_literal_order(num_hist, plan):
    model = tiny_model(num_hist=num_hist)
    if plan is not None:
        model = quantize(model, QuantPlan({"*": plan}))
    objective = Objective(model.objective_weights)
    latents, goals = ends(model)
    actions = candidates(number=5)
    costs, gradients = Rollouts(model, objective, chunk=2).gradients(latents, goals, actions)
    torch.testing.assert_close(
        costs, Rollouts(model, objective).costs(latents, goals, actions), rtol=1e-5, atol=1e-6
    )
    assert gradients.shape == actions.shape
    for i in range(2):
        free = actions[i : i + 1].clone().requires_grad_()
        plain = {name: part.clone() for name, part in latents[i].items()}
        goal = {name: part.clone() for name, part in goals[i].items()}
        objective(literal_rollout(model, plain, free), goal).sum().backward()
        assert relative(gradients[i], free.grad[0]) < 1e-4


def test_descending_the_model_costs_gradient_lowers_the_cost():
    task, model = Field(), PointWorld()
    episodes = task.episodes(range(3))
    cost = ModelCost(model, task, episodes, Objective(model.objective_weights))
    index = np.arange(3)
    cost.observe(index, episodes.start)
    actions = torch.zeros(3, 4, 2, model.action_spec.model_dim)
    before, gradient = cost.gradient(index, actions)
    after = cost(index, actions - 0.1 * gradient)
    assert (after < before).all()


def test_what_is_trained_in_bfloat16_has_the_gradients_of_attention(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(5, 21, 3, 2, 8, generator=generator)
    weights = torch.randn(5, 21, 16, generator=generator)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16:  # without the fused kernel, whose backward pass is slow
            monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
        leaf = packed.detach().to(dtype, copy=True).requires_grad_()
        q, k, v = leaf.permute(2, 0, 3, 1, 4)
        mixed = attention.frame_causal(q, k, v, 7, torch.nn.Identity())
        (mixed.float() * weights).sum().backward()
        gradients.append(leaf.grad.float())
    assert relative(gradients[1], gradients[0]) < 2e-2
