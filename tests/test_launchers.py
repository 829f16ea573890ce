"""Sweeps through Hydra's launchers; needs the extras `joblib` and `ray`."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = [
    "-m",
    "algo=td3",
    "env=hopper",
    "steps=60,80",
    "algo.warmup=20",
    "algo.hidden=[16]",
    "eval_every=40",
    "eval_episodes=2",
    "final_episodes=2",
]


def sweep(folder, *words, env=None):
    """Run the sweep as a command in `folder`; returns steps -> result of each run."""
    command = [sys.executable, "-c", "from offrl.cli import train; train()", *SWEEP, *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in Path(folder).rglob("result.json")]
    return {result["steps"]: result["final_returns"] for result in results}


@pytest.fixture(scope="module")
def one_after_the_other(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("basic"))


@pytest.mark.slow
def test_a_sweep_runs_every_combination(one_after_the_other):
    assert set(one_after_the_other) == {60, 80}


@pytest.mark.slow
def test_joblib_gives_the_same_results(tmp_path, one_after_the_other):
    found = sweep(tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert found == one_after_the_other


@pytest.mark.slow
def test_a_local_ray_cluster_of_two_processes_gives_the_same_results(tmp_path, one_after_the_other):
    found = sweep(tmp_path, "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2")
    assert found == one_after_the_other


@pytest.mark.slow
def test_a_ray_head_in_a_process_of_its_own_gives_the_same_results(tmp_path, one_after_the_other):
    ray = Path(sys.executable).parent / "ray"
    # head and client share a token made here, whatever the machine's own Ray settings are
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = [
        ray,
        "start",
        "--head",
        "--num-cpus=2",
        "--port=6399",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",
    ]
    subprocess.run(start, check=True, capture_output=True, cwd="/", env=env, timeout=120)
    try:
        address = "hydra.launcher.ray.init.address='127.0.0.1:6399'"
        found = sweep(tmp_path, "hydra/launcher=ray_cluster", address, env=env)
    finally:
        subprocess.run([ray, "stop", "--force"], capture_output=True, timeout=60)
    assert found == one_after_the_other


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm"])
def test_submitit_is_selectable(tmp_path, launcher):
    command = [
        sys.executable,
        "-c",
        "from offrl.cli import train; train()",
        f"hydra/launcher={launcher}",
        "--cfg",
        "hydra",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert "submitit_launcher" in done.stdout, done.stderr
