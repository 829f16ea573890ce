"""Divergences of distributions in closed form, and worst cases of a value within them."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Independent,
    Normal,
    OneHotCategorical,
    kl_divergence,
)
from torch.nn import functional as F

from offrl.regularizers.reductions import keep, log_ratio, times

Divergence = Literal["kl", "reverse-kl", "chi2", "tv", "js", "alpha"]


def f_divergence(
    p: Distribution,
    q: Distribution,
    kind: Divergence,
    alpha: float | None = None,
    infinite: Literal["inf", "kl"] = "inf",
) -> Tensor:
    """Divergence D(p || q) in closed form, for each element of the batch shape.

        kind         definition                                       Normal  Beta  Categorical
        kl           E_p log(p / q)                                   yes     yes   yes
        reverse-kl   E_q log(q / p)                                   yes     yes   yes
        chi2         E_q (p / q)^2 - 1                                yes     yes   yes
        alpha        (E_q (p / q)^a - 1) / (a (a - 1))                yes     yes   yes
        tv           half the mass of |p - q|                         scalar  no    yes
        js           mean KL of p and q to their mean, at most log 2  no      no    yes

    alpha -> 1 is kl, alpha -> 0 reverse-kl, alpha = 2 half of chi2. The chi2 of Gaussians is finite
    where 2 s_q^2 > s_p^2, of Betas where 2 a_p > a_q and 2 b_p > b_q; other alpha likewise. Log
    space throughout: values end at e^80, where the gradient is 0. Both sides receive gradients,
    finite ones also next to undefined entries. Divergences of tanh-squashed Gaussians equal those
    of the Gaussians: hand those over.

    Args:
        p, q: `Normal`, `Beta`, one of both in `Independent`, or `Categorical`, of the same kind.
        alpha: order for kind "alpha".
        infinite: what chi2 and alpha give where they are infinite: inf, without gradient, or
            kl(p, q), as the released code does.

    Returns:
        Of the batch shape: 0 where p and q agree, else positive.

    Raises:
        TypeError: other or mixed distributions. ValueError: no closed form.

    Source: the definitions; what to do at infinity: Laidlaw et al., arXiv:2403.03185, code.

    >>> p, q = (Categorical(torch.tensor(probs)) for probs in ([0.5, 0.5], [0.25, 0.75]))
    >>> f_divergence(p, q, "chi2"), f_divergence(p, q, "tv")
    (tensor(0.3333), tensor(0.2500))
    """
    if kind not in ("kl", "reverse-kl", "chi2", "tv", "js", "alpha"):
        raise ValueError(f"no divergence {kind!r}")
    if kind == "alpha" and alpha is None:
        raise ValueError('kind="alpha" needs alpha=')
    (p, dims), (q, others) = unwrap(p), unwrap(q)
    if type(p) is not type(q) or dims != others or not isinstance(p, Normal | Beta | Categorical):
        raise TypeError(f"no divergence between {type(p).__name__} and {type(q).__name__}")
    if kind in ("kl", "reverse-kl") or (kind == "alpha" and alpha in (0, 1)):
        forward = kind == "kl" or alpha == 1
        return over_event(relative_entropy(p, q) if forward else relative_entropy(q, p), dims)
    if kind in ("chi2", "alpha"):
        order = 2.0 if alpha is None or kind == "chi2" else alpha
        affinity, undefined = log_affinity(p, q, order)
        value = torch.expm1(over_event(affinity, dims).clamp(max=80))
        value = value / (1 if kind == "chi2" else order * (order - 1))
        undefined = over_event(undefined.to(value.dtype), dims) > 0
        other = over_event(relative_entropy(p, q), dims) if infinite == "kl" else torch.inf
        return torch.where(undefined, other, value)
    if isinstance(p, Categorical):
        low, high = log_probs(p), log_probs(q)
        if kind == "tv":
            return (low.exp() - high.exp()).abs().sum(-1) / 2
        # Where both are impossible any number does, and 0 has a gradient.
        sides = (torch.where(low.maximum(high) == -torch.inf, 0.0, side) for side in (low, high))
        middle = torch.logaddexp(*sides) - math.log(2)
        return (discrete_kl(low, middle) + discrete_kl(high, middle)) / 2
    if kind == "tv" and isinstance(p, Normal) and dims == 0:
        return normal_tv(p, q)
    raise ValueError(f"{kind} between {type(p).__name__} distributions has no closed form here")


def unwrap(d: Any) -> tuple[Any, int]:
    if isinstance(d, Independent):
        return d.base_dist, d.reinterpreted_batch_ndims
    return d, 0


def over_event(x: Tensor, dims: int) -> Tensor:
    return x.sum(tuple(range(-dims, 0))) if dims else x


def log_probs(d: Any) -> Tensor:
    return keep(d.logits, None).log_softmax(-1)


def relative_entropy(p: Any, q: Any) -> Tensor:
    if isinstance(p, Categorical):
        return discrete_kl(log_probs(p), log_probs(q))
    return keep(kl_divergence(p, q), None)


def discrete_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities (..., V) that may hold -inf."""
    alive, missing = p > -torch.inf, q == -torch.inf
    gap = torch.where(alive & ~missing, p - q, 0.0)
    return torch.where((alive & missing).any(-1), torch.inf, (p.exp() * gap).sum(-1))


