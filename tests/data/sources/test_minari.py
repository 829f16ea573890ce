"""Minari data sets, read and written, and equality across the three layouts."""

import json
import shutil
import warnings

import h5py
import minari as package
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Text
from minari.data_collector import EpisodeBuffer

from offrl.data.dataset import Dataset, check
from offrl.data.sources import files, minari
from offrl.data.sources.d4rl import d4rl_view
from offrl.errors import DataError


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


REAL = Box(-np.inf, np.inf, (2,), np.float32)
UNIT = Box(-1, 1, (1,), np.float32)


def episode(steps, obs=None, act=None, terminal=True, seed=0):
    random, flags = np.random.default_rng(seed), np.zeros(steps, bool)
    last = np.arange(steps) == steps - 1
    return EpisodeBuffer(
        observations=random.normal(size=(steps + 1, 2)).astype(np.float32) if obs is None else obs,
        actions=random.uniform(-1, 1, (steps, 1)).astype(np.float32) if act is None else act,
        rewards=random.normal(size=steps).astype(np.float32),
        terminations=last if terminal else flags,
        truncations=flags if terminal else last,
    )


def store(dataset_id, buffer, obs=REAL, act=UNIT, **metadata):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = package.create_dataset_from_buffers(
            dataset_id, buffer, observation_space=obs, action_space=act
        )
    made.storage.update_metadata(metadata)
    return made


def test_every_transition_is_kept():
    buffers = [episode(3, seed=0), episode(2, terminal=False, seed=1), episode(1, seed=2)]
    store("toy/three-v0", buffers)
    data = minari.load("toy/three-v0")
    assert len(data) == 6
    assert data.starts.tolist() == [0, 3, 5]
    for start, buffer in zip(data.starts.tolist(), buffers, strict=True):
        rows = slice(start, start + len(buffer))
        np.testing.assert_array_equal(data["obs"][rows], buffer.observations[:-1])
        np.testing.assert_array_equal(data["next_obs"][rows], buffer.observations[1:])
        np.testing.assert_array_equal(data["act"][rows], buffer.actions)
    assert data["terminal"].tolist() == [0, 0, 1, 0, 0, 1]
    assert data["timeout"].tolist() == [0, 0, 0, 0, 1, 0]
    np.testing.assert_allclose(data.returns, [b.rewards.sum() for b in buffers], rtol=1e-6)
    check(data, data.fields)


def arrays(flags, seed=0):
    """A log by D4RL's names whose last episode ends, and its episodes as Minari's."""
    random, size = np.random.default_rng(seed), len(flags)
    ends = [row for row, flag in enumerate(flags) if flag]
    log = {
        "observations": random.normal(size=(size, 2)).astype(np.float32),
        "actions": random.uniform(-1, 1, (size, 1)).astype(np.float32),
        "rewards": random.normal(size=size).astype(np.float32),
        "terminals": np.array([flag == "end" for flag in flags]),
        "timeouts": np.array([flag == "cut" for flag in flags]),
    }
    following = np.roll(log["observations"], -1, 0)
    following[ends] = random.normal(size=(len(ends), 2))
    log["next_observations"] = following
    buffers = []
    for first, last in zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True):
        rows = slice(first, last + 1)
        buffers.append(
            EpisodeBuffer(
                observations=np.concatenate([log["observations"][rows], following[[last]]]),
                actions=log["actions"][rows],
                rewards=log["rewards"][rows],
                terminations=log["terminals"][rows],
                truncations=log["timeouts"][rows],
            )
        )
    return log, buffers


@pytest.mark.parametrize(
    "flags",
    [
        ["", "", "end", "", "end", "", "", "end"],
        ["", "cut", "", "", "end", "end", "cut", "", "", "cut"],
        ["", "", "cut", "", "end"],
    ],
)
def test_the_same_log_is_equal_through_hdf5_npz_and_minari(tmp_path, flags):
    log, buffers = arrays(flags)
    np.savez(tmp_path / "log.npz", **log)
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        for name, value in log.items():
            file[name] = value
    store("toy/log-v0", buffers)
    full = minari.load("toy/log-v0")
    assert len(full) == len(flags)
    hdf5, npz = files.load(tmp_path / "log.hdf5"), files.load(tmp_path / "log.npz")
    view = d4rl_view(full)
    assert len(hdf5) == len(flags) - sum(flag == "cut" for flag in flags[:-1]) - 1
    assert hdf5.digest == npz.digest == view.digest
    assert torch.equal(hdf5.returns, view.returns)
    if "cut" not in flags:  # then D4RL's rule loses the very last row only
        assert all(torch.equal(full[name][:-1], npz[name]) for name in full.fields)


