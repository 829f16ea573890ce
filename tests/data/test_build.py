"""Data of one's own, in every way that they can be given, equal the same in D4RL's layout."""

from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offrl.data import sources
from offrl.data.build import Dataset, keep, kept, qlearning, split
from offrl.data.dataset import check
from offrl.data.sources import files
from offrl.errors import DataError

ROWS, EACH = 60, (7, 13, 20, 20)  # steps, and lengths of the episodes; the first one terminates


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))


def log(discrete=False, successors=False):
    rng, ends = np.random.default_rng(0), np.cumsum(EACH) - 1
    obs = rng.normal(size=(ROWS, 3)).astype(np.float32)
    flags = np.zeros((2, ROWS), bool)
    flags[0, ends[0]], flags[1, ends[1:]] = True, True
    wide = rng.uniform([-2, 0], [2, 10], (ROWS, 2)).astype(np.float32)
    found = {
        "observations": obs,
        "actions": rng.integers(5, 8, ROWS) if discrete else wide,
        "rewards": rng.normal(size=ROWS),
        "terminals": flags[0],
        "timeouts": flags[1],
    }
    if successors:
        following = np.roll(obs, -1, 0)
        following[ends] = rng.normal(size=(len(ends), 3))
        found["next_observations"] = following
    return found


LOW, HIGH = [-2, 0], [2, 10]


def episodes(arrays):
    """The log as one mapping per episode."""
    cuts = np.cumsum(EACH)[:-1]
    parts = {name: np.split(value, cuts) for name, value in arrays.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(EACH))]


def bounds(discrete):
    return {} if discrete else {"low": LOW, "high": HIGH}


def as_file(tmp_path, arrays, whole, **limits):
    np.savez(tmp_path / "log.npz", **arrays)
    return files.load(tmp_path / "log.npz", episodes=whole, **limits)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("successors", [False, True])
def test_arrays_equal_the_same_data_in_a_file_for_every_kind_of_method(
    tmp_path, discrete, successors
):
    arrays = log(discrete, successors)
    limits = bounds(discrete)
    data = Dataset.from_arrays(**arrays, **{f"action_{k}": v for k, v in limits.items()})
    assert (len(data), data.lengths.tolist()) == (ROWS, list(EACH))
    for mine, whole in ((data, True), (qlearning(data), False)):
        other = as_file(tmp_path, arrays, whole, **limits)
        assert mine.digest == other.digest
        assert torch.equal(mine.returns, other.returns)
        again = kept(keep(data), whole)
        assert (again.digest, again.info) == (mine.digest, mine.info)


def test_actions_come_to_the_unit_box_and_discrete_ones_to_zero():
    data = Dataset.from_arrays(**log(), action_low=LOW, action_high=HIGH)
    wanted = log()["actions"] / [2, 5] - [0, 1]
    np.testing.assert_allclose(data["act"], wanted, atol=1e-6)
    assert data.info["rescaled_from"] == {"low": [-2, 0], "high": [2, 10]}
    some = Dataset.from_arrays(**log(True))
    assert some["act"].tolist() == (log(True)["actions"] - 5).tolist()
    assert (some.info["action_start"], some.act_dim) == (5, 3)
    more = Dataset.from_arrays(**log(True), action_low=4, action_high=9)
    assert (more.info["action_start"], more.act_dim, int(more["act"].min())) == (4, 6, 1)


def test_a_column_of_actions_without_range_is_zero_and_the_others_stay():
    arrays = log()
    arrays["actions"][:, 1] = 3
    data = Dataset.from_arrays(**arrays, action_low=[-2, 3], action_high=[2, 3])
    assert data["act"][:, 1].tolist() == [0] * ROWS
    np.testing.assert_allclose(data["act"][:, 0], arrays["actions"][:, 0] / 2, atol=1e-6)


