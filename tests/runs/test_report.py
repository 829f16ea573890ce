"""Reports are read from the files of runs, so the runs here are written by hand."""

import json

import numpy as np
import pytest

from offrl import config
from offrl.errors import ConfigError
from offrl.runs.report import Options, counted, courses, finished_runs, gather, make_report


def write_run(folder, algo, seeds, returns, overrides=None, date="2026-01-01T00:00:00", digest="d"):
    """A finished run on halfcheetah-medium; `returns` (seeds, episodes)."""
    resolved = config.configured(algo, {"env": "halfcheetah", **(overrides or {})})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved.to_yaml())
    (folder / "run.json").write_text(json.dumps({"device": "some CPU", "cores": 2}))
    result = {
        "algo": algo,
        "task": resolved.task,
        "steps": resolved.options["steps"],
        "seeds": seeds,
        "unit": "D4RL-normalized",
        "env": {"id": "HalfCheetah-v5"},
        "dataset": {"digest": digest},
        "final_returns": returns,
        "curve": {"steps": [5, 10], "mean_return": [[0.0, np.mean(row)] for row in returns]},
        "command": "train",
        "date": date,
        "versions": {},
        "seconds": 1.0,
        "threads": 1,
        "steps_are": "updates",
    }
    (folder / "result.json").write_text(json.dumps(result))
    for seed in seeds:
        (folder / f"seed-{seed}").mkdir()
        rows = f"5,train,{seed},actor/self_match,0.1\n10,train,{seed},actor/self_match,0.{seed}\n"
        (folder / f"seed-{seed}" / "metrics.csv").write_text("step,stage,seed,name,value\n" + rows)


LOW, HIGH = -280.178953, 12135.0  # D4RL's reference returns of halfcheetah


def at(score):
    return LOW + (HIGH - LOW) * score / 100


def test_a_cell_is_the_mean_over_seeds_of_their_final_episodes(tmp_path):
    write_run(tmp_path / "a", "prdc", [0, 2], [[at(10), at(30)], [at(40), at(40)]])
    write_run(tmp_path / "b", "td3bc", [0], [[at(7), at(7)]], {"algo.alpha": 40.0})
    found = make_report(
        Options((str(tmp_path),), str(tmp_path / "out"), metrics=("actor/self_match",))
    )
    cell = found["methods"]["prdc"]["tasks"]["halfcheetah-medium"]
    assert cell["per_seed"] == pytest.approx([20, 40])
    assert cell["iqm"] == pytest.approx(30)
    assert 20 <= cell["interval95"][0] < cell["interval95"][1] <= 40
    assert cell["metrics"]["actor/self_match"] == [0.0, 0.2]
    assert cell["curve"]["steps"] == [5, 10]
    zero = 100 * (0 - LOW) / (HIGH - LOW)  # the score of a return of 0
    assert np.allclose(cell["curve"]["per_seed"], [[zero, 20], [zero, 40]])
    assert list(found["methods"]) == ["prdc", "td3bc alpha=40.0"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| prdc | 30.0 [20.0, 40.0] |" in text
    assert "| prdc | 0.100 [0.000, 0.200] |" in text
    assert {"table.json", "curves.png", "scores.png", "metrics.png"} < {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_the_course_of_a_metric_is_drawn_for_every_seed(tmp_path):
    write_run(tmp_path / "a", "prdc", [0, 2], [[1.0], [2.0]])
    cells = gather(finished_runs([tmp_path]), ["actor/self_match"])
    steps, values = courses(cells["halfcheetah-medium"], "actor/self_match")["prdc"]
    assert steps.tolist() == [5, 10]
    assert values.tolist() == [[0.1, 0.0], [0.1, 0.2]]


def test_methods_are_told_apart_by_values_and_not_by_where_they_were_given(tmp_path):
    (usual,) = [
        v["alpha"] for k, v in config.shipped("prdc")["tasks"].items() if k == "halfcheetah-*"
    ]
    write_run(tmp_path / "a", "prdc", [0], [[at(10)]])
    write_run(tmp_path / "b", "prdc", [1], [[at(30)]], {"algo.alpha": usual})
    write_run(tmp_path / "c", "prdc", [0], [[at(50)]], {"algo.alpha": usual + 1})
    methods = make_report(Options((str(tmp_path),), str(tmp_path / "out")))["methods"]
    assert list(methods) == ["prdc", f"prdc alpha={usual + 1}"]
    assert methods["prdc"]["tasks"]["halfcheetah-medium"]["seeds"] == [0, 1]


def test_a_preset_is_part_of_a_methods_name(tmp_path):
    write_run(tmp_path / "a", "prdc", [0], [[at(10)]], {"preset": "quick"})
    write_run(tmp_path / "b", "prdc", [0], [[at(10)]])
    methods = make_report(Options((str(tmp_path),), str(tmp_path / "out")))["methods"]
    assert list(methods) == ["prdc", "prdc preset=quick"]


def test_runs_of_further_seeds_join_and_a_repeated_seed_counts_once_with_its_latest(tmp_path):
    write_run(tmp_path / "new", "bc", [0], [[at(50)]], date="2026-03-01T00:00:00")
    write_run(tmp_path / "old", "bc", [0], [[at(1)]], date="2026-01-01T00:00:00")
    write_run(tmp_path / "more", "bc", [1], [[at(60)]], date="2026-02-01T00:00:00")
    cell = make_report(Options((str(tmp_path),), str(tmp_path / "out")))["methods"]["bc"]["tasks"]
    assert cell["halfcheetah-medium"]["per_seed"] == pytest.approx([50, 60])


def test_a_run_that_cannot_be_compared_is_skipped_with_a_line(tmp_path, capsys):
    write_run(tmp_path / "one", "bc", [0], [[at(1)]], date="2026-02-01T00:00:00")
    other = {"date": "2026-01-01T00:00:00", "digest": "another"}
    write_run(tmp_path / "other", "bc", [1], [[at(9)]], **other)
    cell = make_report(Options((str(tmp_path),), str(tmp_path / "out")))["methods"]["bc"]["tasks"]
    assert cell["halfcheetah-medium"]["per_seed"] == pytest.approx([1])
    assert (
        "other: later runs of bc on halfcheetah-medium have other data; report it apart"
        in capsys.readouterr().err
    )


def test_a_metric_that_no_run_logged_is_named(tmp_path):
    write_run(tmp_path / "one", "prdc", [0], [[at(1)]])
    with pytest.raises(ConfigError, match=r"'actor/selfmatch'; did you mean 'actor/self_match'"):
        make_report(Options((str(tmp_path),), str(tmp_path / "out"), metrics=("actor/selfmatch",)))


def test_steps_are_named_after_what_they_count():
    assert counted({"updates"}) == "updates"
    assert counted({"environment steps"}) == "environment steps"
    assert counted({"updates", "environment steps"}) == "updates (online: environment steps)"


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no finished run"):
        make_report(Options((str(tmp_path),), str(tmp_path / "out")))
    with pytest.raises(FileNotFoundError, match="no folder"):
        make_report(Options((str(tmp_path / "missing"),), str(tmp_path / "out")))
