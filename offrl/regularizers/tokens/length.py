"""Rewards that depend on the length of a response; `DLER` and `DRPO` are in length_objectives.

A formula returns the *change* of the reward, (B,) without gradient, in units in which a correct
answer is worth 1; `LengthShaper` adds it, times its coefficient, at the reward hook. Lengths count
the policy's tokens only, without prompt, padding and tool output; whether the end token counts is
the caller's choice. What these papers learned: a length term inside the normalization of a group
can turn correct but long responses negative; punishing the length of wrong answers destabilizes;
zeros of cut responses inflate the variance of a group; shaping should never rank a correct response
below a wrong one.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient, Schedule
from offrl.regularizers.reductions import group_extreme, group_mean, keep, real


def truncate(
    rewards: Tensor, lengths: Tensor, finished: Tensor, *, max_length: float = 4000.0
) -> Tensor:
    """-r for a response that is cut off or longer than `max_length`: its reward becomes 0.

    Args:
        finished: (B,) bool, ended by itself.

    Source: Liu et al., "DLER: Doing Length pEnalty Right", 2025, arXiv:2510.15110, and its code:
    limit 4000, advantages of `DLER`, upper clip 0.28, 16 samples.
    """
    return truncate_beyond(rewards, lengths, finished, torch.full_like(real(lengths), max_length))


def truncate_adaptive(
    rewards: Tensor,
    lengths: Tensor,
    finished: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    max_length: float = 4000.0,
    easy_length: float = 2000.0,
) -> Tensor:
    """`truncate` with the limit `easy_length` for groups of more than half correct responses.

    The numbers come from a secondary source.
    """
    share = group_mean(real(correct), group)
    limit = torch.where(share > 0.5, easy_length, max_length)
    return truncate_beyond(rewards, lengths, finished, limit)


def truncate_beyond(rewards: Tensor, lengths: Tensor, finished: Tensor, limit: Tensor) -> Tensor:
    whole = finished.bool() & (real(lengths) <= limit)
    return torch.where(whole, 0.0, -real(rewards.detach()))


def hapo(lengths: Tensor, correct: Tensor, history: Tensor, *, floor: float = -0.7) -> Tensor:
    """Cosine of the length against the shortest correct response to the prompt so far.

    c = cos(pi/2 min(l / h, 2)): max(floor, c) for correct responses, min(0, c) for wrong ones.

    Args:
        history: (B,), h of the row's prompt from earlier steps; inf where there is none.
        floor: keeps a long correct response, at 1 + floor, above any wrong one while the
            coefficient is below -1 / floor.

    Returns:
        (B,): near 1 for correct responses far shorter than h, 0 at h, `floor` from about 1.5 h on;
        0 to -1 for wrong ones; 0 without a history.

    Source: Huang, Zhang and Cardie, "HAPO", 2025, arXiv:2505.11225, and its code (coefficient 1).

    >>> lengths, correct = torch.tensor([50, 200, 200]), torch.tensor([True, True, False])
    >>> hapo(lengths, correct, torch.full((3,), 100.0))
    tensor([ 0.7071, -0.7000, -1.0000])
    """
    ratio = (real(lengths) / history.clamp(min=1)).clamp(max=2)
    c = torch.cos(math.pi / 2 * ratio)
    shaped = torch.where(correct.bool(), c.clamp(min=floor), c.clamp(max=0))
    return torch.where(history.isfinite(), shaped, 0.0)


def grpo_lambda(
    lengths: Tensor, correct: Tensor, group: Tensor, *, share: float = 0.2, alpha: float = 0.2
) -> Tensor:
    """-alpha sigmoid((l - mean) / std) for correct responses of the groups that do best.

    The `share` of the batch's groups with the highest ratio of correct responses, rounded up (of
    equal ones those of lower id), is ready to be shortened; the others keep their rewards.

    Args:
        share: 0 shapes nothing, 1 every group.
        alpha: about 0.2, and the form, from memory of the paper; not checked.

    Returns:
        (B,) in [-alpha, 0]; mean and (population) std are those of the group's correct responses,
        -alpha / 2 for a single one.

    Source: Dai, Liu and Si, "Stable RL for Efficient Reasoning", 2025, arXiv:2505.18086 (share).
    """
    lengths, right = real(lengths), correct.bool()
    one = torch.ones_like(lengths)
    size = torch.zeros_like(one).index_add(0, group, one)  # per id of a group, 0 for absent ids
    hits = torch.zeros_like(one).index_add(0, group, right.to(one.dtype))
    ratio = torch.where(size > 0, hits / size.clamp(min=1), -1.0)
    order = ratio.argsort(descending=True, stable=True)
    place = torch.arange(len(order), device=order.device)
    rank = torch.empty_like(order).scatter(0, order, place)
    best = (rank < ((size > 0).sum().double() * share - 1e-9).ceil())[group]
    mean = group_mean(lengths, group, right)
    std = group_mean((lengths - mean).square(), group, right).sqrt()
    penalty = -alpha * torch.sigmoid((lengths - mean) / (std + 1e-6))
    return torch.where(best & right, penalty, 0.0)


def kimi(lengths: Tensor, correct: Tensor, group: Tensor) -> Tensor:
    """u = 1/2 - (l - min) / (max - min) over the group; correct ones get u, wrong ones min(0, u).

    Returns:
        (B,): 1/2 for the shortest, -1/2 for the longest, 0 where all are equally long.

    Source: Kimi k1.5, 2025, arXiv:2501.12599; from memory of the paper, not checked.

    >>> kimi(torch.tensor([1, 2, 3]), torch.tensor([True, True, False]), torch.tensor([0, 0, 0]))
    tensor([ 0.5000,  0.0000, -0.5000])
    """
    lengths = real(lengths)
    low, high = group_extreme(lengths, group, largest=False), group_extreme(lengths, group)
    spread = high > low
    u = torch.where(spread, 0.5 - (lengths - low) / torch.where(spread, high - low, 1.0), 0.0)
    return torch.where(correct.bool(), u, u.clamp(max=0))


def curriculum(lengths: Tensor, budget: Tensor) -> Tensor:
    """Triangle over a budget L that shrinks while training: l / L up to L, back to 0 at 2 L.

    Args:
        budget: 0-d, above 0.

    Returns:
        (B,) in [0, 1], 1 for l = L, for correct and wrong responses alike: the weight of
        correctness has to outweigh it where order matters. The paper's rewards are 0.6 correct
        + 0.3 length, or 0.3 and 0.6, next to one for the format.

    Source: Hammoud et al., "Train Long, Think Short", 2025, arXiv:2508.08940.

    >>> curriculum(torch.tensor([50, 100, 150, 300]), torch.tensor(100.0))
    tensor([0.5000, 1.0000, 0.5000, 0.0000])
    """
    return (1 - (real(lengths) / budget - 1).abs()).clamp(min=0)


def levels(lengths: Tensor, level: Tensor, *, targets: Sequence[float]) -> Tensor:
    """Penalty beyond the length that was asked for: 0 up to the target, -1 from twice that on.

    Args:
        level: (B,) int64, index into `targets`; other values are not shaped.
        targets: tokens of each level, such as short, medium, long.

    Source: TLDR, Zhang et al., "Making Small Language Models Efficient Reasoners", 2025,
    arXiv:2505.07961; that only the excess is punished is the paper's, the linear form is ours.
    """
    lengths = real(lengths)
    target = torch.full_like(lengths, torch.inf)
    for index, tokens in enumerate(targets):
        target = torch.where(level == index, float(tokens), target)
    return (1 - lengths / target).clamp(-1, 0)


def overlong(lengths: Tensor, *, max_length: float, buffer: float) -> Tensor:
    """DAPO's soft punishment: 0 up to max_length - buffer, linear to -1 at max_length, -1 beyond.

    Source: Yu et al., "DAPO", 2025, arXiv:2503.14476; the same in TRL, verl and OpenRLHF.

    >>> overlong(torch.tensor([80, 90, 120]), max_length=100, buffer=20)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    return ((max_length - buffer - real(lengths)) / max(buffer, 1e-6)).clamp(-1, 0)


