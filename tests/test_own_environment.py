"""Environments of the user's own, `env=path/to/file.py:Class` and `env=module:Id`, everywhere."""

import json
import re
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from offrl import cli, config, load_policy
from offrl.envs import make
from offrl.envs.make import LONGEST, cut_off
from offrl.envs.vector import Vector, restore, resumes, snapshot
from offrl.errors import ConfigError
from tests.envs.spaces import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_environment.py"
PLACE = Path("my wörlds = good") / "it's mine.py"
MODULE = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv
class Heavy(PendulumEnv):
    def __init__(self):
        super().__init__()
        self.m = 2.0
gymnasium.register("lab/Heavy-v0", Heavy, max_episode_steps=30)
"""
SIZES = ["steps=90", "eval_every=60", "eval_episodes=2", "final_episodes=2"]
SIZES += ["algo.warmup=20", "algo.batch=8"]


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["train.py"])
    PLACE.parent.mkdir()
    PLACE.write_text(EXAMPLE.read_text())
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "worlds.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "lab"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    sys.modules.pop("worlds", None)


def refused(command, capsys, *words):
    with pytest.raises(SystemExit) as stop:
        command(list(words))
    assert stop.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(told) == 1, told
    return told[0]


@pytest.mark.slow
def test_a_file_trains_in_workers_resumes_elsewhere_is_scored_and_collected(tmp_path, monkeypatch):
    env = f"{PLACE}:Boat"
    cli.train(["algo=sac", f"env={env}", "seeds=2", "envs=2", "env_workers=2", *SIZES])
    (folder,) = (tmp_path / "runs" / "sac" / "Boat").iterdir()
    whole = f"{tmp_path / PLACE}:Boat"
    assert config.of_run(folder).settings.env == whole
    result = json.loads((folder / "result.json").read_text())
    assert result["env"]["id"] == whole
    assert result["seeds"] == [0, 1]
    (folder / "result.json").unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    cli.train([f"resume={folder}"])
    assert json.loads((folder / "result.json").read_text())["score"] == result["score"]
    cli.evaluate([f"run={folder}", "episodes=2", "out=found.json"])
    assert json.loads(Path("found.json").read_text())["env"] == whole
    cli.collect([f"run={folder}", "rows=120", "out=boat.npz", "workers=1"])
    kept = np.load("boat.npz")
    assert kept["observations"].shape == (120, 6)  # buoy, then wind
    assert (kept["observations"][:, 2:].sum(1) == 1).all()
    act = load_policy(folder).act(kept["observations"])
    low, high = np.float32([-0.5, 0]), np.float32([0.5, 3])
    assert ((low <= act) & (act <= high)).all()


def test_random_data_of_a_file_are_made_anew_when_it_changes_and_train(tmp_path):
    words = [f"env={PLACE}:Boat", "dataset=random", "rows=300", "workers=1", "out=boat.npz"]
    cli.collect(words)
    first = np.load("boat.npz")["rewards"]
    PLACE.write_text(EXAMPLE.read_text().replace("0.3 *", "3.0 *"))
    from offrl.own import module_of

    module_of.cache_clear()  # as in another process
    cli.collect(words)
    assert (np.load("boat.npz")["rewards"] != first).any()
    sizes = ["steps=20", "eval_every=10", "eval_episodes=1", "final_episodes=1"]
    cli.train(["algo=bc", f"env={PLACE}:Boat", "dataset=boat.npz", *sizes])
    assert len(list(Path("runs/bc/Boat-boat").iterdir())) == 1


def test_an_id_of_a_module_is_imported_in_every_process(tmp_path, capsys):
    cli.train(["algo=td3", "env=worlds:lab/Heavy-v0", "env_workers=1", *SIZES])
    (folder,) = (tmp_path / "runs" / "td3" / "lab" / "Heavy-v0").iterdir()
    assert config.of_run(folder).settings.env == "worlds:lab/Heavy-v0"
    out = capsys.readouterr().out
    assert "the state of worlds:lab/Heavy-v0 cannot be stored" in out  # at the start
    assert out.index("cannot be stored") < out.index("run directory")
    env = make.factory("worlds:lab/Heavy-v0")()
    assert (env.unwrapped.m, env.spec.max_episode_steps) == (2.0, 30)


def test_a_sweep_takes_own_environments(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(cli, "run", lambda job: jobs.append(job) or {"score": {"iqm": 0.0}})
    Path("a.py").write_text(EXAMPLE.read_text())
    cli.train(["-m", "algo=sac", "env=a.py:Boat,worlds:lab/Heavy-v0,hopper", *SIZES])
    names = [job.settings.env for job in jobs]
    assert names == [f"{tmp_path / 'a.py'}:Boat", "worlds:lab/Heavy-v0", "hopper"]
    assert [job.task for job in jobs] == ["Boat", "lab/Heavy-v0", "hopper"]


@pytest.mark.parametrize(
    ("env", "text", "message"),
    [
        ("none.py:Boat", None, "there is no file .*none.py"),
        ("w.py:Boot", EXAMPLE.read_text(), "has no class 'Boot'; name one .* environments: Boat"),
        ("w.py", EXAMPLE.read_text(), "env=w.py:Class .its environments: Boat"),
        ("w.py:STEPS", EXAMPLE.read_text(), "has STEPS, which is not a gymnasium.Env"),
        ("w.py:Boat", "class Boat:\n    pass", "has Boat, which is not a gymnasium.Env; .*none"),
        ("w.py:Boat", "def f(:", "cannot be imported: invalid syntax"),
        ("w.py:Boat", "1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("w.py:Boat", "import nowhere_at_all", "No module named 'nowhere_at_all'"),
        (
            "w.py:Boat",
            "import gymnasium\nclass Boat(gymnasium.Env):\n"
            "    def __init__(self):\n        raise RuntimeError('no\\n water')",
            "w.py:Boat cannot be made: RuntimeError: no water",
        ),
        (
            "w.py:Boat",
            "import gymnasium\nclass Boat(gymnasium.Env):\n    pass",
            "w.py:Boat cannot be made: AttributeError: .*observation_space",
        ),
        ("nowhere.at:Id-v0", None, "there is no module nowhere.at; .*PYTHONPATH"),
        ("worlds:Id-v0", None, "worlds registers no environment 'Id-v0'; .*lab/Heavy-v0"),
        ("json:Id-v0", None, "json registers no environment 'Id-v0'; it registers none"),
        (
            "Pusher-v4",
            None,
            "Pusher-v4 cannot be made: `Pusher-v4` is only supported on `mujoco<3`",
        ),
        ("Hopper-v3", None, "Hopper-v3 cannot be made: The mujoco v2 and v3 based environments"),
        ("GymV21Environment-v0", None, "GymV21Environment-v0 cannot be made: .*shimmy"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_by_training_and_collection(env, text, message, capsys):
    if text is not None:
        Path("w.py").write_text(text)
    told = refused(cli.train, capsys, "algo=sac", f"env={env}", *SIZES)
    assert list(Path().glob("runs/**/*")) == []
    assert re.search(message, told), told
    told = refused(cli.collect, capsys, f"env={env}", "dataset=random", "rows=10")
    assert re.search(message, told), told


class Plain(Any):
    """Without render_mode, snapshot or limit."""

    def __init__(self, steps=None, random=None, own=None):
        unit = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        super().__init__(unit, unit, steps)
        self.random = random
        if own is not None:
            self.snapshot, self.restore = own, lambda state: None

    def reset(self, *, seed=None, options=None):
        found = super().reset(seed=seed, options=options)
        if self.random is not None:
            self.np_random = self.random(seed)
        return found


@pytest.fixture
def plain():
    """What `factory` makes of a Plain."""

    def go(limit=None, repeat=1, render=False, **given):
        gymnasium.register("offrl/Plain-v0", Plain)
        try:
            return make.factory(
                "offrl/Plain-v0", render=render, action_repeat=repeat, episode_limit=limit
            )(**given)
        finally:
            del gymnasium.registry["offrl/Plain-v0"]

    return go


def length(env):
    env.reset(seed=0)
    for count in range(1, 2 * LONGEST):
        if any(env.step(np.zeros(2))[2:4]):
            return count
    return None


def test_episodes_that_never_end_are_cut_off(plain):
    assert (length(plain()), cut_off(plain())) == (LONGEST, True)
    assert (length(plain(limit=7)), cut_off(plain(limit=7))) == (7, False)
    assert length(plain(limit=7, repeat=3)) == 7  # actions
    assert length(plain(steps=4)) == 4


def test_a_limit_replaces_the_one_of_an_environment():
    env = make.factory("Pendulum-v1", episode_limit=12)()
    env.reset(seed=0)
    ends = [env.step(np.zeros(1))[3] for _ in range(12)]
    assert ends == [False] * 11 + [True]
    assert not cut_off(env)


def test_a_limit_is_a_setting_and_its_absence_is_told(capsys):
    Path("w.py").write_text(EXAMPLE.read_text())
    cli.train(["algo=sac", "env=w.py:Boat", "episode_limit=9", *SIZES])
    (folder,) = Path("runs/sac/Boat").iterdir()
    lines = (folder / "episodes.csv").read_text().splitlines()[1:]
    assert {line.split(",")[4] for line in lines} == {"9"}
    assert "states no time limit" not in capsys.readouterr().out
    told = refused(cli.train, capsys, "algo=sac", "env=w.py:Boat", "episode_limit=0")
    assert "episode_limit must be at least 1, got 0" in told
    cli.train(["algo=sac", "env=w.py:Boat", *SIZES])
    out = capsys.readouterr().out
    assert f"cut off after {LONGEST} actions; choose another limit with episode_limit=" in out
    assert "cannot be stored" not in out  # it has snapshot and restore


GENERATORS = [np.random.MT19937, np.random.Philox, np.random.SFC64, np.random.PCG64DXSM]


@pytest.mark.parametrize("bits", GENERATORS, ids=lambda bits: bits.__name__)
def test_every_generator_of_numpy_continues(plain, bits):
    random = lambda seed: np.random.Generator(bits(seed))  # noqa: E731
    env, other = plain(random=random), plain(random=random)
    env.reset(seed=1)
    other.reset(seed=2)
    env.unwrapped.np_random.normal(size=5)
    assert not restore(other, snapshot(env))  # of the state nothing is known
    drawn = (e.unwrapped.np_random.normal(size=9).tolist() for e in (env, other))
    assert next(drawn) == next(drawn)


class Robot(Plain):
    """Attributes named as MuJoCo's, which are none."""

    model, data = object(), object()


