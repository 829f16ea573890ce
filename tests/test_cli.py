"""The command line end to end on tiny runs, and what it answers to mistakes."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

import gymnasium
import numpy as np
import pytest
import torch

import offrl
from offrl import cli, system
from offrl import config as configuration
from offrl.engine import checkpoint
from offrl.engine.curve import Curve
from offrl.engine.loop import Progress
from offrl.envs import make
from offrl.errors import ConfigError, Failed
from offrl.nets.kernels import matmul
from offrl.runs import record as outcome
from offrl.runs import task
from offrl.runs import train as experiment
from offrl.runs.workers import Display

EPISODES = ["eval_episodes=2", "final_episodes=2"]
SIZES = ["algo.hidden=[16]", "algo.batch=16", *EPISODES]
WINDOWS = ["algo.size=tiny", "algo.context=3", "algo.batch=4", *EPISODES]  # of sequence methods


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """Each test has its own working folder and cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def write_data(path="data.npz", rows=400, **changes):
    rng = np.random.default_rng(0)
    fields = {
        "observations": rng.normal(size=(rows, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(rows, 3)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(1, rows + 1) % 100 == 0,
    } | changes
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    return f"dataset={path}"


def train(*words):
    cli.train([*words])


def fails(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        train(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def only_run():
    (config,) = Path("runs").rglob("config.yaml")
    return config.parent


@pytest.mark.parametrize("algo", ["bc", "td3bc", "prdc", "decision_mamba"])
def test_an_offline_run_leaves_everything_a_run_directory_promises(algo, capsys):
    sizes = WINDOWS if algo == "decision_mamba" else SIZES
    train(f"algo={algo}", "env=hopper", write_data(), "steps=60", "eval_every=20", *sizes)
    folder = only_run()
    assert folder.parent == Path("runs") / algo / "hopper-data"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 60
    assert np.shape(result["final_returns"]) == (1, 2)
    low, high = -20.272305, 3234.3
    expected = 100 * (np.mean(result["final_returns"]) - low) / (high - low)
    assert result["score"]["iqm"] == pytest.approx(expected, rel=1e-6)
    assert result["curve"]["steps"] == [20, 40, 60]
    assert (folder / "curve.png").stat().st_size > 5_000
    assert len((folder / "episodes.csv").read_text().splitlines()) == 1 + 4 * 2
    stored = json.loads((folder / "run.json").read_text())
    assert len(stored["dataset"]["digest"]) == 64
    assert stored["versions"]["torch"] == torch.__version__
    assert any((folder / "seed-0").glob("events.*"))
    assert "steps" in (folder / "config.yaml").read_text()
    out = capsys.readouterr().out
    assert "algo.steps" in out
    assert "(command line)" in out
    assert "D4RL-normalized score" in out


def test_processes_and_resumed_runs_keep_the_products_a_run_was_started_with(monkeypatch):
    """Whatever the machine's choice has become since."""
    monkeypatch.setattr(matmul, "measured", lambda: ["forward"])
    train("algo=bc", "env=hopper", write_data(), "steps=40", "eval_every=20", *SIZES)
    folder = only_run()
    assert json.loads((folder / "run.json").read_text())["matmul"] == ["forward"]
    Path("home/matmul.json").unlink()
    monkeypatch.setattr(matmul, "measured", lambda: ["weight gradient"])
    matmul.use(())
    assert resumed(folder, monkeypatch) == [{"forward"}]


def resumed(folder, monkeypatch, **changes):
    """What products a run goes on with whose run.json was changed."""
    about = json.loads((folder / "run.json").read_text()) | changes
    (folder / "run.json").write_text(json.dumps(about))
    seen = []
    monkeypatch.setattr(experiment, "fit", lambda *args: seen.append(matmul.chosen) or Curve())
    monkeypatch.setattr(experiment, "finish", lambda *args: {})
    try:
        run = configuration.from_yaml((folder / "config.yaml").read_text())
        experiment.train(run, folder)
    finally:
        matmul.use(())
    return seen


def test_a_run_does_not_go_on_with_products_that_are_gone(monkeypatch):
    train("algo=bc", "env=hopper", write_data(), "steps=40", "eval_every=20", *SIZES)
    monkeypatch.setattr(matmul, "onednn_works", lambda: False)
    with pytest.raises(Failed, match="does not offer; continue it with the version"):
        resumed(only_run(), monkeypatch, matmul=["forward"])


def test_a_return_conditioned_run_scores_every_target_and_the_best(capsys):
    train(
        "algo=decision_transformer",
        "env=hopper",
        write_data(),
        "steps=40",
        "eval_every=20",
        "algo.targets=[3600,1800]",
        *WINDOWS,
    )
    folder = only_run()
    result = json.loads((folder / "result.json").read_text())
    assert list(result["scenarios"]) == ["target-3600", "target-1800"]
    means = {name: np.mean(s["final_returns"]) for name, s in result["scenarios"].items()}
    best = max(means, key=means.get)
    assert result["final_returns"] == result["scenarios"][best]["final_returns"]
    assert result["score"] == result["scenarios"][best]["score"]
    for scenario in result["scenarios"].values():
        assert np.shape(scenario["curve"]) == (1, 2)
    points = np.array([s["curve"] for s in result["scenarios"].values()])
    np.testing.assert_array_equal(result["curve"]["mean_return"], points.max(0))
    with open(folder / "episodes.csv") as file:
        episodes = list(csv.DictReader(file))
    assert len(episodes) == 3 * 2 * 2
    assert {row["scenario"] for row in episodes} == {"target-3600", "target-1800"}
    assert "return/target-1800" in (folder / "seed-0" / "metrics.csv").read_text()
    capsys.readouterr()
    cli.evaluate([f"run={folder}", "episodes=2", "out=scores.json"])
    assert "target-1800: score " in capsys.readouterr().out
    found = json.loads(Path("scores.json").read_text())
    assert list(found["scenarios"]) == ["target-3600", "target-1800"]


def test_seeds_run_in_processes_of_their_own_and_equal_single_runs():
    data = write_data()
    common = ["algo=td3bc", "env=hopper", data, "steps=40", "eval_every=20", *SIZES]
    train(*common, "seeds=2", "runs=both")
    train(*common, "seed=1", "runs=one")
    (both,), (one,) = (list(Path(p).rglob("result.json")) for p in ("both", "one"))
    both, one = json.loads(both.read_text()), json.loads(one.read_text())
    assert both["seeds"] == [0, 1]
    assert both["layout"] == "one process per seed"
    assert both["score"]["interval95"] is not None
    assert both["final_returns"][0] != both["final_returns"][1]
    assert one.keys() == both.keys()
    assert one["final_returns"][0] == both["final_returns"][1]


def test_other_robots_than_the_generated_datas_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.train(["algo=bc", "env=hopper", "env_version=v4"])
    assert "generated data come from the v5 robots" in capsys.readouterr().err


def test_a_run_is_not_resumed_on_another_kind_of_device(capsys):
    words = ["algo=td3bc", "env=hopper", write_data(), "steps=40", "eval_every=20", *SIZES]
    train(*words, "runs=whole")
    (result,) = Path("whole").rglob("result.json")
    result.unlink()
    about = json.loads((result.parent / "run.json").read_text())
    (result.parent / "run.json").write_text(json.dumps(about | {"device_type": "cuda"}))
    with pytest.raises(SystemExit):
        cli.train([f"resume={result.parent}"])
    assert "was started on cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("algo", "steps", "every", "sizes"),
    [("td3bc", 1500, 100, SIZES), ("decision_mamba", 120, 20, WINDOWS)],
)
def test_a_killed_run_resumes_to_the_same_result(algo, steps, every, sizes):
    """SIGKILL of the whole command, then resume=DIR; a finished run is then refused."""
    words = [f"algo={algo}", "env=hopper", write_data(), f"steps={steps}", f"eval_every={every}"]
    words += sizes
    train(*words, "runs=whole")
    command = [sys.executable, "-c", "from offrl.cli import train; train()", *words, "runs=cut"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and running.poll() is None:
        if any(Path("cut").rglob("checkpoint.pt")):
            break
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert running.returncode == -signal.SIGKILL
    (cut,) = (p.parent for p in Path("cut").rglob("config.yaml"))
    train(f"resume={cut}")
    (whole,) = (p.parent for p in Path("whole").rglob("config.yaml"))
    one, two = (json.loads((f / "result.json").read_text()) for f in (whole, cut))
    assert one["final_returns"] == two["final_returns"]
    assert one["curve"] == two["curve"]
    files = [f / "seed-0" / "metrics.csv" for f in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()
    states = [checkpoint.load(f / "seed-0" / "checkpoint.pt") for f in (whole, cut)]
    net = "net" if "net" in states[0]["algo"] else "actor"
    for name, value in states[0]["algo"][net].items():
        other = states[1]["algo"][net][name]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on():
    words = ["algo=td3bc", "env=hopper", write_data(), "steps=100_000", "seeds=2", *SIZES]
    command = [sys.executable, "-c", "from offrl.cli import train; train()", *words]
    running = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and len(list(Path("runs").rglob("metrics.csv"))) < 2:
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: parent and workers alike
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert f"continue with: offrl train resume={only_run()}\n" in err
    assert err.count("Ctrl-C again stops at once") == 1  # of the command, not of its workers
    assert len(list(only_run().rglob("checkpoint.pt"))) == 2
    assert not (only_run() / "result.json").exists()


def stopped_before_training(monkeypatch):
    """The exit status of a run that is interrupted while its algorithm is made."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("offrl.runs.train.make_task", interrupted)
        with pytest.raises(SystemExit) as stop:
            train("algo=bc", "env=hopper", write_data(), "steps=20", *SIZES)
    return stop.value.code


def test_ctrl_c_before_training_leaves_a_run_that_can_be_resumed(monkeypatch, capsys):
    assert stopped_before_training(monkeypatch) == 130
    err = capsys.readouterr().err
    assert f"stopped\ncontinue with: offrl train resume={only_run()}\n" in err
    train(f"resume={only_run()}")
    assert (only_run() / "result.json").exists()


def test_a_worker_that_outlives_its_command_keeps_the_folder(capsys):
    """Two writers of one seed's files would mix them; the second is refused and named."""
    words = ["algo=bc", "env=hopper", write_data(), "steps=20", *SIZES]
    train(*words)
    (only_run() / "result.json").unlink()
    with system.only_one(only_run() / "seed-0"):
        err = fails(capsys, f"resume={only_run()}")
    assert "another process is training in" in err
    assert "seed-0" in err
    train(f"resume={only_run()}")


def test_a_resumed_display_counts_but_does_not_time_what_was_done():
    resolved = configuration.resolve("bc", {"steps": 100})
    display = Display(resolved, [[0], [1]])
    display.bar.start_t -= 100  # of making what the updates need
    display.bar.last_print_t -= 100
    display.tell([0], Progress("train", 80, 90, 100, 1.0, None))
    assert display.bar.format_dict["elapsed"] < 50
    display.tell([1], Progress("train", 0, 20, 100, 1.0, None))
    display.tell([0], Progress("train", 80, 100, 100, 1.0, None))
    assert (display.bar.n, display.bar.initial, display.bar.total) == (120, 80, 200)
    assert display.bar.miniters <= 100  # a burst of 80 steps would hold the line still
    assert display.bar.last_print_n >= 80
    display.bar.close()


def test_a_finished_run_is_not_resumed(capsys):
    train("algo=bc", "env=hopper", write_data(), "steps=20", *SIZES)
    assert "is finished" in fails(capsys, f"resume={only_run()}")
    assert "no config.yaml" in fails(capsys, "resume=nowhere")
    assert "give no other setting" in fails(capsys, f"resume={only_run()}", "steps=5")


def test_a_checkpoint_of_another_algorithm_is_refused(capsys):
    data = write_data()
    train("algo=bc", "env=hopper", data, "steps=20", "runs=a", *SIZES)
    train("algo=td3bc", "env=hopper", data, "steps=20", "runs=b", *SIZES)
    (one,), (two,) = (list(Path(p).rglob("checkpoint.pt")) for p in ("a", "b"))
    two.write_bytes(one.read_bytes())
    (two.parent.parent / "result.json").unlink()
    assert "belongs to bc, not to td3bc" in fails(capsys, f"resume={two.parent.parent}")


def test_data_that_changed_since_are_refused(capsys):
    train("algo=bc", "env=hopper", write_data(), "steps=20", *SIZES)
    (only_run() / "result.json").unlink()
    write_data(rows=500)
    assert "the data set has changed" in fails(capsys, f"resume={only_run()}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algo=prcd"], "no algorithm 'prcd'; did you mean 'prdc'"),
        (["env=halfcheeta"], "unknown environment 'halfcheeta'; did you mean 'halfcheetah'"),
        (["dataset=medum"], "medum"),
        (["algo.alhpa=3"], "prdc has no option 'alhpa'; did you mean 'alpha'"),
        (["algo.batch=big"], "batch must be int, got 'big'"),
        (["seeds=2.5"], "seeds must be int, got 2.5"),
        (["seeds"], "not of the form key=value"),
        (["algo=prdc,td3bc"], "a sweep needs -m"),
        (["device=cuda"], "no CUDA device"),
        (["dataset=missing.hdf5"], "missing.hdf5"),
        (["rows=5", "source=d4rl"], "rows="),
    ],
)
def test_mistakes_stop_the_run_in_one_line(words, message, capsys):
    if words == ["device=cuda"] and torch.cuda.is_available():
        words = ["device=tpu"]
        message = "device must be one of"
    err = fails(capsys, *words)
    assert message in err
    assert "Traceback" not in err
    assert not list(Path().rglob("config.yaml"))


def changed(name, row, value):
    data = np.load("data.npz")
    array = data[name].copy()
    array[row] = value
    return {name: array}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: changed("observations", (7, 2), np.nan), "obs is NaN or infinite in 1 of"),
        (lambda: changed("actions", (9, 1), 3.0), "act lies outside"),
        (lambda: {"rewards": np.ones(400, np.float32)}, "reward is 1 in every row"),
        (lambda: {"rewards": None}, "rewards"),
        (lambda: {"observations": np.zeros((400, 5), np.float32)}, "observations of 5"),
        (lambda: {"rewards": np.zeros(399, np.float32)}, "399"),
    ],
)
def test_unusable_data_are_refused_with_field_and_row(change, message, capsys):
    write_data()
    write_data(**change())
    err = fails(capsys, "algo=td3bc", "env=hopper", "dataset=data.npz", "steps=20", *SIZES)
    assert message in err


