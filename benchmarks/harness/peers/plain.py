"""TD3+BC as torch code is commonly written: one module per layer, losses read at every update.

A module and an optimizer per network, fields that are gathered one by one, a loop over parameters
for the targets, the actor's gradient taken through the critic's parameters too, and `.item()` of
each loss. It computes what `offrl.algos.td3bc` computes, as a test shows.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FIELDS = ("obs", "act", "reward", "next_obs", "terminal")


class Actor(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, act_dim),
            nn.Tanh(),
        )

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs)


class Critic(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim + act_dim, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, 1),
        )

    def forward(self, obs: Tensor, act: Tensor) -> Tensor:
        return self.net(torch.cat([obs, act], -1)).squeeze(-1)


class TD3BC:
    """Over standardized transitions: obs, act, reward, next_obs, terminal, (N, ...) each."""

    def __init__(self, fields: dict[str, Tensor], batch: int, device: torch.device):
        self.data = {name: value.to(device) for name, value in fields.items()}
        self.batch, self.device, self.count = batch, device, 0
        obs_dim, act_dim = (self.data[name].shape[-1] for name in ("obs", "act"))
        self.actor = Actor(obs_dim, act_dim).to(device)
        self.critic_1, self.critic_2 = (Critic(obs_dim, act_dim).to(device) for _ in range(2))
        self.actor_target = deepcopy(self.actor)
        self.target_1, self.target_2 = deepcopy(self.critic_1), deepcopy(self.critic_2)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.critic_1_opt = torch.optim.Adam(self.critic_1.parameters(), lr=3e-4)
        self.critic_2_opt = torch.optim.Adam(self.critic_2.parameters(), lr=3e-4)

    def update(self) -> dict[str, float]:
        self.count += 1
        index = torch.randint(len(self.data["obs"]), (self.batch,), device=self.device)
        obs, act, reward, next_obs, terminal = (self.data[name][index] for name in FIELDS)
        with torch.no_grad():
            noise = (torch.randn_like(act) * 0.2).clamp(-0.5, 0.5)
            next_act = (self.actor_target(next_obs) + noise).clamp(-1, 1)
            smaller = torch.min(
                self.target_1(next_obs, next_act), self.target_2(next_obs, next_act)
            )
            y = reward + 0.99 * (1 - terminal) * smaller
        loss = F.mse_loss(self.critic_1(obs, act), y) + F.mse_loss(self.critic_2(obs, act), y)
        self.critic_1_opt.zero_grad()
        self.critic_2_opt.zero_grad()
        loss.backward()
        self.critic_1_opt.step()
        self.critic_2_opt.step()
        log = {"critic_loss": loss.item()}
        if self.count % 2 == 0:
            pi = self.actor(obs)
            q = self.critic_1(obs, pi)
            loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, act)
            self.actor_opt.zero_grad()
            loss.backward()
            self.actor_opt.step()
            log["actor_loss"] = loss.item()
            for target, online in (
                (self.actor_target, self.actor),
                (self.target_1, self.critic_1),
                (self.target_2, self.critic_2),
            ):
                for p, new in zip(target.parameters(), online.parameters(), strict=True):
                    p.data.copy_(0.995 * p.data + 0.005 * new.data)
        return log


def td3bc(fields: dict[str, Tensor], batch: int, device: torch.device) -> Callable[[int], None]:
    """`run` over the transitions that `TD3BC` takes."""
    peer = TD3BC(fields, batch, device)

    def run(updates: int) -> None:
        for _ in range(updates):
            peer.update()

    return run
