"""What a model gets wrong when it imagines: hand-made models with known errors."""

import numpy as np
import pytest
import torch

from foreign import Field, PointWorld
from quantwm.diagnostics.rollouts import diagnose_rollouts
from quantwm.errors import MismatchError, UsageError
from quantwm.loading import load
from quantwm.planning.cem import CEM
from quantwm.planning.gradient import GradientDescent

QUICK = {"episodes": 4, "planner": CEM(samples=32, elites=8, steps=2), "dtype": "float32"}


def test_an_exact_model_has_no_error_and_ranks_as_the_truth_does():
    diagnosis = diagnose_rollouts(PointWorld(), Field(), **QUICK)
    assert diagnosis.error[""].max() < 1e-5
    assert diagnosis.still[""].min() > 0.1
    assert (np.diff(diagnosis.still[""]) > 0).all(), "candidates move away from the start"
    np.testing.assert_allclose(diagnosis.rank_correlation, 1)
    np.testing.assert_allclose(diagnosis.elite_overlap, 1)
    np.testing.assert_allclose(diagnosis.regret, 0, atol=1e-9)
    assert len(diagnosis.regret) == 4


def test_errors_are_relative_to_the_true_latents():
    """A model whose every imagined frame is half as long as it should be has error one half."""

    class Half(PointWorld):
        def rollout(self, latent, actions, *, last_only=False):
            frames = super().rollout(latent, actions)
            frames = torch.cat([frames[:, :, :1], frames[:, :, 1:] / 2], dim=2)
            return frames[:, :, -1:] if last_only else frames

    diagnosis = diagnose_rollouts(Half(), Field(), **QUICK)
    np.testing.assert_allclose(diagnosis.error[""], 0.5, rtol=1e-5)


def test_a_model_that_does_not_move_has_the_error_of_standing_still():
    model = PointWorld()
    with torch.no_grad():
        model.move.weight[:, 16:] = 0
    diagnosis = diagnose_rollouts(model, Field(), **QUICK)
    np.testing.assert_allclose(diagnosis.error[""], diagnosis.still[""], rtol=1e-5)
    assert diagnosis.regret.mean() > diagnosis.true_regret.mean()


def test_a_model_that_moves_backwards_ranks_backwards():
    model = PointWorld()
    with torch.no_grad():
        model.move.weight[:, 16:] *= -1
    diagnosis = diagnose_rollouts(model, Field(), **QUICK)
    assert diagnosis.rank_correlation.mean() < -0.3
    assert diagnosis.elite_overlap.mean() < 0.3
    assert (diagnosis.true_regret == 0).all()
    assert (diagnosis.regret > 0.5).all()


# Far from the goal PointMaze's objective says little of the distance (docs/point_maze.md).
@pytest.mark.parametrize(
    ("name", "correlation"), [("wall", 0.8), ("point_maze", 0.0), ("pusht", 0.8)]
)
def test_bundled_models_imagine_better_than_standing_still(name, correlation):
    diagnosis = diagnose_rollouts(load(name), name, episodes=2, planner=CEM(samples=16, elites=4))
    assert set(diagnosis.error) == {"visual", "proprio"}
    assert (diagnosis.error["visual"] < diagnosis.still["visual"]).all()
    assert diagnosis.error["visual"].shape == (5,)
    assert diagnosis.rank_correlation.mean() > correlation


def test_what_cannot_be_diagnosed_is_refused():
    with pytest.raises(UsageError, match="cem, icem or mppi"):
        diagnose_rollouts(PointWorld(), Field(), planner=GradientDescent())
    with pytest.raises(MismatchError, match="trained in task 'wall'"):
        diagnose_rollouts(load("wall"), "pusht")
