"""Every kind of action space: -1 is its low, 1 its high, discrete actions count from its start."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from gymnasium.spaces import Dict as DictSpace

from offrl.data.collector import Collector
from offrl.data.sources import rollout
from offrl.data.sources.rollout import Share, Uniform, roll_out
from offrl.engine.evaluate import Evaluator
from offrl.engine.method import Spec
from offrl.envs import make
from offrl.envs.make import own_actions
from offrl.envs.vector import Vector
from offrl.errors import ConfigError
from offrl.runs.export import Step, distance
from offrl.runs.policy import Policy
from offrl.runs.signature import Signature
from tests.envs.spaces import Any

UNIT = Box(-1, 1, (2,), np.float32)
MOST = float(np.finfo(np.float32).max)


def built(space, observations=UNIT, steps=5):
    """What `factory` makes of an environment with this action space."""
    gymnasium.register("offrl/Any-v0", lambda: Any(observations, space, steps))
    try:
        return make.factory("offrl/Any-v0")()
    finally:
        del gymnasium.registry["offrl/Any-v0"]


SPACES = [
    Box(np.float32([-2, 0.1]), np.float32([2, 0.7])),
    Box(np.array([-0.1, 0.0]), np.array([0.3, 0.1]), dtype=np.float64),
    Box(0, 255, (3,), np.uint8),
    Box(-128, 127, (2, 2), np.int8),
    Box(np.array([-3, 10**9]), np.array([4, 10**9 + 1]), dtype=np.int64),
    Box(-1, 1, (), np.float32),
    Box(-2, 2, (2,), np.float16),
    Box(np.float32([-1, 3]), np.float32([1, 3])),  # the second cannot vary
    Box(np.float32([1e-10]), np.float32([1e9])),
    Box(0, 1, (2,), np.bool_),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_the_ends_and_the_middle_of_a_range_arrive_in_its_own_type(space):
    env = built(space)
    env.reset(seed=0)
    wide = env.action_space.shape
    for act in (-1, 1, -7, 7, 0, 0.375):
        env.step(np.full(wide, act, np.float32))
    low, high, below, above, middle, other = env.unwrapped.received
    for found, expected in ((low, space.low), (high, space.high), (below, low), (above, high)):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == space.dtype
    wide = space.low.astype(float), space.high.astype(float)
    whole = space.dtype.kind != "f"
    near = {"rtol": 0, "atol": 0.5} if whole else {"rtol": 4 * np.finfo(space.dtype).eps}
    np.testing.assert_allclose(middle.astype(float), sum(wide) / 2, **near)
    between = wide[0] + 1.375 / 2 * (wide[1] - wide[0])
    np.testing.assert_allclose(other.astype(float), between, **near)


@pytest.mark.parametrize(
    "space",
    [
        Box(-1, np.inf, (2,)),
        Box(-MOST, MOST, (2,)),
        Box(np.float32([-1, -MOST]), np.float32([1, 1])),
        Box(-1e300, 1e300, (1,), np.float64),
        Box(-np.inf, np.inf, (1,), np.int64),
        Box(-1e10, 1e10, (1,), np.float32),
        MultiBinary(3),
        MultiDiscrete([2, 3]),
        DictSpace(move=UNIT),
    ],
    ids=str,
)
def test_a_space_in_which_the_ends_have_no_meaning_is_refused_by_name(space):
    with pytest.raises(ConfigError) as told:
        built(space)
    assert f"has actions of {space}" in str(told.value)
    assert "\n" not in str(told.value)


COUNTED = [Discrete(3, start=5), Discrete(3, start=-1), Discrete(2, dtype=np.int32)]


class Third:
    """Takes the third discrete action, or as many as there are."""

    def __init__(self, count):
        self.count = count

    def act(self, now, memory=None):
        return torch.full(now["obs"].shape[:-1], self.count - 1), memory


@pytest.mark.parametrize("space", COUNTED, ids=str)
def test_discrete_actions_count_from_the_start_in_training_random_steps_and_evaluation(space):
    env, first, count = built(space), int(space.start), int(space.n)
    envs = Vector([lambda: env], [0])
    assert (envs.act_dim, envs.discrete, own_actions(env)) == (count, True, space)
    collector = Collector(envs)
    collector.keep(100)
    for act in range(count):
        collector.step(torch.tensor([act]))
    assert [int(a) for a in env.unwrapped.received] == list(range(first, first + count))
    kept = collector.replay.sampler(200)(torch.Generator().manual_seed(0))["act"]
    assert set(kept.tolist()) == set(range(count))
    collector.random(60, torch.Generator().manual_seed(0))
    assert {int(a) for a in env.unwrapped.received} == set(range(first, first + count))
    env.unwrapped.received.clear()
    Evaluator(lambda: env, width=1)(Third(count), 1)
    assert {int(a) for a in env.unwrapped.received} == {first + count - 1}


def test_discrete_actions_are_collected_as_numbers_from_zero(tmp_path, monkeypatch):
    env = built(COUNTED[0])
    monkeypatch.setattr(rollout, "in_processes", lambda work, jobs, _: [work(*j) for j in jobs])
    monkeypatch.setattr(rollout.pickle, "dumps", lambda kept: kept)
    monkeypatch.setattr(rollout.pickle, "loads", lambda kept: kept)
    roll_out([Share("random", Uniform(3, True), 60)], lambda: env, tmp_path)
    kept = np.load(tmp_path / "act.npy")
    assert (kept.dtype, kept.shape) == (np.int64, (60,))
    assert [int(a) - 5 for a in env.unwrapped.received] == kept.tolist()
    assert set(kept.tolist()) == {0, 1, 2}


class Constant(torch.nn.Module):
    def __init__(self, action):
        super().__init__()
        self.action = action

    def act(self, now, memory=None):
        return torch.full((len(now["obs"]), 2), float(self.action)), memory


@pytest.mark.parametrize("space", [s for s in SPACES if s.shape == (2,)], ids=str)
def test_a_loaded_policy_acts_in_the_type_and_the_range_of_its_environment(space):
    ends = {"low": tuple(space.low.astype(float)), "high": tuple(space.high.astype(float))}
    about = Signature("own", (1,), (2,), 2, dtype=str(space.dtype), **ends)
    assert about.spec == Spec(1, 2)
    for value, expected in ((-1, space.low), (1, space.high), (0.3, None)):
        step = Step(Constant(value), about)
        found = Policy(step, vars(about), {}).act(np.zeros(1))
        assert space.contains(found), found
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        env = built(space)
        env.reset(seed=0)
        env.step(np.full(2, value, np.float32))
        np.testing.assert_allclose(found, env.unwrapped.received[0], rtol=1e-3, atol=1e-6)


def test_whole_numbers_that_differ_between_file_and_library_count_as_discrete_ones_do():
    about = Signature("own", (1,), (2,), 2, low=(0, 0), high=(9, 9), dtype="int8")
    step, obs = Step(Constant(0.5), about), np.zeros((4, 1), np.float32)
    told = {"obs": obs, "start": np.ones(4, np.float32), "reward": np.zeros(4, np.float32)}
    ours = step.run(told)[0]
    assert ours.dtype == np.int64
    wrong = ours + np.array([[0, 1], [0, 0], [0, 0], [0, 0]])
    assert distance(step, told, None, ours, ours) == 0
    assert distance(step, told, None, ours, wrong) == 0.25
