"""Episodes of a policy in vectorized environments, raw returns kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium
import torch
from scipy.signal import lfilter
from torch import Generator, Tensor

from offrl.engine.method import Algorithm, Batch, Policy, scenarios
from offrl.envs.make import tasks
from offrl.envs.vector import Vector
from offrl.seeding import derive


@dataclass(frozen=True)
class Episodes:
    """Undiscounted returns and lengths, (*S, episodes) each.

    With several scenarios these are of the headline: per seed, the scenario with the highest mean
    return of this very evaluation, as methods with several targets are published. Where the
    scenarios are an environment's tasks, it is all episodes of all of them.

    Attributes:
        scenarios: name -> the episodes of that scenario; empty where there is one without a name.
        bias: (*S, episodes), of a method that estimates its returns; see `Bias`.
    """

    returns: Tensor
    lengths: Tensor
    scenarios: "dict[str, Episodes]" = field(default_factory=dict)
    bias: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Raw values for the learning curve: return, length, bias, and return/<scenario>, ..."""
        values = {"return": self.returns, "length": self.lengths}
        if self.bias is not None:
            values["bias"] = self.bias
        for name, episodes in self.scenarios.items():
            values |= {f"{key}/{name}": value for key, value in episodes.named().items()}
        return values


class Bias:
    """A method's estimates of its discounted return, minus what the rest of the episode paid.

    Means over the steps of an episode. Where it was cut off, only steps count whose return the cut
    weighs by a hundredth or less; nan if there are none.

    Args:
        algo: with `estimate`; see `engine.stage.Policy`.
        count: of environments.
        each: episodes of each.

    Attributes:
        values: (count, each).
    """

    def __init__(self, algo: Any, count: int, each: int):
        self.estimate, self.discount = algo.estimate, algo.config.discount
        fades = 0 < self.discount < 1
        self.tail = math.ceil(math.log(0.01) / math.log(self.discount)) if fades else 0
        self.values = torch.zeros(count, each)
        self.past: list[Tensor] = []  # (2, count) each: estimate and reward
        self.begin = [0] * count

    def add(
        self,
        now: Batch,
        act: Tensor,
        reward: Tensor,
        terminal: Tensor,
        timeout: Tensor,
        finished: Tensor,
    ) -> None:
        """One step of all environments, before `finished` counts the episodes that end with it."""
        self.past.append(torch.stack([self.estimate(now, act).flatten().cpu(), reward]))
        for i in (terminal + timeout).nonzero().flatten().tolist():
            if finished[i] < self.values.shape[1]:
                guess, paid = torch.stack(self.past[self.begin[i] :])[..., i].T.numpy()
                rest = lfilter([1.0], [1.0, -self.discount], paid[::-1])[::-1]
                whole = len(rest) if terminal[i] else max(0, len(rest) - self.tail)
                known = (guess - rest)[:whole]
                self.values[i, finished[i]] = float(known.mean()) if whole else math.nan
            self.begin[i] = len(self.past)


