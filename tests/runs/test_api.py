"""Training from Python, without an environment, and to more steps."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import offrl
from offrl import cli, config
from offrl.data.build import keep, split
from offrl.engine import checkpoint
from offrl.errors import ConfigError, DataError
from offrl.runs.export import Options as Export
from offrl.runs.policy import export_run
from offrl.runs.report import Options, make_report

ROOT = Path(__file__).parents[2]
SMALL = {"hidden": [8], "batch": 8}
BRIEF = {"eval_every": 10, "eval_episodes": 2, "final_episodes": 2, "speed": "eager"}
own_data = importlib.util.spec_from_file_location("own_data", ROOT / "examples" / "own_data.py")
example = importlib.util.module_from_spec(own_data)
own_data.loader.exec_module(example)


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))


def swings(**changes):
    arrays = example.swings(episodes=6, steps=10)
    return offrl.Dataset.from_arrays(*arrays, action_low=-2, action_high=2, **changes)


def train(method="td3bc", steps=20, algo=SMALL, **settings):
    given = {"data": swings()} | BRIEF | settings
    return offrl.train(method, steps=steps, algo=algo, **given)


def test_a_run_without_an_environment_is_watched_by_its_losses_on_held_out_episodes(capsys):
    threads = torch.get_num_threads()
    run = train()
    assert "1 of them are held out" in capsys.readouterr().out
    assert run.score is None
    strict = json.loads((run.folder / "result.json").read_text(), parse_constant=pytest.fail)
    assert strict == run.result
    assert (strict["env"], strict["score"]) == (None, None)
    assert (
        strict["dataset"]["digest"]
        == config.of_run(run.folder).settings.dataset[-12:] + (strict["dataset"]["digest"][12:])
        or len(strict["dataset"]["digest"]) == 64
    )
    steps, values = run.curve["validation/critics/loss"]
    assert (steps.tolist(), values.shape) == ([10, 20], (1, 2))
    assert set(run.curve) >= {"critics/loss", "actor/loss", "validation/actor/loss"}
    assert strict["validation"]["validation/actor/loss"]["per_seed"]
    assert (run.folder / "curve.png").stat().st_size > 5_000
    assert torch.get_num_threads() == threads
    policy = run.policy
    low, high = (policy.act(example.swings(1, 3)[0], explore=e).shape for e in (False, True))
    assert low == high == (3, 1)
    assert (policy.signature.low, policy.signature.high) == ((-2.0,), (2.0,))
    assert np.abs(policy.act(example.swings(1, 50)[0])).max() <= 2
    make_report(Options(runs=("runs",), out="report"))
    assert "validation/actor/loss" in Path("report/table.md").read_text()
    with pytest.raises(ConfigError, match="env=none has no environment; name one"):
        run.evaluate()
    found = run.evaluate(env="Pendulum-v1", episodes=1)
    assert -3000 < found["score"]["mean"] < 0
    export_run(Export(run=str(run.folder), out="policy.pt2"))
    assert Path("policy.pt2").exists()


def test_held_out_losses_are_those_of_the_method_on_these_episodes_alone():
    """Of behavior cloning: the mean squared distance of the policy's actions, in [-1, 1]."""
    run = train("bc", final_episodes=200)
    held = split(swings(), 0.1)[1]
    act = run.policy.act(held["obs"].numpy()) / 2
    error = np.square(act - held["act"].numpy()).mean(-1)
    found = run.result["validation"]["validation/actor/loss"]["mean"]
    assert found == pytest.approx(error.mean(), abs=4 * error.std() / np.sqrt(200 * 8))


def test_watching_changes_nothing_of_the_training():
    runs = [train(eval_every=every) for every in (5, 20)]
    one, other = (checkpoint.load(r.folder / "seed-0" / "checkpoint.pt")["algo"] for r in runs)
    assert torch.equal(one["generator"], other["generator"])
    for name, value in one["actor"].items():
        assert torch.equal(value, other["actor"][name])


