"""Environment steps into a replay, for online methods."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from offrl.data.replay import Replay
from offrl.engine.method import Algorithm, Metrics, Run, Stage


class Environments(Protocol):
    """n environments stepped together; see offrl.envs.vector.Vector."""

    count: int
    obs_dim: int
    act_dim: int
    discrete: bool

    def reset(self) -> Tensor: ...

    def step(self, act: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any], obs: Tensor) -> Tensor: ...


class Collector:
    """Steps S groups of environments with a policy and stores what happened.

    Args:
        envs: len(seeds) * n environments; each stacked seed owns a group of n.
        seeds: stacked seed axes.
        device: of the replay and the policy.

    Attributes:
        replay: fields obs, act, reward, next_obs, terminal and timeout, once `keep` has made it.
    """

    replay: Replay

    def __init__(
        self, envs: Environments, seeds: tuple[int, ...] = (), device: torch.device | str = "cpu"
    ):
        self.envs, self.seeds, self.device = envs, seeds, torch.device(device)
        groups = int(torch.Size(seeds).numel())
        self.group = envs.count // groups  # environments per seed
        self.obs: Tensor | None = None  # (*S, n, o) on the device

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
        """Take `steps` uniformly random steps per seed."""
        for _ in range(0, steps, self.group):
            shape, to = (*self.seeds, self.group), self.device
            if self.envs.discrete:
                act = torch.randint(self.envs.act_dim, shape, generator=generator, device=to)
            else:
                shape = (*shape, self.envs.act_dim)
                act = torch.rand(shape, generator=generator, device=to) * 2 - 1
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
        """Apply actions (*S, n, a) in [-1, 1], or int64 (*S, n), and store the transitions."""
        obs = self.observe()
        flat = act.detach().flatten(0, len(self.seeds)).to("cpu")
        next_obs, reward, terminal, timeout, start_obs = self.envs.step(flat)
        self.replay.add(
            {
                "obs": obs,
                "act": act.detach(),
                "reward": self.grouped(reward),
                "next_obs": self.grouped(next_obs),
                "terminal": self.grouped(terminal),
                "timeout": self.grouped(timeout),
            }
        )
        self.obs = self.grouped(start_obs)

    def grouped(self, value: Tensor) -> Tensor:
        return value.view(*self.seeds, self.group, *value.shape[1:]).to(self.device)

    def state(self) -> dict[str, Any]:
        return {"replay": self.replay.state(), "envs": self.envs.state(), "obs": self.observe()}

    def load(self, state: dict[str, Any]) -> None:
        self.replay.load(state["replay"])
        obs = state["obs"].cpu().reshape(self.envs.count, -1)
        self.obs = self.grouped(self.envs.load(state["envs"], obs))


def watched(algo: Any, data: Collector, rows: int = 2048) -> Callable[[], Metrics]:
    """What `algo.measure` says of rows of the replay, always drawn by the same numbers.

    Args:
        rows: at least four times the width of a representation whose rank is measured.
    """

    def measure() -> Metrics:
        generator = Generator(data.device).manual_seed(0)
        return algo.measure(data.replay.sampler(rows)(generator))

    return measure


def off_policy(algo: Any, data: Collector, run: Run) -> list[Stage]:
    """The stage of a method that learns from its own replay: one update per environment step.

    Args:
        algo: with `config.warmup` random environment steps, counted in `run.steps`,
            `config.batch` and `config.capacity`.
    """
    warmup = algo.config.warmup
    data.keep(min(algo.config.capacity, run.steps))
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
            measure=watched(algo, data),
            parts={"collector": data},
        )
    ]
