"""Constraints with multipliers: several reward models held at thresholds, a cost below a limit."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient, DualVariable
from offrl.regularizers.reductions import (
    keep,
    masked_mean,
    masked_reduce,
    over_tokens,
    real,
    sum_and_count,
)

Kind = Literal["inequality", "equality"]


def standardized(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(x - mean) / (std + 1e-8) over all valid entries of `x`, 0 at the others."""
    x = keep(x, mask)
    valid = None if mask is None else mask.reshape(-1)
    centered = keep(x - masked_mean(x.reshape(-1), valid), mask)
    return centered / (masked_mean(centered.square().reshape(-1), valid).sqrt() + 1e-8)


def mixed_advantages(
    kl_advantages: Tensor, advantages: Tensor, mu: Tensor, mask: Tensor | None = None
) -> Tensor:
    """(N - sum_i mu_i) A_KL + sum_i mu_i A_i, every advantage standardized over the batch.

    Args:
        kl_advantages: L, (B,) or (B, T): of the KL to the reference as a reward; detached.
        advantages: (*L, N), of the N reward models, or (B, N) beside a `kl_advantages` (B, T);
            detached.
        mu: (N,). All 0: N times the advantage of staying near the reference; all 1: the sum of the
            N advantages; -1 (equality only) turns a reward model around.
        mask: L.

    Returns:
        L, 0 at padding. Scales and offsets of the reward models have no influence.

    >>> a, b = torch.tensor([1.0, -1.0]), torch.tensor([[-2.0], [2.0]])
    >>> mixed_advantages(a, b, torch.tensor([0.25]))
    tensor([ 0.5000, -0.5000])
    """
    like, weight = keep(kl_advantages.detach(), mask), real(mu.detach())
    parts = [over_tokens(a, like) for a in advantages.detach().unbind(-1)]
    total = (len(parts) - weight.sum()) * standardized(like, mask)
    for i, part in enumerate(parts):
        total = total + weight[i] * standardized(part, mask)
    return total


class ConstrainedRewards(Regularizer):
    """Advantage hook: CRLHF's mix of several reward models, each rewarded up to its threshold.

    Beyond a threshold (a "proxy point") a reward model no longer agrees with what it stands for.
    Multiplier i, mu_i = sigmoid(raw_i) or tanh(raw_i), falls while the mean reward J_i of the last
    optimizer step is above theta_i and rises while it is below: raw descends mu_i (J_i - theta_i).
    See `mixed_advantages`. The trainer provides advantages (those of the KL as a reward, from a
    value head of their own), extra["reward_advantages"] (*L, N) or (B, N), one value head each,
    and extra["objectives"] (B, N), the rewards themselves. Rows without a valid token do not count.

    Args:
        thresholds: theta, in units of the rewards.
        kind: "inequality" stops rewarding above the threshold (mu in (0, 1)); "equality" holds the
            reward there (mu in (-1, 1)), and was what the released configuration used.
        lr: of the multipliers; 0.1 in the released configuration, 0.01 in the class.

    Momentum 0.1 and the bound 0.5 of the gradient are those of the code, which draws raw from
    N(0, 0.01^2); here it starts at 0. Its thresholds for DailyDialog are 0.44 for intent and 0.238
    for METEOR, with a KL coefficient of 0.2, found by a search of Nelder and Mead.

    Source: Moskovitz et al., "Confronting Reward Model Overoptimization with Constrained RLHF",
    ICLR 2024, arXiv:2310.04373, and its code, whose branch without a squashing function drops the
    first multiplier and is left out.
    """

    hook = "advantage"
    requires = frozenset({"advantages", "extra.reward_advantages", "extra.objectives"})

    def __init__(self, thresholds: Sequence[float], kind: Kind = "inequality", lr: float = 0.1):
        super().__init__()
        if kind not in ("inequality", "equality"):
            raise ValueError(f"kind must be inequality or equality, got {kind!r}")
        self.thresholds = [float(theta) for theta in thresholds]
        self.kind = kind
        start = 0.5 if kind == "inequality" else 0.0
        self.duals = nn.ModuleList(
            DualVariable(
                start, "sigmoid" if kind == "inequality" else "tanh", lr=lr, momentum=0.1, clip=0.5
            )
            for _ in thresholds
        )

    def multipliers(self) -> list[DualVariable]:
        return [dual for dual in self.duals if isinstance(dual, DualVariable)]

    @property
    def mu(self) -> Tensor:
        """(N,), the multipliers now."""
        return torch.stack([dual.value for dual in self.multipliers()])

    def forward(self, x: RegInputs) -> RegOutput:
        objectives, mu = x.need("extra.objectives"), self.mu
        advantages, own = x.need("advantages"), x.need("extra.reward_advantages")
        if objectives.shape[-1] != len(self.duals) or own.shape[-1] != len(self.duals):
            raise ValueError(
                f"{len(self.duals)} thresholds, but advantages of shape {tuple(own.shape)} and "
                f"objectives of shape {tuple(objectives.shape)}"
            )
        ones = torch.ones_like(objectives[:, 0], dtype=torch.bool)
        rows = ones if x.mask is None else x.mask.bool().reshape(len(ones), -1).any(-1)
        total = keep(real(objectives.detach()), rows.unsqueeze(-1)).sum(0)
        count = rows.to(total.dtype).sum()
        mean = total / count.clamp(min=1)
        metrics = {f"mu_{i}": mu[i] for i in range(len(self.duals))}
        metrics |= {f"objective_{i}": mean[i] for i in range(len(self.duals))}
        valid = rows if advantages.dim() == 1 else x.mask
        return RegOutput(
            advantages=mixed_advantages(advantages, own, mu, valid),
            metrics=metrics,
            sync={"objectives": total, "count": count},
        )

    def update(self, sync: Mapping[str, Tensor]) -> None:
        super().update(sync)
        mean = sync["objectives"] / sync["count"]
        for i, (dual, mu) in enumerate(zip(self.multipliers(), self.mu, strict=True)):
            slope = mu * (1 - mu) if self.kind == "inequality" else 1 - mu.square()
            dual.update(slope * (self.thresholds[i] - mean[i]))


