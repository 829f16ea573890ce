import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

import offrl
from offrl.data.dataset import Dataset
from offrl.engine.method import Spec
from offrl.envs.make import ScaleAction, own_actions
from offrl.runs.policy import Policy
from offrl.runs.signature import Signature, keep_observations, observations
from offrl.runs.signature import signature as made_of
from tests.algos.cases import CASES, make
from tests.runs.policies import FIRST, HIGH, LOW, policy, signature, stored

OBS = np.random.default_rng(0).uniform(-1, 1, (7, 3)).astype(np.float32)


def now(**told):
    rows = torch.from_numpy(OBS)
    return {"obs": rows, "start": torch.ones(7), "reward": torch.zeros(7)} | told


def test_a_loaded_policy_acts_as_the_run_does_in_the_units_of_its_environment(tmp_path):
    algo = stored(tmp_path, "td3bc")
    with torch.no_grad():
        act, _ = algo.act(now())

    class Box(gymnasium.Env):
        action_space = gymnasium.spaces.Box(LOW, HIGH, (2,))

    units = ScaleAction(Box()).action(act.numpy())
    found = offrl.load_policy(tmp_path).act(OBS)
    np.testing.assert_allclose(found, units, rtol=0, atol=1e-6)
    assert found.dtype == np.float32
    for place in (tmp_path / "seed-0", tmp_path / "seed-0" / "checkpoint.pt"):
        assert np.array_equal(offrl.load_policy(place).act(OBS), found)


def test_one_observation_is_a_batch_of_one():
    p = policy("td3bc")
    one = p.act(OBS[2])
    assert one.shape == (2,)
    np.testing.assert_allclose(one, p.act(OBS)[2], atol=1e-6)
    assert np.array_equal(p.act(list(OBS[2])), one)


def test_every_stacked_seed_is_found(tmp_path):
    algo = stored(tmp_path, "sac", seeds=(4, 5, 6))
    told = {name: x.expand(3, *x.shape) for name, x in now().items()}
    with torch.no_grad():
        acts, _ = algo.act(told)
    for i, seed in enumerate((4, 5, 6)):
        units = (acts[i].numpy() + 1) / 2 * (HIGH - LOW) + LOW
        np.testing.assert_allclose(offrl.load_policy(tmp_path, seed).act(OBS), units, atol=1e-5)
    assert offrl.load_policy(tmp_path).info["seed"] == 4
    with pytest.raises(ValueError, match="no seed 7; it has 4, 5, 6"):
        offrl.load_policy(tmp_path, 7)


def test_discrete_actions_count_from_where_the_environment_does(tmp_path):
    algo = stored(tmp_path, "dqn")
    p = offrl.load_policy(tmp_path)
    acts = p.act(OBS)
    assert np.array_equal(acts, algo.act(now())[0].numpy() + FIRST)
    assert isinstance(p.act(OBS[0]), np.int64)


def test_exploring_is_random_and_a_seed_repeats_it():
    p = policy("sac")
    assert np.array_equal(p.act(OBS), p.act(OBS))
    first, again, other = (p.act(OBS, explore=True, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(p.act(OBS, explore=True), p.act(OBS, explore=True))


def test_memory_is_handed_on_and_begins_anew_with_an_episode():
    p, algo = policy("decision_transformer"), make("decision_transformer")
    rows, mine, memory = OBS[:, :2], None, None
    reward = np.linspace(-1, 1, 7).astype(np.float32)
    for step in range(6):
        start = np.full(7, step == 0) | (np.arange(7) < 3) & (step == 4)
        act, memory = p.act(
            np.roll(rows, step, 0), memory=memory, start=start, reward=reward, target=2.5
        )
        told = now(
            obs=torch.from_numpy(np.roll(rows, step, 0)),
            start=torch.from_numpy(start).float(),
            reward=torch.from_numpy(reward),
            target=torch.full((7,), 2.5),
        )
        with torch.no_grad():
            wanted, mine = algo.act(told, mine)
        units = (wanted.numpy() + 1) / 2 * (HIGH - LOW) + LOW
        np.testing.assert_allclose(act, units, atol=1e-5)
    with pytest.raises(ValueError, match="memory is of 7 rows, obs has 2"):
        p.act(rows[:2], memory=memory)


@pytest.mark.parametrize("name", ["decision_transformer", "decision_mamba"])
def test_the_first_target_is_the_usual_one(name):
    p = policy(name)
    usual, same, other = (p.act(OBS[:, :2], target=t)[0] for t in (None, 3.0, -7.0))
    assert np.array_equal(usual, same)
    assert not np.allclose(usual, other)


def test_a_goal_is_asked_for_and_only_where_there_is_one():
    p = policy("gcbc")
    near, far = p.act(OBS, goal=OBS[0]), p.act(OBS, goal=OBS[::-1])
    assert near.shape == far.shape == (7, 2)
    assert not np.allclose(near, far)
    pair = p.act(OBS, goal=OBS[0], memory=None)  # the same loop serves every policy
    assert np.array_equal(pair[0], near)
    assert pair[1] is None
    with pytest.raises(ValueError, match=r"gcbc needs a goal: act\(obs, goal="):
        p.act(OBS)
    with pytest.raises(ValueError, match="td3bc takes no goal"):
        policy("td3bc").act(OBS, goal=OBS)
    with pytest.raises(ValueError, match="td3bc is not asked for a return"):
        policy("td3bc").act(OBS, target=3)


def test_predict_is_act_under_other_names():
    p = policy("sac")
    action, state = p.predict(OBS)
    assert state is None
    assert np.array_equal(action, p.act(OBS))
    sampled, _ = p.predict(OBS, deterministic=False, seed=3)
    assert np.array_equal(sampled, p.act(OBS, explore=True, seed=3))
    goals = policy("gcbc")
    told = {"observation": OBS, "desired_goal": OBS[1], "achieved_goal": OBS}
    assert np.array_equal(goals.predict(told)[0], goals.act(OBS, goal=OBS[1]))
    window = policy("decision_transformer")
    first, state = window.predict(OBS[:, :2])
    again, _ = window.predict(OBS[:, :2], state, episode_start=np.ones(7, bool))
    later, _ = window.predict(OBS[:, :2], state)
    np.testing.assert_allclose(first, again, atol=1e-6)
    assert not np.allclose(first, later)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 2, 3), ()])
