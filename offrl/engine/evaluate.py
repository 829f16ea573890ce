"""Episodes of a policy in vectorized environments, raw returns kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import gymnasium
import torch
from scipy.signal import lfilter
from torch import Generator, Tensor

from offrl.engine.method import Now, Policy, Seeds
from offrl.envs.make import tasks
from offrl.envs.vector import Vector
from offrl.seeding import derive


@dataclass(frozen=True)
class Scenario:
    """A situation in which a policy is scored: a wish of its method, a task, a changed world."""

    name: str = ""  # of its values `return/<name>` and so on; "" to report the headline only
    options: dict[str, Any] | None = None  # of every reset, such as OGBench's {"task_id": 1}
    # of the environment, such as {"mass": 1.2}: keywords of `offrl.envs.make.factory`
    settings: dict[str, Any] = field(default_factory=dict)


def biases(past: Tensor, discount: float, each: int) -> Tensor:
    """A method's estimates of its discounted return, minus what the rest of the episode paid.

    Means over the steps of an episode, (n, each). Where it was cut off, only steps count whose
    return the cut weighs by a hundredth or less; nan if there are none.

    Args:
        past: estimate, reward, terminal and timeout of the steps of n environments, (T, 4, n).
        each: episodes of each environment.
    """
    fades = 0 < discount < 1
    tail = math.ceil(math.log(0.01) / math.log(discount)) if fades else 0
    found = torch.full((past.shape[-1], each), math.nan)
    for i, (guesses, rewards, terminal, timeout) in enumerate(past.permute(2, 1, 0)):
        begin = 0
        for k, end in enumerate((terminal + timeout).nonzero().flatten().tolist()[:each]):
            guess, paid = guesses[begin : end + 1].numpy(), rewards[begin : end + 1].numpy()
            rest = lfilter([1.0], [1.0, -discount], paid[::-1])[::-1]
            whole = len(rest) if terminal[end] else max(0, len(rest) - tail)
            if whole:
                found[i, k] = float((guess - rest)[:whole].mean())
            begin = end + 1
    return found


class Evaluator:
    """Scores a policy by roll-outs; a `Task.evaluate`.

    Runs the same number of episodes in each of a fixed set of environments. All scenarios are
    played in lock-step: the policy sees one batch (*S, scenarios * width, ...). Every scenario and
    every stacked seed meets the same random numbers, and every call begins with the same states.

    Args:
        make: maker of one environment; takes the settings of the scenarios.
        seeds: stacked seed axes of the algorithm, () or (S,).
        width: environments per seed and scenario; each runs episodes / width episodes. The batch
            that the policy sees is therefore always the same size, finished environments included.
        seed: of the environments.
        device: of the policy.
        scenarios: at least one; the policy is told the index of its own.
        headline: which episodes are the score: "all" of all scenarios; those of the "first", such
            as the nominal one of a robustness sweep; or, per seed, those of the "best", which has
            the highest mean return of this very evaluation, as methods with several targets are
            published.
    """

    def __init__(
        self,
        make: Callable[..., gymnasium.Env],
        seeds: Seeds = (),
        width: int = 10,
        seed: int = 0,
        device: torch.device | str = "cpu",
        scenarios: Sequence[Scenario] = (Scenario(),),
        headline: Literal["all", "first", "best"] = "all",
    ):
        self.seeds, self.width, self.device = seeds, width, torch.device(device)
        self.seed, self.scenarios, self.headline = seed, scenarios, headline
        groups = int(torch.Size(seeds).numel())
        each = [scenario for scenario in scenarios for _ in range(width)] * groups
        starts = [derive(seed, "evaluation", i) for i in range(width)] * groups * len(scenarios)
        makers = [partial(make, **scenario.settings) for scenario in each]
        self.envs = Vector(makers, starts, [scenario.options for scenario in each])

    @torch.no_grad()
    def __call__(
        self,
        algo: Policy,
        episodes: int,
        explore: bool = False,
        tick: Callable[[int], None] | None = None,
    ) -> dict[str, Tensor]:
        """Play `episodes` per seed and scenario.

        Args:
            explore: act as in training.
            tick: told the number of finished episodes, for a progress bar.

        Returns:
            Of the headline `return` (undiscounted), `length` and, where the method estimates its
            returns, `bias` (see `biases`), (*S, episodes), or (*S, scenarios * episodes) of "all";
            then (*S, episodes) of every scenario with a name, `return/<name>` and so on.

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
        scenario = self.grouped(rows // self.width % len(self.scenarios))
        obs = self.envs.reset()
        estimate: Any = getattr(algo, "estimate", None)
        past: list[Tensor] = []  # of the estimates
        while bool((finished < each).any()):
            now: Now = {"scenario": scenario, "explore": explore, "generator": generator}
            seen = {"obs": obs, "start": start, "reward": reward, "goal": self.envs.goal}
            now |= {name: self.grouped(x) for name, x in seen.items() if x is not None}
            act, memory = algo.act(now, memory)
            step = self.envs.step(act.flatten(0, len(self.seeds)).cpu())
            _, reward, terminal, timeout, obs = step
            if estimate is not None:
                guess = estimate(now, act).flatten().cpu()
                past.append(torch.stack([guess, reward, terminal, timeout]))
            running = (finished < each).float()
            slot = finished.clamp(max=each - 1)
            returns[rows, slot] += reward * running
            lengths[rows, slot] += running
            start = terminal + timeout
            done = (start * running).long()
            finished += done
            if tick is not None and bool(done.any()):
                tick(int(done.sum()))
        played = {"return": returns, "length": lengths}
        if estimate is not None:
            played["bias"] = biases(torch.stack(past), algo.config.discount, each)  # type: ignore
        return self.named(played)

    def named(self, played: dict[str, Tensor]) -> dict[str, Tensor]:
        """The headline and the scenarios of values (environments, episodes of each)."""
        shape = (*self.seeds, len(self.scenarios), -1)
        values = {key: value.view(shape) for key, value in played.items()}
        best = values["return"].mean(-1).argmax(-1)[..., None, None]
        if self.headline == "best":
            found = {k: v.take_along_dim(best, -2).squeeze(-2) for k, v in values.items()}
        elif self.headline == "first":
            found = {k: v.select(-2, 0) for k, v in values.items()}
        else:
            found = {k: v.flatten(-2) for k, v in values.items()}
        for i, scenario in enumerate(self.scenarios):
            if scenario.name:
                found |= {f"{k}/{scenario.name}": v.select(-2, i) for k, v in values.items()}
        return found

    def total(self, episodes: int) -> int:
        """Episodes that a call plays, of all seeds and scenarios."""
        return self.envs.count // self.width * episodes

    def grouped(self, value: Tensor) -> Tensor:
        return value.view(*self.seeds, -1, *value.shape[1:]).to(self.device)

    def close(self) -> None:
        self.envs.close()


def scenarios_of(names: Sequence[str], make: Callable[..., Any]) -> list[Scenario]:
    """A method's, by name; else the environment's tasks; else a single one without a name."""
    if names:
        return [Scenario(name) for name in names]
    env = make()
    options = tasks(env)
    env.close()
    found = [Scenario(f"task-{option['task_id']}", option) for option in options]
    return found or [Scenario()]


def width(*episodes: int) -> int:
    """Environments of an evaluation: the largest divisor of both episode counts up to ten."""
    common = math.gcd(*episodes)
    return max(n for n in range(1, 11) if common % n == 0)