def test_a_place_that_is_not_writable_is_named(capsys):
    Path("file").write_text("")
    err = fails(capsys, "algo=bc", "env=hopper", write_data(), "runs=file/runs", *SIZES)
    assert "choose another place with runs=DIR" in err


def test_an_online_run_and_its_evaluation(capsys):
    train(
        "algo=sac",
        "env=Pendulum-v1",
        "steps=80",
        "algo.warmup=40",
        "eval_every=40",
        "snapshot_every=20",
        *SIZES,
    )
    folder = only_run()
    assert folder.parent == Path("runs/sac/Pendulum-v1")
    assert sorted(p.name for p in (folder / "seed-0" / "snapshots").iterdir()) == [
        "000000060.pt",
        "000000080.pt",
    ]
    capsys.readouterr()
    cli.evaluate([f"run={folder}", "episodes=2", "out=scores.json"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("IQM of 1 seed(s): undiscounted return ")
    assert line.endswith("(Pendulum-v1)")
    found = json.loads(Path("scores.json").read_text())
    assert found["versions"] == {}
    stored = json.loads((folder / "result.json").read_text())
    assert np.shape(found["returns"]) == np.shape(stored["final_returns"])
    cli.evaluate([f"run={folder / 'seed-0' / 'snapshots' / '000000060.pt'}", "episodes=2"])


def test_an_online_run_logs_ranks_and_bias_at_every_point_of_its_curve():
    train(
        "algo=td3",
        "env=Pendulum-v1",
        "algo.beer=1e-3",
        "steps=80",
        "algo.warmup=40",
        "eval_every=20",
        "seeds=1",
        *SIZES,
    )
    with open(only_run() / "seed-0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "evaluation"]
    found = {
        name: [int(row["step"]) for row in rows if row["name"] == name]
        for name in ("rank/feature", "rank/effective", "bias", "return")
    }
    assert found == {name: [60, 80] for name in found}


@pytest.mark.parametrize(
    ("algo", "steps"),
    [
        ("dqn", ["steps=400", "algo.warmup=100", "algo.update_every=10"]),
        ("ppo", ["steps=640", "algo.rollout=32"]),
    ],
)
def test_discrete_runs_count_environment_steps_and_are_scored(algo, steps, capsys):
    train(f"algo={algo}", "env=CartPole-v1", "envs=2", "eval_every=200", *steps, *SIZES)
    folder = only_run()
    result = json.loads((folder / "result.json").read_text())
    last = int(steps[0].removeprefix("steps="))
    assert result["curve"]["steps"][-1] == last
    assert all(b - a <= 220 for a, b in pairwise([0, *result["curve"]["steps"]]))
    cli.evaluate([f"run={folder}", "episodes=2", "out=scores.json"])
    assert np.shape(json.loads(Path("scores.json").read_text())["returns"]) == (1, 2)


def test_methods_and_environments_of_other_actions_are_told_apart(capsys):
    err = fails(capsys, "algo=dqn", "env=hopper")
    assert "dqn is for discrete actions, hopper has continuous ones" in err
    assert err.strip().endswith("methods for these: beer, ddpg, ppo, sac, td3")  # online as dqn is
    err = fails(capsys, "algo=sac", "env=CartPole-v1")
    assert "sac is for continuous actions, CartPole-v1 has discrete ones" in err
    assert "methods for these: dqn, ppo" in err


def test_a_goal_conditioned_method_needs_an_environment_that_names_goals(capsys):
    err = fails(capsys, "algo=hiql", "env=hopper")
    assert "hiql needs an environment that names goals" in err
    assert "pointmaze-medium" in err
    assert not Path("runs").exists()  # nothing was generated or begun


def check(algo, **given):
    resolved = configuration.resolve(algo, given)
    task.check_task(resolved, task.make_env(resolved)())


@pytest.mark.parametrize("algo", ["bc", "gcbc", "hiql", "ota"])
def test_data_without_rewards_are_for_methods_that_need_none(algo):
    pytest.importorskip("ogbench")
    check(algo, env="pointmaze-medium")
    with pytest.raises(ConfigError, match="td3bc learns from rewards") as refused:
        check("td3bc", env="pointmaze-medium")
    assert algo in str(refused.value).partition("methods for these: ")[2].split(", ")
    check("td3bc", env="pointmaze-medium", dataset="rewarded.npz")  # may hold rewards


def test_the_command_that_continues_a_run_is_the_one_that_began_it(monkeypatch):
    script = Path(offrl.__file__).resolve().parents[1] / "scripts" / "train.py"
    for program, start in (
        (str(script), f"python {shlex.quote(str(script))}"),
        ("/usr/bin/offrl", "offrl train"),
        ("train.py", "offrl train"),
    ):
        monkeypatch.setattr("sys.argv", [program, "algo=bc"])
        assert outcome.resuming(Path("a run")) == f"{start} 'resume=a run'"


def test_the_method_is_of_the_command_line_if_it_is_given_there():
    assert cli.chosen({"env": "hopper"}).lines()[0].endswith("= prdc  (default)")
    assert cli.chosen({"algo": "prdc"}).lines()[0].endswith("= prdc  (command line)")


def test_help_lists_every_setting_with_value_origin_choices_and_meaning(capsys):
    train("--help", "algo=beer", "env=dmc-cheetah-run", "algo.beta=0.5")
    out = capsys.readouterr().out
    assert "algo.beta=0.5  (command line)\n    weight of the penalty" in out
    assert "algo.norm_source=mixed  (default; mixed|target)\n    norm of the successor" in out
    assert "threads=1  (default)" in out
    options = get_type_hints(configuration.method("beer").config)
    for name in [*get_type_hints(configuration.Settings), *(f"algo.{n}" for n in options)]:
        assert out.count(f"\n{name}=") == 1
    assert "presets: full, quick" in out
    assert "there is no setting" in fails(capsys, "--help", "envv=hopper")


@pytest.mark.parametrize(
    "cls",
    [
        configuration.Settings,
        *(configuration.method(name).config for name in configuration.algorithms()),
    ],
)
def test_every_setting_has_a_meaning(cls):
    assert [name for name, told in configuration.meanings(cls).items() if not told] == []


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "env=hopper,ant"],
        ["resume=runs/x"],
        ["--cfg", "job"],
        ["hydra/launcher=joblib"],
        ["-m", "algo=bc,prdc", "seed=0,1"],
    ],
)
def test_help_is_given_with_any_words(words, capsys):
    train("--help", *words)
    assert "\nrows=null  (default)\n" in capsys.readouterr().out


