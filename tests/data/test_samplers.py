"""How often the samplers draw each row of a large data set."""

import pytest
import torch

from offrl.data import Dataset, Replay, transitions

SIZE, DRAWS = 5_000_000, 20_000_000
REWARD = torch.zeros(SIZE)


def chi_square(index):
    """Pearson's statistic of equal shares, in standard deviations above its mean."""
    expected = DRAWS / SIZE
    counts = index.bincount(minlength=SIZE).double()
    return float(((counts - expected).square().sum() / expected - SIZE) / (2 * SIZE) ** 0.5)


def fixed():
    data = Dataset({"obs": REWARD}, torch.zeros(1, dtype=torch.int64), torch.zeros(1), "large")
    return transitions(data, DRAWS, names=("obs",))


def growing():
    replay = Replay(SIZE + 1, {"reward": ((), torch.float32)})
    replay.add({"reward": REWARD})
    return replay.sampler(DRAWS)


@pytest.mark.parametrize("sampler", [fixed, growing])
def test_every_one_of_five_million_rows_is_equally_likely(sampler):
    index = sampler()(torch.Generator().manual_seed(0))["index"]
    assert abs(chi_square(index)) < 5


def test_the_statistic_sees_that_32_bit_uniforms_are_uneven():
    uniform = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0))
    assert chi_square((uniform * SIZE).long()) > 50
