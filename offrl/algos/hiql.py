"""HIQL: one goal-conditioned value, a policy that names subgoals and one that reaches them.

Park, Ghosh, Eysenbach and Levine, "HIQL: Offline Goal-Conditioned RL with Latent States as
Actions", NeurIPS 2023, arXiv:2307.11949; as in OGBench (Park et al., ICLR 2025, arXiv:2410.20092).

    phi    phi([s; g]), a vector of length sqrt(d): what a goal looks like from a state
    value  V_e(s, g) = MLP_e([s; phi([s; g])]), e = 1, 2; r = -1, and 0 without a next value where
           the goal is the state itself
           A = r + discount m min_e V'_e(s', g) - mean_e V'_e(s, g)
           L = sum_e mean_b |expectile - 1[A < 0]| (r + discount m V'_e(s', g) - V_e(s, g))^2
    low    L = -mean_b min(exp(low_alpha A), 100) log pi(a | s, phi([s; w]))
           w = s_{t+k},  A = V(s', w) - V(s, w)
    high   L = -mean_b min(exp(high_alpha A), 100) log pi(phi([s; s_{t+k}]) | s, g)
           A = V(s_{t+k}, g) - V(s, g)

V without an index is the mean of the online heads. Primes are target networks, which use the online
phi and follow the online weights from before the step's gradient. phi learns from the value only
(`low_actor_rep_grad` adds the low actor). Both policies are Gaussians of standard deviation 1; in
acting z = pi_high(s, g) is named anew at every step and brought to length sqrt(d).

Shapes: *S optional leading seed axes, B batch, E = 2 heads. Observations are not standardized.
Images go through encoders of their own for phi, the values, their target and each policy; phi and
the high policy see s and g together.

Differences from the authors' code: OGBench's choices where the two differ (both temperatures 3
instead of 1, goals of the high policy along the trajectory only). The paper writes one TD error for
weight and residual; both codes use the target networks in the weight, as here. The value's and the
policies' passes are joined into one product per network, which changes rounding only.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from offrl.data.goals import GOALS, Trajectories, goal_stages
from offrl.engine.method import Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adam, descend, polyak, target_copy
from offrl.engine.ranges import Between, Count, NonNegative, Positive, Share, Whole
from offrl.nets.goal import GoalActor, GoalColumns, GoalRep, RepValues, normalized, sampled

HEADS = 2
WEIGHT_CAP = 100.0  # largest weight of a regression


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # updates
    batch: Count = 1024  # rows per update, each with its goals
    lr: Positive = 3e-4  # Adam, one for all networks
    discount: Between = 0.99  # 0.995 in giant mazes and for humanoids
    tau: Share = 0.005  # share of the online weights in each target update
    expectile: Between = 0.7  # of the value's regression, above 0.5: towards the best
    high_alpha: NonNegative = 3.0  # inverse temperature of the high policy's regression
    low_alpha: NonNegative = 3.0  # of the low policy's
    subgoal_steps: Count = 25  # k, steps to a subgoal
    rep_dim: Count = 10  # d, size of phi
    low_actor_rep_grad: bool = False  # phi learns from the low policy too; published for pixels
    hidden: tuple[Count, ...] = (512, 512, 512)  # widths of the hidden layers
    value_goals: tuple[Share, ...] = (0.2, 0.5, 0.3)  # the state itself, its trajectory, any state
    actor_goals: tuple[Share, ...] = (0.0, 1.0, 0.0)  # of the high policy; likewise
    goal_columns: tuple[Whole, ...] = ()  # of an observation that make a goal; () for all
    images: bool = False  # observations are 64 x 64 RGB images; one seed per run
    crop_share: Share = 0.0  # of batches whose images are moved by up to three pixels


class HIQL:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c, o = config, spec.obs_dim
        self.config, self.generator = c, generator
        self.goal = GoalColumns(o, c.goal_columns, generator.device)
        g, known = self.goal.size, (o, c.rep_dim)
        self.rep = GoalRep((o, g), c.rep_dim, c.hidden, seeds, generator, c.images)
        self.values = RepValues(known, c.hidden, (HEADS,), seeds, generator, c.images)
        self.values_target = target_copy(self.values)
        self.high = GoalActor((o, g), c.rep_dim, c.hidden, seeds, generator, 2 * c.images)
        self.low = GoalActor(known, spec.act_dim, c.hidden, seeds, generator, c.images)
        self.opt = adam(nn.ModuleList([self.rep, self.values, self.high, self.low]), c.lr)

    def update(self, batch: Batch, turn: int) -> Metrics:
        loss, metrics = self.loss(batch)
        polyak(self.values_target, self.values, self.config.tau)  # the weights before the step
        return descend(self.opt, loss, metrics)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        c = self.config
        s, next_s, ahead = batch["obs"], batch["next_obs"], batch["ahead"]
        v, w, g = (self.goal(batch[name]) for name in ("value_goal", "waypoint", "goal"))
        rep = self.rep(s, v)
        with torch.no_grad():  # one call per network for all terms
            rep_next, rep_w, rep_next_w, rep_g, rep_ahead_g, subgoal = self.reps(
                (next_s, v), (s, w), (next_s, w), (s, g), (ahead, g), (s, self.goal(ahead))
            )
            target_next, target_now = self.values_target(((next_s, rep_next), (s, rep)))
            v_w, v_next_w, v_g, v_ahead_g = self.values(
                ((s, rep_w), (next_s, rep_next_w), (s, rep_g), (ahead, rep_ahead_g))
            )
        if c.low_actor_rep_grad:
            rep_w = self.rep(s, w)
        (now,) = self.values(((s, rep),))  # (*S, E, B)
        value, metrics = self.value_loss(now, target_next, target_now, batch["success"])
        low_weight = advantage_weight(c.low_alpha, v_next_w - v_w)
        low = -(low_weight * self.low.log_prob(s, rep_w, batch["act"])).mean(-1)
        high_weight = advantage_weight(c.high_alpha, v_ahead_g - v_g)
        high = -(high_weight * self.high.log_prob(s, g, subgoal)).mean(-1)
        metrics |= {
            "low/loss": low,
            "low/weight": low_weight.mean(-1),
            "high/loss": high,
            "high/weight": high_weight.mean(-1),
        }
        return value + low + high, metrics

    def value_loss(
        self, now: Tensor, target_next: Tensor, target_now: Tensor, success: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Expectile regression of the heads (*S, E, B); success (*S, B)."""
        c = self.config
        reward, discount = success - 1, c.discount * (1 - success)
        advantage = reward + discount * target_next.amin(-2) - target_now.mean(-2)
        weight = torch.where(advantage >= 0, c.expectile, 1 - c.expectile)
        q = reward.unsqueeze(-2) + discount.unsqueeze(-2) * target_next
        loss = (weight.unsqueeze(-2) * (q - now).square()).mean(-1).sum(-1)  # (*S,)
        return loss, {"value/loss": loss, "value/mean": now.mean((-2, -1))}

    def reps(self, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """phi of several (obs, goal) in one call."""
        obs, goal = (torch.cat(parts, -2) for parts in zip(*pairs, strict=True))
        return self.rep(obs, goal).chunk(len(pairs), -2)

    @torch.no_grad()
    def value(self, obs: Tensor, goal: Tensor) -> Tensor:
        """V(s, g) (*S, B), the mean of the online heads, for whole observations as goals."""
        goal = self.goal(goal)
        (heads,) = self.values(((obs, self.rep(obs, goal)),))
        return heads.mean(-2)

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        z = sampled(self.high(now["obs"], self.goal(now["goal"])), now)
        return sampled(self.low(now["obs"], normalized(z)), now).clamp(-1, 1), memory


def advantage_weight(alpha: float, heads: Tensor) -> Tensor:
    """min(exp(alpha A), 100) (*S, B), A the mean of the heads' differences (*S, E, B)."""
    return (alpha * heads.mean(-2)).exp().clamp(max=WEIGHT_CAP)


def draw(c: Config, states: Trajectories, i: Tensor, generator: Generator) -> tuple[Batch, Batch]:
    value_goal = states.goals(i, c.value_goals, generator, c.discount)
    goal, ahead = states.subgoals(i, c.subgoal_steps, c.actor_goals, generator)
    places = {"next_obs": i + 1, "value_goal": value_goal, "goal": goal, "ahead": ahead}
    places |= {"waypoint": states.ahead(i, c.subgoal_steps)}
    return places, {"success": (value_goal == i).float()}


METHOD = Method(HIQL, Config, stages=goal_stages(draw), **GOALS)
