"""Windows of K consecutive steps with returns-to-go: the batches of sequence methods.

A window's fields carry a time axis behind the batch: obs (*S, B, K, o), act (*S, B, K, a),
return_to_go (*S, B, K), step_in_episode (*S, B, K) int64, and mask (*S, B, K), 1 on real steps.
Short windows are padded on the left.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data.collector import each
from offrl.data.dataset import Dataset
from offrl.data.samplers import BUDGET, gatherer, prepare
from offrl.engine.method import Batch, Now, Run, Sampler, Seeds, Stage, Task
from offrl.nets import Standardize

ACT_PAD = -10.0  # what the released code of Decision Transformer puts there


def returns_to_go(reward: Tensor, starts: Tensor) -> Tensor:
    """Undiscounted sum of the rewards (N,) from every row to the end of its episode, (N,).

    Of the rows that are there: an episode whose last rows were dropped has that much less. Episodes
    begin at the rows `starts`, int64 (E,).

    >>> returns_to_go(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 2]))
    tensor([3., 2., 5.])
    """
    before = torch.cat([torch.zeros(1, dtype=torch.float64), reward.double().cumsum(0)])  # (N + 1,)
    return (before[row_ends(starts, len(reward))] - before[:-1]).float()


def row_ends(starts: Tensor, size: int) -> Tensor:
    """For every row the row behind the last one of its episode, int64 (N,)."""
    ends = torch.cat([starts[1:], torch.tensor([size])])
    return ends.repeat_interleave(ends - starts)


def windows(
    data: Dataset,
    batch: int,
    length: int,
    scale: float = 1.0,
    seeds: tuple[int, ...] = (),
    device: torch.device | str = "cpu",
    transform: Callable[[Batch], Batch] | None = None,
    budget: int = BUDGET,
) -> Sampler:
    """Windows that start at uniform rows: generator -> fields (*S, batch, length, ...) and `index`.

    An episode is thereby met in proportion to its length. A window ends with its episode. Pads hold
    obs 0 before `transform`, act -10, return_to_go 0 and step_in_episode 0. `index` (*S, batch) is
    the first row.

    Args:
        length: K. Steps of a window.
        scale: return_to_go is divided by it.
        transform, budget: see `transitions`.

    Source: Chen et al., "Decision Transformer", NeurIPS 2021, arXiv:2106.01345, released code.
    """
    device, size = torch.device(device), len(data)
    starts = data.starts.cpu()
    fields = {
        "obs": data["obs"],
        "act": data["act"],
        "return_to_go": returns_to_go(data["reward"].cpu(), starts) / scale,
        "step_in_episode": torch.arange(size) - starts.repeat_interleave(data.lengths.cpu()),
    }
    rows = gatherer(fields, device, transform, budget)
    pads = {name: torch.zeros_like(value[:1]).to(device) for name, value in fields.items()}
    pads["act"] = torch.full_like(pads["act"], ACT_PAD)
    pads = transform(pads) if transform else pads
    ends, offsets = row_ends(starts, size).to(device), torch.arange(length, device=device)

    def sample(generator: Generator) -> Batch:
        index = torch.randint(size, (*seeds, batch), generator=generator, device=device)
        missing = (length - ends[index] + index).clamp(min=0).unsqueeze(-1)  # (*S, B, 1)
        real = offsets >= missing  # (*S, B, K)
        row = torch.where(real, index.unsqueeze(-1) + offsets - missing, 0)
        window = {
            name: torch.where(per_step(real, value), value, pads[name])
            for name, value in rows(row).items()
        }
        return window | {"mask": real.float(), "index": index}

    return sample


def extend(
    window: Batch | None, now: Batch, goal: Tensor, scale: float, length: int, act_dim: int
) -> Batch:
    """The window of a policy that meets `now`: moved on by one step, begun anew where start is 1.

    Fields (B, length, ...) as of `windows`, zero on pads; the last action is zero.

    Args:
        window: of the step before, its last action filled in by `act_taken`; None at first.
        now: obs (B, o) as the network takes it, start (B,), reward (B,) of the last action.
        goal: (B,), return to ask for at the start of an episode, divided by `scale`.
        scale: by which rewards are divided.
    """
    start, obs = now["start"].bool(), now["obs"]
    if window is None:
        blank = obs.new_zeros(len(obs), length)
        window = dict.fromkeys(("return_to_go", "mask"), blank)
        widths = {"obs": obs.shape[-1], "act": act_dim}
        window |= {name: blank.new_zeros(*blank.shape, width) for name, width in widths.items()}
        window["step_in_episode"] = blank.long()
    rest = window["return_to_go"][:, -1] - now["reward"] / scale
    new = {
        "obs": obs,
        "act": torch.zeros_like(window["act"][:, 0]),
        "return_to_go": torch.where(start, goal, rest),
        "step_in_episode": torch.where(start, 0, window["step_in_episode"][:, -1] + 1),
        "mask": torch.ones_like(rest),
    }
    kept = lambda value: torch.where(per_step(start, value), 0, value[:, 1:])  # noqa: E731
    return {name: torch.cat([kept(window[name]), new[name].unsqueeze(1)], 1) for name in new}


def act_taken(window: Batch, act: Tensor) -> Batch:
    """The window with the last action (B, a) filled in."""
    return window | {"act": torch.cat([window["act"][:, :-1], act.unsqueeze(1)], 1)}


def per_step(flags: Tensor, like: Tensor) -> Tensor:
    """`flags` with trailing axes of one, to broadcast against `like`."""
    return flags.view(*flags.shape, *[1] * (like.dim() - flags.dim()))


def renewed(memory: Any, start: Tensor) -> Any:
    """A policy's memory with zeros in the rows where start (B,) is 1."""
    return each(memory, lambda part: torch.where(per_step(start, part), 0, part))


