import pytest
import torch

from offrl.data import Replay

FIELDS = {"obs": ((2,), torch.float32), "act": ((), torch.int64), "reward": ((), torch.float32)}


def rows(first, count, seeds=()):
    value = torch.arange(first, first + count).expand(*seeds, count)
    return {"obs": torch.stack([value, -value], -1).float(), "act": value, "reward": 0.5 * value}


def test_the_oldest_rows_are_overwritten():
    replay = Replay(5, FIELDS)
    for first in range(0, 8, 2):
        replay.add(rows(first, 2))
    assert int(replay.size) == 5
    batch = replay.sampler(2000)(torch.Generator().manual_seed(0))
    assert set(batch["act"].tolist()) == {3, 4, 5, 6, 7}
    assert batch["act"].dtype == torch.int64
    assert torch.equal(batch["obs"][:, 0], batch["act"].float())
    assert torch.equal(batch["reward"], 0.5 * batch["act"])


def test_stacked_rings_stay_apart():
    replay = Replay(10, FIELDS, seeds=(2,))
    both = rows(0, 4, (2,))
    both["act"] = both["act"] + torch.tensor([[0], [100]])
    replay.add(both)
    batch = replay.sampler(500)(torch.Generator().manual_seed(0))
    assert set(batch["act"][0].tolist()) == {0, 1, 2, 3}
    assert set(batch["act"][1].tolist()) == {100, 101, 102, 103}


def test_sampling_is_uniform_over_the_filled_part():
    replay = Replay(1000, FIELDS)
    replay.add(rows(0, 10))
    got = replay.sampler(100_000)(torch.Generator().manual_seed(0))["act"].bincount(minlength=10)
    assert (got.double() - 10_000).abs().max() < 5 * 10_000**0.5


def test_saved_rings_continue_exactly():
    one, two = Replay(5, FIELDS), Replay(5, FIELDS)
    one.add(rows(0, 4))
    two.load(one.state())
    for replay in (one, two):
        replay.add(rows(4, 3))
    assert torch.equal(one.table, two.table)
    assert int(two.head) == int(one.head) == 2


def test_a_ring_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="saved replay has rows"):
        Replay(5, {"obs": ((9,), torch.float32)}).load(Replay(5, FIELDS).state())
    with pytest.raises(ValueError, match="do not fit a replay of 5"):
        Replay(5, FIELDS).add(rows(0, 6))
