"""Seed blocks are disjoint, and numbers out of range are refused."""

import itertools

import pytest

from quantwm.errors import UsageError
from quantwm.seeds import BLOCKS, MAX_EPISODES, MAX_SEED, episode_seeds, keyed_generator


def test_no_two_blocks_or_seeds_share_an_episode():
    corners = [(0, 0), (0, MAX_EPISODES - 1), (MAX_SEED - 1, 0), (MAX_SEED - 1, MAX_EPISODES - 1)]
    seen = [
        episode_seeds(block, seed, 1, first)[0]
        for block, (seed, first) in itertools.product(BLOCKS, corners)
    ]
    assert len(set(seen)) == len(seen)
    assert max(seen) < 2**32
    blocks = [
        range(episode_seeds(b, 0, 1)[0], episode_seeds(b, MAX_SEED - 1, 1, 4095)[0] + 1)
        for b in BLOCKS
    ]
    for one, other in itertools.combinations(blocks, 2):
        assert one[-1] < other[0] or other[-1] < one[0]


@pytest.mark.parametrize(("seed", "episodes"), [(-1, 5), (MAX_SEED, 5), (0, 0), (0, 4097)])
def test_numbers_out_of_range_are_refused(seed, episodes):
    with pytest.raises(UsageError):
        episode_seeds("evaluation", seed, episodes)


def test_unknown_block_suggests_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'evaluation'"):
        episode_seeds("evalution", 0, 1)


def test_streams_depend_on_their_whole_key():
    assert keyed_generator(1, 2).random() == keyed_generator(1, 2).random()
    assert keyed_generator(1, 2).random() != keyed_generator(2, 1).random()