@pytest.mark.parametrize("discrete", [False, True])
def test_episodes_and_groups_equal_arrays(tmp_path, discrete):
    arrays, limits = log(discrete), bounds(discrete)
    stated = {f"action_{k}": v for k, v in limits.items()}
    data = Dataset.from_arrays(**arrays, **stated)
    assert Dataset.from_episodes(episodes(arrays), **stated).digest == data.digest
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        file.attrs.update(stated)  # recorded bounds
        for i, episode in enumerate(episodes(arrays)):
            for name, value in episode.items():
                file[f"episode_{i}/{name}"] = value
        file["episode_10/x"] = 0  # no episode
    assert files.load(tmp_path / "log.hdf5", episodes=True).digest == data.digest


def test_groups_are_read_in_the_order_of_their_numbers(tmp_path):
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        for i in (10, 9, 2):
            for name in ("rewards", "terminations", "truncations", "actions"):
                file[f"episode_{i}/{name}"] = np.full((2, 1), i * (name == "rewards"), float)
            file[f"episode_{i}/observations"] = np.full((3, 1), i, float)  # Minari's: one more
    data = files.load(tmp_path / "log.hdf5", episodes=True)
    assert data["reward"].tolist() == [2, 2, 9, 9, 10, 10]
    assert data["timeout"].tolist() == [0, 1] * 3


def test_one_flag_says_how_an_episode_ended_and_the_last_observation_is_a_successor():
    steps = {"actions": np.zeros((2, 1)), "rewards": [1.0, 2.0]}
    obs = np.arange(3.0)[:, None]
    data = Dataset.from_episodes(
        [steps | {"observations": obs + 10 * i, "terminated": i == 0} for i in range(2)]
    )
    assert data["next_obs"][:, 0].tolist() == [1, 2, 11, 12]
    assert data["terminal"].tolist() == [0, 1, 0, 0]
    assert data["timeout"].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("discrete", [False, True])
def test_a_dump_of_d3rlpy_is_read(tmp_path, discrete):
    """The layout of `d3rlpy/dataset/io.py`, version 2.1."""
    arrays = log(discrete)
    with h5py.File(tmp_path / "dump.h5", "w") as file:
        keys = ["observations", "actions", "rewards", "terminated"]
        file["columns"], file["num_episodes"], file["version"] = keys, len(EACH), "2.1"
        for i, episode in enumerate(episodes(arrays)):
            file[f"observations_{i}"] = episode["observations"]
            file[f"actions_{i}"] = episode["actions"].reshape(EACH[i], -1)
            file[f"rewards_{i}"] = episode["rewards"][:, None]
            file[f"terminated_{i}"] = bool(episode["terminals"].any())
    data = files.load(tmp_path / "dump.h5", episodes=True, **bounds(discrete))
    assert data.digest == as_file(tmp_path, arrays, True, **bounds(discrete)).digest


def test_a_log_of_d3rlpy_1_ends_where_its_episodes_do(tmp_path):
    arrays = log()
    timeouts = arrays.pop("timeouts")
    with_ends = arrays | {"episode_terminals": timeouts | arrays["terminals"]}
    with h5py.File(tmp_path / "old.h5", "w") as file:
        for name, value in with_ends.items():
            file[name] = value
    data = files.load(tmp_path / "old.h5", episodes=True, low=LOW, high=HIGH)
    same = as_file(tmp_path, arrays | {"timeouts": timeouts}, True, low=LOW, high=HIGH)
    assert data.digest == same.digest


# --- tables --------------------------------------------------------------------------------------


class Frame:
    """What pandas and polars have in common."""

    def __init__(self, columns):
        self.held = columns
        self.columns = list(columns)

    def __getitem__(self, name):
        return SimpleNamespace(to_numpy=lambda: self.held[name])


def table(arrays, discrete=False):
    obs = {f"obs_{k}": arrays["observations"][:, i] for i, k in enumerate(("x", "y", "z"))}
    act = (
        {"act": arrays["actions"]}
        if discrete
        else dict(zip(("act_turn", "act_push"), arrays["actions"].T, strict=True))
    )
    number = np.repeat(np.arange(len(EACH)) + 100, EACH)
    rest = {"reward": arrays["rewards"], "terminal": arrays["terminals"], "episode": number}
    return obs | act | rest


def write_csv(path, columns):
    rows = zip(*(np.asarray(value).tolist() for value in columns.values()), strict=True)
    path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]))
    return path


