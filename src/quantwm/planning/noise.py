"""Action noise, keyed by what it is for and never drawn from a global stream."""

import numpy as np
import numpy.typing as npt

from quantwm.protocols import ActionSpec
from quantwm.seeds import keyed_generator

_STREAM = 10


def action_noise(
    seed: int,
    iteration: int,
    step: int,
    *,
    samples: int,
    horizon: int,
    action_spec: ActionSpec,
    correlation: float = 0.0,
) -> npt.NDArray[np.float32]:
    """Standard normal noise for one optimisation step of one episode's plan.

    Args:
        seed: the episode's.
        iteration: of the receding-horizon loop.
        step: of the optimiser.
        samples, horizon: candidates and model steps.
        action_spec: how many raw actions a model action holds, and their width.
        correlation: of consecutive raw actions, ρ of a stationary AR(1) process; 0 is white.

    Returns:
        (samples, horizon, frameskip·dim) float32, each entry N(0, 1); arms that share (seed,
        iteration, step) get the same numbers.
    """
    generator = keyed_generator(seed, _STREAM, iteration, step)
    length = horizon * action_spec.frameskip
    noise = generator.standard_normal((samples, length, action_spec.dim), dtype=np.float32)
    if correlation:
        fresh = np.float32(np.sqrt(1 - correlation**2))
        for t in range(1, length):
            noise[:, t] = np.float32(correlation) * noise[:, t - 1] + fresh * noise[:, t]
    return noise.reshape(samples, horizon, action_spec.model_dim)
