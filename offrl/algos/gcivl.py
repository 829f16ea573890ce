"""GCIVL: a goal-conditioned value by expectile regression, and the policy that its gain prefers.

Goal-conditioned IQL (Kostrikov et al., ICLR 2022, arXiv:2110.06169) without Q, as HIQL (Park et
al., NeurIPS 2023, arXiv:2307.11949) and OGBench (Park et al., ICLR 2025, arXiv:2410.20092) have it.

    value  r = -1, and 0 without a next value where the goal is the state itself (m = 0)
           A = r + discount m min_e V'_e(s', g) - mean_e V'_e(s, g)
           L = sum_e mean_b |expectile - 1[A < 0]| (r + discount m V'_e(s', g) - V_e(s, g))^2
    actor  L = -mean_b min(exp(alpha (V(s', g) - V(s, g))), 100) log pi(a | s, g)

V without an index is the mean of the online heads, e = 1, 2. Primes are target networks, which
follow the online weights from before the step's gradient. Value and actor have goals of their own.

Shapes: *S optional leading seed axes, B batch, E = 2 heads. Observations are not standardized.
The values, which share it, their target and the actor have an encoder of images each; it sees state
and goal together.

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
from offrl.nets.goal import GoalActor, GoalColumns, Values, sampled

HEADS = 2
WEIGHT_CAP = 100.0  # largest weight of the regression


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # updates
    batch: Count = 1024  # rows per update, each with its goals
    lr: Positive = 3e-4  # Adam, one for both networks
    discount: Between = 0.99  # 0.995 in giant mazes and for humanoids
    tau: Share = 0.005  # share of the online weights in each target update
    expectile: Between = 0.9  # of the value's regression, above 0.5: towards the best
    alpha: NonNegative = 10.0  # inverse temperature of the regression
    hidden: tuple[Count, ...] = (512, 512, 512)  # widths of the hidden layers
    value_goals: tuple[Share, ...] = (0.2, 0.5, 0.3)  # the state itself, its trajectory, any state
    actor_goals: tuple[Share, ...] = (0.0, 1.0, 0.0)  # likewise
    goal_columns: tuple[Whole, ...] = ()  # of an observation that make a goal; () for all
    images: bool = False  # observations are 64 x 64 RGB images; one seed per run
    crop_share: Share = 0.0  # of batches whose images are moved by up to three pixels


class GCIVL:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c, o = config, spec.obs_dim
        self.config, self.generator = c, generator
        self.goal = GoalColumns(o, c.goal_columns, generator.device)
        g = self.goal.size
        self.values = Values((o, g), c.hidden, HEADS, seeds, generator, 2 * c.images)
        self.values_target = target_copy(self.values)
        self.actor = GoalActor((o, g), spec.act_dim, c.hidden, seeds, generator, 2 * c.images)
        self.opt = adam(nn.ModuleList([self.values, self.actor]), c.lr)

    def update(self, batch: Batch, turn: int) -> Metrics:
        value, metrics = self.value_loss(batch)
        actor, more = self.actor_loss(batch)
        polyak(self.values_target, self.values, self.config.tau)  # the weights before the step
        return descend(self.opt, value + actor, metrics | more)

    def value_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        c, success, goal = self.config, batch["success"], self.goal(batch["value_goal"])
        reward, discount = success - 1, c.discount * (1 - success)
        with torch.no_grad():
            later, here = self.heads(self.values_target, goal, batch["next_obs"], batch["obs"])
            advantage = reward + discount * later.amin(-2) - here.mean(-2)
            weight = torch.where(advantage >= 0, c.expectile, 1 - c.expectile)
            q = reward.unsqueeze(-2) + discount.unsqueeze(-2) * later
        (now,) = self.heads(self.values, goal, batch["obs"])  # (*S, E, B)
        loss = (weight.unsqueeze(-2) * (q - now).square()).mean(-1).sum(-1)  # (*S,)
        return loss, {"value/loss": loss, "value/mean": now.mean((-2, -1))}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        goal = self.goal(batch["goal"])
        with torch.no_grad():
            later, here = self.heads(self.values, goal, batch["next_obs"], batch["obs"])
            weight = (self.config.alpha * (later - here).mean(-2)).exp().clamp(max=WEIGHT_CAP)
        log_prob = self.actor.log_prob(batch["obs"], goal, batch["act"])
        loss = -(weight * log_prob).mean(-1)
        return loss, {"actor/loss": loss, "actor/weight": weight.mean(-1)}

    def heads(self, values: Values, goal: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Both heads (*S, E, B) at several states with one goal, in one call."""
        goals = torch.cat([goal] * len(states), -2)
        return values(torch.cat(states, -2), goals).chunk(len(states), -1)

    @torch.no_grad()
    def value(self, obs: Tensor, goal: Tensor) -> Tensor:
        """V(s, g) (*S, B), the mean of the online heads, for whole observations as goals."""
        return self.heads(self.values, self.goal(goal), obs)[0].mean(-2)

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        return sampled(self.actor(now["obs"], self.goal(now["goal"])), now).clamp(-1, 1), memory


METHOD = Method(GCIVL, Config, stages=goal_stages(), **GOALS)
