"""OGBench's npz layout: read, written, downloaded from the loopback, generated."""

import functools
import http.server
import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from offrl.data import sources
from offrl.data.dataset import check
from offrl.data.goals import trajectories
from offrl.data.sources import ogbench
from offrl.errors import DataError, DownloadError

LENGTHS = (4, 1, 6)  # transitions


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "home"


def arrays():
    rows = sum(LENGTHS) + len(LENGTHS)
    g = np.random.default_rng(0)
    terminals = np.zeros(rows, bool)
    terminals[np.cumsum(np.array(LENGTHS) + 1) - 1] = True
    draw = lambda *shape: g.uniform(-1, 1, shape).astype(np.float32)  # noqa: E731
    return {
        "observations": draw(rows, 3),
        "actions": draw(rows, 2),
        "terminals": terminals,
        "qpos": draw(rows, 3),
        "qvel": draw(rows, 3),
    }


def save(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v for k, v in (arrays() | changes).items() if v is not None})
    return path


def test_last_rows_become_successors_only(tmp_path):
    data, raw = ogbench.load("antmaze-giant", str(save(tmp_path / "a.npz"))), arrays()
    keep = np.flatnonzero(~raw["terminals"])
    assert data.lengths.tolist() == list(LENGTHS)
    np.testing.assert_array_equal(data["obs"], raw["observations"][keep])
    np.testing.assert_array_equal(data["act"], raw["actions"][keep])
    np.testing.assert_array_equal(data["next_obs"], raw["observations"][keep + 1])
    assert data["timeout"].nonzero()[:, 0].tolist() == [3, 4, 10]
    assert float(data["terminal"].sum()) == 0
    check(data, ("obs", "act", "next_obs", "terminal", "timeout"))


def test_images_become_rows_of_bytes(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (14, 4, 4, 3)).astype(np.uint8)
    path = save(tmp_path / "a.npz", observations=frames)
    data = ogbench.load("visual-cube-single", str(path))
    assert (data.obs_dim, data["obs"].dtype) == (48, torch.uint8)
    (obs,), _ = trajectories(data).gather(torch.arange(14))
    np.testing.assert_array_equal(obs, frames.reshape(14, 48))


def test_a_method_that_needs_rewards_is_told_that_there_are_none(tmp_path):
    data = ogbench.load("antmaze-giant", str(save(tmp_path / "a.npz")))
    with pytest.raises(DataError, match="no field 'reward'"):
        check(data, ("obs", "act", "reward"))


def test_transitions_and_trajectories_hold_the_same_triples(tmp_path):
    data = ogbench.load("antmaze-giant", str(save(tmp_path / "a.npz")))
    states = trajectories(data)
    (obs, after), act = states.gather(states.valid, states.valid + 1)
    rows = lambda *parts: Counter(tuple(r.tolist()) for r in torch.cat(parts, -1))  # noqa: E731
    assert len(states.valid) == sum(LENGTHS)
    assert rows(obs, act, after) == rows(data["obs"], data["act"], data["next_obs"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"actions": None}, "no field 'actions'.*layout has observations, actions, terminals"),
        (
            {"actions": np.zeros((3, 2))},
            r"actions has shape \(3, 2\), observations \(14, 3\); store one row",
        ),
        ({"terminals": np.zeros(14, bool)}, "the last row must end a trajectory"),
        ({"terminals": np.eye(14, dtype=bool)[-1] | np.eye(14, dtype=bool)[0]}, "ends in row 0"),
        ({"terminals": np.isin(np.arange(14), (5, 6, 13))}, "ends in row 6 has no transition"),
        ({"observations": np.array([None] * 14)}, "pickled objects"),
    ],
)
def test_a_file_of_another_layout_is_refused(tmp_path, changes, words):
    with pytest.raises(DataError, match=words):
        ogbench.load("antmaze-giant", str(save(tmp_path / "a.npz", **changes)))


def test_a_cut_or_missing_file_is_refused(tmp_path):
    path = save(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="damaged"):
        ogbench.load("antmaze-giant", str(path))
    with pytest.raises(DataError, match="there is no data file"):
        ogbench.load("antmaze-giant", str(tmp_path / "b.npz"))


def test_a_changed_file_is_converted_anew(tmp_path):
    path = save(tmp_path / "a.npz")
    first = ogbench.load("antmaze-giant", str(path))
    save(path, observations=arrays()["observations"] + 1)
    assert ogbench.load("antmaze-giant", str(path)).digest != first.digest


