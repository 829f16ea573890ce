"""TD3+BC: a deterministic actor pulled towards the data.

Fujimoto and Gu, "A Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2021,
arXiv:2106.06860.

    target   y = r + discount (1 - terminal) min_e Q'_e(s', clip(pi'(s') + clipped noise))
    critics  L = sum_e mean_b (Q_e(s, a) - y)^2
    actor    L = mean_b,a (pi(s) - a)^2 - scale mean_b Q_0(s, pi(s))
             scale = alpha / mean_b |Q_0(s, pi(s))|

Shapes: *S optional leading seed axes, B batch, E critics. Primes are target networks, which move
on actor updates only. Observations are standardized by (s - mean) / (std + 1e-3).

Differences from the authors' code: none in the update. Rewards are raw, as theirs; `reward_shift`
is for tasks such as AntMaze, where CORL trains on r - 1.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data import Dataset, prepare, transitions
from offrl.engine.method import Batch, Metrics, Run, Spec, Stage, load_modules, modules_state
from offrl.engine.optim import adam, descend, frozen, polyak
from offrl.nets import Actor, Critics, Standardize
from offrl.regularizers.functional import imitation, normalized_trust

FIELDS = ("obs", "act", "reward", "next_obs", "terminal")


@dataclass(frozen=True)
class Config:
    steps: int = 1_000_000  # updates
    batch: int = 256  # transitions per update
    lr: float = 3e-4  # Adam, both optimizers
    discount: float = 0.99  # per step
    tau: float = 0.005  # share of the online weights in each target update
    noise: float = 0.2  # std of the target-action noise; actions live in [-1, 1]
    noise_clip: float = 0.5  # largest size of that noise
    alpha: float = 2.5  # trust in Q against imitation; 0 is behavior cloning
    actor_every: int = 2  # critic updates per actor update
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    reward_scale: float = 1.0  # r <- reward_scale r + reward_shift, in training only
    reward_shift: float = 0.0  # see reward_scale


class TD3BC:
    NAMES = (
        "standardize",
        "actor",
        "critics",
        "actor_target",
        "critics_target",
        "actor_opt",
        "critics_opt",
    )

    def __init__(
        self, config: Config, spec: Spec, generator: Generator, seeds: tuple[int, ...] = ()
    ):
        c = config
        self.config, self.generator, self.cycle = c, generator, c.actor_every
        self.standardize = Standardize(spec.obs_dim, spec.obs_mean, spec.obs_std, generator.device)
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
        act = self.actor(batch["obs"])
        q = self.critics.first(batch["obs"], act)  # (*S, B)
        scale = normalized_trust(q, self.config.alpha)  # one per seed
        penalty = imitation(act, batch["act"]).mean(-1)
        loss = penalty - scale * q.mean(-1)  # (*S,)
        return loss, {"actor/loss": loss, "actor/imitation": penalty, "actor/scale": scale}

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


make = TD3BC


def stages(algo: TD3BC, data: Dataset, run: Run) -> list[Stage]:
    def start():
        ready = prepare(algo.standardize, algo.config.reward_scale, algo.config.reward_shift)
        return transitions(
            data, algo.config.batch, run.seeds, run.device, names=FIELDS, transform=ready
        )

    return [Stage("train", run.steps, start, algo.update, algo.cycle)]
