"""TD3+BC as torch code is commonly written: one module per layer, losses read at every update.

A module and an optimizer per network, fields that are gathered one by one, a loop over parameters
for the targets, the actor's gradient taken through the critic's parameters too, and `.item()` of
each loss. It computes what `offrl.algos.td3bc` computes.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Actor(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, act_dim), nn.Tanh(),
        )  # fmt: skip

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs)


class Critic(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim + act_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, 1),
        )  # fmt: skip

    def forward(self, obs: Tensor, act: Tensor) -> Tensor:
        return self.net(torch.cat([obs, act], -1)).squeeze(-1)


def td3bc(fields: dict[str, Tensor], batch: int, device: torch.device) -> Callable[[int], None]:
    """`run` over standardized transitions: obs, act, reward, next_obs, terminal, (N, ...) each."""
    data = {name: value.to(device) for name, value in fields.items()}
    size, obs_dim = data["obs"].shape
    act_dim = data["act"].shape[-1]
    actor = Actor(obs_dim, act_dim).to(device)
    critic_1, critic_2 = (Critic(obs_dim, act_dim).to(device) for _ in range(2))
    pairs = [(deepcopy(net), net) for net in (actor, critic_1, critic_2)]
    (actor_target, _), (target_1, _), (target_2, _) = pairs
    actor_opt = torch.optim.Adam(actor.parameters(), lr=3e-4)
    critic_1_opt = torch.optim.Adam(critic_1.parameters(), lr=3e-4)
    critic_2_opt = torch.optim.Adam(critic_2.parameters(), lr=3e-4)
    count = 0

    def update() -> dict[str, float]:
        nonlocal count
        count += 1
        index = torch.randint(size, (batch,), device=device)
        obs, act, reward, next_obs, terminal = (data[name][index] for name in data)
        with torch.no_grad():
            noise = (torch.randn_like(act) * 0.2).clamp(-0.5, 0.5)
            next_act = (actor_target(next_obs) + noise).clamp(-1, 1)
            smaller = torch.min(target_1(next_obs, next_act), target_2(next_obs, next_act))
            y = reward + 0.99 * (1 - terminal) * smaller
        loss = F.mse_loss(critic_1(obs, act), y) + F.mse_loss(critic_2(obs, act), y)
        critic_1_opt.zero_grad()
        critic_2_opt.zero_grad()
        loss.backward()
        critic_1_opt.step()
        critic_2_opt.step()
        log = {"critic_loss": loss.item()}
        if count % 2 == 0:
            pi = actor(obs)
            q = critic_1(obs, pi)
            loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, act)
            actor_opt.zero_grad()
            loss.backward()
            actor_opt.step()
            log["actor_loss"] = loss.item()
            for target, online in pairs:
                for p, new in zip(target.parameters(), online.parameters(), strict=True):
                    p.data.copy_(0.995 * p.data + 0.005 * new.data)
        return log

    def run(updates: int) -> None:
        for _ in range(updates):
            update()

    return run
