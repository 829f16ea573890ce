"""Imitation as inverse soft Q-learning: logits are action values, cross-entropy a special case.

With Q_t the logit of the taken action and V_t = lse(logits_t), log pi = Q - V, and the reward that
the policy implicitly maximizes is r_t = Q_t - gamma V_{t+1}, V = 0 after the end. Fitting it to
demonstrations alone with the chi2 divergence leaves

    <-(Q - V)> + <r^2> / (4 alpha)

negative log-likelihood and a regularizer of temporal differences (derived from the code of the
parent method). It needs `logp` and stats["lse"], no logits.

Source: Wulfmeier et al., arXiv:2409.01369; divergences: Garg et al., IQ-Learn, released code.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient
from offrl.regularizers.reductions import held, keep, masked_reduce, times

Divergence = Literal["chi2", "hellinger", "kl", "kl-shifted", "js"]
DIVERGENCES = ("chi2", "hellinger", "kl", "kl-shifted", "js")


def next_values(
    values: Tensor, mask: Tensor | None = None, finished: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For every token the value at the sequence's next valid token, and whether it is known.

    Args:
        values: (B, T), or (B,) for sequences of one token; differentiable.
        mask: of that shape; tokens between two valid ones are skipped.
        finished: (B,) bool: 0 where the sequence was cut off, whose last token's successor is
            unknown. None: all ended.

    Returns:
        (values, known), of the shape of `values`: value 0 after a last token, known False after the
        last one of an unfinished sequence.

    >>> next_values(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1, 0, 1]]))[0]
    tensor([[3., 3., 0.]])
    """
    rows = keep(values, mask)
    rows = rows.unsqueeze(-1) if rows.dim() == 1 else rows
    valid = torch.ones_like(rows) if mask is None else mask.view(rows.shape)
    size = rows.shape[-1]
    place = torch.arange(size, device=rows.device).expand_as(rows)
    here = torch.where(valid.bool(), place, size)
    upcoming = here.flip(-1).cummin(-1).values.flip(-1)  # the first valid place from here on
    end = torch.zeros_like(rows[:, :1])
    after = torch.cat([upcoming[:, 1:], torch.full_like(upcoming[:, :1], size)], -1)
    result = torch.cat([rows, end], -1).gather(-1, after)
    known = torch.ones_like(after, dtype=torch.bool)
    if finished is not None:
        known = (after < size) | finished.bool().unsqueeze(-1)
    return result.view(values.shape), known.view(values.shape)


def soft_q_reward(logp: Tensor, lse: Tensor, following: Tensor, gamma: float) -> Tensor:
    """r = Q - gamma V', elementwise, with Q = logp + lse.

    Args:
        logp: log-probability of the taken action. lse: logsumexp of the logits, V.
        following: V of the next state, 0 after the end. All of one shape; all receive gradient.
        gamma: in [0, 1].

    >>> soft_q_reward(torch.tensor([-1.0]), torch.tensor([3.0]), torch.tensor([2.0]), 0.5)
    tensor([1.])
    """
    return keep(logp, None) + keep(lse, None) - times(gamma, keep(following, None))


def soft_q_weight(reward: Tensor, divergence: Divergence) -> Tensor:
    """phi'(r) of a divergence: what multiplies r in the loss. Detached.

        chi2         1 (its r^2 stands in the loss)
        hellinger    1 / (1 + r)^2
        kl           e^(-r)
        kl-shifted   e^(-r - 1)
        js           e^(-r) / (2 - e^(-r))

    Exponents stay within +-20. hellinger and js have poles at r = -1 and -log 2, at and below which
    they are undefined; r is held where the weight is at most 20. The released code does neither.

    >>> soft_q_weight(torch.tensor([0.0, 1.0]), "kl")
    tensor([1.0000, 0.3679])
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    r = keep(reward.detach(), None)
    if divergence == "chi2":
        return torch.ones_like(r)
    if divergence == "hellinger":
        return (1 + r).clamp(min=20**-0.5) ** -2
    if divergence == "js":
        odds = torch.exp((-r).clamp(-20, math.log(40 / 21)))
        return odds / (2 - odds)
    return torch.exp((-r - (1.0 if divergence == "kl-shifted" else 0.0)).clamp(-20, 20))


class InverseSoftQ(Regularizer):
    """Loss coef <-(Q - V) + r^2 / (4 alpha)>, or coef <-w r + V - gamma V'>, of demonstrations.

    The first is for "chi2", the second for the other divergences, with w = `soft_q_weight`; w = 1
    gives the likelihood term alone. Adding a constant to all logits changes r only.

    Inputs: `logp`, stats["lse"].

    Args:
        alpha: for "chi2"; infinity, the default, is cross-entropy exactly; towards 0 logits are
            pulled to where all r = 0.
        gamma: in [0, 1]; undiscounted by default, our choice.
        following: where V' comes from: "ended" takes the next token of a sequence, 0 after the
            last (so in control every row is an end); "truncated" too, but reads `finished`: the
            last token of a sequence that was cut off keeps its likelihood term alone; "given" takes
            extra["next_lse"] in shape L, V of the next state, 0 at the end.
    """

    def __init__(
        self,
        alpha: float = math.inf,
        gamma: float = 1.0,
        divergence: Divergence = "chi2",
        following: Literal["ended", "truncated", "given"] = "ended",
        coef: Coefficient = 1.0,
        reduction: str | None = None,
    ):
        super().__init__(coef, reduction)
        if alpha <= 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        if divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}")
        self.alpha, self.gamma, self.divergence = alpha, gamma, divergence
        self.following = following
        successor = {"ended": set(), "truncated": {"finished"}, "given": {"extra.next_lse"}}
        self.requires = frozenset({"logp", "stats.lse"} | successor[following])

    def forward(self, x: RegInputs) -> RegOutput:
        logp, lse = keep(x.need("logp"), x.mask), keep(x.need("stats.lse"), x.mask)
        if self.following == "given":
            following = keep(x.need("extra.next_lse"), x.mask)
            known = torch.ones_like(lse, dtype=torch.bool)
        else:
            finished = x.need("finished") if self.following == "truncated" else None
            following, known = next_values(lse, x.mask, finished)
        known = known if x.mask is None else known & x.mask.bool()
        reward = torch.where(known, soft_q_reward(logp, lse, following, self.gamma), 0.0)
        loss = -logp
        if self.divergence != "chi2":
            # -w r + V - gamma V' = -(Q - V) + (1 - w) r
            loss = loss + (1 - soft_q_weight(reward, self.divergence)) * reward
        elif math.isfinite(self.alpha):
            loss = loss + held(reward).square() / (4 * self.alpha)
        return RegOutput(
            per_element=times(self.weight, keep(loss, x.mask)),
            metrics={
                "nll": masked_reduce(-logp.detach(), x.mask),
                "reward": masked_reduce(reward.detach(), known),
                "reward_square": masked_reduce(reward.detach().square(), known),
            },
        )
