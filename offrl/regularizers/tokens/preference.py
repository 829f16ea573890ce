"""Losses of preference pairs, and the imitation terms that go with them.

Rows i and i + B/2 of a batch answer the same prompt, `chosen` (B,) marks the preferred one of the
two. With rho = sum_t (logp - ref_logp) of a row and m = rho_chosen - rho_rejected:

    DPO     -log sigmoid(beta m)                               `dpo_loss`, `LDDPO(alpha=1)`
    LD-DPO  the same with alpha on tokens past the shorter one `ld_weight`, `LDDPO`
    f-DPO   the same of f'(e^rho), other divergences than KL   `f_link`, `LDDPO(divergence=)`
    RPO     DPO - beta eta log-likelihood of the chosen one    `RPO`, or DPO and `NLLAnchor`
    XPO     DPO + alpha log-likelihood of reference samples    DPO and `XPOTerm`
    INPO    squared distance of a margin to 1 / (2 eta)        `inpo_loss`, `INPO`
    SPO     win rate against the other samples as reward       `spo_reward`, `SPO`
    GenARM  DPO without a reference for a token reward model   `GenARM`, `guided_logp`

In a trainer with a DPO loss of its own add the terms only (`NLLAnchor`, `XPOTerm`).
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient
from offrl.regularizers.reductions import (
    held,
    keep,
    log_ratio,
    masked_mean,
    masked_reduce,
    over_tokens,
    times,
)
from offrl.regularizers.tokens.kl import geometric_mixture

SFTReduction = Literal["sum", "seq-mean", "token-mean"]
Link = Literal["kl", "reverse-kl", "js", "alpha"]


def pairs(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected rows, (B/2, ...) each, of `x` (B, ...).

    >>> pairs(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([True, False, False, True]))
    (tensor([1., 4.]), tensor([3., 2.]))
    """
    first, second = x.chunk(2)
    wins = chosen.bool().chunk(2)[0].view(-1, *[1] * (x.dim() - 1))
    return torch.where(wins, first, second), torch.where(wins, second, first)


def row_sum(x: Tensor, mask: Tensor | None, weight: Tensor | None = None) -> Tensor:
    """(B,) sums over the valid tokens of x (B, T), each times its weight; (B,) stays as it is."""
    x = keep(x, mask)
    x = x if weight is None else times(weight, x)
    return x if x.dim() == 1 else x.sum(-1)


def row_ratio(
    logp: Tensor, ref_logp: Tensor, mask: Tensor | None, weight: Tensor | None = None
) -> Tensor:
    """(B,), `row_sum` of logp less that of the reference; tokens that both exclude count 0."""
    both = (logp == ref_logp) & logp.isinf()
    own, other = (row_sum(torch.where(both, 0.0, x), mask, weight) for x in (logp, ref_logp))
    return log_ratio(own, other)


