"""Episode seeds, in blocks that cannot overlap.

An episode's seed is one 32-bit integer: the block in its top four bits, then the user's seed
(16 bits), then the episode's index (12 bits). Training, tuning, calibration and evaluation can
therefore never meet the same episode, whatever numbers a user picks. Random streams are keyed by
such a seed and a position, never drawn from a global state.
"""

from typing import Literal, TypeAlias, get_args

import numpy as np

from quantwm.errors import UsageError, unknown_name

SeedBlock: TypeAlias = Literal[
    "train", "validation", "calibration", "tuning", "evaluation", "held_out"
]
BLOCKS: tuple[SeedBlock, ...] = get_args(SeedBlock)
MAX_SEED = 1 << 16
MAX_EPISODES = 1 << 12


def episode_seeds(block: SeedBlock, seed: int, episodes: int, first: int = 0) -> list[int]:
    """Seeds of episodes `first` to `first + episodes - 1` of a block.

    Args:
        block: one of `BLOCKS`.
        seed: 0 to 65,535; each gives other episodes of the same block.
        episodes: how many; with `first`, at most 4,096.

    Raises:
        UsageError: an unknown block or a number out of range.
    """
    if block not in BLOCKS:
        raise unknown_name("seed block", block, BLOCKS)
    if not 0 <= seed < MAX_SEED:
        raise UsageError(f"seed must be 0 to {MAX_SEED - 1}, got {seed}")
    if episodes < 1 or first < 0 or first + episodes > MAX_EPISODES:
        raise UsageError(f"episodes must be 1 to {MAX_EPISODES} a seed, got {first} + {episodes}")
    base = (BLOCKS.index(block) << 28) | (seed << 12)
    return [base + first + index for index in range(episodes)]


def keyed_generator(*key: int) -> np.random.Generator:
    """A generator that depends on `key` alone; Philox, so that streams are independent."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
