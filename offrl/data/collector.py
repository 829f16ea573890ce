"""Environment steps into a replay, for online methods."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from offrl.data.dataset import FIELDS
from offrl.data.replay import Replay
from offrl.data.table import Columns
from offrl.engine.method import Algorithm, Run, Task

if TYPE_CHECKING:  # a policy is loaded without Gymnasium
    from offrl.envs.vector import Vector

Choose = Callable[[int], dict[str, Any] | None]  # number of an environment -> options of its reset


class Collector:
    """Steps S groups of environments with a policy and stores what happened.

    Args:
        envs: len(seeds) * n environments; each stacked seed owns a group of n.
        seeds: stacked seed axes.
        device: of the replay and the policy.
        on_episode: chooses the options of a reset; see `Vector`. What it draws from is the
            caller's to save.
    """

    replay: Replay  # of obs, act, reward, next_obs, terminal and timeout, once `keep` has made it

    def __init__(
        self,
        envs: "Vector",
        seeds: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
        on_episode: Choose | None = None,
    ):
        self.envs, self.seeds, self.device = envs, seeds, torch.device(device)
        envs.on_episode = on_episode or envs.on_episode
        self.group = envs.count // math.prod(seeds)  # environments per seed
        self.obs: Tensor | None = None  # (*S, n, o) on the device
        self.begin_memory()

    @classmethod
    def of(cls, task: Task, run: Run, on_episode: Choose | None = None) -> "Collector":
        """On the environments of a task; raises ValueError if it has none."""
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
        obs = ((self.envs.obs_dim,), torch.float32)
        act = ((), torch.int64) if self.envs.discrete else ((self.envs.act_dim,), torch.float32)
        columns: Columns = dict.fromkeys(FIELDS, ((), torch.float32))
        columns |= {"obs": obs, "act": act, "next_obs": obs}
        self.replay = Replay(capacity, columns, self.seeds, self.device)

    def random(self, steps: int, generator: Generator) -> None:
        """Take `steps` uniformly random steps per seed.

        A policy with memory has not seen them: its next step is told `start` 1 in every row, in the
        middle of an episode too.
        """
        shape, count = (*self.seeds, self.group), self.envs.act_dim
        how: dict[str, Any] = {"generator": generator, "device": self.device}
        for _ in range(0, steps, self.group):
            if self.envs.discrete:
                self.step(torch.randint(count, shape, **how))
            else:
                self.step(torch.rand(*shape, count, **how) * 2 - 1)
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
        next_obs, reward, terminal, timeout, now = map(self.grouped, self.envs.step(flat))
        row = (obs, act.detach(), reward, next_obs, terminal, timeout)
        self.replay.add(dict(zip(FIELDS, row, strict=True)))
        self.obs, self.start = now, terminal + timeout
        self.reward = reward * (1 - self.start)

    def grouped(self, value: Tensor) -> Tensor:
        return value.view(*self.seeds, self.group, *value.shape[1:]).to(self.device)

    def save(self, place: Path) -> dict[str, Any]:
        """The environments, what the policy is told next, and what the replay's `save` returns."""
        told = {name: getattr(self, name) for name in ("obs", "start", "reward", "memory")}
        envs = None if self.obs is None else self.envs.state()
        return told | {"envs": envs, "replay": self.replay.save(place)}

    def load(self, state: dict[str, Any], place: Path) -> None:
        """Inverse of `save`; where an environment cannot be restored, an episode begins."""
        self.replay.load(state["replay"], place)
        if state["obs"] is None:  # saved before the first step
            return
        obs = state["obs"].cpu().reshape(self.envs.count, -1)
        self.obs, anew = map(self.grouped, self.envs.load(state["envs"], obs))
        self.start = state["start"].to(self.device).maximum(anew)
        self.reward = state["reward"].to(self.device) * (1 - anew)
        self.memory = each(state["memory"], lambda part: part.to(self.device))


def each(memory: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A policy's memory with every tensor changed; it may lie in dicts, tuples and lists."""
    if isinstance(memory, dict):
        return {key: each(part, change) for key, part in memory.items()}
    if isinstance(memory, (list, tuple)):
        return type(memory)(each(part, change) for part in memory)
    return change(memory) if isinstance(memory, Tensor) else memory
