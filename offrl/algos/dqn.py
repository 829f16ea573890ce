"""DQN: Q-learning with a replay and a target network, for discrete actions.

Mnih et al., "Human-level Control through Deep Reinforcement Learning", Nature 2015; double targets:
van Hasselt, Guez and Silver, AAAI 2016, arXiv:1509.06461.

    target   y = r + discount (1 - terminal) max_a Q'(s', a)
             double: Q'(s', argmax_a Q(s', a))
    network  L = mean_b (Q(s, a) - y)^2  [+ beer mean_b R]
    explore  a uniform with probability epsilon, which falls linearly from 1 with the steps taken
    target   Q' <- Q, every `target_every` environment steps

R is BEER's penalty (offrl/algos/beer.py) between psi(s) in the block of a and psi'(s') in the block
of the action that the target takes, psi being the features of the last layer. Where the two actions
differ the features are orthogonal and R has no gradient, so it is left out, of the statistics too.
What the authors of BEER did for discrete actions is not known.

Shapes: *S optional leading seed axes, B batch, A actions. Primes are the target network.

Differences from the authors' code: the settings and the squared loss are those of CleanRL's classic
control; theirs are for Atari's images.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data.collector import Collector
from offrl.data.stages import measured
from offrl.engine.method import Batch, Method, Metrics, Now, Run, Seeds, Spec, Stage, Task
from offrl.engine.optim import adam, bootstrap, descend, polyak, target_copy
from offrl.engine.ranges import Count, NonNegative, Positive, Share, Whole
from offrl.nets import MLP
from offrl.regularizers.rank import action_features, beer_penalty, ranks


@dataclass(frozen=True)
class Config:
    steps: Count = 500_000  # environment steps, warm-up included
    batch: Count = 128  # transitions per update
    lr: Positive = 2.5e-4  # Adam
    discount: Share = 0.99  # per step
    double: bool = False  # the online network picks the action of the target
    beer: NonNegative = 0.0  # weight of BEER's penalty on feature rank; 1e-3 in its paper
    hidden: tuple[Count, ...] = (120, 84)  # widths of the hidden layers
    warmup: Whole = 10_000  # uniformly random environment steps before the first update
    capacity: Count = 10_000  # rows of the replay
    update_every: Count = 10  # environment steps per update
    target_every: Count = 500  # environment steps per copy to the target network
    epsilon: Share = 0.05  # last share of random actions
    explore: Share = 0.5  # share of `steps` in which epsilon falls to its last value


class DQN:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c = config
        self.config, self.generator = c, generator
        self.actions = spec.act_dim
        self.network = MLP((spec.obs_dim, *c.hidden, spec.act_dim), seeds, generator)
        self.target_network = target_copy(self.network)
        self.opt = adam(self.network, c.lr)
        self.taken = torch.tensor(c.warmup)  # environment steps per seed

    def update(self, batch: Batch, turn: int) -> Metrics:
        return descend(self.opt, *self.loss(batch))

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        y, act, after = self.target(batch)
        features = self.network.features(batch["obs"])  # (*S, B, m)
        q = self.network.head(features).gather(-1, batch["act"].unsqueeze(-1)).squeeze(-1)
        loss = (q - y).square().mean(-1)  # (*S,)
        metrics = {"loss": loss, "q": q.mean(-1)}
        if self.config.beer == 0:
            return loss, metrics
        with torch.no_grad():
            online = self.network.features(batch["next_obs"])
        places = (features, batch["act"]), (after, act), (online, act)
        f, t, g = (action_features(*place, self.actions) for place in places)
        weight, discount, mask = (
            self.network.maps()[-1][0],
            self.config.discount,
            act == batch["act"],
        )
        penalty, stats = beer_penalty(
            f, t, batch["reward"], weight, discount, g=g, terminal=batch["terminal"], mask=mask
        )
        loss = loss + self.config.beer * penalty.mean(-1)
        return loss, metrics | {"beer/open": stats["open"], "beer/cos": stats["cos"]}

    @torch.no_grad()
    def target(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """y (*S, B), the action (*S, B) it takes in s', and the target's features there."""
        after = self.target_network.features(batch["next_obs"])  # (*S, B, m)
        q = self.target_network.head(after)  # (*S, B, A)
        act = (self.network(batch["next_obs"]) if self.config.double else q).argmax(-1)
        best = q.gather(-1, act.unsqueeze(-1)).squeeze(-1)
        y = bootstrap(batch, best, self.config.discount)
        return y, act, after

    def renew_target(self) -> None:
        polyak(self.target_network, self.network, 1.0)

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        best = self.network(now["obs"]).argmax(-1)  # (*S, B)
        if not now.get("explore"):
            return best, memory
        draw = {"generator": now["generator"], "device": best.device}
        other = torch.randint(self.actions, best.shape, **draw)
        return torch.where(torch.rand(best.shape, **draw) < self.epsilon(), other, best), memory

    def epsilon(self) -> float:
        """The share of random actions after the steps taken so far."""
        c = self.config
        return max(c.epsilon, 1 - (1 - c.epsilon) * float(self.taken) / max(1, c.explore * c.steps))

    def estimate(self, now: Now, act: Tensor) -> Tensor:
        return self.network(now["obs"]).gather(-1, act.unsqueeze(-1)).squeeze(-1)

    def measure(self, batch: Batch) -> Metrics:
        """Ranks (*S,) of the features of a batch of the replay."""
        return ranks(self.network.features(batch["obs"]))


def stages(algo: DQN, task: Task, run: Run) -> list[Stage]:
    """One update per `update_every` environment steps.

    Raises:
        ValueError: if the environments cannot share these evenly, or they the target's period.
    """
    c, data = algo.config, Collector.of(task, run)
    if c.update_every % data.group:
        raise ValueError(f"update_every={c.update_every} is no multiple of envs={data.group}")
    if c.target_every % c.update_every:
        raise ValueError(
            f"target_every={c.target_every} is no multiple of update_every={c.update_every}"
        )
    data.keep(min(c.capacity, run.steps))

    def collect() -> None:
        for _ in range(0, c.update_every, data.group):
            data.step_policy(algo)
            algo.taken += data.group

    return [
        Stage(
            "train",
            (run.steps - c.warmup) // c.update_every,
            start=lambda: data.replay.sampler(c.batch),
            update=algo.update,
            before=lambda: data.random(c.warmup, algo.generator),
            between=[(1, collect), (c.target_every // c.update_every, algo.renew_target)],
            clock=lambda step: c.warmup + step * c.update_every,
            measure=measured(algo, data),
            parts={"collector": data},
        )
    ]


METHOD = Method(DQN, Config, stages=stages, actions=("discrete",), scheduled=True)
