"""Episodes of a policy in vectorized environments, raw returns kept."""

from collections.abc import Callable
from dataclasses import dataclass

import gymnasium
import torch
from torch import Generator, Tensor

from offrl.engine.stage import Policy
from offrl.envs.vector import Vector
from offrl.seeding import derive


@dataclass(frozen=True)
class Episodes:
    """Undiscounted returns and lengths, (*S, episodes) each."""

    returns: Tensor
    lengths: Tensor


class Evaluator:
    """Runs the same number of episodes in each of a fixed set of environments.

    Args:
        make: maker of one environment.
        seeds: stacked seed axes of the algorithm, () or (S,).
        width: environments per seed; each runs episodes / width episodes. The batch that the
            policy sees is therefore always the same size, finished environments included.
        seed: of the environments; every call starts from the same states.
        device: of the policy.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        seeds: tuple[int, ...] = (),
        width: int = 10,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.seeds, self.width, self.device = seeds, width, torch.device(device)
        self.seed = seed
        groups = int(torch.Size(seeds).numel())
        # every stacked seed meets the same start states
        starts = [derive(seed, "evaluation", i) for i in range(width)] * groups
        self.envs = Vector([make] * (groups * width), starts)

    @torch.no_grad()
    def __call__(
        self, algo: Policy, episodes: int, tick: Callable[[int], None] | None = None
    ) -> Episodes:
        """Play `episodes` per seed with the deterministic policy.

        Args:
            tick: told the number of finished episodes, for a progress bar.

        Raises:
            ValueError: if `episodes` is not a multiple of the width.
        """
        if episodes % self.width:
            raise ValueError(f"episodes must be a multiple of {self.width}, got {episodes}")
        each, count = episodes // self.width, self.envs.count
        generator = Generator(self.device).manual_seed(derive(self.seed, "policy"))
        returns, lengths = torch.zeros(count, each), torch.zeros(count, each)
        finished = torch.zeros(count, dtype=torch.long)
        rows = torch.arange(count)
        memory, start = None, torch.ones(count)
        obs = self.envs.reset()
        while bool((finished < each).any()):
            now = {"obs": self.grouped(obs), "start": self.grouped(start)}
            act, memory = algo.act(now, memory, explore=False, generator=generator)
            step = self.envs.step(act.reshape(count, -1).cpu())
            _, reward, terminal, timeout, obs = step
            running = (finished < each).float()
            slot = finished.clamp(max=each - 1)
            returns[rows, slot] += reward * running
            lengths[rows, slot] += running
            start = terminal + timeout
            done = (start * running).long()
            finished += done
            if tick is not None and bool(done.any()):
                tick(int(done.sum()))
        shape = (*self.seeds, episodes)
        return Episodes(returns.view(shape), lengths.view(shape))

    def grouped(self, value: Tensor) -> Tensor:
        return value.view(*self.seeds, self.width, *value.shape[1:]).to(self.device)

    def close(self) -> None:
        self.envs.close()