def cosine(
    lengths: Tensor,
    correct: Tensor,
    *,
    max_length: float,
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
) -> Tensor:
    """Half a cosine from one reward at length 0 to another at `max_length`, constant beyond.

    Args:
        right, wrong: the two ends. Long wrong answers are punished less, to keep them exploring.

    The defaults, and the values, are those of TRL 1.16's `get_cosine_scaled_reward`.

    >>> cosine(torch.tensor([50, 50]), torch.tensor([True, False]), max_length=100)
    tensor([ 0.7500, -0.7500])
    """
    wave = (1 + torch.cos(math.pi * (real(lengths) / max_length).clamp(max=1))) / 2
    good, bad = (end + (start - end) * wave for start, end in (right, wrong))
    return torch.where(correct.bool(), good, bad)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        truncate,
        truncate_adaptive,
        hapo,
        grpo_lambda,
        kimi,
        curriculum,
        levels,
        overlong,
        cosine,
    )
}
STATE = {"history": "prompt_id", "budget": "lengths"}  # state a formula reads, and what finds it


class PromptHistory(nn.Module):
    """Length of past correct responses to every prompt, as buffers indexed by `prompt_id`.

    Args:
        prompts: number of prompts; ids lie in [0, prompts).
        statistic: the least length ever seen, or the mean of all.

    One step's `observe` is a pair of sums over the table. It comes from rewards gathered over all
    ranks, so it must not be added up over ranks (a sum of equal copies is harmless for "min" and,
    if every step does it, for "mean"). Where one optimizer step covers several reward hooks, "min"
    sees the mean of their least lengths.
    """

    length: Tensor
    count: Tensor

    def __init__(self, prompts: int, statistic: Literal["min", "mean"] = "min"):
        super().__init__()
        if statistic not in ("min", "mean"):
            raise ValueError(f"statistic must be min or mean, got {statistic!r}")
        self.statistic = statistic
        self.register_buffer("length", torch.zeros(prompts))
        self.register_buffer("count", torch.zeros(prompts))

    def read(self, prompt_id: Tensor) -> Tensor:
        """(B,), inf for prompts without a correct response so far."""
        return torch.where(self.count > 0, self.length, torch.inf)[prompt_id]

    def observe(self, prompt_id: Tensor, lengths: Tensor, correct: Tensor) -> dict[str, Tensor]:
        lengths, right = lengths.to(self.length), correct.bool()
        zeros = torch.zeros_like(self.length)
        if self.statistic == "mean":
            total = zeros.index_add(0, prompt_id, keep(lengths, right))
            return {"length": total, "count": zeros.index_add(0, prompt_id, right.to(zeros.dtype))}
        least = torch.full_like(zeros, torch.inf)
        least = least.scatter_reduce(0, prompt_id, keep(lengths, right, torch.inf), "amin")
        seen = least.isfinite()
        return {"length": keep(least, seen), "count": seen.to(zeros.dtype)}

    @torch.no_grad()
    def update(self, sync: Mapping[str, Tensor]) -> None:
        if not self.training:
            return
        total, count = sync["length"].to(self.length), sync["count"].to(self.count)
        if self.statistic == "mean":
            mean = (self.length * self.count + total) / (self.count + count).clamp(min=1)
            self.length.copy_(mean)
        else:
            new = total / count.clamp(min=1)
            new = torch.where(self.count > 0, torch.minimum(self.length, new), new)
            self.length.copy_(torch.where(count > 0, new, self.length))
        self.count.add_(count)


