import gymnasium
import numpy as np
import pytest
import torch

from offrl.data.collector import Collector
from offrl.data.stages import measured
from offrl.engine.method import Run, Spec, Task
from offrl.envs.vector import Vector, generator_state, set_generator_state

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


class Walk(gymnasium.Env):
    """A random walk of a goal's length, which the options of a reset decide; it names its goal."""

    observation_space = gymnasium.spaces.Box(-99, 99, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.length, self.place = 0, (options or {"length": 9})["length"], 0.0
        return np.array([self.place]), {"goal": np.array([self.length])}

    def step(self, action):
        self.at += 1
        self.place += float(action[0]) + self.np_random.normal()
        return np.array([self.place]), self.place, self.at == self.length, False, {}

    def snapshot(self):
        own = {"at": self.at, "length": self.length, "place": self.place}
        return own | {"generator": generator_state(self.np_random)}

    def restore(self, state):
        set_generator_state(self.np_random, state["generator"])
        self.at, self.length, self.place = state["at"], state["length"], state["place"]


class Forgetful(Walk):
    """Only its generator can be restored."""

    snapshot = property()


class Recurrent:
    """Sums what it was told since the start of the episode, and notes what it is told."""

    def __init__(self, act_dim):
        self.act_dim, self.generator, self.told = act_dim, torch.Generator().manual_seed(5), []

    def act(self, now, memory=None):
        assert now["explore"] is True
        assert not torch.is_grad_enabled()
        self.told.append(now)
        start = now["start"]
        memory = (
            {"sums": [torch.zeros_like(start)], "steps": (start,)} if memory is None else memory
        )
        sums = memory["sums"][0] * (1 - start) + now["obs"].sum(-1) + now["reward"]
        steps = memory["steps"][0] * (1 - start) + 1
        noise = torch.randn(*start.shape, self.act_dim, generator=now["generator"])
        act = (sums / steps).unsqueeze(-1) * 0.1 + noise
        return act.tanh(), {"sums": [sums], "steps": (steps,)}

    def level(self, number):
        length = int(torch.randint(2, 5, (), generator=self.generator))
        return {"length": length + 10 * number}


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
    measure = measured(Sum(), data, 64)
    assert torch.equal(measure()["sum"], measure()["sum"])
    assert measure()["sum"].shape == (2,)
    assert torch.equal(Sum.generator.get_state(), before)


def test_a_policy_is_told_starts_and_the_reward_before_and_keeps_its_memory():
    """After random steps in the middle of an episode, its memory begins there."""
    data, algo = collector("continuous"), Recurrent(2)
    for _ in range(4):
        data.step_policy(algo)
    data.random(2, algo.generator)
    assert data.memory is None
    for _ in range(3):
        data.step_policy(algo)
    starts = torch.tensor([1.0, 0, 0, 1, 1, 1, 0])
    told = {name: torch.stack([now[name] for now in algo.told]) for name in ("start", "reward")}
    assert torch.equal(told["start"], starts.view(7, 1, 1).expand(7, 2, 2))
    paid = data.replay.table[:, :16, 4].view(2, 8, 2)  # (S, step, n)
    for policy, step in ((1, 0), (2, 1), (6, 6)):
        assert torch.equal(told["reward"][policy], paid[:, step])
    assert not told["reward"][starts == 1].any()
    assert paid.all()
    assert torch.equal(data.memory["steps"][0], torch.full((2, 2), 2.0))


@pytest.mark.parametrize(("seeds", "warmup"), [((), 0), ((2,), 6)])
def test_a_resumed_run_collects_the_same(tmp_path, seeds, warmup):
    """With a policy with memory, goals, and levels that are drawn when an episode begins."""

    def begin():
        count = 2 * torch.Size(seeds).numel()
        algo = Recurrent(1)
        task = Task(Spec(1, 1), envs=lambda: Vector([Walk] * count, range(count)))
        data = Collector.of(task, Run(100, seeds), algo.level)
        data.keep(10)
        return data, algo

    def steps(data, algo, count):
        for _ in range(count):
            data.step_policy(algo)

    one, algo = begin()
    one.random(warmup, algo.generator)
    for pause in (0, 1, 12):
        steps(one, algo, pause)
        content = {"generator": algo.generator.get_state(), "data": one.save(tmp_path / "c")}
        torch.save(content, tmp_path / "checkpoint.pt")
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        two, other = begin()
        two.load(saved["data"], tmp_path / "c")
        other.generator.set_state(saved["generator"])
        steps(one, algo, 9)
        steps(two, other, 9)
        assert torch.equal(one.replay.table, two.replay.table)
        assert torch.equal(algo.generator.get_state(), other.generator.get_state())
        for now, again in zip(algo.told[-9:], other.told, strict=True):
            assert all(torch.equal(now[name], again[name]) for name in ("start", "reward", "goal"))
        one, algo = two, other
    lengths = algo.told[-1]["goal"].flatten()
    assert torch.equal(lengths // 10, torch.arange(len(lengths)).float())


def test_where_an_environment_cannot_be_restored_an_episode_begins(tmp_path):
    algo = Recurrent(1)
    makers = [Walk, Forgetful]
    one, two = (Collector(Vector(makers, [0, 1]), on_episode=algo.level) for _ in range(2))
    for data in (one, two):
        data.keep(10)
        for _ in range(2 if data is one else 0):
            data.step_policy(algo)
    two.load(one.save(tmp_path / "c"), tmp_path / "c")
    two.step_policy(algo)
    assert algo.told[-1]["start"].tolist() == [0, 1]
    assert algo.told[-1]["obs"][1] == 0
    assert algo.told[-1]["obs"][0] == one.obs[0]
    assert algo.told[-1]["reward"][0] == one.reward[0] != 0
    assert algo.told[-1]["reward"][1] == 0
    assert algo.told[-1]["goal"].flatten().tolist()[0] == one.envs.goal[0]


def test_a_task_without_environments_has_nothing_to_collect():
    with pytest.raises(ValueError, match="no environments"):
        Collector.of(Task(Spec(1, 1)), Run(1))


def test_two_players_act_by_one_vector():
    class Tug(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-99, 99, (1,))
        action_space = gymnasium.spaces.Box(-1, 1, (3,))
        players = (1, 2)

        def reset(self, *, seed=None, options=None):
            return np.zeros(1), {}

        def step(self, action):
            mine, theirs = np.split(action, np.cumsum(self.players)[:-1])
            return np.zeros(1), float(mine.sum() - 10 * theirs.sum()), False, False, {}

    data = Collector(Vector([Tug] * 2, [0, 1]))
    data.keep(20)
    assert data.envs.players == (1, 2)
    assert collector("continuous").envs.players == ()
    for _ in range(10):
        data.step_policy(Recurrent(3))
    batch = data.replay.sampler(50)(torch.Generator().manual_seed(0))
    mine, theirs = batch["act"].split(data.envs.players, -1)
    torch.testing.assert_close(batch["reward"], mine.sum(-1) - 10 * theirs.sum(-1))