def has_tokens(like: Tensor, mask: Tensor | None) -> Tensor:
    valid = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
    return valid if valid.dim() == 1 else valid.any(-1)


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)), elementwise.

    Args:
        chosen, rejected: (P,) sequence log-ratios rho against a reference, or log-probabilities
            where there is none; both receive gradient, which is 0 at a margin of +inf.
        beta: above 0, per nat.

    Returns:
        (P,), log 2 at margin 0, 0 at +inf, linear at -inf.

    Source: Rafailov et al., NeurIPS 2023.

    >>> dpo_loss(torch.tensor([0.0, 10.0]), torch.tensor([0.0, 0.0]), 0.5)
    tensor([0.6931, 0.0067])
    """
    return F.softplus(-beta * log_ratio(keep(chosen, None), keep(rejected, None)))


def f_link(rho: Tensor, kind: Link, order: float | None = None) -> Tensor:
    """f'(u) - f'(1) at u = e^rho: what takes the place of rho under another f-divergence.

    The best policy under a reward and a price D_f(pi || ref) = E_ref f(pi / ref) has reward
    f'(pi / ref) up to a constant of the prompt, which cancels in a margin.

        kind        value                            bounded    TRL's f_divergence_type
        kl          rho                              no         reverse_kl, plain DPO
        reverse-kl  1 - e^-rho                       above: 1   forward_kl
        js          log(2 u / (1 + u))               above:     js_divergence
                                                     log 2
        alpha       (e^((order - 1) rho) - 1)        one side   alpha_divergence, order is its
                    / (order - 1)                               f_alpha_divergence_coef

    Kinds are those of `f_divergence(policy, reference, kind)`, except that js is the paper's, twice
    that one. A bounded kind hardly rewards a probability far above the reference's.

    Args:
        rho: sequence log-ratios, any shape; receives the gradient (0 past e^80).
        order: for kind "alpha"; 1 is kl, 0 reverse-kl; the paper's alpha is 1 - order.

    Returns:
        Of the shape of `rho`: 0 at rho = 0, increasing, there with slope 1 (js: 1/2).

    Raises:
        ValueError: unknown kind, or order missing or not asked for.

    Source: TRL 1.16; Wang et al., "Beyond Reverse KL", ICLR 2024, arXiv:2309.16240 (from memory
    of the paper; not checked).

    >>> f_link(torch.tensor([0.0, 2.0]), "reverse-kl"), f_link(torch.tensor([2.0]), "alpha", 0.5)
    (tensor([0.0000, 0.8647]), tensor([1.2642]))
    """
    if kind not in ("kl", "reverse-kl", "js", "alpha"):
        raise ValueError(f"kind must be kl, reverse-kl, js or alpha, got {kind!r}")
    if (kind == "alpha") != (order is not None):
        raise ValueError('kind "alpha", and no other, needs order=')
    rho = keep(rho, None)
    if kind == "js":
        return math.log(2) + F.logsigmoid(rho)
    power = -1.0 if kind == "reverse-kl" else 0.0 if order is None else order - 1
    return rho if power == 0 else torch.expm1((power * rho).clamp(max=80)) / power


def sequence_nll(
    logp: Tensor, mask: Tensor | None = None, reduction: SFTReduction = "sum"
) -> Tensor:
    """Negative log-likelihood per sequence (P,), scaled in one of the three ways in use for RPO.

    "sum" over the tokens (body of the paper, released trainer), "seq-mean" the mean of each
    sequence's tokens (appendix, released script), "token-mean" scaled so that the mean over the
    sequences is the mean over all tokens (TRL's "sft" loss). They differ by about the length of a
    response, and so do the coefficients that belong to them.

    Args:
        logp: (P, T) or (P,), receives the gradient. mask: of that shape.

    >>> sequence_nll(torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[1, 1], [1, 0]]))
    tensor([3., 3.])
    """
    total = -row_sum(logp, mask)
    if reduction == "sum":
        return total
    tokens = row_sum(torch.ones_like(keep(logp, mask)), mask)
    if reduction == "seq-mean":
        return total / tokens.clamp(min=1)
    if reduction == "token-mean":
        return total * has_tokens(logp, mask).sum() / tokens.sum().clamp(min=1)
    raise ValueError(f"reduction must be sum, seq-mean or token-mean, got {reduction!r}")


def ld_weight(mask: Tensor, alpha: float) -> Tensor:
    """Weights of LD-DPO: 1 on as many tokens as the shorter response of a pair has, alpha after.

    Args:
        mask: (B, T), 1 on tokens of the response; gaps do not count as length. Rows i and i + B/2
            form a pair.
        alpha: in [0, 1]; 1 is DPO, 0 compares equal lengths only.

    Returns:
        (B, T), to multiply log-probabilities of policy and reference with; no gradient.

    Source: Liu et al., arXiv:2409.06411; TRL `ld_alpha`.

    >>> ld_weight(torch.tensor([[1, 1, 1], [1, 0, 0]]), 0.5)[0]
    tensor([1.0000, 0.5000, 0.5000])
    """
    length = mask.bool().sum(-1)
    shorter = torch.minimum(*length.chunk(2)).repeat(2)
    inside = mask.bool().cumsum(-1) <= shorter.unsqueeze(-1)
    return torch.where(inside, 1.0, alpha)


def inpo_loss(
    policy: Tensor, ref: Tensor, previous: Tensor, eta: float = 0.005, ratio: float = 1 / 3
) -> Tensor:
    """(h - 1 / (2 eta))^2 with h = policy - ratio ref - (1 - ratio) previous, elementwise.

    Args:
        policy, ref, previous: (P,) differences log pi(chosen) - log pi(rejected) under the policy
            (receives the gradient), the reference and the policy of the round before (detached).
        eta: step of the mirror descent. ratio: tau / eta, share of the reference; 1 is IPO.

    The defaults, with 3 rounds, are from memory and secondary text; not checked.

    Returns:
        (P,), 0 where h = 1 / (2 eta).

    Source: Zhang et al., arXiv:2407.00617.

    >>> inpo_loss(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([5.0]), 0.5, 1.0)
    tensor([1.])
    """
    h = log_ratio(keep(policy, None), times(ratio, keep(ref.detach(), None)))
    h = held(log_ratio(h, times(1 - ratio, keep(previous.detach(), None))))
    return (h - 1 / (2 * eta)).square()


def spo_reward(preferences: Tensor, group: Tensor) -> Tensor:
    """For every row the mean probability to beat the other rows of its group.

    Args:
        preferences: (B, B), entry i, j the probability that row i beats row j, in [0, 1]; entries
            between groups and on the diagonal are not looked at.
        group: (B,) int64, rows of one prompt; any order.

    Returns:
        (B,), in [0, 1], 0 for a group of one; detached. k rows with complementary preferences sum
        to k / 2. For control divide each by the number of its steps: the method spreads a
        trajectory's reward evenly.

    Source: Swamy et al., arXiv:2401.04056 (code not read).

    >>> spo_reward(torch.tensor([[0.5, 0.8], [0.2, 0.5]]), torch.tensor([0, 0]))
    tensor([0.8000, 0.2000])
    """
    rival = (group.unsqueeze(0) == group.unsqueeze(1)) & ~torch.eye(
        len(group), dtype=torch.bool, device=group.device
    )
    return masked_mean(preferences.detach(), rival)


def guided_logp(base: Tensor, reward: Tensor, alpha: float) -> Tensor:
    """GenARM's decoding distribution, base exp(alpha log pi_r) / Z, as log-probabilities.

    Args:
        base, reward: logits or log-probabilities of the next token under the language model and
            the autoregressive reward model, (..., V).
        alpha: 1 / beta of the trade between reward and KL; 0 is the base model. The released
            decoder divides by 1 + alpha and samples at temperature 1 / (1 + alpha): the same.

    Source: Xu et al., arXiv:2410.08193.

    >>> guided_logp(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log(), 1.0).exp()
    tensor([0.8000, 0.2000])
    """
    return geometric_mixture([base, reward], [1.0, alpha])


def over_pairs(values: Tensor, margin: Tensor, like: Tensor, x: RegInputs) -> RegOutput:
    """Mean of `values` (P,) over the pairs of which both responses have tokens."""
    both = torch.stack(has_tokens(like, x.mask).chunk(2)).all(0)
    return RegOutput(
        loss=masked_reduce(values, both),
        metrics={
            "margin": masked_reduce(margin.detach(), both),
            "accuracy": masked_reduce((margin.detach() > 0).to(margin.dtype), both),
        },
    )


class LDDPO(Regularizer):
    """Loss coef mean over pairs of -log sigmoid(beta m), with `ld_weight` on the tokens.

    Args:
        beta: per nat. alpha: in [0, 1]; 1 is DPO.
        divergence, order: m is the difference of `f_link(rho, divergence, order)`.

    A pair of which one response has no token is left out, also by the other modules here.
    """

    requires = frozenset({"logp", "ref_logp", "chosen"})
    whole_batch = True

    def __init__(
        self,
        coef: Coefficient = 1.0,
        beta: float = 0.1,
        alpha: float = 1.0,
        divergence: Link = "kl",
        order: float | None = None,
    ):
        super().__init__(coef)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        f_link(torch.zeros(()), divergence, order)  # refuses what it does not know
        self.beta, self.alpha = beta, alpha
        self.divergence: Link = divergence
        self.order = order

    def forward(self, x: RegInputs) -> RegOutput:
        logp, chosen = x.need("logp"), x.need("chosen")
        weight = None
        if self.alpha < 1 and logp.dim() == 2:
            weight = ld_weight(torch.ones_like(logp) if x.mask is None else x.mask, self.alpha)
        rho = row_ratio(logp, x.need("ref_logp").detach(), x.mask, weight)
        win, lose = pairs(f_link(rho, self.divergence, self.order), chosen)
        values = times(self.weight, dpo_loss(win, lose, self.beta))
        return over_pairs(values, log_ratio(win, lose), logp, x)


class RPO(LDDPO):
    """Loss coef (DPO + beta eta `sequence_nll`(chosen)): DPO, kept on responses that exist.

    Args:
        beta, eta: of the released configuration for sft_reduction="sum": 0.01 and 0.005 (learning
            rate 5e-7, one epoch, a 7B model), 5e-5 per token. eta = 0 is DPO.
        sft_reduction: see `sequence_nll`. The released script for "seq-mean" has beta 0.5 and
            weighs the mean by 0.2: eta 0.4. TRL's documentation suggests the weight 0.005 with its
            token mean: eta 0.5 at beta 0.01, the released strength at a mean length of 100.

    Another method of that name, arXiv:2404.19733, is TRL's former `rpo_alpha`.

    Source: Liu et al., arXiv:2405.16436, and its code.
    """

    def __init__(
        self,
        coef: Coefficient = 1.0,
        beta: float = 0.01,
        eta: float = 0.005,
        sft_reduction: SFTReduction = "sum",
    ):
        super().__init__(coef, beta)
        self.eta = eta
        self.sft_reduction: SFTReduction = sft_reduction

    def forward(self, x: RegInputs) -> RegOutput:
        out = super().forward(x)
        logp, chosen = x.need("logp"), x.need("chosen")
        mask = torch.ones_like(logp) if x.mask is None else x.mask
        win, valid = pairs(logp, chosen)[0], pairs(mask, chosen)[0]
        both = torch.stack(has_tokens(logp, x.mask).chunk(2)).all(0)
        valid = valid.bool() & over_tokens(both, valid)
        nll = masked_reduce(sequence_nll(win, valid, self.sft_reduction), both)
        assert out.loss is not None
        return RegOutput(
            loss=out.loss + times(self.weight * (self.beta * self.eta), nll),
            metrics=out.metrics | {"nll": nll.detach()},
        )


class XPOTerm(Regularizer):
    """Loss coef mean of sum_t logp over responses that the reference sampled: optimism of XPO.

    Pushes the likelihood of what the reference would say down; next to a DPO loss it is XPO.
    Inputs: `logp`, extra["from_reference"] (B,) bool.

    Args:
        coef: alpha; 1e-5 in TRL, before the trainer was removed, with a list for values per epoch:
            `Schedule`. 0 is DPO.

    Source: Xie et al., arXiv:2405.21046.
    """

    requires = frozenset({"logp", "extra.from_reference"})
    whole_batch = True

    def __init__(self, coef: Coefficient = 1e-5):
        super().__init__(coef)

    def forward(self, x: RegInputs) -> RegOutput:
        logp = x.need("logp")
        rows = x.need("extra.from_reference").bool() & has_tokens(logp, x.mask)
        mean = masked_reduce(row_sum(logp, x.mask), rows)
        return RegOutput(loss=times(self.weight, mean), metrics={"logp": mean.detach()})


class INPO(Regularizer):
    """Loss coef mean over pairs of `inpo_loss`; `old_logp` is of the policy of the round before.

    Args:
        eta, ratio: see `inpo_loss`. The scale of the loss is that of 1 / (4 eta^2).
    """

    requires = frozenset({"logp", "ref_logp", "old_logp", "chosen"})
    whole_batch = True

    def __init__(self, coef: Coefficient = 1.0, eta: float = 0.005, ratio: float = 1 / 3):
        super().__init__(coef)
        self.eta, self.ratio = eta, ratio

    def forward(self, x: RegInputs) -> RegOutput:
        logp, chosen = x.need("logp"), x.need("chosen")
        ref_logp, old_logp = x.need("ref_logp"), x.need("old_logp")
        none = logp.isinf() & (logp == ref_logp) & (logp == old_logp)
        parts = (torch.where(none, 0.0, part) for part in (logp, ref_logp, old_logp))
        rows = (row_sum(part, x.mask) for part in parts)
        policy, ref, previous = (log_ratio(*pairs(row, chosen)) for row in rows)
        values = times(self.weight, inpo_loss(policy, ref, previous, self.eta, self.ratio))
        return over_pairs(values, log_ratio(policy, ref.detach()), logp, x)


class GenARM(Regularizer):
    """Loss coef mean over pairs of -log sigmoid(beta (sum logp_chosen - sum logp_rejected)).

    Trains an autoregressive reward model, whose log-probabilities `logp` are; no reference.
    Decode with `guided_logp`.

    Args:
        beta: released settings: 0.05 (HH); 0.5 for helpfulness and 0.01 for harmlessness.

    Source: Xu et al., arXiv:2410.08193.
    """

    requires = frozenset({"logp", "chosen"})
    whole_batch = True

    def __init__(self, coef: Coefficient = 1.0, beta: float = 0.05):
        super().__init__(coef)
        self.beta = beta

    def forward(self, x: RegInputs) -> RegOutput:
        logp = x.need("logp")
        win, lose = pairs(row_sum(logp, x.mask), x.need("chosen"))
        values = times(self.weight, dpo_loss(win, lose, self.beta))
        return over_pairs(values, log_ratio(win, lose), logp, x)


class SPO(Regularizer):
    """Reward hook: r + coef `spo_reward`; hand over rewards of 0 for the method alone.

    Inputs: `rewards` (B,), `group`, extra["preferences"] (B, B).
    """

    hook = "reward"
    requires = frozenset({"rewards", "group", "extra.preferences"})

    def forward(self, x: RegInputs) -> RegOutput:
        rate = spo_reward(x.need("extra.preferences"), x.need("group"))
        return RegOutput(rewards=x.need("rewards") + self.weight * rate)


class NLLAnchor(Regularizer):
    """Loss coef times the negative log-likelihood of given responses or actions: SFT, cloning.

    Args:
        coef: RPO's beta eta; with reduction="token-mean" and rows="chosen" the weight of "sft" in
            TRL's loss_type=["sigmoid", "sft"].
        reduction: of `masked_reduce`: "token-mean", "seq-mean-token-mean" or "seq-mean-token-sum".
        rows: "chosen" of preference pairs, normalized by their number; "all" for data of
            demonstrations, in control (B,) log-likelihoods of its actions.
    """

    def __init__(
        self,
        coef: Coefficient,
        reduction: str = "token-mean",
        rows: Literal["chosen", "all"] = "chosen",
    ):
        super().__init__(coef, reduction)
        if rows not in ("chosen", "all"):
            raise ValueError(f"rows must be chosen or all, got {rows!r}")
        self.rows, self.whole_batch = rows, rows == "chosen"
        self.requires = frozenset({"logp"} | ({"chosen"} if rows == "chosen" else set()))

    def forward(self, x: RegInputs) -> RegOutput:
        logp, mask = x.need("logp"), x.mask
        if self.rows == "all":
            nll = -keep(logp, mask)
            metrics = {"nll": masked_reduce(nll.detach(), mask)}
            return RegOutput(per_element=times(self.weight, nll), metrics=metrics)
        kept = over_tokens(x.need("chosen").bool(), logp)
        kept = kept if mask is None else kept & mask.bool()
        nll = masked_reduce(-keep(logp, kept), kept, self.reduction)
        return RegOutput(loss=times(self.weight, nll), metrics={"nll": nll.detach()})