@pytest.mark.parametrize(
    "given",
    [
        {"random": np.random.RandomState},
        {"random": lambda seed: __import__("random").Random(seed)},
        {"own": lambda: {"place": np.zeros(2)}},
        {"own": lambda: {"thing": object()}},
        {"own": lambda: 1 / 0},
    ],
)
def test_what_cannot_be_stored_starts_anew_and_nothing_fails(plain, given, tmp_path):
    assert not resumes(plain(**given))
    envs, other = (Vector([lambda: plain(**given)], [3]) for _ in range(2))
    envs.reset()
    *_, obs = envs.step(torch.zeros(1, 2))
    torch.save(envs.state(), tmp_path / "state.pt")
    _, anew = other.load(torch.load(tmp_path / "state.pt", weights_only=True), obs)
    assert anew.tolist() == [1]


def test_names_of_mujoco_alone_are_no_robot():
    assert not resumes(Robot())
    assert resumes(make.factory("hopper")())
    assert resumes(make.factory(f"{EXAMPLE}:Boat")())


def test_a_constructor_without_render_mode_is_filmed_with_a_clear_no(plain):
    assert plain().observation_space.shape == (2,)
    with pytest.raises(ConfigError, match="takes no render_mode, so it cannot be filmed"):
        plain(render=True)


def test_the_example_is_short_and_goes_on_exactly():
    assert len(EXAMPLE.read_text().splitlines()) < 60
    env, other = (make.factory(f"{EXAMPLE}:Boat")() for _ in range(2))
    env.reset(seed=3)
    other.reset(seed=9)
    acts = np.random.default_rng(0).uniform(-1, 1, (250, 2))
    for act in acts[:7]:
        env.step(act)
    assert restore(other, snapshot(env))
    for act in acts[7:]:
        expected, found = env.step(act), other.step(act)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:4] == expected[1:4]
        if expected[2] or expected[3]:
            np.testing.assert_array_equal(other.reset()[0], env.reset()[0])
