"""Small methods that use every part of the contract; none of them is a good one."""

import gymnasium
import numpy as np
import torch
from torch.nn import functional as F

from offrl.data import Dataset, transitions
from offrl.data.collector import Collector
from offrl.data.replay import Replay
from offrl.data.samplers import mixed
from offrl.engine.method import Run, Spec, Stage, Task
from offrl.engine.minimize import minimize
from offrl.engine.optim import adam, descend
from offrl.envs.make import factory
from offrl.envs.vector import Vector
from offrl.nets import Actor, Linear

HOPPER = factory("hopper")
ROW = {"obs": ((11,), torch.float32), "act": ((3,), torch.float32), "reward": ((), torch.float32)}


def toy_data():
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(500, *shape, generator=g)  # noqa: E731
    fields = dict(
        obs=normal(11),
        act=normal(3).tanh(),
        reward=normal(),
        next_obs=normal(11),
        terminal=torch.zeros(500),
    )
    return Dataset(fields, torch.arange(0, 500, 100), torch.zeros(5), "toy")


class Cloner:
    """A policy by imitation, a linear model of the reward, and rows that the model made."""

    def __init__(self, generator, spec=Spec(11, 3)):  # noqa: B008
        self.generator = generator
        self.actor = Actor(spec.obs_dim, spec.act_dim, (16,), (), generator)
        self.model = Linear(spec.obs_dim, 1, (), generator)
        self.actor_opt, self.model_opt = adam(self.actor, 1e-3), adam(self.model, 1e-2)
        self.rows = torch.zeros(64, spec.obs_dim + spec.act_dim + 1)
        self.error = torch.full((), torch.inf)
        self.patience = torch.zeros((), dtype=torch.int64)  # as a tensor, which replays see

    def fit_model(self, batch, turn):
        loss = (self.model(batch["obs"]).squeeze(-1) - batch["reward"]).square().mean()
        return descend(self.model_opt, loss, {"model/loss": loss})

    def update(self, batch, turn):
        loss = (self.actor(batch["obs"]) - batch["act"]).square().mean()
        if turn == 1:
            loss = loss + 1e-3 * self.actor(batch["obs"]).square().mean()
        return descend(self.actor_opt, loss, {"actor/loss": loss})

    def turn(self, step):
        return int(step % 3 == 2)

    def act(self, now, memory=None):
        act = self.actor(now["obs"])
        if now.get("explore"):
            act = act + 0.1 * torch.randn(act.shape, generator=now["generator"])
        return act.clamp(-1, 1), memory

    @torch.no_grad()
    def holdout(self, data):
        """Early stopping: the error on the last rows, and how often it has not fallen."""
        error = (self.model(data["obs"][400:]).squeeze(-1) - data["reward"][400:]).square().mean()
        self.patience.copy_(torch.where(error < self.error, 0, self.patience + 1))
        self.error.copy_(torch.minimum(self.error, error))
        return {"model/holdout": error}

    @torch.no_grad()
    def dream(self, data):
        """What later stages use: rows of the data with the model's rewards."""
        pick = torch.randint(400, (64,), generator=self.generator)
        parts = data["obs"][pick], data["act"][pick], self.model(data["obs"][pick])
        self.rows.copy_(torch.cat(parts, -1))


def two_stages():
    """A model until its holdout error stops falling, then a policy on real and made rows."""
    algo, data = Cloner(torch.Generator().manual_seed(1)), toy_data()
    fields = ("obs", "act", "reward")

    def policy_rows():
        table = Replay(64, ROW)
        obs, act, reward = algo.rows.split((11, 3, 1), -1)
        table.add({"obs": obs, "act": act, "reward": reward.squeeze(-1)})
        real = lambda count: transitions(data, count, names=fields)  # noqa: E731
        return mixed(real, table.sampler, 16, 0.25)

    model = Stage(
        "model",
        None,
        start=lambda: transitions(data, 16, names=fields),
        update=algo.fit_model,
        between=[(10, lambda: algo.holdout(data))],
        stop=lambda: int(algo.patience) >= 2,
        finish=lambda: algo.dream(data),
        evaluate=False,
    )
    return algo, [model, Stage("policy", 180, policy_rows, algo.update, algo.turn)]


