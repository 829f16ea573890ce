"""Logs in HDF5 and npz files, and D4RL's rule against its literal loop."""

import errno
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offrl.data import sources
from offrl.data.dataset import check
from offrl.data.sources import files
from offrl.data.windows import returns_to_go
from offrl.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))


def log(terminals, timeouts=None, next_observations=True, seed=0):
    """A log whose observations are all different; its next_observations are the true ones."""
    random, size = np.random.default_rng(seed), len(terminals)
    obs = random.normal(size=(size, 3)).astype(np.float32)
    ends = np.array(terminals, bool) | np.array(
        np.zeros(size) if timeouts is None else timeouts, bool
    )
    arrays = {
        "observations": obs,
        "actions": random.uniform(-1, 1, (size, 2)).astype(np.float32),
        "rewards": random.normal(size=size).astype(np.float32),
        "terminals": np.array(terminals, bool),
    }
    if timeouts is not None:
        arrays["timeouts"] = np.array(timeouts, bool)
    if next_observations:
        following = np.roll(obs, -1, 0)
        last = [*np.nonzero(ends)[0], size - 1]
        following[last] = random.normal(size=(len(last), 3))
        arrays["next_observations"] = following
    return arrays


def store(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, value in arrays.items():
                file[name] = value
            file["infos/qpos"] = np.zeros((len(arrays["observations"]), 2))
    return path


# Episode 1 ends by a terminal in row 2, episode 2 by a timeout in row 6, the third is cut off.
THREE = {
    "observations": np.array([[0.0], [1], [2], [10], [11], [12], [13], [20], [21]]),
    "actions": np.linspace(-1, 1, 9)[:, None],
    "rewards": np.array([[1.0], [2], [4], [8], [16], [32], [64], [128], [256]]),
    "terminals": np.array([0.0, 0, 1, 0, 0, 0, 0, 0, 0]),
    "timeouts": np.array([0, 0, 0, 0, 0, 0, 1, 0, 0], bool),
}
TRUE_NEXT = np.array([[1.0], [2], [3], [11], [12], [13], [14], [21], [22]])


@pytest.mark.parametrize("suffix", ["hdf5", "h5", "npz"])
def test_three_episodes_by_hand(tmp_path, suffix):
    data = files.load(store(tmp_path / f"three.{suffix}", THREE))  # float64 and (N, 1) on purpose
    assert data["obs"][:, 0].tolist() == [0, 1, 2, 10, 11, 12, 20]
    assert data["next_obs"][:, 0].tolist() == [1, 2, 10, 11, 12, 13, 21]
    assert data["reward"].tolist() == [1, 2, 4, 8, 16, 32, 128]
    assert data["terminal"].tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert data["timeout"].tolist() == [0] * 7
    assert data["act"][:, 0].tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.75]
    assert data.starts.tolist() == [0, 3, 6]
    assert data.returns.tolist() == [7, 120, 384]  # before rows were dropped
    assert [data.info[key] for key in ("rows", "episodes", "unfinished")] == [9, 2, 2]
    assert all(value.dtype == torch.float32 for value in data.fields.values())
    assert any("next episode" in note for note in data.info["notes"])
    check(data, data.fields)


def test_terminal_rows_take_their_own_successor_where_the_file_has_it(tmp_path):
    arrays = THREE | {"next_observations": TRUE_NEXT}
    data = files.load(store(tmp_path / "three.hdf5", arrays))
    assert data["next_obs"][:, 0].tolist() == [1, 2, 3, 11, 12, 13, 21]
    assert not data.info["notes"]


def test_episodes_keep_every_row_of_three_by_hand(tmp_path):
    path = store(tmp_path / "three.hdf5", THREE)
    data = files.load(path, episodes=True)
    assert data["obs"][:, 0].tolist() == THREE["observations"][:, 0].tolist()
    assert data["next_obs"][:, 0].tolist() == [1, 2, 2, 11, 12, 13, 13, 21, 21]
    assert data["terminal"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert data["timeout"].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 1]
    assert data.starts.tolist() == [0, 3, 7]
    assert data.returns.tolist() == [7, 120, 384]
    assert data.info["notes"] == []
    check(data, data.fields)
    own = files.load(
        store(tmp_path / "own.hdf5", THREE | {"next_observations": TRUE_NEXT}), episodes=True
    )
    assert own["next_obs"][:, 0].tolist() == TRUE_NEXT[:, 0].tolist()


