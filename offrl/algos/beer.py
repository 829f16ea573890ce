"""BEER: deterministic policy gradient whose critic keeps its representation's rank adaptively.

He, Zhou, Fang and Maghsudi, "Adaptive Regularization of Representation Rank as an Implicit
Constraint of Bellman Equation", ICLR 2024, arXiv:2404.12754.

With Q(s, a) = w . phi(s, a) + b, f = phi(s, a), g = phi(s', pi(s')) and t = phi'(s', pi'(s')):

    target   y = r + discount (1 - terminal) Q'(s', pi'(s'))
    bound    U = (|f|^2 + discount^2 |g|^2 - r^2 / |w|^2) / (2 discount |f| |t|),  no gradient
    penalty  R = max(0, cos(f, t) - U),  gradient through f within the cosine only
    critic   L = mean_b (Q(s, a) - y)^2 + beta mean_b R
    actor    L = -mean_b Q(s, pi(s)), with the critic after its step
    targets  both move by tau after every update
    explore  a = clip(pi(s) + N(0, explore_noise^2))

The Bellman equation f . w = r + discount g . w bounds how alike consecutive features may be; the
penalty acts beyond that bound only ("gate open"), and never where the temporal difference is 0.
With beta = 0 this is DDPG (offrl/algos/ddpg.py) bit for bit. TD3, SAC and DQN take the same penalty
by their option `beer`. Comparators DR3 and InFeR: offrl/regularizers/rank.py.

Shapes: *S optional leading seed axes, B batch, one critic, m features. Primes are target networks.

Differences from the authors' code: the bound has the discount of the method where theirs has 0.99;
terminal transitions are left out of the penalty, having no successor (dm-control has none). As in
theirs, and unlike in the theorem, the two norms of the bound come from different networks
(`norm_source`), one sample stands for the expectation over (s', a'), and the last layer's bias is
ignored (`bias_aware`).
"""

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from offrl.data.stages import off_policy
from offrl.engine.method import Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adam, bootstrap, descend, polyak, smoothed, target_copy
from offrl.engine.ranges import Count, NonNegative, Positive, Share, Whole
from offrl.nets import Actor, Critics
from offrl.regularizers.rank import beer_penalty, ranks


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # environment steps, warm-up included
    batch: Count = 256  # transitions per update
    lr: Positive = 3e-4  # Adam, both optimizers
    discount: Share = 0.99  # per step
    tau: Share = 0.005  # share of the online weights in each target update
    beta: NonNegative = 1e-3  # weight of the penalty, the same for every task
    # norm of the successor's features in U's numerator: online network and policy (mixed, as in the
    # authors' code), or the target's as in the denominator (target, as in the theorem)
    norm_source: Literal["mixed", "target"] = "mixed"
    bias_aware: bool = False  # r - (1 - discount) b in the place of r, as a biased layer asks for
    explore_noise: NonNegative = 0.1  # std of the noise on collected actions
    hidden: tuple[Count, ...] = (256, 256)  # widths of the hidden layers
    warmup: Whole = 25_000  # uniformly random environment steps before the first update
    capacity: Count = 1_000_000  # rows of the replay


class BEER:
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
        y, t = self.target(batch)
        f = self.critics.features(batch["obs"], batch["act"])  # (*S, 1, B, m)
        q = self.critics.head(f)  # (*S, 1, B)
        error = (q - y.unsqueeze(-2)).square().mean((-2, -1))  # (*S,)
        penalty, stats = self.penalty(f, t, batch)  # (*S, 1, B)
        loss = error + self.config.beta * penalty.mean((-2, -1))
        return loss, {
            "critics/loss": error,
            "critics/q": q.mean((-2, -1)),
            "beer/open": stats["open"].squeeze(-1),
            "beer/cos": stats["cos"].squeeze(-1),
        }

    def penalty(self, f: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """R (*S, 1, B) of features f and t (*S, 1, B, m), with statistics (*S, 1)."""
        c, g = self.config, None
        if c.norm_source == "mixed":
            with torch.no_grad():
                g = self.critics.features(batch["next_obs"], self.actor(batch["next_obs"]))
        reward, terminal = (batch[name].unsqueeze(-2) for name in ("reward", "terminal"))
        weight, last = self.critics.last
        bias = last if c.bias_aware else None
        return beer_penalty(f, t, reward, weight, c.discount, g=g, bias=bias, terminal=terminal)

    @torch.no_grad()
    def target(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """y (*S, B), and the target features t (*S, 1, B, m) that it comes from."""
        t = self.critics_target.features(batch["next_obs"], self.actor_target(batch["next_obs"]))
        q = self.critics_target.head(t).squeeze(-2)  # (*S, B)
        return bootstrap(batch, q, self.config.discount), t

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


METHOD = Method(BEER, Config, stages=off_policy)