def inner_fit():
    """A model that is fitted anew every twenty updates of the policy."""
    algo, data = Cloner(torch.Generator().manual_seed(1)), toy_data()
    draw = transitions(data, 16, names=("obs", "act", "reward"))

    def refit():
        return (
            algo.holdout(data)
            if minimize(algo.fit_model, draw, algo, stop=lambda step: step == 30, name="model")
            else None
        )

    return algo, [Stage("train", 200, lambda: draw, algo.update, algo.turn, [(20, refit)])]


class Recurrent(Cloner):
    """Remembers a decayed mean of what it saw in the running episode."""

    def act(self, now, memory=None):
        past = torch.zeros_like(now["obs"]) if memory is None else memory["mean"]
        mean = torch.where(now["start"].bool().unsqueeze(-1), 0.0, past) * 0.9 + now["obs"] * 0.1
        mean = mean + 0.01 * now["reward"].unsqueeze(-1)
        return super().act(now | {"obs": mean})[0], {"mean": mean}


def recurrent():
    """A policy with memory, collected and evaluated."""
    algo = Recurrent(torch.Generator().manual_seed(1))
    envs = Vector([HOPPER] * 2, [5, 6])
    data = Collector.of(Task(Spec(11, 3), envs=lambda: envs), Run(steps=250))
    data.keep(120)  # the ring wraps
    return algo, [
        Stage(
            "train",
            200,
            start=lambda: data.replay.sampler(16),
            update=algo.update,
            turn=algo.turn,
            before=lambda: data.random(50, algo.generator),
            between=[(2, lambda: data.step_policy(algo))],
            clock=lambda step: 50 + step,
            parts={"collector": data},
        )
    ]


class Tug(gymnasium.Env):
    """Two players pull a point: the first towards 0, the second away from it."""

    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
    players = (1, 2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.clock = self.np_random.uniform(-1, 1), 0
        return np.array([self.place], np.float32), {}

    def step(self, action):
        self.place += 0.1 * float(action[0]) - 0.05 * float(action[1] + action[2])
        self.clock += 1
        return np.array([self.place], np.float32), -abs(self.place), False, self.clock == 20, {}

    def snapshot(self):
        generator = self.np_random.bit_generator.state["state"]
        words = {name: str(value) for name, value in generator.items()}
        return {"place": self.place, "clock": self.clock, **words}

    def restore(self, state):
        self.place, self.clock = state["place"], state["clock"]
        generator = {"state": int(state["state"]), "inc": int(state["inc"])}
        self.np_random.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": generator,
            "has_uint32": 0,
            "uinteger": 0,
        }


class TwoPlayers:
    """Each player's actor climbs a critic of the joint action, the second one down, in turns."""

    def __init__(self, generator, spec):
        self.generator, self.widths = generator, spec.players
        self.actors = [Actor(spec.obs_dim, width, (16,), (), generator) for width in spec.players]
        self.critic = Actor(spec.obs_dim + spec.act_dim, 1, (16,), (), generator)
        self.opts = [adam(net, 1e-2) for net in (*self.actors, self.critic)]

    def turn(self, step):
        return step % 2

    def update(self, batch, turn):
        value = self.critic(torch.cat([batch["obs"], batch["act"]], -1)).squeeze(-1)
        loss = F.mse_loss(value, batch["reward"])
        metrics = descend(self.opts[2], loss, {"critic/loss": loss})
        acts = list(batch["act"].split(self.widths, -1))
        acts[turn] = self.actors[turn](batch["obs"])
        value = self.critic(torch.cat([batch["obs"], *acts], -1)).mean()
        loss = value if turn else -value
        return metrics | descend(self.opts[turn], loss, {f"player_{turn}/loss": loss})

    def act(self, now, memory=None):
        act = torch.cat([actor(now["obs"]) for actor in self.actors], -1)
        if now.get("explore"):
            act = act + 0.3 * torch.randn(act.shape, generator=now["generator"])
        return act.clamp(-1, 1), memory


def two_players():
    """One concatenated action of two players, who learn in turns."""
    envs = Vector([Tug] * 2, [5, 6])
    spec = Spec(envs.obs_dim, envs.act_dim, players=envs.players)
    algo = TwoPlayers(torch.Generator().manual_seed(1), spec)
    data = Collector.of(Task(spec, envs=lambda: envs), Run(steps=250))
    data.keep(150)
    return algo, [
        Stage(
            "train",
            200,
            start=lambda: data.replay.sampler(16),
            update=algo.update,
            turn=algo.turn,
            before=lambda: data.random(50, algo.generator),
            between=[(2, lambda: data.step_policy(algo))],
            clock=lambda step: 50 + step,
            parts={"collector": data},
        )
    ]
