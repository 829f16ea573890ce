"""All pure functions of the package: tensors in, unreduced and unscaled tensors out."""

from offrl.regularizers.control import imitation, nearest_pair, normalized_trust
from offrl.regularizers.divergences import f_divergence, robust_value
from offrl.regularizers.entropy import peak_mask, reinforce_positive
from offrl.regularizers.kl import dads_weight, geometric_mixture, kl_estimate, kl_in_reward
from offrl.regularizers.occupancy import discriminator_loss, occupancy_penalty, sequence_chi2
from offrl.regularizers.preference import (
    dpo_loss,
    guided_logp,
    inpo_loss,
    ld_weight,
    sequence_nll,
    spo_reward,
)
from offrl.regularizers.rank import (
    action_features,
    beer_penalty,
    dr3_penalty,
    infer_penalty,
    representation_rank,
)
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
from offrl.regularizers.selective import (
    covariance,
    low_probability_loss,
    low_probability_mask,
    proxy_logp,
)
from offrl.regularizers.softq import next_values, soft_q_reward, soft_q_weight
from offrl.regularizers.statistics import (
    Head,
    LogMass,
    MinP,
    Nucleus,
    SetEntropy,
    Threshold,
    token_stats,
    token_stats_from_logits,
)

__all__ = [
    "Head",
    "LogMass",
    "MinP",
    "Nucleus",
    "SetEntropy",
    "Threshold",
    "action_features",
    "beer_penalty",
    "covariance",
    "dads_weight",
    "dense_groups",
    "discriminator_loss",
    "dpo_loss",
    "dr3_penalty",
    "f_divergence",
    "geometric_mixture",
    "group_extreme",
    "group_mean",
    "group_std",
    "group_sum",
    "guided_logp",
    "imitation",
    "infer_penalty",
    "inpo_loss",
    "keep",
    "kl_estimate",
    "kl_in_reward",
    "ld_weight",
    "low_probability_loss",
    "low_probability_mask",
    "masked_mean",
    "masked_quantile",
    "masked_reduce",
    "nearest_pair",
    "next_values",
    "normalized_trust",
    "occupancy_penalty",
    "over_tokens",
    "peak_mask",
    "proxy_logp",
    "reinforce_positive",
    "representation_rank",
    "robust_value",
    "sequence_chi2",
    "sequence_nll",
    "soft_q_reward",
    "soft_q_weight",
    "spo_reward",
    "sum_and_count",
    "token_stats",
    "token_stats_from_logits",
]
