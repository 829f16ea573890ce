"""The command: exit status, text, and the files that it writes."""

import json
import re
from html.parser import HTMLParser

import gymnasium
import numpy as np
import pytest

from offrl import cli
from offrl.runs.describe import Options, describe_data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def pendulum():
    """25 episodes of 200 steps with random actions, in D4RL's names."""
    env = gymnasium.make("Pendulum-v1")
    env.action_space.seed(0)
    rows = {name: [] for name in ("observations", "actions", "rewards", "next_observations")}
    for seed in range(25):
        obs, _ = env.reset(seed=seed)
        for _ in range(200):
            act = env.action_space.sample()
            after, reward, *_ = env.step(act)
            for name, value in zip(rows, (obs, act / 2, reward, after), strict=True):
                rows[name].append(value)
            obs = after
    arrays = {name: np.array(value, np.float32) for name, value in rows.items()}
    ends = np.arange(5000) % 200 == 199
    return arrays | {"terminals": np.zeros(5000, bool), "timeouts": ends}


def store(path, arrays, *without):
    np.savez(path, **{name: value for name, value in arrays.items() if name not in without})
    return path


def command(*words):
    with pytest.raises(SystemExit) as stop:
        cli.describe([str(word) for word in words])
    return stop.value.code


def test_joined_pendulum_episodes_are_an_error_that_names_the_remedy(tmp_path, pendulum, capsys):
    path = store(tmp_path / "joined.npz", pendulum, "timeouts", "next_observations")
    assert command(f"dataset={path}") == 1
    out = capsys.readouterr().out
    assert "error   joined episodes: the observation jumps every 200 rows, at 100%" in out
    assert "remedy: set timeouts[199::200] = 1 (a time limit of 200 steps)" in out
    fixed = pendulum | {"timeouts": np.zeros(5000, bool)}
    fixed["timeouts"][199::200] = 1
    path = store(tmp_path / "fixed.npz", fixed, "next_observations")
    assert command(f"dataset={path}") == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def test_rows_that_training_refuses_are_described(tmp_path, pendulum, capsys):
    path = store(tmp_path / "joined.npz", pendulum, "timeouts")
    assert command(f"dataset={path}") == 1
    assert "next_obs differs from the following row in 24 rows" in capsys.readouterr().out


def test_the_environment_gives_the_limit_and_must_fit(tmp_path, pendulum, capsys):
    path = store(tmp_path / "log.npz", pendulum)
    found = describe_data(Options(str(path), env="Pendulum-v1"))
    assert found.facts["limit"] == 200
    assert command(f"dataset={path}", "env=Acrobot-v1") == 2
    assert "the environment Acrobot-v1 has 6" in capsys.readouterr().err


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "rect":
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_the_json_is_whole(tmp_path, pendulum):
    names = {"timeouts", "next_observations"}
    path = store(tmp_path / "<joined>.npz", pendulum, *names)
    found = describe_data(Options(str(path), out=str(tmp_path / "look")))
    page = (tmp_path / "look" / "describe.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    sources = [attrs[key] for _, attrs in tags.seen for key in ("src", "href") if key in attrs]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert not re.search(r"https?:|<script|@import|url\(", page)
    assert "<joined>" not in page
    assert "&lt;joined&gt;" in page
    assert page.count('<div class="finding error">') == found.errors == 1
    assert sum(tag == "svg" for tag, _ in tags.seen) == 5
    told = json.loads((tmp_path / "look" / "describe.json").read_text())
    assert told["stitches"]["limit"] == 200
    assert told["findings"][0]["level"] == "error"
    assert (tmp_path / "look" / "describe.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("kind", ["discrete", "wide", "nothing finite", "one row more than none"])
def test_every_kind_of_data_has_a_picture(tmp_path, kind):
    rng, size = np.random.default_rng(0), 2 if kind == "one row more than none" else 300
    arrays = {
        "observations": rng.normal(size=(size, 700 if kind == "wide" else 3)),
        "actions": rng.uniform(-1, 1, (size, 2)),
        "rewards": rng.normal(size=size),
        "terminals": np.arange(size) % 10 == 9,
    }
    if kind == "discrete":
        arrays["actions"] = rng.integers(0, 4, size)
    if kind == "nothing finite":
        arrays["observations"][:] = np.nan
    path = store(tmp_path / "log.npz", arrays)
    describe_data(Options(str(path), out=str(tmp_path / "look")))
    page = (tmp_path / "look" / "describe.html").read_text()
    assert ("640 more columns" in page) == (kind == "wide")


def test_misspelled_options_name_the_nearest(capsys):
    assert command("datset=x.npz") == 2
    assert "did you mean 'dataset'" in capsys.readouterr().err
