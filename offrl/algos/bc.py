"""Behavior cloning: the action of the data, by least squares.

    actor    L = mean_b,a (pi(s) - a)^2

The baseline of Fujimoto and Gu 2021 and of CORL: tanh MLP, standardized observations.
Shapes: *S optional leading seed axes, B batch.

Differences from CORL's code: none known; its batch, network and learning rate are used.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data import Dataset, prepare, transitions
from offrl.engine.method import Batch, Metrics, Run, Spec, Stage, load_modules, modules_state
from offrl.engine.optim import adam, descend
from offrl.nets import Actor, Standardize

FIELDS = ("obs", "act")


@dataclass(frozen=True)
class Config:
    steps: int = 1_000_000  # updates
    batch: int = 256  # transitions per update
    lr: float = 3e-4  # Adam
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers


class BC:
    NAMES = ("standardize", "actor", "actor_opt")

    def __init__(
        self, config: Config, spec: Spec, generator: Generator, seeds: tuple[int, ...] = ()
    ):
        c = config
        self.config, self.generator, self.cycle = c, generator, 1
        self.standardize = Standardize(spec.obs_dim, spec.obs_mean, spec.obs_std, generator.device)
        self.actor = Actor(spec.obs_dim, spec.act_dim, c.hidden, seeds, generator)
        self.actor_opt = adam(self.actor, c.lr)

    def update(self, batch: Batch, step: int) -> Metrics:
        return descend(self.actor_opt, *self.actor_loss(batch))

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss = (self.actor(batch["obs"]) - batch["act"]).square().mean((-2, -1))  # (*S,)
        return loss, {"actor/loss": loss}

    @torch.no_grad()
    def act(
        self,
        now: Batch,
        memory: Any = None,
        explore: bool = False,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Any]:
        return self.actor(self.standardize(now["obs"])), memory

    def state(self) -> dict[str, Any]:
        return modules_state(self, self.NAMES)

    def load(self, state: dict[str, Any]) -> None:
        load_modules(self, self.NAMES, state)


make = BC


def stages(algo: BC, data: Dataset, run: Run) -> list[Stage]:
    def start():
        ready = prepare(algo.standardize)
        return transitions(
            data, algo.config.batch, run.seeds, run.device, names=FIELDS, transform=ready
        )

    return [Stage("train", run.steps, start, algo.update, algo.cycle)]
