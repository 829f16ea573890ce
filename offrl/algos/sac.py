"""SAC: an off-policy actor-critic that maximizes return and entropy, with a learned temperature.

Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018, arXiv:1812.05905.

    policy   u = mean(s) + std(s) eps,  a = tanh(u),  log pi(a|s) with the tanh's determinant
    target   y = r + discount (1 - terminal) (min_e Q'_e(s', a') - alpha log pi(a'|s'))
    critics  L = 1/2 sum_e mean_b (Q_e(s, a) - y)^2  [+ beer mean_eb R_e]
    actor    L = mean_b (alpha log pi(a|s) - min_e Q_e(s, a))
    alpha    L = -log alpha mean_b (log pi(a|s) + target entropy),  target entropy = -dim(a)

R_e is BEER's penalty (offrl/algos/beer.py) on each critic's features of (s, a) and those of its own
target at (s', a'), with r - discount alpha log pi(a'|s') for r, as the soft Bellman equation asks;
the norm in its bound is of the online critics at the same a'.

Shapes: *S optional leading seed axes, B batch, E critics, m features. Primes are target networks.

Order of an update (as in Stable-Baselines3): temperature, critics, actor, targets; the critics'
target and the actor's loss use the temperature from before the step.

Differences from the authors' code: theirs keeps a separate value network in its first version;
this is the second version, with the settings of Stable-Baselines3 and the MuJoCo warm-up of its
zoo. Log-probabilities are of actions in [-1, 1], whatever the environment's own range.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from offrl.data.stages import off_policy
from offrl.engine.method import Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adam, bootstrap, descend, polyak, target_copy
from offrl.engine.ranges import Count, NonNegative, Positive, Share, Whole
from offrl.nets import Critics, GaussianActor
from offrl.regularizers.rank import beer_penalty, ranks


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # environment steps, warm-up included
    batch: Count = 256  # transitions per update
    lr: Positive = 3e-4  # Adam, all three optimizers
    discount: Share = 0.99  # per step
    tau: Share = 0.005  # share of the online weights in each target update
    hidden: tuple[Count, ...] = (256, 256)  # widths of the hidden layers
    alpha: Positive = 1.0  # first temperature
    beer: NonNegative = 0.0  # weight of BEER's penalty on feature rank; 1e-3 in its paper
    warmup: Whole = 10_000  # uniformly random environment steps before the first update
    capacity: Count = 1_000_000  # rows of the replay


class SAC:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c = config
        self.config, self.generator = c, generator
        self.actor = GaussianActor(spec.obs_dim, spec.act_dim, c.hidden, seeds, generator)
        self.critics = Critics(spec.obs_dim, spec.act_dim, c.hidden, 2, seeds, generator)
        self.critics_target = target_copy(self.critics)
        start = torch.full(seeds, c.alpha, device=generator.device).log()
        self.temperature = nn.ParameterDict({"log": nn.Parameter(start)})
        self.target_entropy = -float(spec.act_dim)
        self.actor_opt, self.critics_opt = adam(self.actor, c.lr), adam(self.critics, c.lr)
        self.temperature_opt = adam(self.temperature, c.lr)

    def update(self, batch: Batch, turn: int) -> Metrics:
        alpha = self.temperature["log"].detach().exp()  # (*S,)
        act, log_prob = self.actor.sample(batch["obs"], self.generator)
        metrics = descend(self.temperature_opt, *self.temperature_loss(log_prob.detach()))
        metrics |= descend(self.critics_opt, *self.critics_loss(batch, alpha))
        metrics |= descend(self.actor_opt, *self.actor_loss(batch, act, log_prob, alpha))
        polyak(self.critics_target, self.critics, self.config.tau)
        return metrics

    def temperature_loss(self, log_prob: Tensor) -> tuple[Tensor, Metrics]:
        log_alpha = self.temperature["log"]
        loss = -log_alpha * (log_prob + self.target_entropy).mean(-1)  # (*S,)
        return loss, {"alpha": log_alpha.exp(), "actor/entropy": -log_prob.mean(-1)}

    def critics_loss(self, batch: Batch, alpha: Tensor) -> tuple[Tensor, Metrics]:
        y, (act, log_prob, t) = self.target(batch, alpha)
        f = self.critics.features(batch["obs"], batch["act"])  # (*S, E, B, m)
        q = self.critics.head(f)  # (*S, E, B)
        loss = 0.5 * (q - y.unsqueeze(-2)).square().mean(-1).sum(-1)  # (*S,)
        metrics = {"critics/loss": loss, "critics/q": q.mean((-2, -1))}
        c = self.config
        if c.beer == 0:
            return loss, metrics
        with torch.no_grad():
            g = self.critics.features(batch["next_obs"], act)
        reward = (batch["reward"] - c.discount * alpha.unsqueeze(-1) * log_prob).unsqueeze(-2)
        weight, terminal = self.critics.last[0], batch["terminal"].unsqueeze(-2)
        penalty, stats = beer_penalty(f, t, reward, weight, c.discount, g=g, terminal=terminal)
        loss = loss + c.beer * penalty.mean((-2, -1))
        return loss, metrics | {f"beer/{name}": stats[name].mean(-1) for name in ("open", "cos")}

    @torch.no_grad()
    def target(self, batch: Batch, alpha: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """y (*S, B), and what it comes from: a', log pi(a'|s') and the target critics' features."""
        act, log_prob = self.actor.sample(batch["next_obs"], self.generator)
        t = self.critics_target.features(batch["next_obs"], act)  # (*S, E, B, m)
        q = self.critics_target.head(t).amin(-2)  # (*S, B)
        soft = q - alpha.unsqueeze(-1) * log_prob
        return bootstrap(batch, soft, self.config.discount), (act, log_prob, t)

    def actor_loss(
        self, batch: Batch, act: Tensor, log_prob: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Metrics]:
        q = self.critics(batch["obs"], act, frozen=True).amin(-2)  # (*S, B)
        loss = (alpha.unsqueeze(-1) * log_prob - q).mean(-1)  # (*S,)
        return loss, {"actor/loss": loss}

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        if now.get("explore"):
            return self.actor.sample(now["obs"], now["generator"])[0], memory
        return self.actor(now["obs"])[0].tanh(), memory

    def estimate(self, now: Now, act: Tensor) -> Tensor:
        """Of the soft return, entropy included: its bias is not that of the plain one."""
        return self.critics(now["obs"], act).mean(-2)

    def measure(self, batch: Batch) -> Metrics:
        """Ranks (*S,) of the critics' features on a batch of the replay, means over critics."""
        found = ranks(self.critics.features(batch["obs"], batch["act"]))
        return {name: value.mean(-1) for name, value in found.items()}


METHOD = Method(SAC, Config, stages=off_policy)