def closed_kl(p: Any, q: Any) -> Tensor:
    """`torch.distributions.kl_divergence`, whose gradient is NaN next to a probability of 0.

    Value and gradient are the same elsewhere; inf where q excludes what p does not.
    """
    kinds = {type(p), type(q)}
    (base, dims), (other, others) = unwrap(p), unwrap(q)
    if dims and dims == others:
        return closed_kl(base, other).flatten(-dims).sum(-1)
    if kinds in ({Categorical}, {OneHotCategorical}):
        return kl_terms(p.probs, log_ratio(p.logits, q.logits), q.probs == 0).sum(-1)
    if kinds == {Bernoulli}:
        # In torch's order, in which gradients are added up; `probs` are made at first sight.
        one, missing = p.probs, q.probs
        gain = log_ratio(F.softplus(-q.logits), F.softplus(-p.logits))
        yes = kl_terms(one, gain, missing == 0)
        gain = log_ratio(F.softplus(q.logits), F.softplus(p.logits))
        return yes + kl_terms(1 - one, gain, missing == 1)
    return kl_divergence(p, q)


def kl_terms(probs: Tensor, gap: Tensor, missing: Tensor) -> Tensor:
    """probs * gap, 0 where the probability is, inf where it is not but `missing` in the other."""
    infinite = missing & (probs > 0)
    return torch.where(infinite, torch.inf, times(probs, torch.where(infinite, 0.0, gap)))


def log_affinity(p: Any, q: Any, order: float) -> tuple[Tensor, Tensor]:
    """log of the integral of p^order q^(1 - order), and where it is infinite (0 stands there)."""
    if isinstance(p, Categorical):
        low, high = log_probs(p), log_probs(q)
        # A power of 0: positive ones vanish, negative ones are infinite.
        vanish = ((low == -torch.inf) & (order > 0)) | ((high == -torch.inf) & (order < 1))
        blow_up = ((low == -torch.inf) & (order < 0)) | ((high == -torch.inf) & (order > 1))
        undefined = (blow_up & ~vanish).any(-1)
        # exp(-1e4) is 0, and unlike -inf leaves the gradient of logsumexp defined.
        terms = torch.where(vanish | blow_up, -1e4, order * low + (1 - order) * high)
        return torch.where(undefined, 0.0, terms.logsumexp(-1)), undefined
    if isinstance(p, Normal):
        (m, s), (n, t) = ((keep(d.loc, None), keep(d.scale, None)) for d in (p, q))
        variance = order * t.square() + (1 - order) * s.square()
        undefined = variance <= 0
        variance = torch.where(undefined, 1.0, variance)
        value = (1 - order) * s.log() + order * t.log() - variance.log() / 2
        value = value - order * (1 - order) * (m - n).square() / variance / 2
        return torch.where(undefined, 0.0, value), undefined
    sides = [(keep(d.concentration1, None), keep(d.concentration0, None)) for d in (p, q)]
    a, b = (order * x + (1 - order) * y for x, y in zip(*sides, strict=True))
    undefined = (a <= 0) | (b <= 0)
    mixed = log_beta(torch.where(undefined, 1.0, a), torch.where(undefined, 1.0, b))
    value = mixed - order * log_beta(*sides[0]) - (1 - order) * log_beta(*sides[1])
    return torch.where(undefined, 0.0, value), undefined


