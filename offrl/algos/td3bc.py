"""TD3+BC: a deterministic actor pulled towards the data.

Fujimoto and Gu, "A Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2021,
arXiv:2106.06860.

    target   y = r + discount (1 - terminal) min_e Q'_e(s', clip(pi'(s') + clipped noise))
    critics  L = sum_e mean_b (Q_e(s, a) - y)^2
    actor    L = mean_b,a (pi(s) - a)^2 - scale mean_b Q_0(s, pi(s))
             scale = alpha / mean_b |Q_0(s, pi(s))|

Shapes: *S optional leading seed axes, B batch, E critics. Primes are target networks, which move
on actor updates only. Observations are standardized by (s - mean) / (std + 1e-3).

Differences from the authors' code: none in the update. Rewards are raw, as theirs; `reward_shift`
is for tasks such as AntMaze, where CORL trains on r - 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data.stages import offline
from offrl.engine.method import TRANSITION, Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adam, bootstrap, descend, polyak, smoothed, target_copy
from offrl.engine.ranges import Bound, Count, NonNegative, Positive, Real, Share
from offrl.nets import Actor, Critics, Standardize
from offrl.regularizers.functional import imitation, q_scale


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # updates
    batch: Count = 256  # transitions per update
    lr: Positive = 3e-4  # Adam, both optimizers
    discount: Share = 0.99  # per step
    tau: Share = 0.005  # share of the online weights in each target update
    noise: NonNegative = 0.2  # std of the target-action noise; actions live in [-1, 1]
    noise_clip: Bound = 0.5  # largest size of that noise
    alpha: NonNegative = 2.5  # trust in Q against imitation; 0 is behavior cloning
    policy_delay: Count = 2  # critic updates per actor update
    hidden: tuple[Count, ...] = (256, 256)  # widths of the hidden layers
    reward_scale: Real = 1.0  # r <- reward_scale r + reward_shift, in training only
    reward_shift: Real = 0.0  # see reward_scale


class TD3BC:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c = config
        self.config, self.generator = c, generator
        self.standardize = Standardize(spec.obs_dim, spec.obs_mean, spec.obs_std, generator.device)
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
        y = self.target(batch)
        q = self.critics(batch["obs"], batch["act"])  # (*S, E, B)
        loss = (q - y.unsqueeze(-2)).square().mean(-1).sum(-1)  # (*S,)
        return loss, {"critics/loss": loss, "critics/q": q.mean((-2, -1))}

    @torch.no_grad()
    def target(self, batch: Batch) -> Tensor:
        c = self.config
        act = self.actor_target(batch["next_obs"])
        act = smoothed(act, c.noise, c.noise_clip, self.generator)
        return bootstrap(batch, self.critics_target(batch["next_obs"], act).amin(-2), c.discount)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        act = self.actor(batch["obs"])
        q = self.critics.first(batch["obs"], act)  # (*S, B)
        scale = q_scale(q, self.config.alpha)  # one per seed
        penalty = imitation(act, batch["act"]).mean(-1)
        loss = penalty - scale * q.mean(-1)  # (*S,)
        return loss, {"actor/loss": loss, "actor/imitation": penalty, "actor/scale": scale}

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        return self.actor(self.standardize(now["obs"])), memory


METHOD = Method(TD3BC, Config, stages=offline, fields=TRANSITION)