def lagrangian_advantages(
    advantages: Tensor, cost_advantages: Tensor, multiplier: Tensor | float
) -> Tensor:
    """(A - lambda A_cost) / (1 + lambda): a step whose size does not grow with the multiplier.

    Args:
        advantages, cost_advantages: of the same shape; detached.
        multiplier: lambda >= 0, such as the `value` of a `DualVariable`.

    Returns:
        Of that shape: A for lambda = 0, -A_cost as lambda grows.

    Source: common in Lagrangian variants of PPO (from memory; not checked).

    >>> lagrangian_advantages(torch.tensor([1.0]), torch.tensor([2.0]), 1.0)
    tensor([-0.5000])
    """
    gain, cost = keep(advantages.detach(), None), keep(cost_advantages.detach(), None)
    return (gain - multiplier * cost) / (1 + multiplier)


class LagrangianPenalty(Regularizer):
    """Loss lambda <cost>, lambda rising while the mean cost of the last step is above the limit.

    For a constraint E[cost] <= limit: costs predicted by a critic, divergences from several other
    policies (one module each), lengths. What is learned stays a saddle point: lambda settles where
    the constraint holds with equality, or at its least value where it is slack.

    Args:
        limit: in units of the cost.
        coef: the multiplier; default starts at 0.5 and rises through softplus by
            0.01 (mean cost - limit) per step. A number is a fixed penalty.
        cost: key of `RegInputs.extra` that holds the cost L; receives the gradient.
    """

    def __init__(
        self,
        limit: float,
        coef: Coefficient | None = None,
        cost: str = "cost",
        reduction: str | None = None,
    ):
        default = DualVariable(0.5, "softplus", "sgd", lr=0.01)
        super().__init__(default if coef is None else coef, reduction)
        self.limit, self.cost = limit, cost
        self.requires = frozenset({f"extra.{cost}"})

    def forward(self, x: RegInputs) -> RegOutput:
        cost = keep(x.need(f"extra.{self.cost}"), x.mask)
        total, count = sum_and_count(cost, x.mask)
        return RegOutput(
            per_element=self.weight * cost,
            metrics={"cost": masked_reduce(cost, x.mask)},
            sync={"cost": total, "count": count},
        )

    def update(self, sync: Mapping[str, Tensor]) -> None:
        super().update(sync)
        if isinstance(self.coef, DualVariable):
            self.coef.update(sync["cost"] / sync["count"] - self.limit)
