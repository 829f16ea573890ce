"""A method of the user's own, `algo=path/to/mine.py`, through every command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from offrl import cli, config
from offrl.errors import ConfigError

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_method.py"
PLACE = Path("my méthods = good") / "it's mine.py"  # no value in Hydra's grammar
STORED = "tasks:\n  hopper-*: {alpha: 2.0, log_every: 7}\npresets:\n  quick: {steps: 40}\n"
SIZES = ["steps=60", "eval_every=20", "eval_episodes=2", "final_episodes=2"]


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """The example and a YAML beside it, in a folder of their own, with data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["train.py"])
    PLACE.parent.mkdir()
    PLACE.write_text(EXAMPLE.read_text())
    PLACE.with_suffix(".yaml").write_text(STORED)
    rng = np.random.default_rng(0)
    np.savez(
        "data.npz",
        observations=rng.normal(size=(400, 11)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(400, 3)).astype(np.float32),
        rewards=rng.normal(size=400).astype(np.float32),
        terminals=np.zeros(400, bool),
        timeouts=np.arange(1, 401) % 100 == 0,
    )
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_own_method_trains_in_workers_resumes_elsewhere_and_is_scored_and_reported(
    tmp_path, monkeypatch, capsys
):
    cli.train([f"algo={PLACE}", "env=hopper", "dataset=data.npz", "seeds=2", *SIZES])
    (folder,) = (tmp_path / "runs" / "it's mine" / "hopper-data").iterdir()
    resolved = config.of_run(folder)
    assert resolved.options["alpha"] == 2.0
    assert resolved.origins["log_every"] == "task hopper-*"
    result = json.loads((folder / "result.json").read_text())
    assert result["seeds"] == [0, 1]
    (folder / "result.json").unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    cli.train([f"resume={folder}"])
    again = json.loads((folder / "result.json").read_text())
    assert (again["curve"], again["score"]) == (result["curve"], result["score"])
    cli.evaluate([f"run={folder}", "episodes=2", "out=a = b.json"])
    assert np.shape(json.loads(Path("a = b.json").read_text())["returns"]) == (2, 2)
    cli.report([f"runs=[{tmp_path / 'runs'}]", "out=report"])
    assert "| it's mine | " in capsys.readouterr().out  # of the YAML's values nothing is said


def swept(monkeypatch, *words):
    """The settings of every job of a sweep."""
    jobs = []
    monkeypatch.setattr(cli, "run", lambda job: jobs.append(job) or {"score": {"iqm": 0.0}})
    cli.train(["-m", "env=hopper", "dataset=data.npz", *SIZES, *words])
    return jobs


def test_a_sweep_takes_own_methods_beside_others_and_their_options(tmp_path, monkeypatch):
    Path("a=b").mkdir()
    for name in ("one.py", "a=b/two.py"):
        Path(name).write_text(EXAMPLE.read_text())
    jobs = swept(monkeypatch, f"algo={PLACE}", "algo.alpha=1,3")
    assert [(job.name, job.options["alpha"]) for job in jobs] == [
        ("it's mine", 1),
        ("it's mine", 3),
    ]
    jobs = swept(monkeypatch, "algo=one.py,bc,'a=b/two.py'", "runs=out = put")
    assert [job.name for job in jobs] == ["one", "bc", "two"]
    assert jobs[2].algo == str(tmp_path / "a=b" / "two.py")  # a job may start elsewhere
    assert {job.settings.dataset for job in jobs} == {str(tmp_path / "data.npz")}
    assert {job.settings.runs for job in jobs} == {str(tmp_path / "out = put")}
    assert all(job.origins["algo"] == "command line" for job in jobs)


def test_files_of_the_same_name_are_told_apart():
    text = EXAMPLE.read_text()
    for folder, key in (("a", "alpha"), ("b", "beta")):
        Path(folder).mkdir()
        (Path(folder) / "mine.py").write_text(
            "from __future__ import annotations\n" + text.replace("alpha:", f"{key}:")
        )
    one, other = (config.method(f"{folder}/mine.py").config for folder in ("a", "b"))
    assert "alpha" in config.meanings(one)
    assert "beta" in config.meanings(other)
    assert "alpha" in config.meanings(one)  # the second has not taken the place of the first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("METHOD = 3", "defines no METHOD"),
        ("import nowhere_at_all", "cannot be imported: No module named 'nowhere_at_all'"),
        ("def f(:", "cannot be imported: invalid syntax"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(text, message):
    if text is not None:
        Path("wrong.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.method("wrong.py")


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("x=a = b/ü.py", ["a = b/ü.py"]),
        ("x=it's", ["it's"]),
        ("x='a=b',c", ["a=b", "c"]),
        ("x=~/data", ["~/data"]),
        ("x=b\\a\\'=\\\\", ["b\\a\\'=\\\\"]),
        ("x=[1,2]", [[1, 2]]),
        ("x=1e-3,null", [1e-3, None]),
        ("x=", [""]),
    ],
)
def test_what_hydras_grammar_does_not_know_is_taken_literally(word, values):
    ((key, found, again),) = cli.overrides_of([word])
    assert (key, found) == ("x", values)
    assert cli.overrides_of([again]) == [("x", values, again)]  # and so Hydra reads it
