"""The literal order gives the planner's costs."""

import pytest
import torch

from dino_wm_support import observation, relative, tiny_model
from quantwm.bench.literal import LiteralDINOWM
from quantwm.errors import UsageError
from quantwm.methods import quantize
from quantwm.planning.objective import Objective
from quantwm.planning.rollout import Rollouts


@pytest.mark.parametrize("concat_dim", [0, 1])
@pytest.mark.parametrize("num_hist", [1, 2, 3])
def test_the_literal_order_and_ours_agree_on_costs_and_elites(num_hist, concat_dim):
    model = tiny_model(num_hist=num_hist, concat_dim=concat_dim)
    start, goal = observation(seed=1), observation(seed=2)
    actions = torch.randn(2, 20, 5, 10, generator=torch.Generator().manual_seed(0))
    literal = LiteralDINOWM(model)
    theirs = literal.costs(start, literal.goals(goal), actions, chunk=7)
    with torch.inference_mode():
        ends = [
            [model.encode({k: v[i : i + 1] for k, v in frames.items()}) for i in range(2)]
            for frames in (start, goal)
        ]
    ours = Rollouts(model, Objective(model.objective_weights)).costs(*ends, actions)
    assert relative(ours, theirs) < 1e-5
    for own, other in zip(ours, theirs, strict=True):
        assert set(own.argsort()[:5].tolist()) == set(other.argsort()[:5].tolist())


def test_the_literal_order_refuses_a_quantized_model_and_an_empty_chunk():
    model = tiny_model()
    with pytest.raises(UsageError, match="quantized"):
        LiteralDINOWM(quantize(model, "w8"))
    with pytest.raises(UsageError, match="chunk must be at least 1"):
        LiteralDINOWM(model).costs(observation(), [], torch.zeros(2, 1, 5, 10), chunk=0)
