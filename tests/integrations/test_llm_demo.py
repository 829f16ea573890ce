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
    """What the script prints; it must need less than two minutes of one core.

    Processor time is what a quiet core takes, whatever else the machine is doing.
    """
    before = os.times()
    printed = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=1200,
    ).stdout
    after = os.times()
    user = after.children_user - before.children_user
    assert user + after.children_system - before.children_system < 120
    return printed


def change(line):
    """First and last number of a printed curve."""
    words = line.replace(",", "").split()
    return float(words[-4]), float(words[-1])


def test_grpo_keeps_entropy_and_shortens_answers_at_equal_reward():
    curves = {}
    for line in run().splitlines():
        if "first 5 steps" in line:
            curves.setdefault(line.split()[0], []).append(change(line))
    for first, last in curves["reward"]:
        assert last > first + 0.5
    (_, alone), (_, regularized) = curves["entropy"]
    assert alone < 0.2
    assert abs(regularized - 0.8) < 0.3  # the target of the controller
    (_, alone), (_, regularized) = curves["length"]
    assert regularized < alone - 3


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
