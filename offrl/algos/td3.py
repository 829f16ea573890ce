"""TD3: deterministic policy gradient with clipped double critics and delayed actor updates.

Fujimoto, van Hoof and Meger, "Addressing Function Approximation Error in Actor-Critic Methods",
ICML 2018, arXiv:1802.09477.

    target   y = r + discount (1 - terminal) min_e Q'_e(s', clip(pi'(s') + clipped noise))
    critics  L = sum_e mean_b (Q_e(s, a) - y)^2
    actor    L = -mean_b Q_0(s, pi(s)), every second update, and only then the targets move
    explore  a = clip(pi(s) + N(0, explore_noise^2))

Shapes: *S optional leading seed axes, B batch, E critics. Primes are target networks.

Differences from the authors' code: none to its current version, which itself differs from the
paper (there 400,300 units, learning rate 1e-3, batch 100). Actions live in [-1, 1], so noise
scales are shares of the environment's half-range.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data.collect import Collector
from offrl.engine.optim import adam, descend, frozen, polyak
from offrl.engine.stage import Batch, Metrics, Run, Spec, Stage, load_modules, modules_state
from offrl.nets import Actor, Critics

FIELDS = ()  # needs no data set: it collects its own


@dataclass(frozen=True)
class Config:
    steps: int = 1_000_000  # environment steps, warm-up included
    batch: int = 256
    lr: float = 3e-4  # Adam, both optimizers
    discount: float = 0.99
    tau: float = 0.005  # share of the online weights in each target update
    noise: float = 0.2  # std of the target-action noise
    noise_clip: float = 0.5
    explore_noise: float = 0.1  # std of the noise on collected actions
    actor_every: int = 2  # critic updates per actor update
    hidden: tuple[int, ...] = (256, 256)
    warmup: int = 25_000  # uniformly random environment steps before the first update
    capacity: int = 1_000_000  # rows of the replay


class TD3:
    NAMES = (
        "actor", "critics", "actor_target", "critics_target", "actor_opt", "critics_opt",
    )  # fmt: skip

    def __init__(
        self, config: Config, spec: Spec, generator: Generator, seeds: tuple[int, ...] = ()
    ):
        c = config
        self.config, self.generator, self.cycle = c, generator, c.actor_every
        self.actor = Actor(spec.obs_dim, spec.act_dim, c.hidden, seeds, generator)
        self.critics = Critics(spec.obs_dim, spec.act_dim, c.hidden, 2, seeds, generator)
        self.actor_target = frozen(deepcopy(self.actor))
        self.critics_target = frozen(deepcopy(self.critics))
        self.actor_opt = adam(self.actor, c.lr)
        self.critics_opt = adam(self.critics, c.lr)

    def update(self, batch: Batch, step: int) -> Metrics:
        metrics = descend(self.critics_opt, *self.critics_loss(batch))
        if (step + 1) % self.config.actor_every == 0:
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
        noise = torch.empty_like(batch["act"]).normal_(0, c.noise, generator=self.generator)
        act = self.actor_target(batch["next_obs"]) + noise.clamp(-c.noise_clip, c.noise_clip)
        q = self.critics_target(batch["next_obs"], act.clamp(-1, 1)).amin(-2)  # (*S, B)
        return batch["reward"] + c.discount * (1 - batch["terminal"]) * q

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        q = self.critics.first(batch["obs"], self.actor(batch["obs"]))  # (*S, B)
        loss = -q.mean(-1)  # (*S,)
        return loss, {"actor/loss": loss}

    @torch.no_grad()
    def act(
        self,
        now: Batch,
        memory: Any = None,
        explore: bool = False,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Any]:
        act = self.actor(now["obs"])
        if explore:
            noise = torch.empty_like(act)
            noise.normal_(0, self.config.explore_noise, generator=generator or self.generator)
            act = (act + noise).clamp(-1, 1)
        return act, memory

    def state(self) -> dict[str, Any]:
        return modules_state(self, self.NAMES)

    def load(self, state: dict[str, Any]) -> None:
        load_modules(self, self.NAMES, state)


make = TD3


def stages(algo: TD3, data: Collector, run: Run) -> list[Stage]:
    warmup = algo.config.warmup
    return [
        Stage(
            "train",
            run.steps - warmup,
            start=lambda: data.replay.sampler(algo.config.batch),
            update=algo.update,
            cycle=algo.cycle,
            before=lambda: data.random(warmup, algo.generator),
            between=[(data.group, lambda: data.follow(algo))],
            offset=warmup,
            parts={"collector": data},
        )
    ]