@pytest.mark.parametrize("block", [7, 1 << 16])
def test_episodes_cut_by_a_time_limit_keep_their_last_step(tmp_path, monkeypatch, block):
    """Both views of one file, in any order, from a cache that holds them apart."""
    monkeypatch.setattr(files, "BLOCK", block)
    timeouts = np.arange(500) % 50 == 49
    arrays = log(np.zeros(500), timeouts)
    path = store(tmp_path / "log.hdf5", arrays)
    for _ in range(2):
        whole = sources.load("files", "", str(path), episodes=True)
        assert (len(whole), whole.lengths.tolist()) == (500, [50] * 10)
        np.testing.assert_array_equal(whole["next_obs"], arrays["next_observations"])
        per_episode = arrays["rewards"].reshape(10, 50).astype(np.float64)
        to_go = per_episode[:, ::-1].cumsum(1)[:, ::-1].reshape(-1)
        found = returns_to_go(whole["reward"], whole.starts)
        np.testing.assert_allclose(found, to_go, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(whole["timeout"], timeouts)
        view = sources.load("files", "", str(path))
        assert (len(view), view["timeout"].sum()) == (490, 0)
        assert torch.equal(whole.returns, view.returns)
    entries = [place.name for place in (tmp_path / "home" / "files").glob("log-*")]
    assert len(entries) == 2


def test_episodes_without_timeouts_are_counted_from_their_first_rows():
    terminal = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 0, 0]) == 1
    whole = files.counted(terminal, 3, after_terminal=0)
    assert whole.nonzero()[:, 0].tolist() == [2, 7]


def literal(arrays, horizon):
    """The loop of D4RL's qlearning_dataset: kept rows."""
    kept, step = [], 0
    for i in range(len(arrays["rewards"]) - 1):
        done = bool(arrays["terminals"][i])
        final = arrays["timeouts"][i] if "timeouts" in arrays else step == horizon - 1
        if final:
            step = 0
            continue
        if done:
            step = 0
        kept.append(i)
        step += 1
    return kept


FLAGS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=60)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(flags=FLAGS, known=st.booleans(), horizon=st.integers(2, 9), block=st.integers(1, 70))
def test_equals_the_literal_loop(tmp_path_factory, monkeypatch, flags, known, horizon, block):
    monkeypatch.setattr(files, "BLOCK", block)
    terminals, timeouts = zip(*flags, strict=True)
    arrays = log(terminals, timeouts if known else None, next_observations=False)
    place = tmp_path_factory.mktemp("entry")
    kept = literal(arrays, horizon)
    if not kept:
        with pytest.raises(DataError, match="no row is left"):
            files.convert(arrays, place, place, files.Rule(horizon))
        return
    files.convert(arrays, place, place, files.Rule(horizon))
    field = lambda name: np.load(place / f"{name}.npy")  # noqa: E731
    obs, successors = arrays["observations"], [i + 1 for i in kept]
    np.testing.assert_array_equal(field("obs"), obs[kept])
    np.testing.assert_array_equal(field("next_obs"), obs[successors])
    np.testing.assert_array_equal(field("act"), arrays["actions"][kept])
    np.testing.assert_array_equal(field("reward"), arrays["rewards"][kept])
    np.testing.assert_array_equal(field("terminal"), arrays["terminals"][kept])


@settings(max_examples=60, deadline=None)
@given(flags=FLAGS)
def test_episodes_and_returns_equal_a_literal_loop(flags):
    terminals, timeouts = (torch.tensor(column) for column in zip(*flags, strict=True))
    keep = ~timeouts
    keep[-1] = False
    starts = files.bounds(terminals | timeouts)
    expected, row, pieces = [], 0, torch.tensor_split(keep, starts[1:])
    for number, piece in enumerate(pieces):
        if piece.any():
            expected.append((row, number))
        row += int(piece.sum())
    if expected:
        got = files.surviving(starts, keep)
        assert list(zip(*(value.tolist() for value in got), strict=True)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_no_kept_row_has_a_timeout_and_successors_are_the_files(tmp_path, seed):
    random = np.random.default_rng(seed)
    terminals = random.random(200) < 0.05
    timeouts = (random.random(200) < 0.05) & ~terminals
    arrays = log(terminals, timeouts, seed=seed)
    data = files.load(store(tmp_path / "log.npz", arrays))
    keep = np.nonzero(~timeouts[:-1])[0]
    np.testing.assert_array_equal(data["next_obs"], arrays["next_observations"][keep])
    np.testing.assert_array_equal(data["obs"], arrays["observations"][keep])


def test_counting_starts_at_one_after_a_terminal_as_in_d4rl():
    terminal = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 0, 0]) == 1
    assert files.counted(terminal, 3).nonzero()[:, 0].tolist() == [2, 6, 9]


