"""D4RL's names, files and defects."""

import logging
import shutil

import h5py
import numpy as np
import pytest
import torch

from offrl.data.dataset import Dataset, check
from offrl.data.sources import d4rl, download
from offrl.envs.scores import REFERENCES
from offrl.errors import DataError, DownloadError


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "package"))


def write(path, terminals, timeouts=None, **more):
    """A file in the layout of D4RL; row i observes (i, i) and pays 1 in the cell before its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = len(terminals)
    with h5py.File(path, "w") as file:
        file["observations"] = np.arange(size, dtype=np.float32)[:, None].repeat(2, 1)
        file["actions"] = np.linspace(-1, 1, size, dtype=np.float32)[:, None]
        file["rewards"] = more.pop("rewards", np.arange(size, dtype=np.float32))
        file["terminals"] = np.array(terminals, bool)
        if timeouts is not None:
            file["timeouts"] = np.array(timeouts, bool)
        file["metadata/algorithm"] = "SAC"
        for name, value in more.items():
            file[name] = value
    return path


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "dataset", "end"),
    [
        ("halfcheetah", "medium-replay", "gym_mujoco_v2/halfcheetah_medium_replay-v2.hdf5"),
        ("ant", "random", "gym_mujoco_v2/ant_random-v2.hdf5"),
        ("hopper-full-replay", "", "gym_mujoco_v2/hopper_full_replay-v2.hdf5"),
        (
            "d4rl-antmaze-umaze",
            "fixed",
            "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
        ),
        (
            "d4rl-antmaze-umaze",
            "diverse",
            "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
        ),
        (
            "d4rl-antmaze-medium",
            "play",
            "ant_maze_v2/Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
        ),
        (
            "d4rl-antmaze-large-diverse",
            "diverse",
            "ant_maze_v2/Ant_maze_hardest-maze_noisy_"
            "multistart_True_multigoal_True_sparse_fixed.hdf5",
        ),
        ("d4rl-maze2d-large", "sparse", "maze2d/maze2d-large-sparse-v1.hdf5"),
        ("d4rl-pen", "human", "hand_dapg_v1/pen-human-v1.hdf5"),
        ("d4rl-kitchen", "complete", "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5"),
        ("d4rl-kitchen-mixed", "", "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5"),
    ],
)
def test_addresses(env, dataset, end):
    *_, source = d4rl.resolve(env, dataset)
    assert source.url == f"http://rail.eecs.berkeley.edu/datasets/offline_rl/{end}"


def test_every_data_set_has_its_own_file():
    stems = [source.stem for sets in d4rl.SOURCES.values() for source in sets.values()]
    assert len(stems) == len(set(stems)) == 24 + 6 + 6 + 12 + 3


@pytest.mark.parametrize("env", d4rl.SOURCES)
def test_every_data_set_comes_with_the_returns_of_its_environment(tmp_path, env):
    for name, source in d4rl.SOURCES[env].items():
        write(tmp_path / "package" / source.file, [0] * 5, [0, 0, 1, 0, 0])
        row = f"{env}-dense" if name == "dense" else env
        for names in ((f"d4rl-{env}", name), (f"d4rl-{env}-{name}", "")):
            assert d4rl.load(*names).info["reference"] == list(REFERENCES[row])
            shutil.rmtree(tmp_path / "home")


@pytest.mark.parametrize(
    ("env", "dataset", "words"),
    [
        ("hopper", "easy", "no data set 'easy' of hopper; it has random, medium"),
        ("d4rl-antmaze-umaze", "medium", "it has fixed, diverse"),
        ("d4rl-antmaze-large-play", "diverse", "names its data set itself, 'play'"),
        ("swimmer", "medium", "no environment 'swimmer' in its table; it has halfcheetah"),
    ],
)
def test_unknown_names_list_the_known_ones(env, dataset, words):
    with pytest.raises(ValueError, match=words):
        d4rl.resolve(env, dataset)


# --- files ---------------------------------------------------------------------------------------


def test_a_file_in_the_cache_or_in_the_packages_folder_is_found(tmp_path):
    theirs = write(tmp_path / "package" / "hopper_medium-v2.hdf5", [0, 1, 0], [0, 0, 0])
    assert d4rl.load("hopper", "medium", download=False).info["file"] == str(theirs)
    ours = write(tmp_path / "home" / "d4rl" / "hopper_medium-v2.hdf5", [0, 1, 0, 0], [0, 0, 0, 0])
    data = d4rl.load("hopper", "medium", download=False)
    assert data.info["file"] == str(ours)
    assert len(data) == 3


def test_a_file_that_is_nowhere_is_downloaded_and_checked(tmp_path, monkeypatch):
    def fetch(url, path, check):
        assert url == d4rl.SOURCES["walker2d"]["expert"].url
        write(path, [0, 1, 0], [0, 0, 0])
        check(path)

    monkeypatch.setattr(download, "fetch", fetch)
    data = d4rl.load("walker2d", "expert")
    assert len(data) == 2
    assert data.info["file"].endswith("home/d4rl/walker2d_expert-v2.hdf5")
    with pytest.raises(FileNotFoundError, match="walker2d_random-v2"):
        d4rl.load("walker2d", "random", download=False)


def test_without_a_network_the_alternatives_are_named(monkeypatch):
    monkeypatch.setattr(d4rl, "ROOT", "http://127.0.0.1:1/")
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DownloadError, match="source=generated needs no network"):
        d4rl.load("walker2d", "expert")


def test_a_web_page_in_place_of_a_file_is_damaged(tmp_path):
    (tmp_path / "home" / "d4rl").mkdir(parents=True)
    (tmp_path / "home" / "d4rl" / "hopper_medium-v2.hdf5").write_text("<html>")
    with pytest.raises(DataError, match="is damaged"):
        d4rl.load("hopper", "medium")


def test_provenance_is_kept(tmp_path, caplog):
    path = write(tmp_path / "package" / "hopper_medium-v2.hdf5", [0, 1, 0, 0, 0], [0, 0, 0, 1, 0])
    data = d4rl.load("hopper", "medium")
    info = data.info
    assert data.name == "d4rl/hopper-medium-v2"
    assert info["url"].endswith("hopper_medium-v2.hdf5")
    assert info["reference"] == list(REFERENCES["hopper"])
    assert (info["rows"], info["episodes"], info["unfinished"]) == (5, 2, 1)
    assert len(info["sha256"]) == 64
    assert info["sha256"] in caplog.text
    assert "5 rows and 2 episodes, other sources report 999906 and 2186" in caplog.text
    assert data["obs"][:, 0].tolist() == [0, 1, 2]
    assert data.returns.tolist() == [1, 5]
    check(data, data.fields)
    assert str(path) in caplog.text


def test_expected_counts_are_not_warned_about(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(d4rl.COUNTS, "hopper-medium", (5, 2))
    write(tmp_path / "package" / "hopper_medium-v2.hdf5", [0, 1, 0, 0, 0], [0, 0, 0, 1, 0])
    with caplog.at_level(logging.WARNING):
        d4rl.load("hopper", "medium")
    assert not caplog.records


def test_successors_that_disagree_are_warned_about_and_the_following_row_used(tmp_path, caplog):
    own = np.arange(1, 6, dtype=np.float32)[:, None].repeat(2, 1)
    own[0] = 77  # nothing ends here
    own[1] = 88  # a terminal row
    write(
        tmp_path / "package" / "ant_random-v2.hdf5", [0, 1, 0, 0, 0], [0] * 5, next_observations=own
    )
    data = d4rl.load("ant", "random")
    assert data["next_obs"][:, 0].tolist() == [1, 88, 3, 4]
    assert "in 1 rows that end nothing" in caplog.text


def test_actions_are_clipped_and_counted(tmp_path):
    path = write(tmp_path / "package" / "door-expert-v1.hdf5", [0] * 5, [0] * 5)
    with h5py.File(path, "a") as file:
        file["actions"][1:3] = [[1.5], [-2]]
    data = d4rl.load("d4rl-door", "expert")
    assert data["act"][:, 0].tolist() == [-1, 1, -1, 0.5]
    assert any("2 rows had actions outside" in note for note in data.info["notes"])


# --- the odd ones --------------------------------------------------------------------------------


def test_antmaze_episodes_go_through_terminals_and_end_where_the_view_jumps(tmp_path):
    source = d4rl.SOURCES["antmaze-large"]["play"]
    terminals = [0, 0, 1, 1, 1, 0, 0, 1, 0, 0]
    timeouts = [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    write(
        tmp_path / "package" / source.file,
        terminals,
        timeouts,
        rewards=np.array(terminals, np.float32),
    )
    data = d4rl.load("d4rl-antmaze-large", "play")
    assert data["obs"][:, 0].tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert data["terminal"].tolist() == [0, 0, 1, 1, 0, 0, 1, 0]
    assert data.starts.tolist() == [0, 4]
    assert data.returns.tolist() == [3, 1]
    jump = (data["obs"][1:] - data["next_obs"][:-1]).norm(dim=-1) > 1e-6
    assert (torch.nonzero(jump)[:, 0] + 1).tolist() == data.starts.tolist()[1:]
    assert data.info["reference"] == [0, 1]
    whole = d4rl.load("d4rl-antmaze-large", "play", episodes=True)
    assert whole["obs"][:, 0].tolist() == list(range(10))
    assert whole["next_obs"][:, 0].tolist() == [1, 2, 3, 4, 4, 6, 7, 8, 9, 9]
    assert (whole.starts.tolist(), whole.returns.tolist()) == ([0, 5], [3, 1])
    assert whole.name == "d4rl/antmaze-large-play-v2 (episodes)"


def test_the_kitchen_has_no_timeouts_and_counts_its_horizon(tmp_path):
    source = d4rl.SOURCES["kitchen"]["partial"]
    terminals = np.zeros(600, bool)
    terminals[[99, 599]] = True
    write(tmp_path / "package" / source.file, terminals)
    data = d4rl.load("d4rl-kitchen", "partial")
    # after the terminal in row 99 the count starts at 1: limits in rows 100 + 278 and 379 + 279
    expected = [row for row in range(599) if row != 378]
    assert data["obs"][:, 0].tolist() == expected
    assert data.starts.tolist() == [0, 100, 378]


@pytest.mark.parametrize(
    ("env", "dataset", "words"),
    [
        ("d4rl-maze2d-umaze", "sparse", "reached at s_t, not at s_{t+1}"),
        ("d4rl-maze2d-umaze", "sparse", "timeouts mark reached waypoints"),
        ("d4rl-maze2d-umaze", "dense", "timeouts mark reached waypoints"),
        ("d4rl-antmaze-medium", "play", "runs of terminals"),
        ("d4rl-antmaze-umaze", "diverse", "a single 1 per success"),
        ("d4rl-kitchen", "mixed", "subtasks satisfied at the moment"),
        ("d4rl-door", "cloned", "longer than the evaluation's horizon"),
        ("ant", "expert", "111 observations"),
    ],
)
def test_defects_are_told(tmp_path, env, dataset, words):
    *_, source = d4rl.resolve(env, dataset)
    write(tmp_path / "package" / source.file, [0] * 5, [0, 0, 1, 0, 0])
    assert any(words in note for note in d4rl.load(env, dataset).info["notes"])


def test_sound_data_sets_have_no_notes(tmp_path):
    write(tmp_path / "package" / "hopper_expert-v2.hdf5", [0] * 5, [0, 0, 1, 0, 0])
    assert d4rl.load("hopper", "expert").info["notes"] == []


def test_the_view_of_a_full_data_set_loses_limits_and_the_last_row():
    flags = {"terminal": [0, 1, 0, 0, 0, 0, 1], "timeout": [0, 0, 0, 1, 1, 0, 0]}
    fields = {name: torch.tensor(value, dtype=torch.float32) for name, value in flags.items()}
    fields |= {"obs": torch.arange(7.0)[:, None], "next_obs": torch.arange(7.0)[:, None] + 1}
    starts, returns = torch.tensor([0, 2, 4, 5]), torch.tensor([1.0, 2, 3, 4])
    view = d4rl.d4rl_view(Dataset(fields, starts, returns, "full"))
    assert view["obs"][:, 0].tolist() == [0, 1, 2, 5]
    assert view["next_obs"][:, 0].tolist() == [1, 2, 3, 6]
    assert view["timeout"].sum() == 0
    assert view["terminal"].tolist() == [0, 1, 0, 0]
    assert view.starts.tolist() == [0, 2, 3]  # the episode of one truncated row is gone
    assert view.returns.tolist() == [1, 2, 4]