@pytest.mark.parametrize("method", ["prdc", "gcbc", "decision_transformer"])
def test_other_kinds_of_methods_learn_without_an_environment(method):
    sizes = {"size": "tiny", "context": 3, "targets": [-5.0], "batch": 4}
    run = train(method, 10, sizes if method == "decision_transformer" else {"batch": 8})
    assert all(np.isfinite(values).all() for _, values in run.curve.values())
    goal = {"goal": [1.0, 0, 0]} if method == "gcbc" else {}
    assert np.shape(run.policy.act([1.0, 0, 0], memory=None, **goal)[0]) == (1,)


def test_a_single_episode_is_learned_from_and_nothing_is_held_out():
    data = offrl.Dataset.from_arrays(*example.swings(1, 30), action_low=-2, action_high=2)
    run = train(data=data)
    assert "validation" not in run.result
    assert "critics/loss" in run.curve


def test_a_file_and_an_environment_go_by_the_same_words():
    arrays = example.swings(6, 10)
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    np.savez("log.npz", **dict(zip(names, arrays, strict=True)))
    told = {"action_low": -2, "action_high": 2, "data": None, "dataset": Path("log.npz")}
    free, given = train(**told), train()
    assert free.result["validation"] == given.result["validation"]
    assert free.result["dataset"]["digest"] == given.result["dataset"]["digest"]
    scored = train("bc", env="Pendulum-v1", evaluation="inline", **told)
    assert scored.score == scored.result["score"]["iqm"]
    assert scored.curve["return"][1].shape == (1, 2)


SCRIPT = f"""
import sys; sys.path.insert(0, {str(ROOT / "examples")!r})
import offrl, own_data
data = offrl.Dataset.from_arrays(*own_data.swings(6, 10), action_low=-2, action_high=2)
run = offrl.train("bc", data=data, seeds=2, steps=4, algo={SMALL!r}, **{BRIEF!r})
print(run.result["seeds"], len(list(run.folder.glob("seed-*"))))
"""