def test_without_timeouts_and_horizon_the_log_says_so(tmp_path, caplog):
    path = store(tmp_path / "log.npz", log([0, 0, 1, 0, 0]))
    data = files.load(path)
    assert len(data) == 4
    assert data.starts.tolist() == [0, 3]
    assert "no timeouts and no horizon" in caplog.text
    assert len(files.load(path, horizon=3)) == 3  # rows 0, 1 and 3; row 2 is counted as a limit


def test_discrete_actions_become_int64(tmp_path):
    arrays = log([0, 1, 0, 0]) | {"actions": np.array([[2], [0], [1], [1]], np.int32)}
    data = files.load(store(tmp_path / "log.npz", arrays))
    assert data.discrete
    assert data["act"].tolist() == [2, 0, 1]
    assert data.act_dim == 3


def test_a_conversion_is_reused_until_the_file_changes(tmp_path):
    path = store(tmp_path / "log.npz", log([0, 0, 1, 0, 0]))
    first = files.load(path)
    meta = next((tmp_path / "home" / "files").glob("*/meta.json"))
    made = meta.stat().st_mtime_ns
    assert files.load(path).digest == first.digest
    assert meta.stat().st_mtime_ns == made
    store(path, log([0, 0, 1, 0, 0], seed=1))
    os.utime(path, ns=(1, 1))
    assert files.load(path).digest != first.digest
    assert len(list((tmp_path / "home" / "files").glob("log-*"))) == 1


def test_files_of_one_name_do_not_share_a_conversion(tmp_path):
    (tmp_path / "a").mkdir()
    one = files.load(store(tmp_path / "log.npz", log([0, 1, 0])))
    other = files.load(store(tmp_path / "a" / "log.npz", log([0, 1, 0], seed=1)))
    assert one.digest != other.digest


# --- files that cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["hdf5", "npz"])
@pytest.mark.parametrize("name", files.REQUIRED)
def test_a_missing_field_is_named(tmp_path, suffix, name):
    arrays = THREE | {"observations": np.zeros((9, 1))}
    arrays.pop(name)
    path = tmp_path / f"log.{suffix}"
    if suffix == "npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value
    with pytest.raises(DataError, match=f"no field '{name}'; it holds .*Store observations"):
        files.load(path)
    assert not list((tmp_path / "home" / "files").glob("log-*"))


@pytest.mark.parametrize("suffix", ["hdf5", "npz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_called_damaged(tmp_path, suffix, share):
    path = store(tmp_path / f"log.{suffix}", log([0] * 500))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"log\.\w+ is damaged, cut short .*get or write it again"):
        files.load(path)


def test_a_damaged_chunk_is_blamed_on_the_file_and_not_on_the_cache(tmp_path):
    path = tmp_path / "log.hdf5"
    with h5py.File(path, "w") as file:
        for name, value in log([0] * 500).items():
            file.create_dataset(name, data=value, compression="gzip")
    content, start = bytearray(path.read_bytes()), None
    with h5py.File(path, "r") as file:
        start = file["observations"].id.get_chunk_info(0).byte_offset
    content[start : start + 50] = b"\xff" * 50
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        files.load(path)


class Touch:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_objects_are_refused_and_do_not_run(tmp_path):
    trap = tmp_path / "ran"
    arrays = THREE | {"rewards": np.array([Touch(trap)] * 9, object)}
    np.savez(tmp_path / "log.npz", **arrays)
    with pytest.raises(DataError, match="pickled objects"):
        files.load(tmp_path / "log.npz")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": np.zeros(8)}, "rewards has shape"),
        ({"terminals": np.zeros((9, 2))}, r"terminals must be \(N,\)"),
        ({"observations": np.zeros(9)}, r"observations must be \(N, o\)"),
        ({"next_observations": np.zeros((9, 2))}, "next_observations .* differ"),
        ({"actions": np.zeros(9)}, r"actions must be real \(N, a\)"),
        ({"actions": np.zeros((9, 3), int)}, r"actions must be real \(N, a\)"),
        ({"rewards": np.array(["a"] * 9)}, "rewards must be a numeric array"),
        ({"rewards": np.float32(0)}, "rewards has shape"),
        ({name: value[:1] for name, value in THREE.items()}, "holds 1 rows"),
        ({"timeouts": np.ones(9, bool)}, "no row is left"),
        ({"next_observations": TRUE_NEXT[::-1]}, "differs from the following row .* in 5 rows"),
    ],
)
def test_fields_that_do_not_fit_are_named(tmp_path, change, words):
    np.savez(tmp_path / "log.npz", **(THREE | change))
    with pytest.raises(DataError, match=words):
        files.load(tmp_path / "log.npz")