def test_a_wrong_width_is_one_clear_error(shape):
    with pytest.raises(ValueError, match=r"obs has shape .*trained on \(3,\)"):
        policy("td3bc").act(np.zeros(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named(bad):
    obs = OBS.copy()
    obs[4, 1] = bad
    with pytest.raises(ValueError, match=rf"obs\[1\] is {bad} in row 4"):
        policy("td3bc").act(obs)
    with pytest.raises(ValueError, match=rf"goal\[1\] is {bad} in row 4"):
        policy("gcbc").act(OBS, goal=obs)


def test_an_observation_far_outside_the_training_data_is_told_once(recwarn):
    p = policy("td3bc")
    p.signature = replace(p.signature, obs_names=("angle", "speed", "height"))
    near, far = OBS.copy(), OBS.copy()
    near[1, 2], far[1, 2] = 5.9, 6.1  # the data end at 1, their standard deviation is 0.5
    p.act(near)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"height is 6\.1 in row 1, more than 10 standard"):
        p.act(far)
    recwarn.clear()
    p.act(far)
    assert not recwarn.list


def test_images_come_as_the_environment_has_them():
    p = policy("td3bc")
    p.signature = replace(p.signature, obs_shape=(1, 3, 1))
    assert np.array_equal(p.act(OBS.reshape(7, 1, 3, 1)), p.act(OBS))
    assert p.act(OBS[0].reshape(1, 3, 1)).shape == (2,)


class World(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2, 3))
    action_space = gymnasium.spaces.Box(np.array([[-1.0, 0.0]]), np.array([[1.0, 0.5]]))


def run_of(name="td3bc"):
    return SimpleNamespace(
        name=name, method=SimpleNamespace(goals=False), config=lambda: CASES[name].config
    )


def test_bounds_are_those_of_the_environment_before_scaling():
    spec, space = Spec(6, 2), own_actions(ScaleAction(World()))
    found = made_of(run_of(), spec, None, World.observation_space, space)
    assert (found.low, found.high) == ((-1.0, 0.0), (1.0, 0.5))
    assert (found.obs_shape, found.act_shape, found.actions) == ((2, 3), (1, 2), 2)
    discrete = gymnasium.spaces.Discrete(3, start=5)
    found = made_of(run_of(), Spec(6, 3, discrete=True), None, World.observation_space, discrete)
    assert (found.start, found.actions, found.act_shape, found.low) == (5, 3, (), ())


def test_without_an_environment_the_data_say_what_their_actions_were():
    info = {"rescaled_from": {"low": [-2.0, -1.0], "high": 4.0}, "obs_names": ["x", "y", "z"]}
    data = Dataset({}, torch.zeros(1), torch.zeros(1), "own", info)
    found = made_of(run_of(), Spec(3, 2), data)
    assert (found.low, found.high, found.obs_names) == ((-2, -1), (4, 4), ("x", "y", "z"))
    data = Dataset({}, torch.zeros(1), torch.zeros(1), "own", {"action_start": 1})
    assert made_of(run_of(), Spec(3, 2, discrete=True), data).start == 1
    assert made_of(run_of(), Spec(3, 2), data).low == (-1, -1)


def test_a_signature_comes_back_from_its_file(tmp_path):
    found = signature("decision_mamba")
    (tmp_path / "policy.json").write_text(found.to_json())
    assert Signature.read(tmp_path) == found
    with pytest.raises(FileNotFoundError, match="earlier version"):
        Signature.read(tmp_path / "elsewhere")


def test_range_and_sample_of_the_data_are_kept(tmp_path):
    obs = torch.randn(5000, 2) * torch.tensor([1.0, 3.0]) + 2
    keep_observations(tmp_path, obs)
    found = observations(tmp_path / "seed-0", tmp_path)
    np.testing.assert_array_equal(found["low"], obs.amin(0))
    np.testing.assert_array_equal(found["high"], obs.amax(0))
    np.testing.assert_allclose(found["std"], obs.std(0, unbiased=False), rtol=1e-5)
    assert found["sample"].shape == (1000, 2)
    rows = {tuple(row) for row in obs.numpy()}
    assert all(tuple(row) in rows for row in found["sample"])


def test_a_fresh_process_loads_no_simulator(tmp_path):
    stored(tmp_path, "prdc")
    heavy = "gymnasium mujoco hydra scipy matplotlib minari torch._dynamo omegaconf"
    code = (
        "import sys, offrl; "
        f"act = offrl.load_policy({str(tmp_path)!r}).act([0.1, 0.2, 0.3]); "
        f"print(act.shape, [m for m in {heavy.split()} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "(2,) []"


def test_the_public_names_are_loaded_on_first_use():
    assert offrl.Policy is Policy
    assert {"load_policy", "Policy"} <= set(dir(offrl))
    with pytest.raises(AttributeError, match="no attribute 'lod_policy'"):
        offrl.lod_policy  # noqa: B018