@pytest.mark.parametrize("discrete", [False, True])
def test_tables_equal_arrays_and_keep_their_names(tmp_path, discrete):
    arrays, limits = log(discrete), bounds(discrete)
    stated = {f"action_{k}": v for k, v in limits.items()}
    data = Dataset.from_arrays(**arrays, **stated)
    framed = Dataset.from_dataframe(Frame(table(arrays, discrete)), **stated)
    path = write_csv(tmp_path / "log.csv", table(arrays, discrete))
    for found in (framed, files.load(path, episodes=True, **limits)):
        assert found.digest == data.digest
        assert found.info["obs_names"] == ["obs_x", "obs_y", "obs_z"]
        assert found.info["act_names"] == (["act"] if discrete else ["act_turn", "act_push"])


def test_columns_of_other_names_are_named():
    renamed = {name.replace("obs", "sensor"): value for name, value in table(log()).items()}
    sensors = ["sensor_x", "sensor_y", "sensor_z"]
    told = {"action_low": LOW, "action_high": HIGH}
    data = Dataset.from_dataframe(Frame(renamed), sensors, **told)
    assert data.digest == Dataset.from_dataframe(Frame(table(log())), **told).digest
    with pytest.raises(DataError, match="no column for observations"):
        Dataset.from_dataframe(Frame(renamed), **told)
    with pytest.raises(DataError, match="no column 'sensor'"):
        Dataset.from_dataframe(Frame(renamed), ["sensor"], **told)


@pytest.mark.parametrize(
    ("cell", "words"), [("", "obs_y is empty in row 4"), ("n/a", "obs_y is 'n/a' in row 4")]
)
def test_a_cell_that_is_no_number_is_named(tmp_path, cell, words):
    columns = {name: [str(v) for v in value] for name, value in table(log()).items()}
    columns["obs_y"][4] = cell
    with pytest.raises(DataError, match=words):
        files.load(write_csv(tmp_path / "log.csv", columns), low=LOW, high=HIGH)


def test_an_episode_that_comes_back_is_named():
    columns = table(log())
    columns["episode"][-20:] = 101
    with pytest.raises(DataError, match="episode 101 ends in row 59 for the second time"):
        Dataset.from_dataframe(Frame(columns))