def commit_of(monkeypatch, root):
    monkeypatch.setattr("offrl.__file__", str(root / "offrl" / "__init__.py"))
    return outcome.source_commit()


def test_a_run_keeps_the_commit_of_the_sources(monkeypatch, tmp_path):
    root = tmp_path / "repository"
    (root / "offrl").mkdir(parents=True)
    who = ["-c", "user.name=x", "-c", "user.email=x"]

    def git(*words):
        done = subprocess.run(
            ["git", *who, *words], cwd=root, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert commit_of(monkeypatch, root) is None
    git("init")
    for name in ("offrl/a.py", "README.md"):
        (root / name).write_text("1")
    git("add", "."), git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert commit_of(monkeypatch, root) == head
    (root / "README.md").write_text("2")
    assert commit_of(monkeypatch, root) == head
    (root / "offrl" / "mine.py").write_text("a method of one's own, not added yet")
    assert commit_of(monkeypatch, root) == head + "+"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert commit_of(monkeypatch, root) == head + "+"
    inside = root / "site-packages"
    inside.mkdir()
    assert commit_of(monkeypatch, inside) is None  # of a user's own repository


class Own(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))


def test_a_run_keeps_what_its_dynamics_rest_on():
    mujoco = metadata.version("mujoco")
    robot = make.factory("halfcheetah")()
    assert make.engines(robot) == {"mujoco": mujoco}
    assert make.engines(gymnasium.make("CartPole-v1")) == make.engines(Own()) == {}
    env = {"id": "HalfCheetah-v5", "legacy_mass": True}
    told = outcome.played_in(env, make.engines(robot))
    assert told == f"HalfCheetah-v5 with legacy masses, mujoco {mujoco}"
    gymnasium.register("Wrapped-v0", lambda **given: gymnasium.make("Hopper-v5"))
    assert make.engines(make.factory("Wrapped-v0")()) == {"mujoco": mujoco}
    del gymnasium.registry["Wrapped-v0"]


