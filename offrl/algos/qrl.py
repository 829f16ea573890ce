"""QRL: the value as a quasimetric, spread out as far as one-step distances allow.

Wang, Torralba, Isola and Zhang, "Optimal Goal-Reaching Reinforcement Learning via Quasimetric
Learning", ICML 2023, arXiv:2304.01203; as in OGBench (Park et al., ICLR 2025, arXiv:2410.20092).

    metric   d(s, g) between latents z, an interval quasimetric (offrl.nets.metric)
             L = mean_b 100 softplus(5 - d(s, g) / 100) + lambda mean_b relu(d(s, s') - 1)^2
             lambda = exp(l) >= 0 rises while the constraint is broken: L = lambda (0.05 - broken)
    model    z^ = z_s + F([z_s; a]),  L = mean_b (d(z_s', z^) + d(z^, z_s')) / 2
    actor    L = -mean_b Q / (mean_b |Q| + 1e-6) - alpha mean_b log pi(a | s, g)
             Q = -d(z^(s, clip(mu(s, g), -1, 1)), z_g), mu the mean of the unit Gaussian pi

There are no target networks. All losses are taken at the same weights, in one step of one
optimizer, which also moves l. Goals of the metric are any states.

Shapes: *S optional leading seed axes, B batch. Observations are not standardized. Goals are whole
observations, since the metric is one of states. Images go through an encoder before the latents;
the actor's sees state and goal together.

Differences from OGBench's code: its one-step distances are held to 0, not 1, in the few rows whose
random goal happens to be the state itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from offrl.data.goals import GOALS, Trajectories, goal_stages, two_goals
from offrl.engine.method import Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adam, descend
from offrl.engine.ranges import Count, NonNegative, Positive, Share
from offrl.nets.goal import GoalActor, held, normal_log_prob, sampled
from offrl.nets.metric import IQE
from offrl.nets.mlp import MLP


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # updates
    batch: Count = 1024  # rows per update, each with its goals
    lr: Positive = 3e-4  # Adam, one for everything
    slack: NonNegative = 0.05  # squared violation of one-step distances that is allowed on average
    alpha: NonNegative = 0.003  # weight of imitation in the actor's loss
    latent: Count = 512  # numbers of a state's latent, which the metric reads as intervals
    hidden: tuple[Count, ...] = (512, 512, 512)  # widths of the hidden layers
    value_goals: tuple[Share, ...] = (0.0, 0.0, 1.0)  # the state itself, its trajectory, any state
    actor_goals: tuple[Share, ...] = (0.0, 1.0, 0.0)  # likewise
    images: bool = False  # observations are 64 x 64 RGB images; one seed per run
    crop_share: Share = 0.0  # of batches whose images are moved by up to three pixels


class QRL:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c, o, a = config, spec.obs_dim, spec.act_dim
        self.config, self.generator = c, generator
        self.metric = IQE(o, c.hidden, c.latent, seeds, generator, c.images)
        dims = (c.latent + a, *c.hidden, c.latent)
        self.model = MLP(dims, seeds, generator, "gelu", norm=True)
        self.actor = GoalActor((o, o), a, c.hidden, seeds, generator, 2 * c.images)
        zero = torch.zeros(seeds, device=generator.device)
        self.multiplier = nn.ParameterDict({"log": nn.Parameter(zero)})  # lambda = 1 at first
        self.opt = adam(nn.ModuleList([self.metric, self.model, self.actor, self.multiplier]), c.lr)

    def update(self, batch: Batch, turn: int) -> Metrics:
        value, metrics = self.value_loss(batch)
        actor, more = self.actor_loss(batch)
        return descend(self.opt, value + actor, metrics | more)

    def value_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The losses of metric, multiplier and model."""
        states = torch.cat([batch["obs"], batch["next_obs"], batch["value_goal"]], -2)
        z, next_z, z_goal = self.metric(states).chunk(3, -2)
        far = self.metric.distance(z, z_goal)
        spread = (100 * F.softplus(5 - far / 100)).mean(-1)
        violation = (self.metric.distance(z, next_z) - 1).relu().square().mean(-1)  # (*S,)
        multiplier = self.multiplier["log"].exp()  # (*S,)
        dual = multiplier * (self.config.slack - violation.detach())
        predicted = z + self.model(torch.cat([z, batch["act"]], -1))
        there = self.metric.distance(next_z, predicted), self.metric.distance(predicted, next_z)
        model = (there[0] + there[1]).mean(-1) / 2
        loss = spread + multiplier.detach() * violation + dual + model
        return loss, {
            "value/spread": spread,
            "value/violation": violation,
            "value/multiplier": multiplier,
            "value/mean": far.mean(-1),
            "model/loss": model,
        }

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        s, goal = batch["obs"], batch["goal"]
        mean = self.actor(s, goal)
        with torch.no_grad():
            z, z_goal = self.metric(torch.cat([s, goal], -2)).chunk(2, -2)
        predicted = z + held(self.model, torch.cat([z, mean.clamp(-1, 1)], -1))
        q = -self.metric.distance(predicted, z_goal, held=True)  # (*S, B)
        climb = -q.mean(-1) / (q.detach().abs().mean(-1) + 1e-6)
        imitation = -normal_log_prob(batch["act"], mean).mean(-1)
        loss = climb + self.config.alpha * imitation
        return loss, {"actor/loss": loss, "actor/imitation": imitation}

    @torch.no_grad()
    def value(self, obs: Tensor, goal: Tensor) -> Tensor:
        """-d(s, g) (*S, B)."""
        return -self.metric.distance(self.metric(obs), self.metric(goal))

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        return sampled(self.actor(now["obs"], now["goal"]), now).clamp(-1, 1), memory


def draw(c: Config, states: Trajectories, i: Tensor, generator: Generator) -> tuple[Batch, Batch]:
    # the metric's goals are random, so the discount of trajectory goals plays no part
    return two_goals(c, states, i, generator, discount=0.99)


METHOD = Method(QRL, Config, stages=goal_stages(draw), **GOALS)
