import gymnasium
import numpy as np
import pytest
import torch

from offrl.envs import workers
from offrl.envs.make import factory
from offrl.envs.vector import Vector
from offrl.envs.workers import Workers, environments

HOPPER = factory("hopper")


@pytest.mark.slow
def test_workers_give_what_one_process_gives_and_continue_from_its_snapshot():
    makers, seeds = [HOPPER] * 3, [4, 5, 6]
    plain, apart = Vector(makers, seeds), Workers(makers, seeds, 2)
    try:
        assert (apart.obs_dim, apart.act_dim, apart.discrete) == (11, 3, False)
        assert apart.players == ()
        assert torch.equal(apart.reset(), plain.reset())
        g, ended = torch.Generator().manual_seed(0), 0.0
        for _ in range(60):
            act = torch.rand(3, 3, generator=g) * 2 - 1
            found, expected = apart.step(act), plain.step(act)
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
            ended += float(expected[2].sum())
        assert ended > 0
        state, obs = apart.state(), torch.zeros(3, 11)
        other = Vector(makers, [7, 8, 9])
        for envs in (other, apart):
            found, anew = envs.load(state, obs)
            assert torch.equal(found, obs)
            assert not anew.any()
        act = torch.full((3, 3), 0.3)
        for _ in range(3):
            expected = plain.step(act)[0]
            assert torch.equal(other.step(act)[0], expected)
            assert torch.equal(apart.step(act)[0], expected)
        apart.processes[0].kill()
        apart.processes[0].join()
        with pytest.raises(OSError, match="resume the run"):
            apart.step(act)
    finally:
        apart.close()


class Level(gymnasium.Env):
    """An episode of so many steps as the options of its reset say; its goal is their number."""

    observation_space = gymnasium.spaces.Box(0, 99, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))
    players = (1, 1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = (options or {"steps": 1})["steps"]
        return np.array([self.left]), {"goal": np.array([self.left])}

    def step(self, action):
        self.left -= 1
        return np.array([self.left]), 0.0, False, self.left == 0, {}

    def snapshot(self):
        return {"left": self.left}

    def restore(self, state):
        self.left = state["left"]


@pytest.mark.slow
def test_workers_ask_for_the_options_of_an_episode_as_one_process_does():
    def chooser(asked):
        def choose(i):
            asked.append(i)
            return {"steps": 1 + 7 * len(asked) % 5}

        return choose

    makers, act = [Level] * 5, torch.zeros(5, 2)
    plain, apart = Vector(makers, range(5)), Workers(makers, range(5), 2)
    try:
        lists = ([], [])
        plain.on_episode, apart.on_episode = map(chooser, lists)
        assert apart.players == plain.players == (1, 1)
        assert torch.equal(apart.reset(), plain.reset())
        assert torch.equal(apart.goal, plain.goal)
        for _ in range(20):
            pairs = zip(apart.step(act), plain.step(act), strict=True)
            assert all(torch.equal(x, y) for x, y in pairs)
            assert torch.equal(apart.goal, plain.goal)
        assert lists[0] == lists[1]
        assert lists[0][:5] == [0, 1, 2, 3, 4]
        assert len(lists[0]) > 20
        asked, goal = len(lists[0]), plain.goal
        other = Vector(makers, range(5))
        for envs in (apart, other):
            envs.load(plain.state(), torch.zeros(5, 1))
            assert torch.equal(envs.goal, goal)
        assert len(lists[1]) == asked
    finally:
        apart.close()


class Slow:
    """An environment whose step takes as long as told, by a clock of the test's own."""

    clock = 0.0

    def __init__(self, seconds):
        self.seconds, self.action_space = seconds, self

    def seed(self, seed):
        pass

    def sample(self):
        return 0

    def reset(self, seed=None):
        return np.zeros(1), {}

    def step(self, action):
        Slow.clock += self.seconds
        return np.zeros(1), 0.0, False, False, {}

    def close(self):
        pass


@pytest.mark.parametrize(
    ("seconds", "count", "worth"), [(1e-3, 8, True), (2e-5, 8, False), (1e-3, 1, False)]
)
def test_workers_are_worth_it_where_steps_are_slow_and_many(monkeypatch, seconds, count, worth):
    monkeypatch.setattr(workers.time, "perf_counter", lambda: Slow.clock)
    assert workers.worthwhile([lambda: Slow(seconds)] * count, 4) is worth


def test_few_cores_step_in_their_own_process():
    assert isinstance(environments([HOPPER] * 4, range(4), None, cores=2), Vector)
    assert isinstance(environments([HOPPER], [0], 0, cores=16), Vector)