@pytest.mark.parametrize(
    ("module", "env", "names"),
    [
        ("dm_control", "dmc-cheetah-run", ["dm_control", "mujoco"]),
        ("ogbench", "antmaze-medium", ["ogbench", "mujoco"]),
        ("ogbench", "cube-single", ["ogbench", "dm_control", "mujoco"]),
        ("Box2D", "LunarLander-v3", metadata.packages_distributions().get("Box2D")),
    ],
)
def test_a_run_keeps_the_versions_of_other_suites(module, env, names):
    pytest.importorskip(module)
    assert list(make.engines(make.factory(env)())) == names


def test_all_the_time_of_a_resumed_run_counts(monkeypatch):
    stopped_before_training(monkeypatch)
    place = only_run() / "run.json"
    about = json.loads(place.read_text())
    assert 0 < about["seconds"] < 60
    place.write_text(json.dumps(about | {"seconds": 1e6}))
    train(f"resume={only_run()}")
    result = json.loads((only_run() / "result.json").read_text())
    assert 1e6 <= result["seconds"] < 1e6 + 60


def test_evaluate_names_missing_options_and_files(capsys):
    for words, message in (
        ([], "run= is missing"),
        (["run=nowhere"], "neither a run directory nor a checkpoint"),
        (["run=x", "episods=3"], "did you mean 'episodes'"),
    ):
        with pytest.raises(SystemExit):
            cli.evaluate(words)
        assert message in capsys.readouterr().err
