"""PRDC: the policy is pulled towards the nearest state-action pair of the data set.

Ran, Li, Zhang, Zhang and Yu, "Policy Regularization with Dataset Constraint for Offline
Reinforcement Learning", ICML 2023, arXiv:2306.06569.

    target      y = r + discount (1 - terminal) min_e Q'_e(s', clip(pi'(s') + clipped noise))
    critics     L = sum_e mean_b (Q_e(s, a) - y)^2
    neighbor    j = argmin_j |[beta s, pi(s)] - [beta s_j, a_j]|  over the whole data set
    actor       L = mean_b,a (pi(s) - a_j)^2 - scale mean_b Q_0(s, pi(s))
                scale = alpha / mean_b |Q_0(s, pi(s))|

Shapes: *S optional leading seed axes, B batch, E critics. Primes are target networks, which move
on actor updates only. Observations are standardized by (s - mean) / (std + 1e-3) before anything
else, so beta multiplies standardized states.

The penalty of a row never exceeds TD3+BC's: the row itself is in the table. `actor/self_match` is
the share of rows whose neighbor is themselves; near 1, PRDC equals TD3+BC with the same alpha.

The search is exact (`offrl.data.neighbors`). `actor/uncertified` is the share of rows that the
lists could not decide, which take most of its time.

Differences from the authors' code and paper:
- The paper states the penalty as the unsquared joint distance; the released code, followed here,
  takes the mean squared error of the action part.
- Their search is a KD-tree query of every row; ours proves most rows from precomputed lists of
  state neighbors. Both return the nearest row; ours breaks ties by the lowest index.
- Their first release applied AntMaze's reward map to next_obs by mistake; the fixed form is used.
- Only k = 1 exists here; their k selects the k-th neighbor and is 1 in every published command.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data.neighbors import StateNeighbors
from offrl.data.stages import offline
from offrl.engine.method import (
    TRANSITION,
    Batch,
    Method,
    Metrics,
    Now,
    Run,
    Sampler,
    Seeds,
    Spec,
    Stage,
    Task,
)
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
    alpha: NonNegative = 2.5  # trust in Q against the data constraint
    beta: NonNegative = 2.0  # weight of the state in the distance; large: TD3+BC, 0: act only
    policy_delay: Count = 2  # critic updates per actor update
    hidden: tuple[Count, ...] = (256, 256)  # widths of the hidden layers
    reward_scale: Real = 1.0  # r <- reward_scale r + reward_shift, in training only
    reward_shift: Real = 0.0  # see reward_scale
    list_length: Count = 16  # state neighbors kept per row; speed only, the search is exact


class PRDC:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c = config
        self.config, self.generator = c, generator
        self.standardize = Standardize(spec.obs_dim, spec.obs_mean, spec.obs_std, generator.device)
        self.actor = Actor(spec.obs_dim, spec.act_dim, c.hidden, seeds, generator)
        self.critics = Critics(spec.obs_dim, spec.act_dim, c.hidden, 2, seeds, generator)
        self.actor_target, self.critics_target = target_copy(self.actor), target_copy(self.critics)
        self.actor_opt, self.critics_opt = adam(self.actor, c.lr), adam(self.critics, c.lr)
        self.neighbors: StateNeighbors  # set by `stages`: a table of the data, not of the run

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
        row, search = self.neighbors.nearest(batch["index"], act.detach(), self.config.beta)
        penalty = imitation(act, self.neighbors.act[row]).mean(-1)
        loss = penalty - scale * q.mean(-1)  # (*S,)
        metrics = {"actor/loss": loss, "actor/penalty": penalty, "actor/scale": scale}
        return loss, metrics | {f"actor/{name}": value for name, value in search.items()}

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        return self.actor(self.standardize(now["obs"])), memory


def stages(algo: PRDC, task: Task, run: Run) -> list[Stage]:
    """As usual, once the neighbors are there."""
    c, (stage,) = algo.config, offline(algo, task, run)

    def start() -> Sampler:
        algo.neighbors = StateNeighbors.build(
            algo.standardize(task.data["obs"].to(run.device)),
            task.data["act"].to(run.device),
            task.data.digest,
            k=c.list_length,
            cache=Path(run.cache) if run.cache else None,
            device=run.device,
            progress=run.progress,
        )
        if run.device.type == "cuda":  # every query in full, so that no update waits for the host
            algo.neighbors = replace(algo.neighbors, budget=c.batch)
        return stage.start()

    return [replace(stage, start=start)]


METHOD = Method(PRDC, Config, stages=stages, fields=TRANSITION)