def test_a_group_in_place_of_an_array_is_named(tmp_path):
    path = store(tmp_path / "log.hdf5", {k: v for k, v in THREE.items() if k != "rewards"})
    with h5py.File(path, "a") as file:
        file["rewards/x"] = np.zeros(9)
    with pytest.raises(DataError, match="rewards must be a numeric array"):
        files.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no data file .*nothing\.npz"):
        files.load(tmp_path / "nothing.npz")


def test_nan_is_found_by_the_check_on_entry(tmp_path):
    arrays = log([0, 0, 1, 0, 0])
    arrays["rewards"][1] = np.nan
    data = files.load(store(tmp_path / "log.npz", arrays))
    with pytest.raises(DataError, match="reward is NaN or infinite in 1 of 4 rows, first in row 1"):
        check(data, ("obs", "reward"))


def test_actions_outside_the_unit_box_are_kept_and_found_by_the_check(tmp_path):
    arrays = log([0, 0, 1, 0, 0])
    arrays["actions"][2] = 3
    data = files.load(store(tmp_path / "log.npz", arrays))
    with pytest.raises(DataError, match=r"act lies outside \[-1, 1\] in 1 of 4 rows"):
        check(data, ("obs", "act"))


def test_a_cache_that_is_not_writable_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(OSError, match=r"cannot write the data cache .*OFFRL_HOME"):
        files.load(store(tmp_path / "log.npz", log([0, 0, 1, 0, 0])))


@pytest.mark.parametrize("field", ["observations", "rewards", "actions"])
def test_a_bad_row_is_named_by_its_number_in_the_file(tmp_path, field):
    arrays = {name: np.array(value, np.float32) for name, value in THREE.items()}
    arrays[field][7] = np.nan  # after row 6, a timeout, which is dropped
    data = files.load(store(tmp_path / "log.npz", arrays))
    with pytest.raises(DataError, match=r"NaN or infinite in 1 of 7 rows, first in row 7 "):
        check(data, ("obs", "act", "reward"))


def test_nan_in_observations_is_not_taken_for_a_missing_timeout(tmp_path):
    arrays = log(np.zeros(9))
    arrays["observations"][4, 1] = np.nan
    data = files.load(store(tmp_path / "log.npz", arrays))
    with pytest.raises(DataError, match=r"obs is NaN or infinite in 1 of 8 rows, first in row 4 "):
        check(data, ("obs",))
    arrays["observations"][4, 1] = 5.0
    with pytest.raises(DataError, match="differs from the following row of observations in 1 rows"):
        files.load(store(tmp_path / "other.npz", arrays))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (BlockingIOError(errno.EAGAIN, "unable to lock file"), "is in use: another process"),
        (PermissionError(errno.EACCES, "Permission denied"), "may not be read by this user"),
        (OSError(errno.EIO, "Input/output error"), "cannot be read: Input/output error"),
        (OSError("truncated file: eof = 96"), "is damaged, cut short or of another format"),
    ],
)
def test_the_systems_refusals_are_told_apart_from_damage(tmp_path, monkeypatch, error, told):
    def refuse(*args):
        raise error

    path = store(tmp_path / "log.hdf5", THREE)
    monkeypatch.setattr(files.h5py, "File", refuse)
    with pytest.raises(DataError, match=told) as found:
        files.load(path)
    assert "delete" not in str(found.value)


def test_a_file_that_another_process_writes_is_said_to_be_in_use(tmp_path):
    path = store(tmp_path / "log.hdf5", THREE)
    holder = "import sys, h5py; f = h5py.File(sys.argv[1], 'a'); print('held', flush=True); input()"
    command = [sys.executable, "-c", holder, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="is in use: another process has locked it"):
            files.load(path)
        process.communicate(b"\n")
    assert len(files.load(path)) == 7


def test_a_constant_reward_is_refused_only_where_no_episode_ends(tmp_path):
    arrays = log([0, 0, 1, 0, 0, 1, 0])
    arrays["rewards"][:] = 1
    check(files.load(store(tmp_path / "log.npz", arrays)), ("obs", "reward", "terminal"))
    arrays["terminals"][:] = False
    data = files.load(store(tmp_path / "log.npz", arrays), strict=False)
    with pytest.raises(DataError, match="reward is 1 in every row and no episode ends"):
        check(data, ("obs", "reward", "terminal"))
