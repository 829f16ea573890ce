"""A method of one's own in one file: imitate what turned out better than the state promised.

value   L = mean_b (r + discount (1 - terminal) V(s') - V(s))^2,  no gradient through V(s')
actor   L = mean_b w |pi(s) - a|^2,  w = min(exp(alpha advantage / mean |advantage|), 10)

python scripts/train.py algo=examples/own_method.py env=halfcheetah steps=20_000
python scripts/evaluate.py run=runs/own_method/halfcheetah-medium/<time>
python scripts/train.py resume=runs/own_method/halfcheetah-medium/<time>
"""

from dataclasses import dataclass

import torch

from offrl.data.stages import offline
from offrl.engine.method import TRANSITION, Method
from offrl.engine.optim import adam, bootstrap, descend
from offrl.nets import MLP, Actor, Standardize


@dataclass(frozen=True)
class Config:
    steps: int = 100_000  # updates
    batch: int = 256  # transitions per update
    lr: float = 3e-4  # Adam, both optimizers
    discount: float = 0.99  # per step
    alpha: float = 1.0  # 0 is behavior cloning
    reward_scale: float = 1.0
    reward_shift: float = 0.0


class OwnMethod:
    def __init__(self, config, spec, generator, seeds=()):
        self.config, self.generator = config, generator
        self.standardize = Standardize(spec.obs_dim, spec.obs_mean, spec.obs_std, generator.device)
        self.actor = Actor(spec.obs_dim, spec.act_dim, (256, 256), seeds, generator)
        self.value = MLP((spec.obs_dim, 256, 256, 1), seeds, generator)
        self.actor_opt, self.value_opt = adam(self.actor, config.lr), adam(self.value, config.lr)

    def update(self, batch, turn):
        with torch.no_grad():
            later = bootstrap(
                batch, self.value(batch["next_obs"]).squeeze(-1), self.config.discount
            )
        advantage = later - self.value(batch["obs"]).squeeze(-1)  # (*S, B)
        error = advantage.square().mean(-1)
        metrics = descend(self.value_opt, error, {"value/loss": error})
        scale = advantage.detach() / advantage.detach().abs().mean(-1, keepdim=True)
        weight = (self.config.alpha * scale).exp().clamp(max=10)
        miss = (self.actor(batch["obs"]) - batch["act"]).square().mean(-1)
        loss = (weight * miss).mean(-1)  # (*S,)
        return metrics | descend(self.actor_opt, loss, {"actor/loss": loss})

    def act(self, now, memory=None):
        return self.actor(self.standardize(now["obs"])), memory


METHOD = Method(OwnMethod, Config, stages=offline, fields=TRANSITION)
