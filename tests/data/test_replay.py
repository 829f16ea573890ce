import os
import pickle

import pytest
import torch

from offrl.data import Replay
from offrl.data import replay as module

FIELDS = {"obs": ((2,), torch.float32), "act": ((), torch.int64), "reward": ((), torch.float32)}


def rows(first, count, seeds=()):
    value = torch.arange(first, first + count).expand(*seeds, count)
    return {"obs": torch.stack([value, -value], -1).float(), "act": value, "reward": 0.5 * value}


def ring(capacity=5, seeds=(), per_file=2):
    replay = Replay(capacity, FIELDS, seeds)
    replay.per_file = per_file
    return replay


def add(replay, count):
    replay.add(rows(replay.total, count, replay.seeds))


def loaded(state, place, capacity=5, seeds=()):
    replay = Replay(capacity, FIELDS, seeds)
    replay.load(pickle.loads(pickle.dumps(state)), place)
    return replay


def same(one, two):
    return torch.equal(one.table, two.table) and torch.equal(one.size, two.size)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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


@pytest.mark.parametrize("seeds", [(), (3,)])
def test_saved_rings_continue_exactly_from_every_save(tmp_path, seeds):
    """Before and after the wrap, after more rows than the ring holds, and from a loaded ring."""
    one = ring(seeds=seeds)
    for steps in ((3,), (1,), (), (4,), (2, 5, 5, 5, 1), (1,)):
        for count in steps:
            add(one, count)
        two = loaded(one.save(tmp_path / "r"), tmp_path / "r", seeds=seeds)
        assert same(one, two)
        for replay in (one, two):
            add(replay, 3)
        assert same(one, two)
        one = two


@pytest.mark.parametrize("seeds", [(), (2,)])
def test_rows_are_written_once_and_files_take_about_the_room_of_the_ring(
    tmp_path, monkeypatch, seeds
):
    sizes, saved = [], []
    write = module.write
    monkeypatch.setattr(module, "write", lambda *a: (sizes.append(len(a[2])), write(*a)))
    replay = ring(160, seeds, per_file=10)
    for _ in range(100):
        add(replay, 13)
        state = replay.save(tmp_path / "r")
        saved.append(len(pickle.dumps(state)))
        if len(saved) % 10 == 0:
            replay = loaded(state, tmp_path / "r", 160, seeds)
        on_disk = sum(len(content) for content in contents(tmp_path).values())
        assert on_disk <= (160 + 2 * 13 + 2 * 10) * replay.row_bytes
    assert sum(sizes) == 1300 * replay.row_bytes
    assert max(saved) < 200


def test_a_ring_that_is_overwritten_between_saves_writes_only_what_it_holds(tmp_path, monkeypatch):
    sizes = []
    write = module.write
    monkeypatch.setattr(module, "write", lambda *a: (sizes.append(len(a[2])), write(*a)))
    replay = ring()
    for _ in range(3):
        for _ in range(4):
            add(replay, 5)
        replay.save(tmp_path / "r")
    assert sum(sizes) == 3 * 5 * replay.row_bytes


@pytest.mark.parametrize(("first", "then"), [(3, 4), (4, 3), (11, 4), (12, 9)])
def test_a_run_killed_at_any_byte_continues_from_its_checkpoint_twice(tmp_path, first, then):
    """Files hold anything between what the checkpoint knows and what the next one would know."""
    replay, place = ring(), tmp_path / "run" / "r"
    place.parent.mkdir()
    for _ in range(first):
        add(replay, 1)
        state = replay.save(place)
    known, before = replay.table.clone(), contents(place.parent)
    for _ in range(then):
        add(replay, 1)
    replay.save(place)
    after = contents(place.parent)
    new = {name: content[len(before.get(name, b"")) :] for name, content in after.items()}
    for written in range(sum(map(len, new.values())) + 1):
        files, rest = dict(before), written
        for name, content in new.items():
            if rest:
                files[name] = before.get(name, b"") + content[: max(rest - 1, 0)] + b"\xff"
            rest = max(0, rest - len(content))
        folder = tmp_path / str(written)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        for _ in range(2):  # the second time over what the first resumed run appended
            again = loaded(state, folder / "r")
            assert torch.equal(again.table, known)
            for _ in range(then):
                add(again, 1)
            later = again.save(folder / "r")
        assert same(loaded(later, folder / "r"), replay)


def test_files_stay_until_the_second_save_after_the_checkpoint_that_needs_them(tmp_path):
    replay = ring()
    add(replay, 5)
    state, known = replay.save(tmp_path / "r"), replay.table.clone()
    for _ in range(21):
        add(replay, 1)
    replay.save(tmp_path / "r")
    assert torch.equal(loaded(state, tmp_path / "r").table, known)
    (tmp_path / "r.replay-notes").touch()
    replay.save(tmp_path / "r")
    assert sorted(contents(tmp_path)) == [
        "r.replay-000010",
        "r.replay-000011",
        "r.replay-000012",
        "r.replay-notes",
    ]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    replay = ring()
    add(replay, 4)
    state, known = replay.save(tmp_path / "r"), replay.table.clone()
    add(replay, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write .*r\.replay-000002.*last checkpoint"):
            replay.save(tmp_path / "r")
    assert torch.equal(loaded(state, tmp_path / "r").table, known)
    assert same(loaded(replay.save(tmp_path / "r"), tmp_path / "r"), replay)


def test_files_that_lack_rows_are_named(tmp_path):
    replay = ring()
    add(replay, 4)
    state = replay.save(tmp_path / "r")
    path = tmp_path / "r.replay-000001"
    for content in (path.read_bytes()[:-1], None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"r\.replay-000001 has .*copy the run's folder"):
            loaded(state, tmp_path / "r")


def test_a_ring_of_other_rows_is_refused(tmp_path):
    replay = ring()
    add(replay, 5)
    state = replay.save(tmp_path / "r")
    assert torch.equal(loaded(state, tmp_path / "r", 9).table[:5], replay.table)  # not wrapped yet
    with pytest.raises(ValueError, match="the saved replay has rows"):
        Replay(5, {"obs": ((9,), torch.float32)}).load(state, tmp_path / "r")
    with pytest.raises(ValueError, match="the saved replay has rows"):
        Replay(5, FIELDS, (2,)).load(state, tmp_path / "r")
    add(replay, 1)
    with pytest.raises(ValueError, match=r"in a ring of 5, this one .* in a ring of 9"):
        loaded(replay.save(tmp_path / "r"), tmp_path / "r", 9)
    with pytest.raises(ValueError, match="do not fit a replay of 5"):
        Replay(5, FIELDS).add(rows(0, 6))


def test_a_ring_larger_than_the_memory_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"algo\.capacity=1000000000000 rows needs [\d.]+ GiB"):
        Replay(10**12, FIELDS)
