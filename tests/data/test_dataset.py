import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from offrl.data import Dataset, prepare, transitions
from offrl.data.dataset import bounds, check, episode_sums, read, store, write
from offrl.data.samplers import mixed
from offrl.errors import DataError

ALL = ("obs", "act", "reward", "next_obs", "terminal", "timeout")


def toy(rows=30, **changes):
    g = torch.Generator().manual_seed(0)
    fields = (
        dict(
            obs=torch.randn(rows, 3, generator=g),
            act=torch.rand(rows, 2, generator=g) * 2 - 1,
            reward=torch.arange(float(rows)),
            next_obs=torch.randn(rows, 3, generator=g),
            terminal=torch.zeros(rows),
            timeout=(torch.arange(1, rows + 1) % 10 == 0).float(),
        )
        | changes
    )
    starts = torch.arange(0, rows, 10)
    return Dataset(fields, starts, episode_sums(fields["reward"], starts).float(), "toy")


def save(data, folder):
    def fill(place):
        for name, value in (data.fields | {"starts": data.starts, "returns": data.returns}).items():
            store(place / f"{name}.npy", value.numpy())
        return {"name": data.name, "info": data.info}

    write(folder, fill)


def test_bounds_and_sums_of_episodes():
    ends = torch.tensor([0, 0, 1, 1, 0])
    assert bounds(ends).tolist() == [0, 3, 4]  # the trailing piece counts
    assert episode_sums(torch.arange(5.0), bounds(ends)).tolist() == [3.0, 3.0, 4.0]
    assert toy().lengths.tolist() == [10, 10, 10]


def test_digest_depends_on_every_value_and_bound():
    assert toy().digest == toy().digest
    reward = toy()["reward"].clone()
    reward[7] += 1e-6
    assert toy(reward=reward).digest != toy().digest
    moved = dataclasses.replace(toy(), starts=torch.tensor([0, 11, 20]))
    assert moved.digest != toy().digest


def test_statistics_are_population_moments():
    mean, std = toy().statistics()
    torch.testing.assert_close(mean, toy()["obs"].mean(0))
    torch.testing.assert_close(std, toy()["obs"].std(0, correction=0) + 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: {"obs": f["obs"].index_fill(0, torch.tensor([4]), torch.nan)},
            r"obs is NaN or infinite in 1 of 30 rows, first in row 4",
        ),
        (lambda f: {"act": f["act"] * 3}, r"act lies outside \[-1, 1\]"),
        (lambda f: {"reward": torch.ones(30)}, "reward is 1 in every row"),
        (lambda f: {"terminal": torch.full((30,), 0.5)}, "terminal is neither 0 nor 1"),
        (lambda f: {"reward": f["reward"][:29]}, "reward has 29 rows, obs has 30"),
        (lambda f: {"next_obs": f["next_obs"][:, :2]}, "differ in shape"),
    ],
)
def test_unusable_data_are_refused_with_field_and_row(change, message):
    check(toy(), ALL)
    with pytest.raises(DataError, match=message):
        check(toy(**change(toy().fields)), ALL)


def test_a_constant_reward_matters_only_where_rewards_are_used():
    check(toy(reward=torch.ones(30)), ("obs", "act"))


def test_the_cache_gives_back_the_same_data_memory_mapped(tmp_path):
    save(toy(), tmp_path / "entry")
    again = read(tmp_path / "entry")
    assert again.digest == toy().digest
    assert again.name == "toy"
    assert [p.name for p in tmp_path.iterdir()] == ["entry"]


def test_a_failing_writer_leaves_nothing_and_the_old_entry(tmp_path):
    save(toy(), tmp_path / "entry")

    def full(place):
        np.save(place / "obs.npy", np.zeros(3))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="nothing was left behind"):
        write(tmp_path / "entry", full)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "other", lambda place: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [p.name for p in tmp_path.iterdir()] == ["entry"]
    assert read(tmp_path / "entry").digest == toy().digest


def test_a_damaged_entry_is_named(tmp_path):
    save(toy(), tmp_path / "entry")
    (tmp_path / "entry" / "meta.json").write_text(json.dumps({"name": "toy"}))
    with pytest.raises(DataError, match="entry is damaged"):
        read(tmp_path / "entry")


@pytest.mark.parametrize("budget", [1 << 30, 0])
@pytest.mark.parametrize("seeds", [(), (3,)])
def test_batches_are_rows_of_the_data_wherever_they_lie(budget, seeds):
    data = toy()
    sample = transitions(data, 16, seeds, names=ALL[:5], budget=budget)
    batch = sample(torch.Generator().manual_seed(0))
    assert batch["obs"].shape == (*seeds, 16, 3)
    assert batch["reward"].shape == (*seeds, 16)
    for name in ALL[:5]:
        assert torch.equal(batch[name], data[name][batch["index"]])


def test_both_ways_of_sampling_draw_the_same_and_transform_alike():
    data = toy()
    ready = prepare(lambda obs: 2 * obs - 1, scale=10.0, shift=-1.0)
    batches = [
        transitions(data, 16, names=ALL[:5], transform=ready, budget=budget)(
            torch.Generator().manual_seed(0)
        )
        for budget in (0, 1 << 30)
    ]
    for name in batches[0]:
        assert torch.equal(batches[0][name], batches[1][name])
    index = batches[0]["index"]
    assert torch.equal(batches[0]["reward"], 10 * data["reward"][index] - 1)
    assert torch.equal(batches[0]["obs"], 2 * data["obs"][index] - 1)


POSIX = """
import os, sys

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # as on Windows: importing it fails
for name in ("posix_fallocate", "sched_getaffinity", "fork", "killpg"):
    delattr(os, name)
from pathlib import Path

import numpy as np
import offrl.data, offrl.system
from offrl.data.sources import d4rl, files, generated, minari, ogbench
from offrl.data.dataset import store

store(Path(sys.argv[1]), np.ones((3, 2), np.float32))
print(np.load(sys.argv[1]).sum())
"""


def test_the_data_package_needs_nothing_that_only_unix_has(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", POSIX, tmp_path / "rows.npy"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (run.returncode, run.stdout) == (0, "6.0\n"), run.stderr


def test_derived_fields_join_the_batches_and_the_digest():
    data = toy()
    more = data.with_fields(next_act=data["act"].roll(-1, 0))
    assert more.digest != data.digest
    batch = transitions(more, 8, names=("act", "next_act"))(torch.Generator().manual_seed(0))
    assert torch.equal(batch["next_act"], more["next_act"][batch["index"]])
    with pytest.raises(DataError, match="toy: next_act has 3 rows, obs has 30"):
        data.with_fields(next_act=torch.zeros(3, 2))


def test_a_mixed_batch_has_the_stated_share_of_rows_from_each_place():
    real = lambda count: transitions(toy(), count, names=("obs", "reward"))  # noqa: E731
    model = lambda count: transitions(  # noqa: E731
        toy(reward=torch.full((30,), -1.0)), count, names=("obs", "act", "reward")
    )
    draw = mixed(real, model, 20, 0.15)
    batch = draw(torch.Generator().manual_seed(0))
    assert set(batch) == {"obs", "reward"}
    assert batch["obs"].shape == (20, 3)
    assert (batch["reward"] >= 0).tolist() == [True] * 3 + [False] * 17
