"""Environment steps into a replay, for online methods."""

from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from offrl.data.replay import Replay
from offrl.engine.stage import Algorithm


class Environments(Protocol):
    """n environments stepped together; see offrl.envs.vector.Vector."""

    count: int
    obs_dim: int
    act_dim: int

    def reset(self) -> Tensor: ...

    def step(self, act: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any], obs: Tensor) -> Tensor: ...


class Collector:
    """Steps S groups of environments with a policy and stores what happened.

    Args:
        envs: len(seeds) * n environments; each stacked seed owns a group of n.
        capacity: rows of each seed's replay.
        seeds: stacked seed axes.
        device: of the replay and the policy.
    """

    def __init__(
        self,
        envs: Environments,
        capacity: int,
        seeds: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
    ):
        self.envs, self.seeds, self.device = envs, seeds, torch.device(device)
        groups = int(torch.Size(seeds).numel())
        self.group = envs.count // groups  # environments per seed
        scalar: tuple[tuple[int, ...], torch.dtype] = ((), torch.float32)
        vector = lambda width: ((width,), torch.float32)  # noqa: E731
        fields = {
            "obs": vector(envs.obs_dim), "act": vector(envs.act_dim), "reward": scalar,
            "next_obs": vector(envs.obs_dim), "terminal": scalar,
        }  # fmt: skip
        self.replay = Replay(capacity, fields, seeds, device)
        self.obs: Tensor | None = None  # (*S, n, o) on the device

    def random(self, steps: int, generator: Generator) -> None:
        """Take `steps` uniformly random steps per seed."""
        for _ in range(0, steps, self.group):
            shape = (*self.seeds, self.group, self.envs.act_dim)
            act = torch.rand(shape, generator=generator, device=self.device) * 2 - 1
            self.step(act)

    def follow(self, algo: Algorithm) -> None:
        """One exploring step of the policy in every environment."""
        act, _ = algo.act({"obs": self.observe()}, explore=True, generator=algo.generator)
        self.step(act)

    def observe(self) -> Tensor:
        """The current observations (*S, n, o); resets the environments the first time."""
        if self.obs is None:
            self.obs = self.grouped(self.envs.reset())
        return self.obs

    def step(self, act: Tensor) -> None:
        """Apply actions (*S, n, a) in [-1, 1] and store the transitions."""
        obs = self.observe()
        flat = act.detach().reshape(self.envs.count, -1).to("cpu")
        next_obs, reward, terminal, _, start_obs = self.envs.step(flat)
        self.replay.add({
            "obs": obs, "act": act.detach(), "reward": self.grouped(reward),
            "next_obs": self.grouped(next_obs), "terminal": self.grouped(terminal),
        })  # fmt: skip
        self.obs = self.grouped(start_obs)

    def grouped(self, value: Tensor) -> Tensor:
        return value.view(*self.seeds, self.group, *value.shape[1:]).to(self.device)

    def state(self) -> dict[str, Any]:
        return {
            "replay": self.replay.state(),
            "envs": self.envs.state(),
            "obs": self.observe(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.replay.load(state["replay"])
        obs = state["obs"].cpu().reshape(self.envs.count, -1)
        self.obs = self.grouped(self.envs.load(state["envs"], obs))