# --- by name -------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    place = tmp_path / "server"
    place.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(Quiet, directory=str(place))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(ogbench, "ROOT", f"http://127.0.0.1:{server.server_port}/")
        yield place
        server.shutdown()
        thread.join()


def test_a_published_file_is_downloaded_once_by_its_name(served, cache):
    published = save(served / "antmaze-giant-navigate-v0.npz")
    data = sources.load("ogbench", "antmaze-giant", "navigate")
    assert len(data) == sum(LENGTHS)
    published.unlink()
    assert sources.load("ogbench", "antmaze-giant", "navigate").digest == data.digest
    assert (cache / "ogbench" / "antmaze-giant-navigate-v0.npz").exists()


def test_a_download_that_is_not_the_data_leaves_nothing(served, cache):
    (served / "antmaze-giant-navigate-v0.npz").write_bytes(b"PK\x03\x04 moved")
    with pytest.raises(DownloadError, match="damaged"):
        ogbench.load("antmaze-giant", "navigate")
    with pytest.raises(DownloadError, match="404"):
        ogbench.load("antmaze-giant", "explore")
    assert not list((cache / "ogbench").glob("*.npz"))


def test_a_file_of_the_ogbench_package_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(ogbench, "ROOT", "http://127.0.0.1:9/")
    save(tmp_path / ".ogbench" / "data" / "antmaze-large-stitch-v0.npz")
    assert len(ogbench.load("antmaze-large", "stitch")) == sum(LENGTHS)


# --- written -------------------------------------------------------------------------------------


def test_streamed_files_hold_the_chunks_and_equal_rows_make_equal_bytes(tmp_path):
    raw = arrays()
    for name, cuts in (("a", (0, 5, 14)), ("b", (0, 7, 14))):
        pieces = itertools.pairwise(cuts)
        chunks = ({k: v[first:last] for k, v in raw.items()} for first, last in pieces)
        ogbench.write_npz(tmp_path / f"{name}.npz", chunks, 14, name)
    with np.load(tmp_path / "a.npz") as file:
        assert set(file) == set(raw)
        for name, array in raw.items():
            np.testing.assert_array_equal(file[name], array)
            assert file[name].dtype == array.dtype
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "b.npz"}


@pytest.fixture
def in_this_process(monkeypatch):
    pytest.importorskip("ogbench")
    monkeypatch.setattr(
        ogbench, "in_processes", lambda play, jobs, workers: (play(*job) for job in jobs)
    )


def test_generated_data_have_the_published_layout_and_are_made_once(in_this_process, cache, capsys):
    data = sources.load("auto", "pointmaze-medium", "stitch", rows=2_000)
    assert (len(data), data.episodes) == (2_000, 10)
    (entry,) = (cache / "generated").glob("pointmaze-medium-stitch-2000-*")
    with np.load(entry / "pointmaze-medium-stitch-v0.npz") as file:
        assert set(file) == {"observations", "actions", "terminals", "qpos", "qvel"}
        assert file["observations"].shape == (2_010, 2)
    with np.load(entry / "pointmaze-medium-stitch-v0-val.npz") as file:
        assert file["observations"].shape == (201, 2)
    own = ogbench.load("pointmaze-medium", str(entry / "pointmaze-medium-stitch-v0.npz"))
    assert torch.equal(own["obs"], data["obs"])
    made = capsys.readouterr().err
    assert "stitch" in made
    assert sources.load("generated", "pointmaze-medium", "stitch", rows=2_000).digest == data.digest
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("env", "dataset"), [("antmaze-giant", "navigate"), ("scene", "expert")])
def test_data_without_a_recipe_name_the_other_sources(env, dataset):
    with pytest.raises(DataError, match=r"cannot be generated.*source=ogbench downloads"):
        sources.load("generated", env, dataset)


def test_fewer_rows_than_an_episode_are_refused():
    pytest.importorskip("ogbench")
    with pytest.raises(DataError, match="at least one episode of 200, got 100"):
        ogbench.generate("pointmaze-medium", "stitch", rows=100)


@pytest.mark.slow
def test_rows_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    pytest.importorskip("ogbench")
    digests = []
    for workers in (1, 2):
        monkeypatch.setenv("OFFRL_HOME", str(tmp_path / str(workers)))
        data = ogbench.generate("pointmaze-medium", "stitch", rows=30_000, workers=workers)
        digests.append(data.info["sha256"])
    assert digests[0] == digests[1]
