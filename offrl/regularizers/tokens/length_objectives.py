"""Shorter responses by more than a reward: whitened advantages (DLER), a loss of its own (DRPO)."""

from typing import Literal

import torch
from torch import Tensor

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient
from offrl.regularizers.reductions import (
    group_extreme,
    group_mean,
    group_sum,
    keep,
    log_ratio,
    masked_mean,
    real,
    times,
)


def dler_advantages(
    rewards: Tensor, group: Tensor, lengths: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """Rewards less their group's mean, whitened over the batch; 0 for groups of equal rewards.

    Args:
        rewards: (B,). c r + b for any c > 0 and b gives the same advantages.
        lengths: (B,): statistics over tokens, as the released code has it, where long responses
            weigh more and the mean is not 0; None: over responses, as the text says.

    Returns:
        (B,), no gradient. Groups in which all rewards are equal are left out of mean and variance.

    Source: Liu et al., "DLER: Doing Length pEnalty Right", 2025, arXiv:2510.15110, and its code.
    Unbiased variance, to which `epsilon` is added.
    """
    rewards = real(rewards.detach())
    centered = rewards - group_mean(rewards, group)
    mixed = group_extreme(rewards, group) > group_extreme(rewards, group, largest=False)
    weight = mixed.to(rewards.dtype) * (1.0 if lengths is None else real(lengths))
    count = weight.sum()
    mean = (weight * centered).sum() / count.clamp(min=1)
    variance = (weight * (centered - mean).square()).sum() / (count - 1).clamp(min=1)
    return torch.where(mixed, (centered - mean) * (variance + epsilon).rsqrt(), 0.0)


class DLER(Regularizer):
    """Advantage hook: replaces the advantages by `dler_advantages`; after `truncate`.

    Upper clip 0.28, 16 samples and 512 prompts are the paper's.

    Args:
        over: whitening over the "batch" of responses, or over "tokens" as the released code.
    """

    hook = "advantage"

    def __init__(self, over: Literal["batch", "tokens"] = "batch"):
        super().__init__()
        self.over = over
        own = {"lengths"} if over == "tokens" else set()
        self.requires = frozenset({"rewards", "group", *own})

    def forward(self, x: RegInputs) -> RegOutput:
        lengths = x.need("lengths") if self.over == "tokens" else None
        advantages = dler_advantages(x.need("rewards"), x.need("group"), lengths)
        return RegOutput(
            advantages=advantages, metrics={"used": (advantages != 0).to(advantages.dtype).mean()}
        )


def drpo_weights(
    lengths: Tensor, correct: Tensor, group: Tensor, max_length: float, temperature: float = 0.1
) -> Tensor:
    """Softmax of (1 - l / max_length) / temperature over the correct responses of a group.

    Returns:
        (B,), 0 for wrong responses, of sum 1 over the correct ones of a group. Low temperatures
        keep the shortest only, high ones weigh all alike.
    """
    right = correct.bool()
    score = keep((1 - real(lengths) / max_length) / temperature, right, -torch.inf)
    top = keep(group_extreme(score, group), right)
    weight = keep((keep(score, right) - top).exp(), right)
    return weight / group_sum(weight, group).clamp(min=1e-30)


def drpo_loss(
    score: Tensor, weights: Tensor, correct: Tensor, wrong: Tensor, group: Tensor, tau: float = 10.0
) -> Tensor:
    """-w (s - tau log mean exp(s / tau)), the mean over the wrong responses of the group.

    Args:
        score: (B,), mean log-probability of the response's tokens; receives the gradient: up for
            correct responses, down for wrong ones, most for the likeliest.
        weights: (B,) of `drpo_weights`, detached. correct, wrong: (B,) bool, both false for rows
            that do not count. group: (B,) int64 in [0, B).
        tau: high values take the plain mean of the wrong responses, low ones their maximum.

    Returns:
        (B,); the sum over a group is the group's loss. 0 in wrong rows and in groups that lack
        correct or wrong responses.
    """
    scaled = keep(score / tau, wrong, -torch.inf)
    top = group_extreme(scaled.detach(), group)
    has = top.isfinite()
    top = keep(top, has)
    total = group_sum(keep((keep(score / tau, wrong) - top).clamp(max=0).exp(), wrong), group)
    count = group_sum(wrong.to(score.dtype), group)
    mean = torch.where(has, total, 1.0).log() - count.clamp(min=1).log() + top
    return keep(-times(weights.detach(), score - tau * mean), correct & has)


class DRPO(Regularizer):
    """Decoupled reward policy optimization, instead of the trainer's own policy loss.

    Mean over groups of `drpo_loss` plus (beta relu(kl - delta)).detach() kl with
    kl = -<logp - old_logp>, an estimate of KL(old || pi). Lengths only rank correct responses among
    themselves, so that none of them is pushed down for being long.

    Args:
        max_length: of a response; the released code takes the width of the padded batch.
        temperature: of the weights, lambda in the paper.
        over: mean over the groups with both correct and wrong responses, or over "all" groups as
            the released code.

    Groups may span ranks. Group ids must describe whole groups of the micro-batch on all ranks:
    trainers that shuffle single responses into several micro-batches do not provide that, and the
    responses of a group that come later are not known to the earlier ones. Metrics hold the loss
    itself, where the released code's value has tau in place of tau log mean exp (its gradient is
    the same).

    Source: Li et al., "DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization", 2025,
    arXiv:2510.04474, and its code, whose defaults these are.
    """

    requires = frozenset({"logp", "old_logp", "lengths", "correct", "group"})
    whole_batch = True

    def __init__(
        self,
        coef: Coefficient = 1.0,
        max_length: float = 8192.0,
        temperature: float = 0.1,
        tau: float = 10.0,
        beta: float = 1e3,
        delta: float = 1e-4,
        over: Literal["valid", "all"] = "valid",
    ):
        super().__init__(coef)
        self.max_length, self.temperature, self.tau = max_length, temperature, tau
        self.beta, self.delta, self.over = beta, delta, over

    def forward(self, x: RegInputs) -> RegOutput:
        logp, group = keep(x.need("logp"), x.mask), x.need("group")
        rows = torch.ones_like(logp, dtype=torch.bool) if x.mask is None else x.mask.bool()
        there, right = rows.any(-1), x.need("correct").bool()
        correct, wrong = there & right, there & ~right
        weights = drpo_weights(x.need("lengths"), correct, group, self.max_length, self.temperature)
        loss = drpo_loss(masked_mean(logp, x.mask), weights, correct, wrong, group, self.tau)
        size, rights, wrongs = (
            group_sum(some.to(loss.dtype), group)
            for some in (torch.ones_like(right), correct, wrong)
        )
        counted = size > 0 if self.over == "all" else (rights > 0) & (wrongs > 0)
        policy = loss.sum() / (counted / size).sum().clamp(min=1)
        drift = log_ratio(keep(x.need("old_logp").detach(), x.mask), logp)
        kl = masked_mean(drift.reshape(-1), (rows & ~drift.isinf()).reshape(-1))
        penalty = (self.beta * (kl - self.delta).clamp(min=0)).detach() * kl
        return RegOutput(
            loss=times(self.weight, policy + penalty),
            metrics={"policy": policy.detach(), "kl": kl.detach()},
        )