def log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def normal_tv(p: Any, q: Any) -> Tensor:
    """Total variation of scalar Gaussians: they cross at two points, one at infinity if s_p = s_q.

    In units of p, where q has mean u and scale r, the crossings solve a z^2 + 2 b z + c = 0.
    """
    u = (keep(q.loc, None) - keep(p.loc, None)) / p.scale
    r = keep(q.scale, None) / p.scale
    a, b, c = 1 - r**-2, u / r**2, -((u / r) ** 2) - 2 * r.log()
    square = (u / r) ** 2 + 2 * a * r.log()  # b^2 - a c without its cancellation
    same = square < 1e-14
    root = -(b + torch.where(b < 0, -1.0, 1.0) * torch.where(same, 1.0, square).sqrt())
    far = root / torch.where(a.abs() < 1e-12, 1e-12, a)
    near = c / torch.where(same, 1.0, root)
    mass = normal_cdf(far) - normal_cdf(near)
    other = normal_cdf((far - u) / r) - normal_cdf((near - u) / r)
    return torch.where(same, 0.0, (mass - other).abs())


def normal_cdf(z: Tensor) -> Tensor:
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def robust_value(
    values: Tensor,
    probs: Tensor | None,
    kind: Literal["tv", "kl", "chi2"],
    lam: float | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Worst case min_P' E_P'[V] + lam D(P' || P) over distributions P' near P.

        tv    E[min(V, V_min + lam)], V_min the least of the values listed, also those of
              probability 0
        kl    -lam log E exp(-V / lam)
        chi2  max_c E[min(V, c)] - Var(min(V, c)) / (4 lam); the best c is found exactly

    Args:
        values: V of the next states or samples, (..., N).
        probs: P, of that shape, detached; None: equally likely samples.
        lam: above 0, a number or a tensor that broadcasts against (...), detached: price of a unit
            of divergence. -> 0 gives the least value (of positive probability, except for tv),
            -> inf the mean.
        mask: of the shape of `values`, 1 where an entry counts; with none in a row its value is 0.

    Returns:
        (...): at most the mean, and not decreasing in `lam`; computed in float64. The gradient to
        `values` is the worst case P' itself.

    Source: duality of f-divergences, derived; checked in the tests by optimizing over P'.

    >>> robust_value(torch.tensor([0.0, 1.0]), None, "tv", 0.5)
    tensor(0.2500)
    """
    if kind not in ("tv", "kl", "chi2"):
        raise ValueError(f"kind must be tv, kl or chi2, got {kind!r}")
    kept = keep(values, mask)
    v = kept.double()
    valid = torch.ones_like(v) if mask is None else mask.to(v.dtype).expand_as(v)
    empty = valid.sum(-1, keepdim=True) == 0
    valid = torch.where(empty, 1.0, valid)
    p = valid if probs is None else keep(probs.detach().double(), mask) + empty
    p = p / p.sum(-1, keepdim=True)
    lam = torch.as_tensor(lam, dtype=v.dtype, device=v.device).detach().unsqueeze(-1)
    if kind != "tv":
        v = torch.where(v.isinf() & (p == 0), 0.0, v)
    if kind == "tv":
        least = torch.where(valid > 0, v, torch.inf).amin(-1, keepdim=True)
        result = times(p, torch.minimum(v, least + lam)).sum(-1)
    elif kind == "kl":
        result = -lam.squeeze(-1) * (p.log() - v / lam).logsumexp(-1)
    else:
        # E (c - V)_+ = 2 lam at the best c: over the k least values c = (2 lam + sum p V) / sum p,
        # and the least of these is the one.
        order = v.detach().argsort(-1)
        mass = p.gather(-1, order).cumsum(-1)
        total = (p * v.detach()).gather(-1, order).cumsum(-1)
        c = torch.where(mass > 0, (2 * lam + total) / mass.clamp(min=1e-300), torch.inf)
        low = torch.minimum(v, c.amin(-1, keepdim=True))
        mean = (p * low).sum(-1)
        variance = (p * (low - mean.unsqueeze(-1)).square()).sum(-1)
        result = mean - variance / (4 * lam.squeeze(-1))
    return result.to(kept.dtype)