class Evaluator:
    """Runs the same number of episodes in each of a fixed set of environments.

    All scenarios are played in lock-step: the policy sees one batch (*S, scenarios * width, ...).
    Every scenario and every stacked seed meets the same start states.

    Args:
        make: maker of one environment.
        seeds: stacked seed axes of the algorithm, () or (S,).
        width: environments per seed and scenario; each runs episodes / width episodes. The batch
            that the policy sees is therefore always the same size, finished environments included.
        seed: of the environments; every call starts from the same states.
        device: of the policy.
        scenarios: names, as `stage.scenarios` tells them; the policy learns the index of its own.
        tasks: reset options of each scenario, where these are tasks of the environment and not
            wishes of the method.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        seeds: tuple[int, ...] = (),
        width: int = 10,
        seed: int = 0,
        device: torch.device | str = "cpu",
        scenarios: tuple[str, ...] = (),
        tasks: Sequence[dict[str, Any]] = (),
    ):
        self.seeds, self.width, self.device = seeds, width, torch.device(device)
        self.seed, self.scenarios, self.tasks = seed, scenarios, tasks
        self.parts = max(1, len(scenarios))
        groups = int(torch.Size(seeds).numel()) * self.parts
        starts = [derive(seed, "evaluation", i) for i in range(width)] * groups
        options = [task for task in tasks for _ in range(width)] * (groups // self.parts)
        self.envs = Vector([make] * (groups * width), starts, options or None)

    @torch.no_grad()
    def __call__(
        self, algo: Policy, episodes: int, tick: Callable[[int], None] | None = None
    ) -> Episodes:
        """Play `episodes` per seed and scenario with the deterministic policy.

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
        memory, start, reward = None, torch.ones(count), torch.zeros(count)
        scenario = self.grouped(rows // self.width % self.parts)
        obs = self.envs.reset()
        bias = Bias(algo, count, each) if self.parts == 1 and hasattr(algo, "estimate") else None
        while bool((finished < each).any()):
            now = {
                "obs": self.grouped(obs),
                "start": self.grouped(start),
                "reward": self.grouped(reward),
                "scenario": scenario,
            }
            if self.envs.goal is not None:
                now["goal"] = self.grouped(self.envs.goal)
            act, memory = algo.act(now, memory, explore=False, generator=generator)
            step = self.envs.step(act.flatten(0, len(self.seeds)).cpu())
            _, reward, terminal, timeout, obs = step
            if bias is not None:
                bias.add(now, act, reward, terminal, timeout, finished)
            running = (finished < each).float()
            slot = finished.clamp(max=each - 1)
            returns[rows, slot] += reward * running
            lengths[rows, slot] += running
            start = terminal + timeout
            done = (start * running).long()
            finished += done
            if tick is not None and bool(done.any()):
                tick(int(done.sum()))
        shape = (*self.seeds, self.parts, episodes)
        found = self.summed_up(returns.view(shape), lengths.view(shape))
        if bias is None:
            return found
        return replace(found, bias=bias.values.view(*self.seeds, episodes))

    def summed_up(self, returns: Tensor, lengths: Tensor) -> Episodes:
        """Episodes from values (*S, scenarios, episodes)."""
        pairs = zip(returns.unbind(-2), lengths.unbind(-2), strict=True)
        apart = {name: Episodes(*pair) for name, pair in zip(self.scenarios, pairs, strict=False)}
        if self.tasks:
            return Episodes(returns.flatten(-2), lengths.flatten(-2), apart)
        best = (
            returns.mean(-1).argmax(-1)[..., None, None].expand(*self.seeds, 1, returns.shape[-1])
        )
        headline = returns.gather(-2, best).squeeze(-2), lengths.gather(-2, best).squeeze(-2)
        return Episodes(*headline, apart)

    def grouped(self, value: Tensor) -> Tensor:
        return value.view(*self.seeds, -1, *value.shape[1:]).to(self.device)

    def close(self) -> None:
        self.envs.close()


def evaluator_of(
    algo: Algorithm,
    make: Callable[[], Any],
    axes: tuple[int, ...],
    episodes: Sequence[int],
    seed: int,
    device: torch.device | str = "cpu",
) -> Evaluator:
    """The evaluator of a method's scenarios, or of the environment's tasks where it has none.

    Args:
        episodes: the numbers of episodes per scenario that it will be asked for.
    """
    names = scenarios(algo)
    env = make()
    options = () if names else tasks(env)
    env.close()
    names = names or tuple(f"task-{option['task_id']}" for option in options)
    return Evaluator(
        make, axes, width(*episodes), derive(seed, "evaluator"), device, names, options
    )


def width(*episodes: int) -> int:
    """Environments of an evaluation: the largest divisor of both episode counts up to ten."""
    common = math.gcd(*episodes)
    return max(n for n in range(1, 11) if common % n == 0)