def asked_returns(name: str, config: Any, seeds: Seeds, device: torch.device) -> Tensor:
    """The returns that a policy is asked for, divided by the config's scale: (n,).

    Raises ValueError if there are none, or for seed axes, which the methods do not have.
    """
    if seeds:
        raise ValueError(f"{name} carries no seed axis: make one per seed")
    if not config.targets:
        raise ValueError(
            f"{name} has no target returns for this task; give the returns to ask for, such as "
            "algo.targets=[3600,1800]"
        )
    return torch.tensor(config.targets, device=device) / config.scale


def asked(algo: Any, now: Now) -> Tensor:
    """The return (B,) to ask for, divided by the config's scale: `target`, else the scenario's."""
    if "target" in now:
        return now["target"] / algo.config.scale
    return algo.targets[now["scenario"]]


def scenarios(config: Any) -> tuple[str, ...]:
    """The names of the returns that a policy is asked for."""
    return tuple(f"target-{target:g}" for target in config.targets)


def window_stages(
    algo: Any, task: Task, run: Run, between: Sequence[tuple[int, Callable[[], None]]] = ()
) -> list[Stage]:
    """One stage on windows of the data, by `config.batch`, `config.context` and `config.scale`.

    The algorithm's `standardize` is made here: the authors of these methods add 1e-6 to the std,
    the engine's statistics 1e-3.
    """
    c, data = algo.config, task.data
    mean, std = data.statistics(eps=1e-6)
    algo.standardize = Standardize(data.obs_dim, mean, std, run.device)

    def start() -> Sampler:
        ready = prepare(algo.standardize)
        return windows(data, c.batch, c.context, c.scale, run.seeds, run.device, ready)

    return [Stage("train", run.steps, start, algo.update, between=between)]


SEQUENCE: dict[str, Any] = {  # what a METHOD says of itself that learns from windows
    "fields": ("obs", "act", "reward"),
    "episodes": True,
    "stacks": lambda config: False,
    "scenarios": scenarios,
}
