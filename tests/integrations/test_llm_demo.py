"""The demonstration script, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

SCRIPT = Path(__file__).parents[2] / "scripts" / "llm_demo.py"
pytestmark = pytest.mark.slow


def run(*options):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True, timeout=300,
    ).stdout  # fmt: skip


def change(line):
    """First and last number of a printed curve."""
    words = line.replace(",", "").split()
    return float(words[-4]), float(words[-1])


def test_grpo_learns_with_regularizers_within_two_minutes():
    lines = run("--steps", "60").splitlines()
    rewards = [change(line) for line in lines if line.split()[0] == "reward"]
    assert len(rewards) == 2
    for first, last in rewards:
        assert last > first + 0.3


def test_dpo_with_an_anchor_keeps_the_chosen_answers_likelier():
    lines = run("--method", "dpo", "--steps", "40").splitlines()
    (_, alone), (_, anchored) = (change(line) for line in lines if "logps/chosen" in line)
    assert anchored > alone


def test_the_comparison_writes_numbers_and_a_picture(tmp_path):
    run("--seeds", "1", "--steps", "10", "--out", str(tmp_path / "demo"))
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["seeds"] == [0]
    assert all(len(curve[0]) == 10 for curve in record["curves"]["TRL alone"].values())
    assert record["versions"]["trl"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000