# --- spaces --------------------------------------------------------------------------------------

GOAL = Dict(
    achieved_goal=Box(-9, 9, (2,), np.float64),
    desired_goal=Box(-9, 9, (2,), np.float64),
    observation=Box(-9, 9, (3,), np.float64),
)


def goal_episode(steps=2):
    parts = {"achieved_goal": (10, 2), "desired_goal": (20, 2), "observation": (30, 3)}
    row = lambda first, width: first + np.arange(width, dtype=np.float64)  # noqa: E731
    obs = {name: np.tile(row(*part), (steps + 1, 1)) for name, part in parts.items()}
    return episode(steps, obs=obs)


@pytest.mark.parametrize(
    ("name", "row", "layout"),
    [
        (
            "D4RL/pointmaze/umaze-v2",
            [30, 31, 32, 10, 11, 20, 21],
            {"observation": 3, "achieved_goal": 2, "desired_goal": 2},
        ),
        (
            "D4RL/antmaze/large-play-v1",
            [10, 11, 30, 31, 32, 20, 21],
            {"achieved_goal": 2, "observation": 3, "desired_goal": 2},
        ),
    ],
)
def test_goal_observations_have_a_fixed_order(name, row, layout):
    store(name, [goal_episode()], obs=GOAL)
    data = minari.load(name)
    assert data["obs"].tolist() == [row, row]
    assert data["obs"].dtype == torch.float32
    assert list(data.info["layout"].items()) == list(layout.items())


def test_other_dictionaries_are_flattened_by_sorted_keys():
    space = Dict(
        {
            "zeta": Box(-9, 9, (2, 2), np.float32),
            "alpha": Dict({"two": Box(-9, 9, (1,), np.float32), "one": Box(-9, 9, (), np.float32)}),
        }
    )
    obs = {
        "zeta": np.arange(8, dtype=np.float32).reshape(2, 2, 2),
        "alpha": {"two": np.full((2, 1), 5, np.float32), "one": np.full(2, 6, np.float32)},
    }
    store("toy/dict-v0", [episode(1, obs=obs)], obs=space)
    data = minari.load("toy/dict-v0")
    assert data["obs"].tolist() == [[6, 5, 0, 1, 2, 3]]
    assert data["next_obs"].tolist() == [[6, 5, 4, 5, 6, 7]]
    assert data.info["layout"] == {"alpha/one": 1, "alpha/two": 1, "zeta": 4}


def test_actions_are_rescaled_from_other_bounds():
    space = Box(np.float32([0, -2]), np.float32([4, 2]))
    act = np.float32([[0, -2], [4, 2], [1, 0]])
    store("toy/wide-v0", [episode(3, act=act)], act=space)
    data = minari.load("toy/wide-v0")
    assert data["act"].tolist() == [[-1, -1], [1, 1], [-0.5, 0]]
    assert data.info["actions"] == {"rescaled_from": {"low": [0, -2], "high": [4, 2]}}


def test_a_number_that_cannot_vary_is_0_and_the_others_stay():
    space = Box(np.float32([0, 3, -2]), np.float32([4, 3, 2]))
    act = np.float32([[0, 3, -2], [4, 3, 2], [1, 3, 0]])
    store("toy/fixed-v0", [episode(3, act=act)], act=space)
    assert minari.load("toy/fixed-v0")["act"].tolist() == [[-1, 0, -1], [1, 0, 1], [-0.5, 0, 0]]


