"""The table of OGBench's tasks, from runs written by hand."""

import json

import pytest

from offrl import config
from offrl.config import ConfigError
from offrl.goal_report import Options, make_goal_report

WON = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]  # task by task


def write_run(folder, algo, seed, won=WON, env="pointmaze-giant"):
    given, stored = {"env": env, "preset": "small"}, config.shipped(algo)
    resolved = config.resolve(algo, given, stored.get("tasks"), stored.get("presets"))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved.to_yaml())
    result = {
        "task": resolved.task, "steps": resolved.options["steps"], "seeds": [seed],
        "final_returns": [[value for row in won for value in row]],
        "versions": {}, "command": "train",
        "curve": {"steps": [1, 2, 3, 4], "mean_return": [[1.0, 0.1, 0.2, 0.6]]},
        "scenarios": {f"task-{i + 1}": {"final_returns": [row]} for i, row in enumerate(won)},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def test_a_cell_holds_success_per_task_per_seed_and_the_published_rows(tmp_path):
    write_run(tmp_path / "a", "ota", 0)
    write_run(tmp_path / "b", "ota", 1, [[1.0, 1.0]] * 5)
    write_run(tmp_path / "c", "hiql", 0)
    found = make_goal_report(Options((str(tmp_path),), str(tmp_path / "out")))["cells"]
    assert [(c["method"], c["seeds"]) for c in found] == [("hiql", [0]), ("ota", [0, 1])]
    ota = found[1]
    assert ota["per_seed"] == pytest.approx([40, 100])
    assert ota["success"] == pytest.approx(70)
    assert list(ota["per_task"].values()) == pytest.approx([75, 100, 50, 75, 50])
    assert ota["last3"] == pytest.approx([30, 30])
    low, high = ota["interval95_episodes"]  # Wilson's, of 14 in 20
    assert (low, high) == pytest.approx((48.1, 85.5), abs=0.1)
    assert list(ota["published"].values()) == [[67.2, 9.8]]
    assert list(found[0]["published"].values()) == [[46, 9], [43.0, 10.5]]
    text = (tmp_path / "out" / "table.md").read_text()
    assert (
        "| ota | 50,000 | 0, 1 | 70.0 [48.1, 85.5] | 30.0 | 75 100 50 75 50 | 67.2 ± 9.8 |" in text
    )


def test_a_seed_that_was_run_twice_is_told(tmp_path):
    write_run(tmp_path / "a", "ota", 0)
    write_run(tmp_path / "b", "ota", 0)
    with pytest.raises(ConfigError, match="ota on pointmaze-giant-navigate: a seed was run twice"):
        make_goal_report(Options((str(tmp_path),), str(tmp_path / "out")))


def test_without_finished_runs_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match="no finished run on OGBench's tasks"):
        make_goal_report(Options((str(tmp_path),), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
