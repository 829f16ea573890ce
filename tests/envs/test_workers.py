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
            assert torch.equal(envs.load(state, obs), obs)
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