def test_parquet_is_a_table_and_without_its_extra_the_name_is_told(tmp_path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        (tmp_path / "log.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match=r"offrl\[parquet\]"):
            files.load(tmp_path / "log.parquet")
        return
    parquet.write_table(pyarrow.table(table(log())), tmp_path / "log.parquet")
    data = files.load(tmp_path / "log.parquet", episodes=True, low=LOW, high=HIGH)
    assert data.digest == as_file(tmp_path, log(), True, low=LOW, high=HIGH).digest


# --- objects of other libraries ------------------------------------------------------------------


def replay(full=False, shared=False, environments=2, size=10, start=0):
    """What is read of Stable-Baselines3's ReplayBuffer, with rows numbered in order of time."""
    count = size + 3 if full else 8
    rows = np.zeros((5, size, environments, 1))
    dones, timeouts = np.zeros((2, size, environments))
    for step in range(count):
        at = step % size
        for env in range(environments):
            now = 100.0 * env + step
            rows[:, at, env, 0] = now, now + 1, 0.5, now, 0
            dones[at, env] = step % 4 == 3
            timeouts[at, env] = step % 8 == 7
    box = SimpleNamespace(low=np.array([-3.0]), high=np.array([5.0]))
    return SimpleNamespace(
        buffer_size=size,
        pos=count % size,
        full=full,
        optimize_memory_usage=shared,
        handle_timeout_termination=True,
        observations=rows[0],
        next_observations=rows[1],
        actions=rows[2],
        rewards=rows[3, ..., 0],
        dones=dones,
        timeouts=timeouts,
        action_space=box,
    )


@pytest.mark.parametrize("full", [False, True])
def test_a_replay_buffer_becomes_the_episodes_of_each_environment(full):
    data = Dataset.from_sb3(replay(full))
    steps = np.arange(3, 13) if full else np.arange(8)
    assert data["obs"][:, 0].tolist() == [*steps, *(100 + steps)]
    assert data["next_obs"][:, 0].tolist() == [*(steps + 1), *(101 + steps)]
    ended = (steps % 4 == 3) & (steps % 8 != 7)
    assert data["terminal"].tolist() == [*ended, *ended]
    cut = (steps % 8 == 7) | ((np.arange(len(steps)) == len(steps) - 1) & ~ended)
    assert data["timeout"].tolist() == [*cut, *cut]
    assert data["act"].unique().tolist() == [0.5]  # scaled by its algorithm already
    assert data.info["rescaled_from"] == {"low": [-3.0], "high": [5.0]}


def test_a_buffer_that_shares_its_observations_leaves_out_the_row_that_was_overwritten():
    data = Dataset.from_sb3(replay(full=True, shared=True))
    steps = np.arange(4, 13)
    assert data["obs"][:, 0].tolist() == [*steps, *(100 + steps)]
    inside = (data["timeout"] + data["terminal"]) == 0
    assert torch.equal(data["next_obs"][inside], data["obs"][inside] + 1)


def test_a_replay_buffer_of_discrete_actions_keeps_where_they_begin():
    buffer = replay()
    buffer.actions = np.ones((10, 2, 1), np.int64)
    buffer.action_space = SimpleNamespace(n=np.int64(3), start=np.int64(5))
    data = Dataset.from_sb3(buffer)
    assert data["act"].unique().tolist() == [1]
    assert (data.info["action_start"], data.act_dim) == (5, 3)


@pytest.mark.slow
def test_a_real_replay_buffer_is_read():
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    from gymnasium.spaces import Box

    box = Box(-3, 5, (1,), np.float32)
    buffer = buffers.ReplayBuffer(20, Box(-9, 9, (1,)), box, "cpu", n_envs=2)
    for step in range(8):
        now = np.array([[float(step)], [100.0 + step]])
        done = np.full(2, step % 4 == 3)
        infos = [{"TimeLimit.truncated": step == 7}] * 2
        buffer.add(now, now + 1, np.full((2, 1), 0.5), now[:, 0], done, infos)
    assert Dataset.from_sb3(buffer).digest == Dataset.from_sb3(replay()).digest


def test_minari_by_object_and_by_id_are_the_same(tmp_path, monkeypatch):
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng = np.random.default_rng(0)
    held = [
        EpisodeBuffer(
            observations=rng.normal(size=(5, 2)).astype(np.float32),
            actions=rng.uniform(-2, 2, (4, 1)).astype(np.float32),
            rewards=rng.normal(size=4),
            terminations=[False] * 3 + [i == 0],
            truncations=[False] * 3 + [i > 0],
        )
        for i in range(3)
    ]
    lent = minari.create_dataset_from_buffers(
        "own/pendulum-v0",
        buffer=held,
        observation_space=Box(-9, 9, (2,), np.float32),
        action_space=Box(-2, 2, (1,), np.float32),
    )
    data, same = Dataset.from_minari("own/pendulum-v0"), Dataset.from_minari(lent)
    assert data.digest == same.digest
    assert data.info["rescaled_from"] == same.info["rescaled_from"] == {"low": [-2], "high": [2]}
    some = Dataset.from_minari(lent.filter_episodes(lambda episode: episode.id > 0))
    assert some.episodes == 2
    assert torch.equal(some["obs"], data["obs"][4:])


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"action_low": -2}, "action_low and action_high must be given together"),
        ({"action_low": 2, "action_high": -2}, "must be finite and in this order"),
        ({"action_low": -2, "action_high": np.inf}, "must be finite and in this order"),
        ({"action_low": [1, 2, 3], "action_high": 9}, "one or 2, one of every column"),
        ({"action_low": "a", "action_high": 9}, "must be numbers"),
        ({}, "act lies outside .* action_low=, action_high="),
        ({"rewards": np.zeros(3)}, r"rewards has shape \(3,\)"),
        ({"observations": [[1.0], [1.0, 2.0]]}, "observations is no array of numbers"),
        ({"terminals": np.full(ROWS, "x")}, "terminals must be a numeric array"),
        ({"terminals": np.full(ROWS, 2.0)}, "terminal is neither 0 nor 1"),
        ({"obs_names": ["a"]}, "1 obs_names for 3 columns of observations"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(DataError, match=words):
        Dataset.from_arrays(**log() | change)


@pytest.mark.parametrize("field", ["observations", "actions", "rewards"])
def test_a_number_that_is_not_finite_is_named_with_its_row(field):
    arrays = log()
    arrays[field] = arrays[field].copy()
    arrays[field][23] = np.nan
    with pytest.raises(DataError, match=f"{field[:3]}\\w* is NaN .* row 23"):
        Dataset.from_arrays(**arrays, action_low=LOW, action_high=HIGH)


def test_discrete_actions_beyond_their_bounds_are_named():
    arrays = log(True)
    with pytest.raises(DataError, match="outside of the 2 from 5 to 6"):
        Dataset.from_arrays(**arrays, action_low=5, action_high=6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e[1].pop("terminals"), "episode 1 has no 'terminals'"),
        (lambda e: e[2].update(actions=np.zeros((20, 5))), "actions of episode 2"),
        (lambda e: e[3].update(rewards=np.zeros(0)), "episode 3 has no steps"),
        (lambda e: e.clear(), "holds no episodes"),
        (lambda e: e[0].update(actions=np.zeros((3, 2))), "episode 0: actions has shape"),
    ],
)
def test_an_episode_that_does_not_fit_is_named(change, words):
    held = episodes(log())
    change(held)
    with pytest.raises(DataError, match=words):
        Dataset.from_episodes(held)


