"""DDPG: deterministic policy gradient with a replay and target networks.

Lillicrap et al., "Continuous Control with Deep Reinforcement Learning", ICLR 2016,
arXiv:1509.02971, with the settings of "OurDDPG" of Fujimoto et al. (sfujim/TD3).

    target   y = r + discount (1 - terminal) Q'(s', pi'(s'))
    critic   L = mean_b (Q(s, a) - y)^2
    actor    L = -mean_b Q(s, pi(s)), with the critic after its step
    targets  both move by tau after every update
    explore  a = clip(pi(s) + N(0, explore_noise^2))

Shapes: *S optional leading seed axes, B batch, one critic. Primes are target networks.

Differences from the authors' code: the original has 400,300 units, weight decay on the critic,
other rates, tau = 0.001 and Ornstein-Uhlenbeck noise; these are OurDDPG's, to which there are none.
Actions live in [-1, 1], so noise scales are shares of the environment's half-range.
"""

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data.stages import off_policy
from offrl.engine.method import Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adam, bootstrap, descend, polyak, smoothed, target_copy
from offrl.engine.ranges import Count, NonNegative, Positive, Share, Whole
from offrl.nets import Actor, Critics
from offrl.regularizers.rank import ranks


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # environment steps, warm-up included
    batch: Count = 256  # transitions per update
    lr: Positive = 3e-4  # Adam, both optimizers
    discount: Share = 0.99  # per step
    tau: Share = 0.005  # share of the online weights in each target update
    explore_noise: NonNegative = 0.1  # std of the noise on collected actions
    hidden: tuple[Count, ...] = (256, 256)  # widths of the hidden layers
    warmup: Whole = 25_000  # uniformly random environment steps before the first update
    capacity: Count = 1_000_000  # rows of the replay


class DDPG:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c = config
        self.config, self.generator = c, generator
        self.actor = Actor(spec.obs_dim, spec.act_dim, c.hidden, seeds, generator)
        self.critics = Critics(spec.obs_dim, spec.act_dim, c.hidden, 1, seeds, generator)
        self.actor_target, self.critics_target = target_copy(self.actor), target_copy(self.critics)
        self.actor_opt, self.critics_opt = adam(self.actor, c.lr), adam(self.critics, c.lr)

    def update(self, batch: Batch, turn: int) -> Metrics:
        metrics = descend(self.critics_opt, *self.critics_loss(batch))
        metrics |= descend(self.actor_opt, *self.actor_loss(batch))
        polyak(self.critics_target, self.critics, self.config.tau)
        polyak(self.actor_target, self.actor, self.config.tau)
        return metrics

    def critics_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        y = self.target(batch)
        q = self.critics(batch["obs"], batch["act"])  # (*S, 1, B)
        loss = (q - y.unsqueeze(-2)).square().mean((-2, -1))  # (*S,)
        return loss, {"critics/loss": loss, "critics/q": q.mean((-2, -1))}

    @torch.no_grad()
    def target(self, batch: Batch) -> Tensor:
        act = self.actor_target(batch["next_obs"])
        q = self.critics_target(batch["next_obs"], act).squeeze(-2)  # (*S, B)
        return bootstrap(batch, q, self.config.discount)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        q = self.critics.first(batch["obs"], self.actor(batch["obs"]))  # (*S, B)
        loss = -q.mean(-1)  # (*S,)
        return loss, {"actor/loss": loss}

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        act = self.actor(now["obs"])
        if now.get("explore"):
            act = smoothed(act, self.config.explore_noise, inf, now["generator"])
        return act, memory

    def estimate(self, now: Now, act: Tensor) -> Tensor:
        return self.critics(now["obs"], act).squeeze(-2)

    def measure(self, batch: Batch) -> Metrics:
        """Ranks (*S,) of the critic's features on a batch of the replay."""
        return ranks(self.critics.features(batch["obs"], batch["act"]).squeeze(-3))


METHOD = Method(DDPG, Config, stages=off_policy)
