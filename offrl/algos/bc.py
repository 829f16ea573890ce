"""Behavior cloning: the action of the data, by least squares.

    actor    L = mean_b,a (pi(s) - a)^2

The baseline of Fujimoto and Gu 2021 and of CORL: tanh MLP, standardized observations.
Shapes: *S optional leading seed axes, B batch.

Differences from CORL's code: none known; its batch, network and learning rate are used.
"""

from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from offrl.data.stages import offline
from offrl.engine.method import Batch, Method, Metrics, Now, Seeds, Spec
from offrl.engine.optim import adam, descend
from offrl.engine.ranges import Count, Positive
from offrl.nets import Actor, Standardize


@dataclass(frozen=True)
class Config:
    steps: Count = 1_000_000  # updates
    batch: Count = 256  # transitions per update
    lr: Positive = 3e-4  # Adam
    hidden: tuple[Count, ...] = (256, 256)  # widths of the hidden layers


class BC:
    def __init__(self, config: Config, spec: Spec, generator: Generator, seeds: Seeds = ()):
        c = config
        self.config, self.generator = c, generator
        self.standardize = Standardize(spec.obs_dim, spec.obs_mean, spec.obs_std, generator.device)
        self.actor = Actor(spec.obs_dim, spec.act_dim, c.hidden, seeds, generator)
        self.actor_opt = adam(self.actor, c.lr)

    def update(self, batch: Batch, turn: int) -> Metrics:
        return descend(self.actor_opt, *self.actor_loss(batch))

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss = (self.actor(batch["obs"]) - batch["act"]).square().mean((-2, -1))  # (*S,)
        return loss, {"actor/loss": loss}

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        return self.actor(self.standardize(now["obs"])), memory


METHOD = Method(BC, Config, stages=offline, fields=("obs", "act"))