def test_bounds_are_for_files(tmp_path):
    with pytest.raises(DataError, match="source=generated has its own"):
        sources.load("generated", "hopper", "medium", low=-1, high=1)


def test_a_share_of_the_episodes_is_held_out():
    data = Dataset.from_arrays(**log(True))
    learned, held = split(data, 0.25)
    assert (learned.episodes, held.episodes) == (3, 1)
    assert len(learned) + len(held) == ROWS
    rows = {tuple(row) for row in data["obs"].tolist()}
    assert rows == {tuple(row) for part in (learned, held) for row in part["obs"].tolist()}
    for part in (learned, held):
        sums = [float(x.sum()) for x in part["reward"].double().split(part.lengths.tolist())]
        np.testing.assert_allclose(part.returns, sums, atol=1e-5)
    assert split(data, 0.9)[0].episodes == 1
    assert split(data, 0)[1] is None
    assert split(learned, 0.01)[1].episodes == 1  # at least one


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_given_becomes_whole_data_or_one_clear_error(data):
    pick = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    size, rng = sum(lengths), np.random.default_rng(data.draw(st.integers(0, 9)))
    ends = np.zeros(size, pick(bool, np.float32, np.int64))
    ends[np.cumsum(lengths) - 1] = 1
    discrete, start = pick(False, True), pick(-3, 0, 7)
    arrays = {
        "observations": rng.normal(size=(size, 2)).astype(pick(np.float32, np.float64, np.float16)),
        "actions": rng.integers(start, start + 3, size)
        if discrete
        else rng.uniform(-2, 2, (size, 1)),
        "rewards": rng.normal(size=size),
        "terminals": ends * pick(0, 1),
        "timeouts": pick(None, ends),
    }
    if broken := pick(None, "observations", "rewards"):
        arrays[broken][data.draw(st.integers(0, size - 1))] = np.nan
    low, high = pick((None, None), (-2, 2), (2, -2), ([-2], [2]), (7, 9), (-np.inf, np.inf))
    try:
        made = Dataset.from_arrays(**arrays, action_low=low, action_high=high)
        check(qlearning(made), ("obs", "act", "next_obs", "terminal"))
    except DataError as error:
        told = str(error)
    else:
        told = ""
    assert told.startswith("arrays") or not told
    if told:
        return
    assert broken is None
    assert len(made) == size
    assert int(made.lengths.sum()) == size
    limits = (0, made.act_dim - 1) if discrete else (-1 - 1e-5, 1 + 1e-5)
    assert limits[0] <= made["act"].min() <= made["act"].max() <= limits[1]
