"""Action noise, keyed by what it is for and never drawn from a global stream."""

import numpy as np
import numpy.typing as npt

from quantwm.errors import UsageError
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
    exponent: float = 0.0,
) -> npt.NDArray[np.float32]:
    """Standard normal noise for one optimisation step of one episode's plan.

    Args:
        seed: the episode's.
        iteration: of the receding-horizon loop.
        step: of the optimiser.
        samples, horizon: candidates and model steps.
        action_spec: how many raw actions a model action holds, and their width.
        correlation: of consecutive raw actions, ρ of a stationary AR(1) process; 0 is white.
        exponent: of a power-law spectrum over the raw actions (`power_law`); 0 is white.

    Returns:
        (samples, horizon, frameskip·dim) float32, each entry N(0, 1); arms that share (seed,
        iteration, step) get the same numbers.

    Raises:
        UsageError: both a correlation and an exponent.
    """
    if correlation and exponent:
        raise UsageError(
            f"noise takes a correlation or an exponent, got {correlation} and {exponent}: "
            "set one of them to 0"
        )
    generator = keyed_generator(seed, _STREAM, iteration, step)
    length = horizon * action_spec.frameskip
    noise = generator.standard_normal((samples, length, action_spec.dim), dtype=np.float32)
    if correlation:
        noise = autoregressive(noise, correlation)
    if exponent:
        noise = power_law(noise, exponent)
    return noise.reshape(samples, horizon, action_spec.model_dim)


def autoregressive(white: npt.NDArray[np.float32], correlation: float) -> npt.NDArray[np.float32]:
    """White noise (samples, T, dim) → a stationary AR(1) process over T, of unit variance."""
    noise = white.copy()
    fresh = np.float32(np.sqrt(1 - correlation**2))
    for t in range(1, noise.shape[1]):
        noise[:, t] = np.float32(correlation) * noise[:, t - 1] + fresh * noise[:, t]
    return noise


def power_law(white: npt.NDArray[np.float32], exponent: float) -> npt.NDArray[np.float32]:
    """White noise (samples, T, dim) → noise whose power falls as 1/f^exponent over T.

    Every entry keeps unit variance. The mean over T, whose frequency is zero, has the power of
    the lowest frequency 1/T (Timmer & König 1995, as iCEM uses it, arXiv 2008.06389, section
    3.1). The noise is periodic: its first and last entries are neighbours.
    """
    length = white.shape[1]
    frequencies = np.fft.rfftfreq(length)
    amplitude = np.maximum(frequencies, 1 / length) ** (-exponent / 2)
    # An entry's variance is the mean of the power over all T frequencies; `rfft` holds one of
    # each conjugate pair.
    pairs = np.full(len(frequencies), 2.0)
    pairs[0] = 1
    if length % 2 == 0:
        pairs[-1] = 1
    amplitude /= np.sqrt((pairs * amplitude**2).sum() / length)
    spectrum = np.fft.rfft(white.astype(np.float64), axis=1) * amplitude[:, None]
    return np.fft.irfft(spectrum, n=length, axis=1).astype(np.float32)