@pytest.mark.parametrize("most", [np.inf, np.finfo(np.float32).max])
def test_actions_without_bounds_stay_as_they_are(most):
    act = np.float32([[0.5], [-0.25], [1]])
    store("toy/free-v0", [episode(3, act=act)], act=Box(-most, most, (1,), np.float32))
    data = minari.load("toy/free-v0")
    assert data["act"].tolist() == act.tolist()
    assert data.info["actions"] == {"rescaled_from": None}


def test_discrete_actions_count_from_zero():
    act = np.array([3, 5, 4])
    store("toy/discrete-v0", [episode(3, act=act)], act=Discrete(3, start=3))
    data = minari.load("toy/discrete-v0")
    assert data["act"].dtype == torch.int64
    assert data["act"].tolist() == [0, 2, 1]


def test_spaces_that_do_not_flatten_are_named(tmp_path):
    store("toy/text-v0", [episode(1, obs=["ab", "cd"])], obs=Text(5))
    with pytest.raises(DataError, match="toy/text-v0 has observations of Text"):
        minari.load("toy/text-v0")
    assert not list((tmp_path / "home").rglob("*.npy"))


def test_references_of_the_metadata_stay_apart():
    store("D4RL/door/toy-v0", [episode(2)], ref_min_score=-45.8, ref_max_score=2940.6)
    info = minari.load("D4RL/door/toy-v0").info
    assert (info["ref_min"], info["ref_max"]) == (-45.8, 2940.6)
    assert "reference" not in info


# --- the cache and damage ------------------------------------------------------------------------


def test_a_data_set_is_flattened_once_and_outlives_minaris_copy(tmp_path, monkeypatch):
    store("toy/log-v0", [episode(3)])
    first = minari.load("toy/log-v0")
    monkeypatch.setattr(minari, "flatten", None)
    assert minari.load("toy/log-v0").digest == first.digest
    shutil.rmtree(tmp_path / "minari")
    assert minari.load("toy/log-v0").digest == first.digest


def test_a_data_set_that_grew_is_flattened_again():
    made = store("toy/log-v0", [episode(3)])
    assert len(minari.load("toy/log-v0")) == 3
    made.update_dataset_from_buffer([episode(2)])
    assert len(minari.load("toy/log-v0")) == 5


def test_without_a_network_the_alternatives_are_named(tmp_path, monkeypatch):
    def refuse(dataset_id):
        (tmp_path / "minari" / dataset_id / "data").mkdir(parents=True)
        raise ConnectionError("no route")

    monkeypatch.setattr(package, "download_dataset", refuse)
    store("toy/log-v0", [episode(3)])
    for _ in range(2):  # half a download is not taken for a data set the second time
        with pytest.raises(OSError, match=r"downloaded \(no route\).*source=generated.*copy"):
            minari.load("toy/other-v0")
    with pytest.raises(FileNotFoundError, match="download is off"):
        minari.load("toy/other-v0", download=False)
    assert len(minari.load("toy/log-v0")) == 3