@pytest.mark.parametrize("way", ["file", "stdin", "-c"])
def test_no_guard_is_needed_where_seeds_have_processes_of_their_own(way):
    Path("script.py").write_text(SCRIPT)
    words = {"file": ["script.py"], "stdin": ["-"], "-c": ["-c", SCRIPT]}[way]
    text = SCRIPT if way == "stdin" else ""
    out = subprocess.run([sys.executable, *words], input=text, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[-1] == "[0, 1] 2"
    assert "step/s" in out.stderr  # a progress bar


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stepz": 3}, "there is no setting 'stepz'; did you mean 'steps'"),
        ({"algo": {"alhpa": 1}}, "no option 'alhpa'; did you mean 'alpha'"),
        (
            {"method": "td3", "algo": {"warmup": 5}},
            "td3 collects its own data.* methods for these: .*td3bc",
        ),
        ({"method": "td4bc"}, "no algorithm 'td4bc'; did you mean 'td3bc'"),
        ({"dataset": "x.npz"}, "leave out dataset="),
        ({"data": None}, r"name an environment \(env=\), or give data"),
        ({"data": None, "dataset": "medium"}, "env=none is for data of your own"),
        ({"validation": 2.0}, "validation must be"),
        ({"env": "Pendulum-v1", "data": None, "dataset": "no.csv"}, "there is no data file"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(given, words):
    with pytest.raises((ConfigError, DataError), match=words):
        train(**{"method": "td3bc"} | given)
    assert not Path("runs").exists()


def test_methods_of_other_actions_are_refused_by_the_data():
    arrays = list(example.swings(6, 10))
    arrays[1] = np.arange(60) % 3 + 5
    with pytest.raises(ConfigError, match="is for continuous actions"):
        train(data=offrl.Dataset.from_arrays(*arrays))
    assert not Path("runs").exists()


def test_data_that_left_the_cache_are_missed_by_name():
    run = train(steps=10)
    name = config.of_run(run.folder).settings.dataset
    assert keep(swings()) == name
    for path in Path("home/given").rglob("*.npy"):
        path.unlink()
    Path("home/given", name, "meta.json").unlink()
    Path("home/given", name).rmdir()
    with pytest.raises(DataError, match="no longer in the cache"):
        run.extend(20)


# --- more steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["td3bc", "prdc"])
def test_a_finished_run_that_goes_on_equals_a_longer_one(method):
    long, short = train(method, 30), train(method, 14)
    went_on = short.extend(30)
    assert went_on.folder == short.folder
    one, other = (
        checkpoint.load(run.folder / "seed-0" / "checkpoint.pt") for run in (long, went_on)
    )
    same(one["algo"], other["algo"])
    assert one["global_step"] == other["global_step"] == 30
    assert went_on.result["validation"] == long.result["validation"]
    assert went_on.result["steps"] == 30
    assert went_on.curve["validation/actor/loss"][0].tolist() == [10, 14, 20, 30]
    assert json.loads((short.folder / "result-14.json").read_text()) == short.result


def same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            same(value, other[key])
    elif isinstance(one, (list, tuple)):
        for pair in zip(one, other, strict=True):
            same(*pair)
    else:
        assert one == other


def test_an_online_run_goes_on_with_its_replay_and_a_schedule_is_told(capsys):
    sizes = ["algo.hidden=[8]", "algo.batch=8", "algo.warmup=10", "eval_episodes=1"]
    words = ["env=Pendulum-v1", "eval_every=20", "final_episodes=1", "evaluation=inline"]
    for steps, runs in ((40, "a"), (20, "b")):
        cli.train(["algo=td3", *words, *sizes, f"steps={steps}", f"runs={runs}", "speed=eager"])
    (long,), (short,) = (list(Path(place).glob("*/*/*")) for place in ("a", "b"))
    cli.train([f"resume={short}", "steps=40"])
    states = (checkpoint.load(run / "seed-0" / "checkpoint.pt")["algo"] for run in (long, short))
    same(*states)
    assert "schedule" not in capsys.readouterr().out
    assert config.method("ppo").scheduled


def test_fewer_steps_and_other_settings_are_refused(capsys):
    run = train(steps=10)
    for steps in (10, 5):
        with pytest.raises(ConfigError, match=f"a run of 10 steps; steps={steps} must be more"):
            run.extend(steps)
    for words in (["steps=10"], ["seeds=2"], ["steps=20", "seeds=2"]):
        with pytest.raises(SystemExit):
            cli.train([f"resume={run.folder}", *words])
    assert (run.folder / "result.json").exists()
    assert "no other setting with it but steps=" in capsys.readouterr().err


# --- what people read ----------------------------------------------------------------------------


def test_the_example_runs_as_the_readme_shows_it(tmp_path):
    path = ROOT / "examples" / "own_data.py"
    assert len(path.read_text().splitlines()) < 60
    if importlib.util.find_spec("onnxruntime") is None:
        text = path.read_text().replace("policy.onnx", "policy.pt2")
        path = tmp_path / "example.py"
        path.write_text(text)
    out = subprocess.run(
        [sys.executable, str(path), "20"], capture_output=True, text=True, cwd=tmp_path
    )
    assert out.returncode == 0, out.stderr
    assert len(re.findall(r"\[ ?-?[01]\.\d+ ?\]|\[\[", out.stdout)) >= 1
    assert list(tmp_path.glob("policy.*"))


def test_the_public_names_are_light_until_they_are_used():
    code = (
        "import sys, offrl; print(sorted(offrl.__all__), [m for m in "
        "('torch', 'numpy', 'gymnasium', 'hydra') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ["Dataset", "Policy", "evaluate", "load_policy", "train"]
    assert out.stdout.strip() == f"{names} []"
