"""CRL: the value of a goal as the log-odds of reaching it, learned by contrast.

Eysenbach, Zhang, Levine and Salakhutdinov, "Contrastive Learning as Goal-Conditioned Reinforcement
Learning", NeurIPS 2022, arXiv:2206.07568; as in OGBench (Park et al., ICLR 2025, arXiv:2410.20092).

    critic  Q_e(s, a, g) = phi_e(s, a) . psi_e(g) / sqrt(d), e = 1, 2
            L = mean_e,b,b' BCE(Q_e(s_b, a_b, g_b'), 1[b = b'])
            g_b a geometric future state of s_b; the goals of the others are the negatives
    actor   L = -mean_b Q / (mean_b |Q| + 1e-6) - alpha mean_b log pi(a | s, g)
            Q = max(min_e Q_e(s, clip(mu(s, g), -1, 1), g), log FLOOR), mu the mean of the unit
            Gaussian pi

There are no target networks. Both losses are taken at the same weights, in one step.

Shapes: *S optional leading seed axes, B batch, E = 2 heads. Observations are not standardized.
Images go through one encoder of states and one of goals, which the heads share, and through the
actor's, which sees both together.

Differences from the authors' code: none known against OGBench's but for the order of sums.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from offrl.data.goals import GOALS, goal_stages
from offrl.engine.method import Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adam, descend
from offrl.engine.ranges import Between, Count, NonNegative, Positive, Share, Whole
from offrl.nets.goal import GoalActor, GoalColumns, Sight, held, normal_log_prob, sampled
from offrl.nets.mlp import MLP

HEADS = 2
FLOOR = 1e-6  # of exp(Q) in the actor's loss, as in OGBench: no gradient below


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # updates
    batch: Count = 1024  # rows per update, each with its goals
    lr: Positive = 3e-4  # Adam, one for all networks
    discount: Between = 0.99  # of the future states; 0.995 in giant mazes and for humanoids
    alpha: NonNegative = 0.1  # weight of imitation in the actor's loss
    latent: Count = 512  # d
    hidden: tuple[Count, ...] = (512, 512, 512)  # widths of the hidden layers
    value_goals: tuple[Share, ...] = (0.0, 1.0, 0.0)  # the state itself, its trajectory, any state
    actor_goals: tuple[Share, ...] = (0.0, 1.0, 0.0)  # likewise
    goal_columns: tuple[Whole, ...] = ()  # of an observation that make a goal; () for all
    images: bool = False  # observations are 64 x 64 RGB images; one seed per run
    crop_share: Share = 0.0  # of batches whose images are moved by up to three pixels


class Latents(nn.Module):
    """phi or psi of every head: parts (*S, B, n) -> (*S, E, B, d); heads share image encoders."""

    def __init__(self, sizes: tuple[int, ...], c: Config, seeds: Seeds, generator: Generator):
        super().__init__()
        self.sight = Sight(sizes, int(c.images), seeds, generator)
        dims = (self.sight.size, *c.hidden, c.latent)
        self.net = MLP(dims, (*seeds, HEADS), generator, "gelu", norm=True)

    def forward(self, *parts: Tensor) -> Tensor:
        return self.net(self.sight(*parts).unsqueeze(-3))


class CRL:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c, o, a = config, spec.obs_dim, spec.act_dim
        self.config, self.generator = c, generator
        self.goal = GoalColumns(o, c.goal_columns, generator.device)
        g = self.goal.size
        self.phi = Latents((o, a), c, seeds, generator)
        self.psi = Latents((g,), c, seeds, generator)
        self.actor = GoalActor((o, g), a, c.hidden, seeds, generator, 2 * c.images)
        self.opt = adam(nn.ModuleList([self.phi, self.psi, self.actor]), c.lr)

    def update(self, batch: Batch, turn: int) -> Metrics:
        critic, metrics = self.critic_loss(batch)
        actor, more = self.actor_loss(batch)
        return descend(self.opt, critic + actor, metrics | more)

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        phi = self.phi(batch["obs"], batch["act"])
        psi = self.psi(self.goal(batch["value_goal"]))
        logits = phi @ psi.mT / phi.shape[-1] ** 0.5  # (*S, E, B, B)
        own = torch.eye(logits.shape[-1], device=logits.device).expand_as(logits)
        loss = F.binary_cross_entropy_with_logits(logits, own, reduction="none").mean((-3, -2, -1))
        met, others = logits.diagonal(dim1=-2, dim2=-1).mean((-2, -1)), logits.mean((-3, -2, -1))
        return loss, {"critic/loss": loss, "critic/own": met, "critic/all": others}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        s, goal = batch["obs"], self.goal(batch["goal"])
        mean = self.actor(s, goal)
        phi = held(self.phi, s, mean.clamp(-1, 1))
        with torch.no_grad():
            psi = self.psi(goal)
        q = ((phi * psi).sum(-1) / phi.shape[-1] ** 0.5).amin(-2)  # (*S, B)
        q = q.clamp(min=math.log(FLOOR))
        climb = -q.mean(-1) / (q.detach().abs().mean(-1) + 1e-6)
        imitation = -normal_log_prob(batch["act"], mean).mean(-1)
        loss = climb + self.config.alpha * imitation
        return loss, {"actor/loss": loss, "actor/imitation": imitation}

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        return sampled(self.actor(now["obs"], self.goal(now["goal"])), now).clamp(-1, 1), memory


METHOD = Method(CRL, Config, stages=goal_stages(), **GOALS)
