"""Divergence of what two policies visit or say: by a discriminator, by sequences, in closed form.

occupancy_penalty   reward penalties from a discriminator's log-ratio (control)
sequence_chi2       chi2 of whole responses from their log-probabilities (token policies)
f_divergence        closed forms between two distributions
robust_value        worst case of a value over distributions near a given one
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient
from offrl.regularizers.reductions import keep, log_ratio, masked_mean, masked_reduce, times

Penalty = Literal["kl", "chi2", "sqrt-chi2", "tv", "wasserstein"]


def discriminator_loss(
    score: Tensor,
    current: Tensor,
    kind: Literal["log-ratio", "tv", "wasserstein"] = "log-ratio",
    mask: Tensor | None = None,
) -> Tensor:
    """Loss of a discriminator D(s, a) between the current policy's and base data, elementwise.

    "log-ratio" is logistic: softplus(-D) on current and softplus(D) on base data, minimal at
    D = log(current / base) if both are averaged with equal weight. "tv" is -tanh(D) and tanh(D),
    plus 0.01 D^2; "wasserstein" is -D and D: the caller clips D's weights to +-0.01 after a step.

    Args:
        score: D, any shape; receives the gradient.
        current: bool of that shape, 1 where the pair is the current policy's.
        mask: of that shape.

    Returns:
        Of that shape; at D = 0 it is log 2 for "log-ratio" and 0 for the others.

    Source: Laidlaw et al., arXiv:2403.03185, released code.

    >>> discriminator_loss(torch.tensor([0.0, 3.0]), torch.tensor([True, True]))
    tensor([0.6931, 0.0486])
    """
    if kind not in ("log-ratio", "tv", "wasserstein"):
        raise ValueError(f"kind must be log-ratio, tv or wasserstein, got {kind!r}")
    score = keep(score, mask)
    signed = torch.where(current.bool(), score, -score)
    if kind == "log-ratio":
        return keep(F.softplus(-signed), mask)
    return -signed.tanh() + 0.01 * score.square() if kind == "tv" else -signed


def occupancy_penalty(
    score: Tensor, kind: Penalty = "sqrt-chi2", mask: Tensor | None = None, trim: float = 0.01
) -> Tensor:
    """What a discriminator's score D costs in reward; its mean is the divergence that `kind` names.

        kl           D
        chi2         e^D - 1, the exponent at most 20
        sqrt-chi2    (e^D - 1) / sqrt(chi2), chi2 the mean over the batch without the share `trim`
                     at each end; without the division where that mean is not positive
        tv           sign(D), D trained with kind "tv"
        wasserstein  D, trained with kind "wasserstein"

    Args:
        score: any shape; detached. Values that are not finite give 0.
        mask: of that shape.

    Returns:
        Of that shape, to be subtracted from the reward; no gradient. 0 where both policies visit
        alike, except that signs scatter there.

    Source: Laidlaw et al., arXiv:2403.03185, released code, whose coefficients lie between 0.01
    and 1 times the standard deviation of the base policy's rewards.

    >>> occupancy_penalty(torch.tensor([0.0, 1.0]), "chi2")
    tensor([0.0000, 1.7183])
    """
    if kind not in ("kl", "chi2", "sqrt-chi2", "tv", "wasserstein"):
        raise ValueError(f"kind must be kl, chi2, sqrt-chi2, tv or wasserstein, got {kind!r}")
    score = keep(score.detach(), mask)
    score = torch.where(score.isfinite(), score, 0.0)
    if kind == "tv":
        return score.sign()
    if kind in ("kl", "wasserstein"):
        return score
    excess = torch.expm1(score.clamp(max=20))
    if kind == "chi2":
        return excess
    mean = trimmed_mean(excess, mask, trim)
    return excess * torch.where(mean > 0, mean, 1.0).rsqrt()


def trimmed_mean(x: Tensor, mask: Tensor | None, trim: float) -> Tensor:
    """0-d mean of the valid entries without floor(trim n) of them at each end."""
    ordered = keep(x, mask, torch.inf).reshape(-1).sort().values
    valid = torch.ones_like(x) if mask is None else mask.to(x.dtype).expand_as(x)
    count = valid.sum()
    cut = (trim * count.double()).floor()
    place = torch.arange(len(ordered), device=x.device)
    return masked_mean(ordered, (place >= cut) & (place < count - cut))


class OccupancyReward(Regularizer):
    """Reward hook: r - coef `occupancy_penalty`(D), D from a discriminator that the trainer fits.

    Inputs: `rewards` (B,), extra["discriminator"] (B,). Not for token policies, whose log-ratio is
    known exactly: `Chi2Occupancy`.

    Args:
        coef: in units of reward. The released configurations use 2e-4 (traffic), 0.08 (pandemic)
            and 0.05 (glucose, tomato).
    """

    hook = "reward"
    requires = frozenset({"rewards", "extra.discriminator"})

    def __init__(self, coef: Coefficient, kind: Penalty = "sqrt-chi2"):
        super().__init__(coef)
        self.kind: Penalty = kind

    def forward(self, x: RegInputs) -> RegOutput:
        penalty = occupancy_penalty(x.need("extra.discriminator"), self.kind)
        return RegOutput(
            rewards=x.need("rewards") - self.weight * penalty, metrics={"penalty": penalty.mean()}
        )


def sequence_chi2(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None = None,
    grad: Literal["path", "ratio"] = "path",
) -> Tensor:
    """Sampled chi2(pi || ref) = E_ref[(pi / ref)^2] - 1 of whole sequences, one number per row.

    With R = sum_t (logp - ref_logp) it is expm1(R) + expm1(-R). The second term has mean 0 under pi
    (a control variate) and makes every sample 2 cosh R - 2 >= 0. Beyond 10 both continue linearly,
    as e^10 (1 + |R| - 10) - 1, so that one odd response cannot take over a batch.

    In expectation over y ~ pi, as long as |R| <= 10, the gradient is
        path    grad chi2 / 2 + grad KL(ref || pi), as in the released code
        ratio   grad chi2; the value is multiplied by pi / sg(pi) = 1

    Args:
        logp: (B, T), or (B,) for actions; receives the gradient.
        ref_logp: the same under the reference; detached.
        mask: of the shape of `logp`.

    Returns:
        (B,): 0 where R = 0, with a zero path gradient, else positive.

    Source: Laidlaw et al., arXiv:2403.03185, released code for language models.

    >>> sequence_chi2(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -1.5]]))
    tensor([1.0862])
    """
    if grad not in ("path", "ratio"):
        raise ValueError(f"grad must be path or ratio, got {grad!r}")
    ratio = log_ratio(keep(logp, mask), keep(ref_logp.detach(), mask))
    ratio = ratio if ratio.dim() == 1 else ratio.sum(-1)
    value = linear_expm1(ratio) + linear_expm1(-ratio)
    if grad == "path":
        return value
    ratio = torch.where(ratio.isinf(), 0.0, ratio)
    return (ratio - ratio.detach()).exp() * value


def linear_expm1(x: Tensor, edge: float = 10.0) -> Tensor:
    return torch.expm1(x.clamp(max=edge)) + math.exp(edge) * (x - edge).clamp(min=0)


class Chi2Occupancy(Regularizer):
    """Loss coef sqrt(max(chi2, floor)), chi2 the mean of `sequence_chi2` over the sequences.

    On the floor, where training from the reference starts, the loss is coef 0.01 and has no
    gradient; the metric "floor" is 1 there and "chi2" the value before it. The root is taken of the
    mean over a micro-batch on all ranks, so its size matters: the mean of the micro-batches' roots
    lies below the root of their mean.

    Args:
        coef: 8e-4 in the released code.
        floor: least chi2.
    """

    requires = frozenset({"logp", "ref_logp"})
    whole_batch = True

    def __init__(
        self, coef: Coefficient = 8e-4, floor: float = 1e-4, grad: Literal["path", "ratio"] = "path"
    ):
        super().__init__(coef)
        self.floor = floor
        self.grad: Literal["path", "ratio"] = grad

    def forward(self, x: RegInputs) -> RegOutput:
        logp = x.need("logp")
        values = sequence_chi2(logp, x.need("ref_logp"), x.mask, self.grad)
        valid = torch.ones_like(logp) if x.mask is None else x.mask
        valid = valid.bool() if valid.dim() == 1 else valid.bool().any(-1)
        chi2 = masked_reduce(values, valid)
        root = torch.where(valid.any(), chi2.clamp(min=self.floor).sqrt(), chi2)
        return RegOutput(
            loss=times(self.weight, root),
            metrics={"chi2": chi2.detach(), "floor": (chi2 <= self.floor).to(chi2.dtype)},
        )
