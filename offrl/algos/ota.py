"""OTA: HIQL whose high-level value counts options of n steps, so that far goals are nearer.

Ahn, Choi, Han and Moon, "Option-aware Temporally Abstracted Value for Offline Goal-Conditioned
Reinforcement Learning", NeurIPS 2025, arXiv:2505.12737, built on HIQL (Park et al., NeurIPS 2023,
arXiv:2307.11949).

    phi    phi([s; g]), a vector of length sqrt(d), one for both levels
    value  V^l_e and V^h_e (s, g) = MLP_e([s; phi([s; g])]), e = 1, 2. Both regress alike, the
           low one on s+ = s', the high one on s+ = s_e, where an option that began in s ended:
           after n steps, at the goal, or with the trajectory. r = -1, and 0 without a next value
           where the goal is s (low) or s_e (high)
           A = r + discount m min_e V'_e(s+, g) - mean_e V'_e(s, g)
           L = sum_e mean_b |expectile - 1[A < 0]| (r + discount m V'_e(s+, g) - V_e(s, g))^2
    low    L = -mean_b min(exp(low_alpha A), 100) log pi(a | s, phi([s; w]))
           w = s_{t+k},  A = V^l(s', w) - V^l(s, w)
    high   L = -mean_b min(exp(high_alpha A), 100) log pi(phi([s; s_{t+k}]) | s, g)
           A = V^h(s_{t+k}, g) - V^h(s, g)

A step of V^h is an option: d steps away, V^h counts ceil(d / n) - 1 failed options, discounted once
per option and not per step. V without an index is the mean of the online heads. Primes are target
networks, which use the online phi and follow the online weights from before the step's gradient.
phi learns from the values only (`low_actor_rep_grad` adds the low actor). Both policies are
Gaussians of standard deviation 1; in acting z = pi_high(s, g) is named anew at every step and
brought to length sqrt(d).

Shapes: *S optional leading seed axes, B batch, two levels (low, high) of E = 2 heads, which are one
stack of four networks. Observations are not standardized. Images go through encoders of their own
for phi, each level's values, their targets and each policy; phi and the high policy see s and g
together.

Differences from the authors' code (read in a copy): all passes of a network are joined into one
product, which changes rounding only. Their crops leave out s_e and the goal of V^h, while s is
cropped; here all images of a row are. Their option lengths per data set are not public but for
antmaze-large-navigate (5); here n = k / 5 (configs/algo/ota.yaml).
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

LEVELS, HEADS = 2, 2
WEIGHT_CAP = 100.0  # largest weight of a regression


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # updates
    batch: Count = 1024  # rows per update, each with its goals
    lr: Positive = 3e-4  # Adam, one for all networks
    discount: Between = 0.99  # of both levels; 0.995 in giant mazes and for humanoids
    tau: Share = 0.005  # share of the online weights in each target update
    expectile: Between = 0.7  # of the value's regression, above 0.5: towards the best
    high_alpha: NonNegative = 3.0  # inverse temperature of the high policy's regression
    low_alpha: NonNegative = 3.0  # of the low policy's
    subgoal_steps: Count = 25  # k, steps to a subgoal
    option_steps: Count = 5  # n, steps of an option; below k
    rep_dim: Count = 10  # d, size of phi
    low_actor_rep_grad: bool = False  # phi learns from the low policy too; published for pixels
    hidden: tuple[Count, ...] = (512, 512, 512)  # widths of the hidden layers
    value_goals: tuple[Share, ...] = (0.2, 0.5, 0.3)  # the state itself, its trajectory, any state
    actor_goals: tuple[Share, ...] = (0.0, 1.0, 0.0)  # of the high policy; likewise
    goal_columns: tuple[Whole, ...] = ()  # of an observation that make a goal; () for all
    images: bool = False  # observations are 64 x 64 RGB images; one seed per run
    crop_share: Share = 0.0  # of batches whose images are moved by up to three pixels


class OTA:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c, o = config, spec.obs_dim
        self.config, self.generator = c, generator
        self.goal = GoalColumns(o, c.goal_columns, generator.device)
        g, known = self.goal.size, (o, c.rep_dim)
        self.rep = GoalRep((o, g), c.rep_dim, c.hidden, seeds, generator, c.images)
        self.values = RepValues(known, c.hidden, (LEVELS, HEADS), seeds, generator, c.images)
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
        s, next_s, end = batch["obs"], batch["next_obs"], batch["option_end"]
        ahead = batch["ahead"]
        names = ("low_goal", "high_goal", "waypoint", "goal")
        l, h, w, g = (self.goal(batch[name]) for name in names)  # noqa: E741
        rep_l, rep_h = self.reps((s, l), (s, h))
        with torch.no_grad():  # one call per network for all terms
            rep_next, rep_end, rep_w, rep_next_w, rep_g, rep_ahead_g, subgoal = self.reps(
                (next_s, l),
                (end, h),
                (s, w),
                (next_s, w),
                (s, g),
                (ahead, g),
                (s, self.goal(ahead)),
            )
            target_next, target_now = self.values_target(
                ((next_s, rep_next), (s, rep_l)), ((end, rep_end), (s, rep_h))
            )
            later, earlier = self.values(
                ((next_s, rep_next_w), (s, rep_w)), ((ahead, rep_ahead_g), (s, rep_g))
            )
        if c.low_actor_rep_grad:
            rep_w = self.rep(s, w)
        (now,) = self.values(((s, rep_l),), ((s, rep_h),))  # (*S, 2, E, B)
        success = torch.stack([batch["low_success"], batch["high_success"]], -2)  # (*S, 2, B)
        value, metrics = self.value_loss(now, target_next, target_now, success)
        advantage = (later - earlier).mean(-2)  # (*S, 2, B)
        low_weight = (c.low_alpha * advantage.select(-2, 0)).exp().clamp(max=WEIGHT_CAP)
        low = -(low_weight * self.low.log_prob(s, rep_w, batch["act"])).mean(-1)
        high_weight = (c.high_alpha * advantage.select(-2, 1)).exp().clamp(max=WEIGHT_CAP)
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
        """Expectile regression of both levels' heads (*S, 2, E, B); success (*S, 2, B)."""
        c = self.config
        reward, discount = success - 1, c.discount * (1 - success)
        advantage = reward + discount * target_next.amin(-2) - target_now.mean(-2)
        weight = torch.where(advantage >= 0, c.expectile, 1 - c.expectile)
        q = reward.unsqueeze(-2) + discount.unsqueeze(-2) * target_next
        losses = (weight.unsqueeze(-2) * (q - now).square()).mean(-1).sum(-1)  # (*S, 2)
        (low, high), means = losses.unbind(-1), now.mean((-2, -1))
        metrics = {
            "value/low_loss": low,
            "value/low_mean": means.select(-1, 0),
            "value/high_loss": high,
            "value/high_mean": means.select(-1, 1),
        }
        return low + high, metrics

    def reps(self, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """phi of several (obs, goal) in one call."""
        obs, goal = (torch.cat(parts, -2) for parts in zip(*pairs, strict=True))
        return self.rep(obs, goal).chunk(len(pairs), -2)

    @torch.no_grad()
    def value(self, obs: Tensor, goal: Tensor) -> Tensor:
        """V^h(s, g) (*S, B), the mean of the online heads, for whole observations as goals."""
        pair = (obs, self.rep(obs, self.goal(goal)))
        (heads,) = self.values((pair,), (pair,))
        return heads.select(-3, 1).mean(-2)

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        z = sampled(self.high(now["obs"], self.goal(now["goal"])), now)
        return sampled(self.low(now["obs"], normalized(z)), now).clamp(-1, 1), memory


def draw(c: Config, states: Trajectories, i: Tensor, generator: Generator) -> tuple[Batch, Batch]:
    low_goal = states.goals(i, c.value_goals, generator, c.discount)
    end, high_goal = states.options(i, c.option_steps, c.value_goals, c.discount, generator)
    goal, ahead = states.subgoals(i, c.subgoal_steps, c.actor_goals, generator)
    places = {"next_obs": i + 1, "option_end": end, "low_goal": low_goal, "high_goal": high_goal}
    places |= {"waypoint": states.ahead(i, c.subgoal_steps), "goal": goal, "ahead": ahead}
    success = {"low_success": (low_goal == i).float(), "high_success": (high_goal == end).float()}
    return places, success


METHOD = Method(OTA, Config, stages=goal_stages(draw), **GOALS)