def test_an_interrupted_download_is_not_taken_for_a_data_set(tmp_path, monkeypatch):
    def interrupted(dataset_id):
        shutil.copytree(whole, tmp_path / "minari" / dataset_id)
        raise KeyboardInterrupt

    whole = tmp_path / "minari" / "toy" / "log-v0"
    store("toy/log-v0", [episode(3)])
    monkeypatch.setattr(package, "download_dataset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        minari.load("toy/other-v0")
    with pytest.raises(FileNotFoundError, match="download is off"):
        minari.load("toy/other-v0", download=False)


@pytest.mark.parametrize("name", ["medium", "toy/log", "../toy/log-v0", "/tmp/log-v0", ""])
def test_malformed_ids_are_refused_before_anything_is_touched(tmp_path, name):
    store("toy/log-v0", [episode(3)])
    with pytest.raises(DataError, match="is no Minari id such as"):
        minari.load(name)
    assert (tmp_path / "minari" / "toy" / "log-v0" / "data").is_dir()


def damage(tmp_path, change):
    store("toy/log-v0", [episode(30), episode(30)])
    place = tmp_path / "minari" / "toy" / "log-v0" / "data"
    change(place)
    return place


def test_a_truncated_file_is_called_damaged(tmp_path):
    def cut(place):
        content = (place / "main_data.hdf5").read_bytes()
        (place / "main_data.hdf5").write_bytes(content[: len(content) // 2])

    place = damage(tmp_path, cut)
    with pytest.raises(DataError, match=f"the Minari data set at {place} is damaged"):
        minari.load("toy/log-v0")


def test_a_missing_episode_or_field_is_called_damaged(tmp_path):
    def remove(place):
        with h5py.File(place / "main_data.hdf5", "a") as file:
            del file["episode_1/rewards"]

    damage(tmp_path, remove)
    with pytest.raises(DataError, match=r"is damaged \(.*rewards"):
        minari.load("toy/log-v0")


def test_observations_without_the_last_are_refused(tmp_path):
    def shorten(place):
        with h5py.File(place / "main_data.hdf5", "a") as file:
            file["episode_1/observations"].resize((30, 2))

    damage(tmp_path, shorten)
    with pytest.raises(DataError, match=r"episode 1 has rows {'obs': 30, 'act': 30"):
        minari.load("toy/log-v0")


@pytest.mark.parametrize("steps", [59, 61])
def test_a_wrong_count_of_steps_is_refused(tmp_path, steps):
    def lie(place):
        metadata = json.loads((place / "metadata.json").read_text())
        (place / "metadata.json").write_text(json.dumps(metadata | {"total_steps": steps}))

    damage(tmp_path, lie)
    with pytest.raises(DataError, match=f"announces {steps} steps"):
        minari.load("toy/log-v0")


def test_metadata_without_spaces_build_no_environment(tmp_path, monkeypatch):
    def strip(place):
        metadata = json.loads((place / "metadata.json").read_text())
        metadata.pop("observation_space")
        metadata["env_spec"] = '{"id": "evil:Evil-v0"}'
        (place / "metadata.json").write_text(json.dumps(metadata))

    damage(tmp_path, strip)
    monkeypatch.setattr("gymnasium.make", None)
    with pytest.raises(DataError, match="does not describe its spaces"):
        minari.load("toy/log-v0")


# --- writing -------------------------------------------------------------------------------------


def full(discrete=False):
    log, _ = arrays(["", "cut", "", "", "end", "end", "", "cut"])
    column = lambda name: torch.from_numpy(log[name].astype(np.float32))  # noqa: E731
    fields = {
        "obs": column("observations"),
        "act": torch.tensor([0, 2, 1, 0, 0, 1, 2, 1]) if discrete else column("actions"),
        "reward": column("rewards"),
        "next_obs": column("next_observations"),
        "terminal": column("terminals"),
        "timeout": column("timeouts"),
    }
    returns = torch.zeros(4, dtype=torch.float64)
    return Dataset(fields, torch.tensor([0, 2, 5, 6]), returns, "toy", {"simulator": "1.2"})


@pytest.mark.parametrize("discrete", [False, True])
def test_what_is_exported_comes_back(discrete):
    data = full(discrete)
    place = minari.export(data, "offrl/hopper/medium-v0", env="Hopper-v5", author="A. Name")
    back = minari.load("offrl/hopper/medium-v0")
    assert back.digest == data.digest
    assert back.info["env"] == "Hopper-v5"
    metadata = json.loads((place / "data" / "metadata.json").read_text())
    assert metadata["provenance"] == {"name": "toy", "simulator": "1.2"}
    assert metadata["author"] == ["A. Name"]
    assert package.load_dataset("offrl/hopper/medium-v0").total_episodes == 4


def test_an_existing_data_set_is_not_overwritten(tmp_path):
    minari.export(full(), "offrl/toy-v0")
    with pytest.raises(ValueError, match="there is a Minari data set offrl/toy-v0 already"):
        minari.export(full(), "offrl/toy-v0")
    assert len(minari.load("offrl/toy-v0")) == 8


def test_rows_that_do_not_follow_are_refused_and_nothing_is_left(tmp_path):
    data = full()
    data.fields["next_obs"][2] += 1
    with pytest.raises(DataError, match=r"not the following row.s obs .* from row 2"):
        minari.export(data, "offrl/toy-v0")
    assert not (tmp_path / "minari" / "offrl" / "toy-v0").exists()
