"""All pure functions of the package: tensors in, unreduced and unscaled tensors out."""

from offrl.regularizers.control import imitation, nearest_pair, normalized_trust
from offrl.regularizers.reductions import (
    dense_groups,
    group_extreme,
    group_mean,
    group_std,
    group_sum,
    keep,
    masked_mean,
    masked_quantile,
    masked_reduce,
    over_tokens,
    sum_and_count,
)

__all__ = [
    "dense_groups",
    "group_extreme",
    "group_mean",
    "group_std",
    "group_sum",
    "imitation",
    "keep",
    "masked_mean",
    "masked_quantile",
    "masked_reduce",
    "nearest_pair",
    "normalized_trust",
    "over_tokens",
    "sum_and_count",
]
