"""Masked reductions and statistics of groups; float32, no branch on a value, no host sync."""

import torch
from torch import Tensor

MODES = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "none",
)


def keep(x: Tensor, mask: Tensor | None, fill: float = 0.0) -> Tensor:
    """float32 copy of `x` with `fill` wherever the mask is 0.

    Applied to inputs, not to results: what padding holds (NaN and infinities included) then reaches
    neither values nor gradients.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x if mask is None else torch.where(mask.bool(), x, fill)


def real(x: Tensor) -> Tensor:
    """Integers, bools and half precision as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def times(weight: Tensor | float, x: Tensor) -> Tensor:
    """weight * x, where 0 times an infinity is 0 and has no gradient: p log p at p = 0.

    Args:
        weight: of a shape that broadcasts against `x`: probabilities, gates, coefficients.
        x: log-probabilities and what is made of them.

    >>> times(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.5]).log())
    tensor([ 0.0000, -0.3466])
    """
    return weight * torch.where(x.isinf() & (weight == 0), 0.0, x)


def log_ratio(p: Tensor, q: Tensor) -> Tensor:
    """p - q of log-probabilities; 0 without gradient where both are the same infinity.

    What both exclude they agree on. What one of them excludes gives an infinity.

    >>> log_ratio(torch.tensor([-torch.inf, -1.0]), torch.tensor([-torch.inf, -3.0]))
    tensor([0., 2.])
    """
    return torch.where((p == q) & p.isinf(), 0.0, p - q)


def held(x: Tensor) -> Tensor:
    """`x`, without gradient where it is infinite: what is then made of it has a finite one."""
    return torch.where(x.isinf(), x.detach(), x)


def masked_reduce(
    x: Tensor,
    mask: Tensor | None = None,
    mode: str = "token-mean",
    count: Tensor | float | None = None,
    norm: float | None = None,
) -> Tensor:
    """Reduce per-element values of shape L, (B, T) or (B,), to a scalar.

    Args:
        x: values (B, T) or (B,); a (B,) input is one token per sequence.
        mask: (B, T) or (B,), 1 where an element counts; None counts all.
        mode: `token-mean` sum / tokens; `seq-mean-token-mean` mean over sequences of their token
            means; `seq-mean-token-sum` mean over sequences of their token sums;
            `seq-mean-token-sum-norm` the same divided by `norm`; `none` returns the masked `x`.
            Sequences without a valid token are left out of the mean over sequences.
        count: the global number of tokens (`token-mean`) or sequences (the others) divided by the
            world size, so that averaging over ranks gives the global mean; None counts locally. It
            may lie below 1.
        norm: constant of `seq-mean-token-sum-norm`, such as the longest completion.

    Returns:
        0-d tensor, 0 with a gradient path when nothing counts; (B, T) for `none`.

    Raises:
        ValueError: unknown mode, or `norm` missing.

    >>> x, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> masked_reduce(x, mask), masked_reduce(x, mask, "seq-mean-token-mean")
    (tensor(3.), tensor(3.5000))
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    x = keep(x, mask)
    if mode == "none":
        return x
    weight = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    if mode == "token-mean":
        return x.sum() / not_zero(weight.sum() if count is None else count)
    rows, tokens = (x, weight) if x.dim() == 1 else (x.sum(-1), weight.sum(-1))
    if mode == "seq-mean-token-mean":
        rows = rows / tokens.clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        if norm is None:
            raise ValueError("seq-mean-token-sum-norm needs norm=")
        rows = rows / norm
    return rows.sum() / not_zero((tokens > 0).sum() if count is None else count)


def not_zero(count: Tensor | float) -> Tensor | float:
    return torch.where(count == 0, 1, count) if isinstance(count, Tensor) else count or 1


def masked_mean(x: Tensor, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Mean over `dim` of the entries where the mask is 1; 0 where there are none."""
    x = keep(x, mask)
    if mask is None:
        return x.mean(dim)
    return x.sum(dim) / mask.to(x.dtype).sum(dim).clamp(min=1)


def sum_and_count(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of the entries where the mask is 1, and their number: what `sync` carries. Detached."""
    x = keep(x.detach(), mask)
    weight = torch.ones_like(x) if mask is None else mask.to(x.dtype).expand_as(x)
    return x.sum(), weight.sum()


def masked_quantile(
    x: Tensor, quantile: float, mask: Tensor | None = None, rowwise: bool = False
) -> Tensor:
    """Quantile of the entries where the mask is 1, interpolated as by `torch.quantile`. Detached.

    Args:
        x: values of shape L, of any number (`torch.quantile` stops at 16 million).
        quantile: in [0, 1]; 0 gives the smallest entry, 1 the largest.
        rowwise: one quantile per row of the last axis instead of one of all entries.

    Returns:
        (..., 1) or (1,), which broadcasts against `x`; not finite where nothing counts.

    >>> masked_quantile(torch.tensor([1.0, 5.0, 2.0, 9.0]), 0.5, torch.tensor([1, 1, 1, 0]))
    tensor([2.])
    """
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool().expand_as(x)
    x = keep(x.detach(), valid, torch.inf)
    if not rowwise:
        x, valid = x.reshape(-1), valid.reshape(-1)
    rank = quantile * (valid.sum(-1, keepdim=True) - 1).clamp(min=0).double()
    ordered = x.sort(-1).values
    low, high = (ordered.gather(-1, edge.long()) for edge in (rank.floor(), rank.ceil()))
    between = torch.lerp(low, high, (rank - rank.floor()).to(low.dtype))
    return torch.where(low.isinf(), low, between)


def over_tokens(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the shape of `like`: one number per sequence (B,) is repeated over its tokens."""
    return x if x.dim() == like.dim() else x.unsqueeze(-1).expand_as(like)


def group_sum(x: Tensor, group: Tensor) -> Tensor:
    """For every row the sum of `x` (B,) or (B, ...) over the rows of its group.

    Args:
        group: int64 (B,) in [0, B), in any order; see `dense_groups` for other ids.
    """
    return torch.zeros_like(x).index_add(0, group, x)[group]


def group_mean(x: Tensor, group: Tensor, mask: Tensor | None = None) -> Tensor:
    """For every row the mean of `x` (B,) or (B, ...) over its group's rows where `mask`, of the
    shape of `x`, is 1; 0 if none."""
    weight = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    return group_sum(keep(x, mask), group) / group_sum(weight, group).clamp(min=1)


def group_std(x: Tensor, group: Tensor, correction: int = 1) -> Tensor:
    """For every row the standard deviation of `x` (B,) in its group; 0 for a group of one."""
    square = (x - group_mean(x, group)).square()
    size = group_sum(torch.ones_like(x), group)
    return (group_sum(square, group) / (size - correction).clamp(min=1)).sqrt()


def group_extreme(x: Tensor, group: Tensor, largest: bool = True) -> Tensor:
    """For every row the largest (or smallest) `x` (B,) of its group."""
    start = torch.full_like(x, -torch.inf if largest else torch.inf)
    return start.scatter_reduce(0, group, x, "amax" if largest else "amin")[group]


def dense_groups(group: Tensor) -> Tensor:
    """Any integer ids (B,) as int64 ids in [0, B); equal ids stay equal. Not for compiled code."""
    return torch.unique(group, return_inverse=True)[1]
