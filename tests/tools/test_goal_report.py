"""The table of OGBench's tasks, from runs written by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offrl import config
from offrl.errors import ConfigError
from tools import goal_report
from tools.goal_report import Options, make_goal_report

WON = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]  # task by task


def write_run(folder, algo, seed, won=WON, env="pointmaze-giant"):
    resolved = config.configured(algo, {"env": env, "preset": "small"})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved.to_yaml())
    result = {
        "task": resolved.task,
        "steps": resolved.options["steps"],
        "seeds": [seed],
        "final_returns": [[value for row in won for value in row]],
        "versions": {},
        "command": "train",
        "curve": {"steps": [1, 2, 3, 4], "mean_return": [[1.0, 0.1, 0.2, 0.6]]},
        "scenarios": {
            f"task-{i + 1}": {"final_returns": [row], "curve": [[0.0, 0.0, 0.5, 0.1 * i]]}
            for i, row in enumerate(won)
        },
    }
    (folder / "result.json").write_text(json.dumps(result))


def test_a_cell_holds_success_per_task_per_seed_and_the_published_rows(tmp_path):
    write_run(tmp_path / "a", "ota", 0)
    write_run(tmp_path / "b", "ota", 1, [[1.0, 1.0]] * 5)
    write_run(tmp_path / "c", "hiql", 0)
    found = make_goal_report(Options((str(tmp_path),), str(tmp_path / "out")))["cells"]
    assert [(c["method"], c["seeds"]) for c in found] == [
        ("hiql preset=small", [0]),
        ("ota preset=small", [0, 1]),
    ]
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
    row = "| ota preset=small | 50,000 | 0: 40.0; 1: 100.0 | 70.0 [48.1, 85.5] | 30.0, 30.0: 30.0 |"
    assert row in text
    assert (tmp_path / "out" / "pointmaze-giant-navigate.png").stat().st_size > 1000
    panels = goal_report.panels("pointmaze-giant-navigate", found)
    assert list(panels) == ["all tasks", *(f"task-{i}" for i in range(1, 6))]
    updates, success = panels["task-3"]["ota preset=small, 50,000 updates"]
    assert updates.tolist() == [1, 2, 3, 4]
    assert success == pytest.approx(np.array([[0, 0, 50, 20]] * 2))


def test_the_order_of_a_runs_checkpoint_stands_in_its_cell(tmp_path, monkeypatch):
    write_run(tmp_path / "a", "ota", 4)
    write_run(tmp_path / "b", "ota", 2)
    (tmp_path / "a" / "seed-4").mkdir()
    (tmp_path / "a" / "seed-4" / "checkpoint.pt").touch()
    algo = SimpleNamespace(value=lambda obs, goal: obs[:, 0])
    monkeypatch.setattr(goal_report, "load_algorithm", lambda resolved, file: (algo, [4]))
    up, down = torch.arange(60.0).unsqueeze(-1), -torch.arange(60.0).unsqueeze(-1)
    paths = [(up, up[-1:])] * 3 + [(down, down[-1:])]
    monkeypatch.setattr(goal_report.mazes, "expert_paths", lambda env, seed: paths)
    options = Options((str(tmp_path),), str(tmp_path / "out"))
    (found,) = make_goal_report(options)["cells"]
    assert (found["seeds"], found["order_consistency"]) == ([2, 4], [None, 0.75])
    assert "| 0.750 |" in (tmp_path / "out" / "table.md").read_text()


def test_runs_that_were_measured_otherwise_are_told(tmp_path):
    write_run(tmp_path / "a", "ota", 0)
    write_run(tmp_path / "b", "ota", 1, [[1.0]] * 5)
    with pytest.raises(ConfigError, match="runs differ in episodes or in the points"):
        make_goal_report(Options((str(tmp_path),), str(tmp_path / "out")))


def test_a_seed_that_was_run_twice_is_told(tmp_path):
    write_run(tmp_path / "a", "ota", 0)
    write_run(tmp_path / "b", "ota", 0)
    with pytest.raises(
        ConfigError, match="ota preset=small on pointmaze-giant-navigate: a seed was run twice"
    ):
        make_goal_report(Options((str(tmp_path),), str(tmp_path / "out")))


def test_without_finished_runs_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match="no finished run on OGBench's tasks"):
        make_goal_report(Options((str(tmp_path),), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
