import gymnasium
import numpy as np
import pytest
import torch

from offrl.data.collector import Collector, watched
from offrl.envs.vector import Vector

SPACES = {"continuous": gymnasium.spaces.Box(-1, 1, (2,)), "discrete": gymnasium.spaces.Discrete(3)}


class Counter(gymnasium.Env):
    """The observation is (own number, step); an episode is cut off after three steps."""

    observation_space = gymnasium.spaces.Box(0, 99, (2,))

    def __init__(self, number, kind):
        self.number, self.action_space = number, SPACES[kind]

    def reset(self, *, seed=None, options=None):
        self.at = 0
        return np.array([self.number, 0.0]), {}

    def step(self, action):
        self.at += 1
        assert self.action_space.contains(action)
        return np.array([self.number, self.at]), float(np.sum(action)), False, self.at == 3, {}


def collector(kind, seeds=(2,), group=2):
    count = group * torch.Size(seeds).numel()
    makers = [lambda i=i: Counter(i, kind) for i in range(count)]
    data = Collector(Vector(makers, range(count)), seeds)
    data.keep(100)
    return data


@pytest.mark.parametrize("kind", SPACES)
def test_every_seed_s_replay_holds_the_rows_of_its_own_environments(kind):
    data = collector(kind)
    data.random(8, torch.Generator().manual_seed(0))
    assert data.replay.size.tolist() == [8, 8]
    batch = data.replay.sampler(400)(torch.Generator().manual_seed(1))
    assert [set(part.tolist()) for part in batch["obs"][..., 0]] == [{0, 1}, {2, 3}]
    assert torch.equal(batch["next_obs"][..., 1], batch["obs"][..., 1] + 1)
    assert torch.equal(batch["timeout"], (batch["next_obs"][..., 1] == 3).float())
    assert not batch["terminal"].any()
    paid = batch["act"].sum(-1) if kind == "continuous" else batch["act"].float()
    torch.testing.assert_close(batch["reward"], paid)


def test_discrete_actions_stay_whole_numbers():
    data = collector("discrete")
    data.random(20, torch.Generator().manual_seed(0))
    act = data.replay.sampler(400)(torch.Generator().manual_seed(1))["act"]
    assert act.dtype == torch.int64
    assert set(act.flatten().tolist()) == {0, 1, 2}


def test_what_is_measured_is_drawn_alike_and_leaves_the_run_s_generator():
    class Sum:
        generator = torch.Generator().manual_seed(3)

        def measure(self, batch):
            return {"sum": batch["reward"].sum(-1)}

    data = collector("continuous")
    data.random(50, torch.Generator().manual_seed(0))
    before = Sum.generator.get_state()
    measure = watched(Sum(), data, 64)
    assert torch.equal(measure()["sum"], measure()["sum"])
    assert measure()["sum"].shape == (2,)
    assert torch.equal(Sum.generator.get_state(), before)
