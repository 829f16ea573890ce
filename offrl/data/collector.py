"""Environment steps into a replay, for online methods."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from offrl.data.replay import Replay
from offrl.engine.method import Algorithm, Run, Task

Choose = Callable[[int], dict[str, Any] | None]  # number of an environment -> options of its reset


class Environments(Protocol):
    """n environments stepped together; see offrl.envs.vector.Vector."""

    count: int
    obs_dim: int
    act_dim: int
    discrete: bool
    players: tuple[int, ...]
    goal: Tensor | None
    on_episode: Choose

    def reset(self) -> Tensor: ...

    def step(self, act: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any], obs: Tensor) -> tuple[Tensor, Tensor]: ...


class Collector:
    """Steps S groups of environments with a policy and stores what happened.

    Args:
        envs: len(seeds) * n environments; each stacked seed owns a group of n.
        seeds: stacked seed axes.
        device: of the replay and the policy.
        on_episode: chooses the options of a reset, asked whenever an episode begins, the first one
            too, in the order of the environments. What it draws from is the caller's to save.

    Attributes:
        replay: fields obs, act, reward, next_obs, terminal and timeout, once `keep` has made it.
    """

    replay: Replay

    def __init__(
        self,
        envs: Environments,
        seeds: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
        on_episode: Choose | None = None,
    ):
        self.envs, self.seeds, self.device = envs, seeds, torch.device(device)
        if on_episode is not None:
            envs.on_episode = on_episode
        groups = int(torch.Size(seeds).numel())
        self.group = envs.count // groups  # environments per seed
        self.obs: Tensor | None = None  # (*S, n, o) on the device
        self.begin_memory()

    @classmethod
    def of(cls, task: Task, run: Run, on_episode: Choose | None = None) -> "Collector":
        """On the environments of a task.

        Raises:
            ValueError: if it has none.
        """
        if task.envs is None:
            raise ValueError("the task has no environments, and the method collects its own data")
        return cls(task.envs(), run.seeds, run.device, on_episode)

    def begin_memory(self) -> None:
        """What the policy is told next is the beginning of what it has seen."""
        self.memory: Any = None
        self.start = torch.ones(*self.seeds, self.group, device=self.device)
        self.reward = torch.zeros_like(self.start)  # of the action before

    def keep(self, capacity: int) -> None:
        """Store the newest `capacity` rows of each seed."""
        scalar: tuple[tuple[int, ...], torch.dtype] = ((), torch.float32)
        obs = ((self.envs.obs_dim,), torch.float32)
        act = ((), torch.int64) if self.envs.discrete else ((self.envs.act_dim,), torch.float32)
        fields = {
            "obs": obs,
            "act": act,
            "reward": scalar,
            "next_obs": obs,
            "terminal": scalar,
            "timeout": scalar,
        }
        self.replay = Replay(capacity, fields, self.seeds, self.device)

    def random(self, steps: int, generator: Generator) -> None:
        """Take `steps` uniformly random steps per seed.

        A policy with memory has not seen them: its next step is told `start` 1 in every row, in the
        middle of an episode too.
        """
        for _ in range(0, steps, self.group):
            shape, to = (*self.seeds, self.group), self.device
            if self.envs.discrete:
                act = torch.randint(self.envs.act_dim, shape, generator=generator, device=to)
            else:
                shape = (*shape, self.envs.act_dim)
                act = torch.rand(shape, generator=generator, device=to) * 2 - 1
            self.step(act)
        self.begin_memory()

    @torch.no_grad()
    def step_policy(self, algo: Algorithm) -> None:
        """One exploring step of the policy in every environment."""
        now = {"obs": self.observe(), "start": self.start, "reward": self.reward}
        if self.envs.goal is not None:
            now["goal"] = self.grouped(self.envs.goal)
        how = {"explore": True, "generator": algo.generator}
        act, self.memory = algo.act(now | how, self.memory)
        self.step(act)

    def observe(self) -> Tensor:
        """The current observations (*S, n, o); resets the environments the first time."""
        if self.obs is None:
            self.obs = self.grouped(self.envs.reset())
        return self.obs

    def step(self, act: Tensor) -> None:
        """Apply actions (*S, n, a) in [-1, 1], or int64 (*S, n), and store the transitions."""
        obs = self.observe()
        flat = act.detach().flatten(0, len(self.seeds)).to("cpu")
        *found, now = map(self.grouped, self.envs.step(flat))
        next_obs, reward, terminal, timeout = found
        self.replay.add(
            {
                "obs": obs,
                "act": act.detach(),
                "reward": reward,
                "next_obs": next_obs,
                "terminal": terminal,
                "timeout": timeout,
            }
        )
        self.obs, self.start = now, terminal + timeout
        self.reward = reward * (1 - self.start)

    def grouped(self, value: Tensor) -> Tensor:
        return value.view(*self.seeds, self.group, *value.shape[1:]).to(self.device)

    def save(self, place: Path) -> dict[str, Any]:
        """The environments, what the policy is told next, and what the replay's `save` returns."""
        return {
            "replay": self.replay.save(place),
            "envs": None if self.obs is None else self.envs.state(),
            "obs": self.obs,
            "start": self.start,
            "reward": self.reward,
            "memory": self.memory,
        }

    def load(self, state: dict[str, Any], place: Path) -> None:
        """Inverse of `save`; where an environment cannot be restored, an episode begins."""
        self.replay.load(state["replay"], place)
        if state["obs"] is None:  # saved before the first step
            return
        obs = state["obs"].cpu().reshape(self.envs.count, -1)
        self.obs, anew = map(self.grouped, self.envs.load(state["envs"], obs))
        self.start = state["start"].to(self.device).maximum(anew)
        self.reward = state["reward"].to(self.device) * (1 - anew)
        self.memory = moved(state["memory"], self.device)


def moved(memory: Any, device: torch.device) -> Any:
    """A policy's memory on another device."""
    if isinstance(memory, dict):
        return {key: moved(part, device) for key, part in memory.items()}
    if isinstance(memory, (list, tuple)):
        return type(memory)(moved(part, device) for part in memory)
    return memory.to(device) if isinstance(memory, Tensor) else memory
