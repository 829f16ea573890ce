"""GCIQL: goal-conditioned IQL, whose policy climbs Q while it imitates.

Kostrikov, Nair and Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022,
arXiv:2110.06169, with goals, and with DDPG+BC for the policy, as in OGBench (Park et al., ICLR
2025, arXiv:2410.20092).

    value   L = mean_b |expectile - 1[u < 0]| u^2,  u = min_e Q'_e(s, a, g) - V(s, g)
    critic  L = sum_e mean_b (r + discount m V(s', g) - Q_e(s, a, g))^2
            r = -1, and 0 without a next value (m = 0) where the goal is the state itself
    actor   L = -mean_b Q / (mean_b |Q| + 1e-6) - alpha mean_b log pi(a | s, g)
            Q = min_e Q_e(s, clip(mu(s, g), -1, 1), g), mu the mean of the unit Gaussian pi

Primes are target networks, which follow the online weights from before the step's gradient. All
three losses are taken at the same weights, in one step. Values and actor have goals of their own.

Shapes: *S optional leading seed axes, B batch, E = 2 critics. Observations are not standardized.
Value, critics, their target and actor have an encoder of images each, which the two critics share;
it sees state and goal together.

Differences from the authors' code: none known against OGBench's but for the order of sums.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from offrl.data.goals import GOALS, goal_stages
from offrl.engine.method import Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adam, descend, polyak, target_copy
from offrl.engine.ranges import Between, Count, NonNegative, Positive, Share, Whole
from offrl.nets.goal import GoalActor, GoalColumns, Values, held, normal_log_prob, sampled

HEADS = 2


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # updates
    batch: Count = 1024  # rows per update, each with its goals
    lr: Positive = 3e-4  # Adam, one for all networks
    discount: Between = 0.99  # 0.995 in giant mazes and for humanoids
    tau: Share = 0.005  # share of the online weights in each target update
    expectile: Between = 0.9  # of the value's regression, above 0.5: towards the best
    alpha: NonNegative = 0.3  # weight of imitation in the actor's loss
    hidden: tuple[Count, ...] = (512, 512, 512)  # widths of the hidden layers
    value_goals: tuple[Share, ...] = (0.2, 0.5, 0.3)  # the state itself, its trajectory, any state
    actor_goals: tuple[Share, ...] = (0.0, 1.0, 0.0)  # likewise
    goal_columns: tuple[Whole, ...] = ()  # of an observation that make a goal; () for all
    images: bool = False  # observations are 64 x 64 RGB images; one seed per run
    crop_share: Share = 0.0  # of batches whose images are moved by up to three pixels


class GCIQL:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c, o, a = config, spec.obs_dim, spec.act_dim
        self.config, self.generator = c, generator
        self.goal = GoalColumns(o, c.goal_columns, generator.device)
        g = self.goal.size
        self.values = Values((o, g), c.hidden, 0, seeds, generator, 2 * c.images)
        self.critics = Values((o, g, a), c.hidden, HEADS, seeds, generator, 2 * c.images)
        self.critics_target = target_copy(self.critics)
        self.actor = GoalActor((o, g), a, c.hidden, seeds, generator, 2 * c.images)
        self.opt = adam(nn.ModuleList([self.values, self.critics, self.actor]), c.lr)

    def update(self, batch: Batch, turn: int) -> Metrics:
        value, metrics = self.value_loss(batch)
        critic, more = self.critic_loss(batch)
        actor, most = self.actor_loss(batch)
        polyak(self.critics_target, self.critics, self.config.tau)  # the weights before the step
        return descend(self.opt, value + critic + actor, metrics | more | most)

    def value_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        s, goal = batch["obs"], self.goal(batch["value_goal"])
        q = self.critics_target(s, goal, batch["act"]).amin(-2)
        v = self.values(s, goal)
        gap = q - v
        weight = torch.where(gap >= 0, self.config.expectile, 1 - self.config.expectile)
        loss = (weight * gap.square()).mean(-1)
        return loss, {"value/loss": loss, "value/mean": v.mean(-1)}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        success, goal = batch["success"], self.goal(batch["value_goal"])
        with torch.no_grad():
            later = self.values(batch["next_obs"], goal)
            y = success - 1 + self.config.discount * (1 - success) * later
        q = self.critics(batch["obs"], goal, batch["act"])  # (*S, E, B)
        loss = (q - y.unsqueeze(-2)).square().mean(-1).sum(-1)
        return loss, {"critic/loss": loss, "critic/q": q.mean((-2, -1))}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        s, goal = batch["obs"], self.goal(batch["goal"])
        mean = self.actor(s, goal)
        q = held(self.critics, s, goal, mean.clamp(-1, 1)).amin(-2)  # (*S, B)
        climb = -q.mean(-1) / (q.detach().abs().mean(-1) + 1e-6)
        imitation = -normal_log_prob(batch["act"], mean).mean(-1)
        loss = climb + self.config.alpha * imitation
        return loss, {"actor/loss": loss, "actor/imitation": imitation}

    @torch.no_grad()
    def value(self, obs: Tensor, goal: Tensor) -> Tensor:
        """V(s, g) (*S, B) for whole observations as goals."""
        return self.values(obs, self.goal(goal))

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        return sampled(self.actor(now["obs"], self.goal(now["goal"])), now).clamp(-1, 1), memory


METHOD = Method(GCIQL, Config, stages=goal_stages(), **GOALS)
