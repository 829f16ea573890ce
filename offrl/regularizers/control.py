"""Terms of control actors: imitation, nearest pairs, the weight of values. Unreduced, unscaled."""

import torch
from torch import Tensor


def imitation(act: Tensor, anchor: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance of actions to given ones, averaged over the action's dimensions.

    Args:
        act: policy actions (..., a); receives the gradient 2 (act - anchor) / a.
        anchor: actions to stay near (..., a), of the data or of a neighbor; detached.
        mask: (...), 1 where the entry counts; None counts all.

    Returns:
        Tensor (...): 0 where the actions agree, at most 4 for actions in [-1, 1]. The caller
        reduces it and adds the weight once.

    Source: Fujimoto and Gu, NeurIPS 2021 (data action); Ran et al., ICML 2023 (neighbor's action).

    >>> imitation(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.5000])
    """
    penalty = (act - anchor.detach()).square().mean(-1)
    return penalty if mask is None else penalty * mask


def nearest_pair(
    obs: Tensor, act: Tensor, data_obs: Tensor, data_act: Tensor, beta: float, block: int = 65_536
) -> Tensor:
    """Row of the data pair nearest to (obs, act) in the metric of PRDC, searched exhaustively.

    j = argmin_j beta^2 |obs - data_obs_j|^2 + |act - data_act_j|^2, by differences in float64, the
    lowest row on a tie. Cost: all B N distances, in blocks; meant for small data or for checking.
    `offrl.data.neighbors` finds the same rows fast when the observations are rows of the data.

    Args:
        obs, act: queries (B, o) and (B, a); no gradient flows.
        data_obs, data_act: (N, o) and (N, a), on the same scale as the queries.
        beta: weight of the observation; 0 compares actions only.

    Returns:
        int64 (B,).

    >>> zero = torch.zeros(2, 1)
    >>> nearest_pair(zero[:1], torch.tensor([[0.9]]), zero, torch.tensor([[0.0], [1.0]]), beta=2.0)
    tensor([1])
    """
    query = torch.cat([beta * obs.detach().double(), act.detach().double()], -1)
    best = torch.full((len(query),), torch.inf, dtype=torch.float64, device=query.device)
    row = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    for start in range(0, len(data_obs), block):
        part = slice(start, start + block)
        keys = torch.cat([beta * data_obs[part].double(), data_act[part].double()], -1)
        gaps = torch.cdist(query, keys, compute_mode="donot_use_mm_for_euclid_dist")
        distance, index = gaps.min(-1)
        closer = distance < best
        best = torch.where(closer, distance, best)
        row = torch.where(closer, index + start, row)
    return row


def normalized_trust(q: Tensor, alpha: float) -> Tensor:
    """TD3+BC's weight of the value term: alpha / mean |Q|, which makes it scale-free.

    Args:
        q: values of the policy's actions (*S, B); detached.
        alpha: trust in the values against imitation; 0 leaves imitation only.

    Returns:
        Tensor (*S,), one weight per stacked seed.

    Source: Fujimoto and Gu, NeurIPS 2021.

    >>> normalized_trust(torch.tensor([2.0, -2.0]), 2.5)
    tensor(1.2500)
    """
    return alpha / q.detach().abs().mean(-1)
