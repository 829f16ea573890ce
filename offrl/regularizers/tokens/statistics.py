"""Statistics of token distributions that never hold the probabilities of more than one tile.

The (N, V) product with the head is made in tiles of `chunk_tokens` x `chunk_vocab`. One sweep keeps
per token the running max m of the logits z, s = sum e^(z - m) and u = sum e^(z - m) (z - m), from
which every statistic follows; the backward pass makes the same tiles once more. Both sums are
shifted by m, so a large offset that all logits share costs no digits. Cost: four products with the
head where a plain forward and backward pass takes three.

With p = softmax(z), r the reference, q = p restricted to a set S and renormalized, H an entropy:

    name         value                                 gradient with respect to z_j
    logp         z_a - m - log s                       1[j = a] - p_j
    entropy      log s - u / s                         -p_j (log p_j + H)
    lse          m + log s                             p_j
    log_sum_sq   log sum p^2 = lse(2 z) - 2 lse(z)     2 (p_j^2 / sum p^2 - p_j)
    kl           KL(p || r)                            p_j (log p_j - log r_j - KL)
    reverse_kl   KL(r || p)                            p_j - r_j
    log1p_chi2   lse(2 z - z^r) - 2 lse(z) + lse(z^r)  2 (softmax(2 z - z^r)_j - p_j)
    tv           sum |p - r| / 2, a second sweep       p_j (s_j - sum p s) / 2, s = sign(p - r)
    SetEntropy   entropy of q                          -q_j (log q_j + H) in S, 0 elsewhere
    LogMass      log of the mass of S                  q_j 1[j in S] - p_j
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from offrl.regularizers.tokens.sweep import RELATIVE, Head, Plan, TokenStatistics
from offrl.regularizers.tokens.token_sets import (
    LogMass,
    MinP,
    Nucleus,
    SetEntropy,
    Statistic,
    Threshold,
)

__all__ = [
    "PLAIN",
    "RELATIVE",
    "Head",
    "LogMass",
    "MinP",
    "Nucleus",
    "SetEntropy",
    "Statistic",
    "Threshold",
    "token_stats",
    "token_stats_from_logits",
]

PLAIN = ("logp", "entropy", "lse", "log_sum_sq")


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    targets: Tensor | None = None,
    want: Sequence[str] | Mapping[str, Statistic] = ("logp", "entropy"),
    reference: Head | Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = 512,
    chunk_vocab: int = 8192,
) -> dict[str, Tensor]:
    """Statistics of softmax(z) per token, z = softcap tanh(logit_scale logits / softcap) / T.

    The weight is rounded to the dtype of `hidden`; products and all that follows are float32, or
    float64 for float64, under autocast too.

    Args:
        hidden: last hidden states (*L, H), with weight (V, H) and bias (V,) of the head. All three
            receive gradient; the product with a frozen weight is left out.
        targets: int64 (*L,), the tokens whose `logp` is wanted, in [0, V) where the mask is 1.
            One outside gives NaN.
        want: names of the table above, or {name of the result: statistic}, as
            {"logp": "logp", "nucleus_entropy": SetEntropy(Nucleus(0.8))}. Sets are constants for
            the gradient.
        reference: logits (*L, V) or a `Head`, for the divergences; detached. Scale, softcap and
            temperature apply to it as well.
        mask: (*L,), 1 where a token counts; elsewhere all results and gradients are 0, whatever
            `hidden` holds.
        temperature, softcap: above 0; no softcap if None.
        chunk_tokens, chunk_vocab: size of a tile; about five are held at a time.

    Returns:
        {name: Tensor (*L,)} in nats. Logits of -inf are allowed; a divergence that is infinite
        has no gradient.

    Raises:
        ValueError: an unknown name, or one without the targets or reference it needs.

    Rows whose set holds more than the TOP largest logits of a tile are made again with four times
    as many until it is exact, so near uniform rows are slow to give set statistics. This looks at
    values, so the function belongs outside of compiled graphs.

    >>> hidden, weight = torch.zeros(2, 3), torch.randn(5, 3)
    >>> {k: round(v[0].item(), 4) for k, v in token_stats(hidden, weight, want=["entropy"]).items()}
    {'entropy': 1.6094}
    """
    head = Head(hidden, weight, bias)
    return measure(
        head,
        targets,
        want,
        reference,
        mask,
        (temperature, logit_scale, softcap, chunk_tokens, chunk_vocab),
    )


def token_stats_from_logits(
    logits: Tensor,
    targets: Tensor | None = None,
    want: Sequence[str] | Mapping[str, Statistic] = ("logp", "entropy"),
    reference: Head | Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = 512,
    chunk_vocab: int = 8192,
) -> dict[str, Tensor]:
    """`token_stats` of logits (*L, V) that are there already; they receive the gradient.

    >>> token_stats_from_logits(torch.zeros(1, 4), want={"half": LogMass(Nucleus(0.5))})
    {'half': tensor([0.])}
    """
    return measure(
        Head(logits),
        targets,
        want,
        reference,
        mask,
        (temperature, logit_scale, softcap, chunk_tokens, chunk_vocab),
    )


def measure(
    head: Head,
    targets: Tensor | None,
    want: Sequence[str] | Mapping[str, Statistic],
    reference: Head | Tensor | None,
    mask: Tensor | None,
    options: tuple[float, float, float | None, int, int],
) -> dict[str, Tensor]:
    want = dict(want) if isinstance(want, Mapping) else {name: name for name in want}
    for name, statistic in want.items():
        if isinstance(statistic, str) and statistic not in PLAIN + RELATIVE:
            raise ValueError(f"{name!r} must be one of {', '.join(PLAIN + RELATIVE)}, or a set's")
        if statistic == "logp" and targets is None:
            raise ValueError("logp needs targets")
        if statistic in RELATIVE and reference is None:
            raise ValueError(f"{statistic} needs a reference")
    if options[0] <= 0 or (options[2] is not None and options[2] <= 0):
        raise ValueError(f"temperature and softcap must be above 0, got {options[0]}, {options[2]}")
    shape = head.hidden.shape[:-1]
    dtype = torch.float64 if head.hidden.dtype == torch.float64 else torch.float32
    plan = Plan(want, *options, dtype)
    base = Head(reference) if isinstance(reference, Tensor) else reference
    if base is None or not plan.wants(*RELATIVE):
        base = None

    def flat(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        clean = x if mask is None else torch.where(mask.bool().unsqueeze(-1), x, 0)
        return clean.reshape(-1, x.shape[-1])

    if targets is not None:
        targets = targets if mask is None else torch.where(mask.bool(), targets, 0)
        targets = targets.reshape(-1)
    pieces = (None, None, None) if base is None else (flat(base.hidden), base.weight, base.bias)
    found = TokenStatistics.apply(
        plan,
        targets,
        flat(head.hidden),
        head.weight,
        head.bias,
        *(None if x is None else x.detach() for x in pieces),
    )
    found = [x.view(shape) for x in found]
    if mask is not None:
        found = [torch.where(mask.bool(), x, 0) for x in found]
    return dict(zip(want, found, strict=True))
