"""Roll-outs, recipes and the cache of generated data, with tiny random policies."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from offrl.algos import sac
from offrl.data.dataset import check, read, write
from offrl.data.sources import generated, policies, rollout
from offrl.data.sources.policies import Behavior, layers
from offrl.data.sources.rollout import Share, Uniform, roll_out
from offrl.engine import checkpoint
from offrl.engine.method import Spec
from offrl.engine.state import state_of
from offrl.envs.make import factory
from offrl.errors import DataError
from offrl.nets import GaussianActor
from offrl.results.plots import distribution
from offrl.runs import collect as collection

STEPS = (20_000, 30_000, 50_000, 300_000)
ROLES = ("early", "early", "medium", "expert")
HOPPER = factory("hopper")


def actor(seed=0):
    return GaussianActor(11, 3, (32, 32), (), torch.Generator().manual_seed(seed))


def behavior(seed=0):
    return Behavior(layers(actor(seed).state_dict()), {"role": "medium", "step": 1})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def one_process(function, jobs, workers=0):
    return (function(*job) for job in jobs)


@pytest.fixture
def here(monkeypatch):
    """Play in this process, which saves the start of workers; see the test of their equality."""
    monkeypatch.setattr(rollout, "in_processes", one_process)


@pytest.fixture
def shipped(tmp_path):
    """A folder of policies as `tools.packing` writes it."""
    folder, tensors = tmp_path / "behavior", {}
    folder.mkdir()
    for i, (step, role) in enumerate(zip(STEPS, ROLES, strict=True)):
        for name, value in actor(i).state_dict().items():
            tensors[f"{role}/{step}/{name}"] = value.half()
    save_file(tensors, folder / "hopper.safetensors")
    about = [{"role": r, "step": s, "return": 1.0} for s, r in zip(STEPS, ROLES, strict=True)]
    robot = {"env": "Hopper-v5", "random_steps": 10_000, "command": "train", "policies": about}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "robots": {"hopper": robot}}))
    return folder


def rolled(place, shares, make_env=HOPPER, **options):
    """The data set of a roll-out, and what `roll_out` found."""
    found = {}

    def fill(folder):
        found.update(roll_out(shares, make_env, folder, **options))
        return {"name": "test", "info": {}}

    write(place, fill)
    return read(place), found


def leftovers(cache):
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


# --- the policies --------------------------------------------------------------------------------


def test_behavior_is_the_gaussian_actor_with_its_weights_rounded():
    net, policy = actor(), behavior()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.half().float())
    obs = torch.randn(512, 11, generator=torch.Generator().manual_seed(1))
    streams = [torch.Generator().manual_seed(2) for _ in range(2)]
    with torch.no_grad():
        expected, _ = net.sample(obs, streams[0])
        mean = net(obs)[0].tanh()
    sampled, _ = policy.act({"obs": obs, "explore": True, "generator": streams[1]})
    torch.testing.assert_close(sampled, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.act({"obs": obs})[0], mean, rtol=1e-5, atol=1e-6)


def test_sampled_actions_have_sacs_mean_and_spread_before_the_tanh():
    algo = sac.SAC(sac.Config(hidden=(32, 32)), Spec(11, 3), torch.Generator().manual_seed(0))
    policy = Behavior(layers(algo.actor.state_dict()), {})
    obs = torch.randn(1, 11, generator=torch.Generator().manual_seed(1)).expand(100_000, 11)
    stream = torch.Generator().manual_seed(3)
    act, _ = policy.act({"obs": obs, "explore": True, "generator": stream})
    with torch.no_grad():
        mean, log_std = (value[0] for value in algo.actor(obs[:1]))
    raw = act.double().clamp(-1 + 1e-7, 1 - 1e-7).atanh()
    torch.testing.assert_close(raw.mean(0).float(), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(raw.std(0).float(), log_std.exp(), rtol=0.02, atol=0)


def test_unknown_robots_and_damaged_policies_are_named(shipped):
    with pytest.raises(DataError, match=r"'swimmer' \(there are: hopper\)"):
        policies.load("swimmer", shipped)
    (shipped / "hopper.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="damaged"):
        policies.load("hopper", shipped)


def test_packing_keeps_evenly_spaced_snapshots_up_to_medium_and_the_expert():
    from tools.packing import kept, within

    assert within((0.4, 0.5), [10, 100, 380, 450, 700, 500], 1000) == [3, 5]
    assert kept(medium=4, expert=7, keep=3) == [
        (0, "early"),
        (2, "early"),
        (4, "medium"),
        (7, "expert"),
    ]
    assert kept(medium=1, expert=3, keep=10) == [(0, "early"), (1, "medium"), (3, "expert")]


def test_packed_policies_play_as_the_run_that_they_come_from(tmp_path, monkeypatch):
    from tools import packing

    run = tmp_path / "run" / "snapshots"
    run.mkdir(parents=True)
    config = sac.Config(hidden=(32, 32), batch=8)
    algo = sac.SAC(config, Spec(11, 3), torch.Generator().manual_seed(0))
    obs, means, scalar = torch.randn(5, 11), {}, torch.zeros(8)
    batch = {
        "obs": torch.randn(8, 11),
        "act": torch.zeros(8, 3),
        "reward": scalar,
        "next_obs": torch.randn(8, 11),
        "terminal": scalar,
    }
    for update in range(3):
        algo.update(batch, 0)
        about = {"label": "sac", "seeds": [4], "step": 101 + update}
        checkpoint.save(run / f"{101 + update}.pt", about | {"algo": state_of(algo)})
        means[101 + update] = algo.act({"obs": obs})[0].detach()
    monkeypatch.setattr(packing, "in_processes", one_process)
    monkeypatch.setattr(packing, "MEDIUM", (0.0, 1.5))
    told = packing.pack({"hopper": run.parent}, folder=tmp_path / "out", episodes=2)
    robot = told["robots"]["hopper"]
    assert (robot["seed"], robot["random_steps"], robot["env"]) == (4, 100, "Hopper-v5")
    assert robot["last_snapshot"] == 103
    medium, expert = policies.load("hopper", tmp_path / "out")
    assert (medium.about["role"], medium.about["step"]) == ("medium", 101)
    assert expert.about["return"] > 0
    for policy in (medium, expert):
        played = policy.act({"obs": obs})[0]
        torch.testing.assert_close(played, means[policy.about["step"]], rtol=0, atol=1e-3)


# --- roll-outs -----------------------------------------------------------------------------------


def test_rows_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "CHUNK", 200)
    shares = [Share("a", behavior(), 500), Share("b", Uniform(3), 300)]
    one, found = rolled(tmp_path / "one", shares, workers=1)
    two, again = rolled(tmp_path / "two", shares, workers=2)
    assert one.digest == two.digest
    assert found == again


def test_episodes_follow_each_other_and_their_flags_are_right(tmp_path, here, monkeypatch):
    monkeypatch.setattr(rollout, "CHUNK", 400)
    data, found = rolled(tmp_path / "data", [Share("random", Uniform(3), 1000)])
    check(data, rollout.FIELDS)
    assert len(data) == 1000
    assert found["episodes"] == data.episodes > 20
    last = torch.cat([data.starts[1:], torch.tensor([1000])]) - 1
    inside = torch.ones(1000, dtype=torch.bool)
    inside[last] = False
    ended = data["terminal"] + data["timeout"]
    assert (ended[last] == 1).all()
    assert (ended[inside] == 0).all()
    rows = inside.nonzero()[:, 0]
    assert torch.equal(data["next_obs"][rows], data["obs"][rows + 1])
    cuts = (data["timeout"] == 1).nonzero()[:, 0].tolist()
    assert set(cuts) <= {399, 799, 999}  # hopper falls long before its time limit
    assert found["cut_episodes"] == len(cuts)
    healthy = data["next_obs"][data["terminal"] == 1]
    assert ((healthy[:, 0] <= 0.7) | (healthy[:, 1].abs() >= 0.2)).all()
    whole = ~torch.isin(last, torch.tensor(cuts))
    assert found["mean_return"] == pytest.approx(float(data.returns[whole].mean()), rel=1e-5)


def test_episodes_are_cut_after_a_thousand_steps(tmp_path, here):
    shares = [Share("random", Uniform(1), 2500)]
    data, found = rolled(tmp_path / "data", shares, factory("InvertedPendulum-v5"))
    assert data.lengths.max() <= 1000
    shares = [Share("random", Uniform(2), 2500)]
    data, found = rolled(tmp_path / "more", shares, factory("swimmer"))
    assert data["timeout"].nonzero()[:, 0].tolist() == [999, 1999, 2499]
    assert data["terminal"].sum() == 0
    assert found["cut_episodes"] == 1


def test_replaying_the_stored_actions_gives_the_stored_rows(tmp_path, here):
    data, _ = rolled(tmp_path / "data", [Share("medium", behavior(), 60)], seed=5)
    env = HOPPER()
    seed = rollout.derive(rollout.derive(5, "rollout", "medium", 0), "environment")
    obs, _ = env.reset(seed=seed)
    for row in range(60):
        assert np.array_equal(obs.astype(np.float32), data["obs"][row].numpy())
        obs, reward, terminal, timeout, _ = env.step(data["act"][row].numpy())
        assert np.float32(reward) == data["reward"][row].numpy()
        if terminal or timeout:
            obs, _ = env.reset()


# --- nothing half-made ---------------------------------------------------------------------------


class Dying:
    """Kills its process."""

    def act(self, now, memory=None):
        os.kill(os.getpid(), signal.SIGKILL)


class Failing:
    def act(self, now, memory=None):
        raise ZeroDivisionError("bad policy")


def test_a_killed_worker_is_told_and_leaves_nothing(cache):
    with pytest.raises(DataError, match="died: out of memory") as caught:
        rolled(cache / "entry", [Share("dying", Dying(), 100)], workers=1)
    assert isinstance(caught.value.__cause__, BrokenProcessPool)
    assert leftovers(cache) == []


def test_a_failing_policy_leaves_nothing(cache, here):
    with pytest.raises(ZeroDivisionError, match="bad policy"):
        rolled(cache / "entry", [Share("failing", Failing(), 100)])
    assert leftovers(cache) == []


def test_a_script_without_a_main_guard_is_told_and_leaves_nothing(cache, tmp_path):
    """Its workers run it again as they start, and would wait for each other forever."""
    script = tmp_path / "script.py"
    script.write_text(
        "from offrl.data.sources import generated\n"
        "generated.load('hopper', 'random', rows=500, workers=1)\n"
    )
    run = subprocess.run(
        [sys.executable, str(script)], stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    assert run.returncode == 1
    assert "outside `if __name__ == '__main__':`" in run.stderr.splitlines()[-1]
    assert leftovers(cache) == []


def test_ctrl_c_leaves_nothing(cache, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import signal\n"
        "from offrl.data.sources import generated\n"
        "if __name__ == '__main__':\n"
        # a shell ignores the signal for what it starts in the background; here it must arrive
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    generated.load('hopper', 'random', rows=2_000_000, workers=1)\n"
    )
    run = subprocess.Popen(
        [sys.executable, str(script)], stderr=subprocess.PIPE, start_new_session=True
    )
    limit = time.monotonic() + 240
    while not list(cache.glob("generated/.hopper*/new/obs.npy")) and time.monotonic() < limit:
        time.sleep(0.05)
    try:
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        _, told = run.communicate(timeout=60)
    finally:
        if run.poll() is None:  # nothing goes on behind a test that failed
            os.killpg(run.pid, signal.SIGKILL)
    assert b"KeyboardInterrupt" in told
    assert leftovers(cache) == []


def test_an_unwritable_cache_is_told_before_anything_is_played(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set OFFRL_HOME"):
        generated.load("hopper", "random", rows=100)


# --- recipes -------------------------------------------------------------------------------------


def test_medium_replay_gives_every_snapshot_its_part_of_training(shipped):
    shares = generated.recipe("hopper", "medium-replay", 50_000, shipped)
    assert [(share.name, share.rows) for share in shares] == [
        ("random", 10_000),
        ("step 20000", 15_000),
        ("step 30000", 15_000),
        ("step 50000", 10_000),
    ]
    default = generated.recipe("hopper", "medium-replay", None, shipped)
    assert sum(share.rows for share in default) == 400_000


def test_medium_expert_is_half_medium_half_expert(shipped, here, monkeypatch):
    monkeypatch.setattr(rollout, "CHUNK", 100)
    load = lambda *args: generated.load("hopper", *args, folder=shipped)  # noqa: E731
    both, medium, expert = load("medium-expert", 401), load("medium", 200), load("expert", 201)
    joined = torch.cat([medium["obs"], expert["obs"]])
    assert torch.equal(both["obs"], joined)


def test_an_entry_tells_where_it_comes_from_and_is_made_once(shipped, here, monkeypatch):
    data = generated.load("hopper", "medium", 300, folder=shipped)
    assert data.name.startswith("generated/hopper-medium (Hopper-v5, mujoco ")
    info = data.info
    assert info["reference"] == [-20.272305, 3234.3]
    assert info["shares"][0]["step"] == 50_000
    assert info["policies_trained"]["command"] == "train"
    assert info["mean_score"] == pytest.approx(
        100 * (info["mean_return"] + 20.272305) / (3234.3 + 20.272305)
    )
    monkeypatch.setattr(generated, "roll_out", None)
    assert generated.load("hopper", "medium", 300, folder=shipped).digest == data.digest


def test_other_weights_rows_or_seeds_are_other_entries(shipped):
    shares = generated.recipe("hopper", "medium", 100, shipped)
    other = [Share("medium", behavior(9), 100)]
    keys = {
        generated.identity("hopper", shares, 0),
        generated.identity("hopper", shares, 1),
        generated.identity("hopper", other, 0),
        generated.identity("walker2d", shares, 0),
    }
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("env", "dataset", "rows", "words"),
    [
        ("hoper", "medium", None, "did you mean 'hopper'"),
        ("hopper", "mediun", None, "did you mean 'medium'"),
        ("hopper", "medium", 0, "rows must be at least 1"),
        ("ant", "expert", None, "no behaviour policies ship for 'ant'"),
    ],
)
def test_wrong_requests_are_answered_in_words(shipped, env, dataset, rows, words):
    with pytest.raises(ValueError, match=words):
        generated.load(env, dataset, rows, folder=shipped)


# --- collecting and the picture ------------------------------------------------------------------


def test_collected_data_can_be_written_and_read_as_files(tmp_path, here):
    from offrl.data.sources import files

    def collect(out):
        told = collection.Options(env="hopper", dataset="random", rows=300, out=str(out))
        return collection.collect_data(told)

    for suffix in ("npz", "hdf5"):
        out = tmp_path / f"data.{suffix}"
        data = collect(out)
        back = files.load(out)
        kept = data["timeout"] == 0
        kept[-1] = False
        assert torch.equal(back["obs"], data["obs"][kept])
        assert torch.equal(back["next_obs"], data["next_obs"][kept])
    with pytest.raises(DataError, match=r"\.npz or \.hdf5"):
        collect(tmp_path / "data.csv")


def test_a_trained_algorithm_rolls_out_with_and_without_exploration(tmp_path, here):
    algo = sac.SAC(sac.Config(hidden=(32, 32)), Spec(11, 3), torch.Generator().manual_seed(0))
    make = lambda explore: collection.from_policies(  # noqa: E731
        [Share("seed 0", algo, 100, explore)], HOPPER, "hopper", "Hopper-v5", "test"
    )
    plain = make(False)
    with torch.no_grad():
        expected = algo.actor(plain["obs"])[0].tanh()
    torch.testing.assert_close(plain["act"], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(make(True)["act"][:1], plain["act"][:1])


def test_picture_of_returns_is_drawn_even_where_all_are_equal(tmp_path, here):
    data = generated.load("hopper", "random", 200)
    same = generated.load("swimmer", "random", 20)
    distribution(tmp_path / "picture.png", {"hopper": {"random": data}, "swimmer": {"a": same}})
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
