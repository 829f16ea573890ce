"""TD3: deterministic policy gradient with clipped double critics and delayed actor updates.

Fujimoto, van Hoof and Meger, "Addressing Function Approximation Error in Actor-Critic Methods",
ICML 2018, arXiv:1802.09477.

    target   y = r + discount (1 - terminal) min_e Q'_e(s', clip(pi'(s') + clipped noise))
    critics  L = sum_e mean_b (Q_e(s, a) - y)^2  [+ beer mean_eb R_e]
    actor    L = -mean_b Q_0(s, pi(s)), every second update, and only then the targets move
    explore  a = clip(pi(s) + N(0, explore_noise^2))

R_e is BEER's penalty (offrl/algos/beer.py) on each critic's features of (s, a) and those of its own
target at (s', a'), a' the noisy action of y; the norm in its bound is of the online networks.

Shapes: *S optional leading seed axes, B batch, E critics, m features. Primes are target networks.

Differences from the authors' code: none to its current version, which itself differs from the
paper (there 400,300 units, learning rate 1e-3, batch 100). Actions live in [-1, 1], so noise
scales are shares of the environment's half-range.
"""

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data.stages import off_policy
from offrl.engine.method import Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adam, bootstrap, descend, polyak, smoothed, target_copy
from offrl.engine.ranges import Bound, Count, NonNegative, Positive, Share, Whole
from offrl.nets import Actor, Critics
from offrl.regularizers.rank import beer_penalty, ranks


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # environment steps, warm-up included
    batch: Count = 256  # transitions per update
    lr: Positive = 3e-4  # Adam, both optimizers
    discount: Share = 0.99  # per step
    tau: Share = 0.005  # share of the online weights in each target update
    noise: NonNegative = 0.2  # std of the target-action noise
    noise_clip: Bound = 0.5  # largest size of that noise
    explore_noise: NonNegative = 0.1  # std of the noise on collected actions
    beer: NonNegative = 0.0  # weight of BEER's penalty on feature rank; 1e-3 in its paper
    policy_delay: Count = 2  # critic updates per actor update
    hidden: tuple[Count, ...] = (256, 256)  # widths of the hidden layers
    warmup: Whole = 25_000  # uniformly random environment steps before the first update
    capacity: Count = 1_000_000  # rows of the replay


class TD3:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c = config
        self.config, self.generator = c, generator
        self.actor = Actor(spec.obs_dim, spec.act_dim, c.hidden, seeds, generator)
        self.critics = Critics(spec.obs_dim, spec.act_dim, c.hidden, 2, seeds, generator)
        self.actor_target, self.critics_target = target_copy(self.actor), target_copy(self.critics)
        self.actor_opt, self.critics_opt = adam(self.actor, c.lr), adam(self.critics, c.lr)

    def turn(self, step: int) -> int:
        """1 for an update of critics and actor, 0 for one of the critics alone."""
        return int((step + 1) % self.config.policy_delay == 0)

    def update(self, batch: Batch, turn: int) -> Metrics:
        metrics = descend(self.critics_opt, *self.critics_loss(batch))
        if turn == 1:
            metrics |= descend(self.actor_opt, *self.actor_loss(batch))
            polyak(self.actor_target, self.actor, self.config.tau)
            polyak(self.critics_target, self.critics, self.config.tau)
        return metrics

    def critics_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        y, t = self.target(batch)
        f = self.critics.features(batch["obs"], batch["act"])  # (*S, E, B, m)
        q = self.critics.head(f)  # (*S, E, B)
        loss = (q - y.unsqueeze(-2)).square().mean(-1).sum(-1)  # (*S,)
        metrics = {"critics/loss": loss, "critics/q": q.mean((-2, -1))}
        if self.config.beer == 0:
            return loss, metrics
        penalty, stats = self.penalty(f, t, batch)
        loss = loss + self.config.beer * penalty.mean((-2, -1))
        return loss, metrics | {f"beer/{name}": stats[name].mean(-1) for name in ("open", "cos")}

    def penalty(self, f: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """BEER's R (*S, E, B) for features f and t (*S, E, B, m), with statistics (*S, E)."""
        with torch.no_grad():
            g = self.critics.features(batch["next_obs"], self.actor(batch["next_obs"]))
        reward, terminal = (batch[name].unsqueeze(-2) for name in ("reward", "terminal"))
        weight, discount = self.critics.last[0], self.config.discount
        return beer_penalty(f, t, reward, weight, discount, g=g, terminal=terminal)

    @torch.no_grad()
    def target(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """y (*S, B), and the target critics' features (*S, E, B, m) that it comes from."""
        c = self.config
        act = self.actor_target(batch["next_obs"])
        act = smoothed(act, c.noise, c.noise_clip, self.generator)
        t = self.critics_target.features(batch["next_obs"], act)
        q = self.critics_target.head(t).amin(-2)  # (*S, B)
        return bootstrap(batch, q, c.discount), t

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
        return self.critics(now["obs"], act).mean(-2)

    def measure(self, batch: Batch) -> Metrics:
        """Ranks (*S,) of the critics' features on a batch of the replay, means over critics."""
        found = ranks(self.critics.features(batch["obs"], batch["act"]))
        return {name: value.mean(-1) for name, value in found.items()}


METHOD = Method(TD3, Config, stages=off_policy)
