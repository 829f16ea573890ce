"""Terms for a few tokens of a batch, chosen by probability or by covariance with the advantage."""

import math
from typing import Literal

import torch
from torch import Generator, Tensor

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient
from offrl.regularizers.reductions import (
    keep,
    log_ratio,
    masked_mean,
    masked_reduce,
    over_tokens,
    times,
)
from offrl.regularizers.tokens.kl import kl_estimate


def lowest(score: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """bool of the shape of `score`: the `count` (0-d) eligible elements of lowest score."""
    order = keep(score.detach(), eligible, torch.inf).reshape(-1).argsort(stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    return eligible & (rank.view(score.shape) < count)


def share_of(eligible: Tensor, share: float) -> Tensor:
    return (share * eligible.sum().double()).floor()


def all_or(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()


def proxy_logp(
    logp: Tensor,
    log_mass: Tensor,
    log_top: Tensor | None = None,
    threshold: float = 0.02,
    mode: Literal["minp", "fixed"] = "minp",
) -> Tensor:
    """Log-probability of the taken tokens under the policy without its unlikely tokens (Lp-Reg).

    The proxy keeps the tokens of at least `threshold` times the largest probability ("minp") or of
    at least `threshold` ("fixed") and renormalizes. Computed once per rollout from three numbers
    per token; no second forward pass and no logits are kept.

    Args:
        logp: log-probabilities under the filtered policy, L.
        log_mass: log of the mass of the kept set, L: of `token_stats` the statistic
            `LogMass(MinP(0.02))` or `LogMass(Threshold(0.02))` of the same policy.
        log_top: log of the largest probability, L, needed for "minp": `LogMass(MinP(1.0))`.

    Returns:
        L, -inf for tokens that were filtered out; no gradient. Give it to `LowProbability` as
        stats["proxy_logp"].

    >>> logp = torch.tensor([0.9, 0.09, 0.01]).log()
    >>> proxy_logp(logp, torch.tensor(0.99).log(), torch.tensor(0.9).log()).exp()
    tensor([0.9091, 0.0909, 0.0000])
    """
    if mode == "minp" and log_top is None:
        raise ValueError('mode="minp" needs log_top=')
    edge = math.log(threshold) + (0.0 if mode == "fixed" or log_top is None else log_top)
    return torch.where(logp >= edge, logp - log_mass, -torch.inf).detach()


def low_probability_mask(
    logp: Tensor, proxy: Tensor, advantages: Tensor, mask: Tensor | None = None, share: float = 0.01
) -> Tensor:
    """Tokens that Lp-Reg protects: unlikely ones that a negative advantage pushes further down.

    A token is chosen if its advantage is negative, its `logp` is among the lowest `share` of such
    tokens in the batch (rounded down; 0 chooses none), and `logp` lies below `proxy`, which a
    token that the proxy filtered out never does.

    Args:
        logp: L, under the policy now. proxy: L, see `proxy_logp`. advantages: (B,) or L.

    Returns:
        bool L. The released code chooses none where the share comes to a single token.
    """
    negative = all_or(mask, logp) & (over_tokens(advantages, logp) < 0)
    few = lowest(logp, negative, share_of(negative, share))
    return few & (logp.detach() < proxy)


def low_probability_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    proxy: Tensor,
    coef: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """What replaces the clipped surrogate on the chosen tokens: -A ratio + coef k3(pi, proxy).

    Use as `torch.where(low_probability_mask(...), low_probability_loss(...), surrogate)`.

    Args:
        logp: L, receives the gradient, which raises it towards the proxy. old_logp, proxy: L.
        advantages: (B,) or L.

    Returns:
        L, finite everywhere; of use where the mask is 1.
    """
    kept = keep(logp, mask)
    ratio = log_ratio(kept, keep(old_logp.detach(), mask)).clamp(-20, 20).exp()
    gain = keep(over_tokens(advantages.detach(), logp), mask) * ratio
    return coef * kl_estimate(logp, proxy, "k3", "path", mask=mask) - gain


class LowProbability(Regularizer):
    """Lp-Reg: coef k3(pi, proxy) on the tokens of `low_probability_mask`, beside the surrogate.

    For a negative advantage the clipped surrogate is -A max(ratio, 1 - clip_low), so with the
    released clip_low of 1 it equals -A ratio and this module next to it is the released loss. With
    a tighter clip replace the surrogate by `low_probability_loss`.

    The released proxy is of the policy that sampled. One of the policy now, as trainers make it
    that keep no statistics of the rollout, is the same in the first update of a batch.

    Args:
        coef: 1 in the released code; batches without negative advantages cost 0.
        share: of the tokens with negative advantage; 0.01 in the released code, with the proxy of
            threshold 0.02 in mode "minp". The paper speaks of a forward KL over the proxy, the code
            of k3 on the sampled token, as here.

    Source: Huang et al., "Low-probability Tokens Sustain Exploration in RLVR", 2025,
    arXiv:2510.03222, and its code.
    """

    requires = frozenset({"logp", "advantages", "stats.proxy_logp"})
    whole_batch = True

    def __init__(self, coef: Coefficient = 1.0, share: float = 0.01, reduction: str | None = None):
        super().__init__(coef, reduction)
        self.share = share

    def forward(self, x: RegInputs) -> RegOutput:
        logp, proxy = x.need("logp"), x.need("stats.proxy_logp")
        chosen = low_probability_mask(logp, proxy, x.need("advantages"), x.mask, self.share)
        # Elsewhere the policy is its own proxy: k3 and its gradient are 0 there.
        kl = kl_estimate(logp, torch.where(chosen, proxy, logp), "k3", "path", mask=x.mask)
        return RegOutput(
            per_element=times(self.weight, kl),
            metrics={"share": masked_reduce(chosen.to(kl.dtype), x.mask)},
        )


def covariance(logp: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """Per element (A - mean A) (logp - mean logp), with means over the valid ones of the batch.

    Its mean is the covariance that drives the entropy down in policy-gradient training. Elements of
    infinite logp do not count in the means.

    Args:
        logp: (B, T) or (B,). advantages: (B,) or of the shape of `logp`.

    Returns:
        Of the shape of `logp`, 0 at padding; no gradient.

    >>> covariance(torch.tensor([-1.0, -3.0]), torch.tensor([1.0, -1.0]))
    tensor([1., 1.])
    """
    valid = (all_or(mask, logp) & ~logp.isinf()).reshape(-1)
    parts = [keep(part.detach(), mask) for part in (logp, over_tokens(advantages, logp))]
    low, high = (part - masked_mean(part.reshape(-1), valid) for part in parts)
    return keep(times(high, low), mask)


class ClipCov(Regularizer):
    """Token hook: weight 0 for a random few of the tokens with low < covariance < high, else 1.

    Args:
        generator: draws which ones, on its device, one uniform number per element and call;
            seed it alike on all ranks. None: the trainer draws extra["noise"] (uniform in [0, 1),
            L), as compiled code needs it.
        fraction: of all valid tokens, at least one token.
        low, high: of `covariance`.

    The weight reaches the terms of this package; the method asks for it on the policy's surrogate,
    which the trainer multiplies itself. The released code passes over tokens that the clip of PPO
    already caught, which is not known here.

    Source: Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
    Models", arXiv:2505.22617 (number from memory); defaults of its code and of verl.
    """

    hook = "token"
    requires = frozenset({"logp", "advantages"})
    whole_batch = True

    def __init__(
        self,
        generator: Generator | None = None,
        fraction: float = 0.0002,
        low: float = 1.0,
        high: float = 5.0,
    ):
        super().__init__()
        if generator is None:
            self.requires |= {"extra.noise"}
        self.generator, self.fraction, self.low, self.high = generator, fraction, low, high

    def forward(self, x: RegInputs) -> RegOutput:
        logp = x.need("logp")
        score = covariance(logp, x.need("advantages"), x.mask)
        valid = all_or(x.mask, logp)
        if self.generator is None:
            noise = x.need("extra.noise")
        else:
            noise = torch.rand(score.shape, generator=self.generator, device=score.device)
        between = valid & (score > self.low) & (score < self.high)
        caught = lowest(noise, between, share_of(valid, self.fraction).clamp(min=1))
        weight = 1 - caught.to(score.dtype)
        return RegOutput(
            token_weight=weight, metrics={"clipped": masked_reduce(1 - weight, x.mask)}
        )


class KLCov(Regularizer):
    """Loss coef |logp - old_logp| on the few tokens of largest covariance.

    On the policy that sampled, the gradient is 0; it acts from the second update of a batch on.

    Args:
        coef: 1 in the paper's scripts, 0.1 in verl's defaults.
        fraction: of all valid tokens, at least one token.

    Source: as `ClipCov`; where it acts the method uses the surrogate without clipping.
    """

    requires = frozenset({"logp", "old_logp", "advantages"})
    whole_batch = True

    def __init__(
        self, coef: Coefficient = 1.0, fraction: float = 0.0002, reduction: str | None = None
    ):
        super().__init__(coef, reduction)
        self.fraction = fraction

    def forward(self, x: RegInputs) -> RegOutput:
        logp, old = x.need("logp"), x.need("old_logp")
        score = covariance(logp, x.need("advantages"), x.mask)
        valid = all_or(x.mask, logp)
        top = lowest(-score, valid, share_of(valid, self.fraction).clamp(min=1))
        drift = log_ratio(keep(logp, x.mask), keep(old.detach(), x.mask)).abs()
        return RegOutput(
            per_element=times(self.weight, torch.where(top, drift, 0.0)),
            metrics={"drift": masked_reduce(drift.detach(), top)},
        )
