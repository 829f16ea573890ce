"""Terms of control actors: imitation, gated or not, nearest pairs, the weight of values."""

from typing import Literal

import torch
from torch import Tensor

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient
from offrl.regularizers.reductions import keep, masked_reduce, over_tokens, times


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
    rows = None if mask is None else mask.unsqueeze(-1)
    return (keep(act, rows) - keep(anchor.detach(), rows)).square().mean(-1)


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


def q_scale(q: Tensor, alpha: float) -> Tensor:
    """TD3+BC's weight of the value term: alpha / mean |Q|, which makes it scale-free.

    Args:
        q: values of the policy's actions (*S, B); detached.
        alpha: trust in the values against imitation; 0 leaves imitation only.

    Returns:
        Tensor (*S,), one weight per stacked seed.

    Source: Fujimoto and Gu, NeurIPS 2021.

    >>> q_scale(torch.tensor([2.0, -2.0]), 2.5)
    tensor(1.2500)
    """
    return alpha / q.detach().abs().mean(-1)


def gated_clone(
    act: Tensor,
    candidate: Tensor,
    data_act: Tensor,
    q_candidate: Tensor,
    q_data: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    ref_detach: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A2PR's imitation: towards the better of two actions, where one is better than the policy.

    The reference is the candidate if q_candidate >= q_data, else the data action; the gate is open
    where q_candidate >= value or q_data > value, so that the reference's advantage is not negative.
    Comparisons carry no gradient.

    Args:
        act: policy actions (..., a); receives the gradient.
        candidate: actions (..., a) of the generative model: in the released code its
            reconstruction of `act`, through which the gradient also flows unless `ref_detach`.
        data_act: actions of the data (..., a); detached.
        q_candidate, q_data, value: Q(s, candidate), Q(s, data_act), V(s), (...); detached.
        mask: (...), 1 where an entry counts.
        ref_detach: a fixed target, as the paper has it (from memory; not checked).

    Returns:
        Squared distance averaged over the action's dimensions, 0 where the gate is closed, (...);
        the gate (...) and where the candidate won (...), both bool. A gate open everywhere and a
        data action that wins everywhere make it the imitation of TD3+BC.

    Source: Liu et al., ICML 2024, arXiv:2405.19909, released code.

    >>> act, candidate, data = torch.tensor([[0.0]]), torch.tensor([[0.5]]), torch.tensor([[1.0]])
    >>> q = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.0])
    >>> gated_clone(act, candidate, data, *q)
    (tensor([0.2500]), tensor([True]), tensor([True]))
    """
    rows = None if mask is None else mask.unsqueeze(-1)
    q_candidate, q_data, value = (keep(q.detach(), mask) for q in (q_candidate, q_data, value))
    wins = q_candidate >= q_data
    gate = (q_candidate >= value) | (q_data > value)
    gate = gate if mask is None else gate & mask.bool()
    candidate = keep(candidate.detach() if ref_detach else candidate, rows)
    reference = torch.where(wins.unsqueeze(-1), candidate, keep(data_act.detach(), rows))
    distance = (keep(act, rows) - reference).square().mean(-1)
    return keep(distance, gate), gate, wins


class AdvantageGatedClone(Regularizer):
    """Loss coef times cloning of what has a positive advantage only.

    Args:
        form: "likelihood": -logp where the advantage is above 0, for token policies and actors with
            a density; inputs `logp` L, `advantages` (B,) or L. "action": `gated_clone` for
            deterministic actors; inputs, in extra: "act", "candidate", "data_act", (*L, a), and
            "q_candidate", "q_data", "value", L.
        ref_detach: of `gated_clone`.

    A closed gate counts in the mean: the fewer gates are open, the weaker the term. Where all
    advantages are <= 0 it is 0.
    """

    def __init__(
        self,
        coef: Coefficient,
        form: Literal["likelihood", "action"] = "likelihood",
        ref_detach: bool = False,
        reduction: str | None = None,
    ):
        super().__init__(coef, reduction)
        if form not in ("likelihood", "action"):
            raise ValueError(f"form must be likelihood or action, got {form!r}")
        self.form, self.ref_detach = form, ref_detach
        self.requires = frozenset(
            {"logp", "advantages"} if form == "likelihood" else {f"extra.{n}" for n in PARTS}
        )

    def forward(self, x: RegInputs) -> RegOutput:
        if self.form == "likelihood":
            logp = x.need("logp")
            gate = keep(over_tokens(x.need("advantages"), logp), x.mask) > 0
            loss = -keep(logp, gate)
            metrics = {"open": masked_reduce(gate.to(loss.dtype), x.mask)}
        else:
            parts = {name: x.need(f"extra.{name}") for name in PARTS}
            loss, gate, wins = gated_clone(**parts, mask=x.mask, ref_detach=self.ref_detach)
            metrics = {
                "open": masked_reduce(gate.to(loss.dtype), x.mask),
                "candidate": masked_reduce(wins.to(loss.dtype), x.mask),
                "distance": masked_reduce(loss.detach(), gate),
            }
        return RegOutput(per_element=times(self.weight, loss), metrics=metrics)


PARTS = ("act", "candidate", "data_act", "q_candidate", "q_data", "value")
