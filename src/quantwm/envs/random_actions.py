"""Random actions for scripted policies."""

import numpy as np

from quantwm.protocols import FloatArray

_CORRELATIONS = (0.0, 0.5, 0.8, 0.9, 0.97)


def correlated_actions(generator: np.random.Generator, steps: int, width: int) -> FloatArray:
    """What a sampling planner proposes: stationary AR(1) noise (steps, width) of deviation 1.

    The correlation from step to step is drawn from 0, 0.5, 0.8, 0.9 and 0.97.
    """
    correlation = generator.choice(_CORRELATIONS)
    noise = generator.standard_normal((steps, width))
    for t in range(1, steps):
        noise[t] = correlation * noise[t - 1] + np.sqrt(1 - correlation**2) * noise[t]
    return np.asarray(noise, np.float64)