class LengthShaper(Regularizer):
    """Reward hook: rewards + coef formula(lengths, ...), see the function of the kind's name.

    Args:
        kind: truncate, truncate_adaptive, hapo, grpo_lambda, kimi, curriculum, levels, overlong or
            cosine.
        coef: 1 where the paper has no weight of its own.
        history: of kind "hapo". It is read before this step's lengths enter it.
        budget: of kind "curriculum", tokens; default Schedule("exponential", 256, 1, steps=150,
            factor=0.7), the paper's from 256 to 87 within 600 optimizer steps.
        options: keyword arguments of the formula, such as max_length.

    Group formulas see the rows of one call: give them whole groups.

    Raises:
        ValueError: unknown kind, unknown or missing option, or a history that is missing.

    >>> shaper = LengthShaper("overlong", max_length=100, buffer=20)
    >>> shaper(RegInputs(rewards=torch.tensor([1.0]), lengths=torch.tensor([90]))).rewards
    tensor([0.5000])
    """

    hook = "reward"

    def __init__(
        self,
        kind: str,
        coef: Coefficient = 1.0,
        history: PromptHistory | None = None,
        budget: Schedule | None = None,
        **options: Any,
    ):
        super().__init__(coef)
        if kind not in FORMULAS:
            raise ValueError(f"kind must be one of {', '.join(FORMULAS)}, got {kind!r}")
        self.kind, self.formula, self.options = kind, FORMULAS[kind], options
        parameters = inspect.signature(self.formula).parameters
        self.inputs = [n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
        known = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        missing = {n for n, p in known.items() if p.default is p.empty} - options.keys()
        if options.keys() - known.keys() or missing:
            raise ValueError(
                f"{kind!r} takes {sorted(known)} and needs {sorted(missing)} still, "
                f"got {sorted(options)}"
            )
        if ("history" in self.inputs) != (history is not None):
            raise ValueError('kind "hapo", and no other, needs history=PromptHistory(prompts)')
        if "budget" in self.inputs and budget is None:
            budget = Schedule("exponential", 256, 1, steps=150, factor=0.7)
        self.history, self.budget = history, budget
        self.requires = frozenset({"rewards", *(STATE.get(n, n) for n in self.inputs)})

    def change(self, x: RegInputs) -> Tensor:
        """The formula's value (B,), without the coefficient."""
        given: list[Tensor] = []
        for name in self.inputs:
            if name == "history" and self.history is not None:
                given.append(self.history.read(x.need("prompt_id")))
            elif name == "budget" and self.budget is not None:
                given.append(self.budget.value)
            else:
                given.append(x.need(name))
        return self.formula(*given, **self.options)

    def forward(self, x: RegInputs) -> RegOutput:
        change, sync = self.weight * self.change(x), {}
        if self.history is not None:
            rows = (x.need("prompt_id"), x.need("lengths"), x.need("correct"))
            sync = self.history.observe(*rows)
        return RegOutput(
            rewards=real(x.need("rewards").detach()) + change,
            metrics={"change": change.mean()},
            sync=sync,
        )

    def update(self, sync: Mapping[str, Tensor]) -> None:
        super().update(sync)
        if self.history is not None:
            self.history.update(sync)
        if self.budget is not None:
            self.budget.update()

    def as_reward_func(
        self,
        correct: Callable[..., list[float | None]] | None = None,
        group_size: int | None = None,
        threshold: float = 0.5,
    ) -> "ShapedReward":
        """A plain reward function, for trainers that add up a list of those (TRL).

        Args:
            correct: a reward function of the same signature whose value above `threshold` means
                correct, where the kind needs that; None from it counts as wrong and gives None.
            group_size: responses per prompt, consecutive, where the kind compares within groups.

        Raises:
            ValueError: something needed is missing, or the kind keeps a state, which nobody would
                update: use the adapter of the trainer.
        """
        if self.history is not None or self.budget is not None:
            raise ValueError(f"{self.kind!r} keeps a state, which a plain function cannot update")
        if isinstance(self.coef, nn.Module):
            raise ValueError("a plain function cannot update a coefficient that changes")
        if "group" in self.inputs and group_size is None:
            raise ValueError(f"{self.kind!r} compares within groups: pass group_size=")
        if {"correct", "rewards"} & set(self.inputs) and correct is None:
            raise ValueError(f"{self.kind!r} needs to know what is correct: pass correct=")
        return ShapedReward(self, correct, group_size, threshold)


class ShapedReward:
    """What `LengthShaper.as_reward_func` returns; an object, so that it can be pickled.

    Lengths count all completion ids. Without knowing the end token, a response counts as finished
    if it is shorter than `max_length`.
    """

    def __init__(
        self,
        shaper: LengthShaper,
        correct: Callable[..., list[float | None]] | None,
        group_size: int | None,
        threshold: float,
    ):
        self.shaper, self.correct, self.threshold = shaper, correct, threshold
        self.group_size, self.__name__ = group_size, f"length_{shaper.kind}"

    def __call__(
        self, completions: list, completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """One number per completion.

        Raises:
            ValueError: if the rows are not whole groups, which is so unless the group size divides
                the local batch of generation.
        """
        rows = len(completion_ids)
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        x = RegInputs(lengths=lengths)
        known: list[float | None] = [0.0] * rows
        if self.correct is not None:
            known = self.correct(completions=completions, completion_ids=completion_ids, **columns)
            x.correct = torch.tensor([v is not None and v > self.threshold for v in known])
            x.rewards = x.correct.float()
        if self.group_size is not None:
            if rows % self.group_size:
                raise ValueError(
                    f"{rows} local rows do not hold whole groups of {self.group_size}: make the "
                    "group size divide the local batch, or use the adapter, which gathers rows"
                )
            x.group = torch.arange(rows) // self.group_size
        if "finished" in self.shaper.inputs:
            x.finished = lengths < self.shaper.options.get("max_length", 4000.0)
        if "level" in self.shaper.inputs:
            x.level = torch.tensor([int(level) for level in columns["level"]])
        change = (self.shaper.weight * self.shaper.change(x)).tolist()
        return [None if v is None else c for v, c in zip(known, change, strict=True)]
