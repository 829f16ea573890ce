"""Entropy of the policy: a bonus, an anchor, a band, a temperature and the tokens that have it.

Entropies are in nats and of the distribution that was sampled from: trainers divide logits by the
temperature first. The mean of -log pi(a) is an unbiased estimate of the entropy, but its path
gradient is 0 in expectation and never a substitute for the entropy's.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient, DualVariable, needs_target
from offrl.regularizers.reductions import (
    keep,
    masked_quantile,
    masked_reduce,
    over_tokens,
    sum_and_count,
    times,
)

Scope = Literal["sequence", "batch"]
Mode = Literal["hinge", "square", "indicator"]


def peak_mask(
    entropy: Tensor,
    quantile: float,
    mask: Tensor | None = None,
    scope: Scope = "batch",
    strict: bool = False,
) -> Tensor:
    """Elements whose entropy reaches the quantile of the valid ones.

    Args:
        entropy: any statistic of shape L; no gradient.
        quantile: in [0, 1]; 0 keeps every valid element, 1 the largest alone.
        mask: L, 1 where an element is valid; the others are never kept.
        scope: one quantile for the batch, (B, T) or (B,), or one per sequence of (B, T).
        strict: keep only what lies above the quantile. A sequence whose values are all equal, such
            as one of a single token, then keeps nothing.

    Returns:
        bool, L.

    Raises:
        ValueError: scope "sequence" for (B,) inputs, which have no sequences.

    >>> peak_mask(torch.tensor([0.1, 0.4, 0.2, 0.9]), 0.5)
    tensor([False,  True, False,  True])
    """
    if scope == "sequence" and entropy.dim() == 1:
        raise ValueError('inputs of shape (B,) have no sequences: use scope="batch"')
    level = masked_quantile(entropy, quantile, mask, rowwise=scope == "sequence")
    peak = entropy > level if strict else entropy >= level
    return peak if mask is None else peak & mask.bool()


class PeakEntropyMask(Regularizer):
    """Token hook: weight 1 for the elements of highest entropy, 0 for the rest.

    The default is TRL's `top_entropy_quantile=0.2`: one quantile over the batch, ties kept, means
    still taken over all valid tokens. The quantile is of the micro-batch on all ranks and depends
    on its size; scope "sequence" does not. Inside `Compose` the weight reaches the terms of this
    package; a trainer multiplies its own surrogate by `run("token", x).token_weight`.

    Args:
        quantile: 0 keeps all, 1 the largest alone.

    Source: Wang et al., "Beyond the 80/20 Rule", arXiv:2506.01939 (number from memory).
    """

    hook = "token"
    requires = frozenset({"entropy"})

    def __init__(self, quantile: float = 0.8, scope: Scope = "batch"):
        super().__init__()
        self.quantile, self.scope = quantile, scope
        self.whole_batch = scope == "batch"

    def forward(self, x: RegInputs) -> RegOutput:
        entropy = x.need("entropy")
        peak = peak_mask(entropy, self.quantile, x.mask, self.scope).to(keep(entropy, None).dtype)
        return RegOutput(token_weight=peak, metrics={"share": masked_reduce(peak, x.mask)})


class EntropyBonus(Regularizer):
    """Loss -coef <H>: the gradient flows into the entropy.

    Args:
        coef: number, `Schedule`, or `DualVariable` with violation target - <H> of the last
            optimizer step. The adaptive entropy of Skywork and TRL is `DualVariable(0.0,
            rule="additive", delta=0.005, bounds=(0, 1), gate=True)` with target 0.2: up by delta
            after a step whose entropy lay at or below the target, down otherwise, and applied only
            after the former. All micro-batches of a step use one coefficient; `sync` carries the
            sum of entropies and the count of tokens, so that the mean is that of the whole step.
        target: nats per element, for a `DualVariable`.
        reduction: TRL's bonus is the token mean whatever the type of its loss.

    A uniform distribution of n actions gives -coef log n, a deterministic one 0.
    """

    requires = frozenset({"entropy"})

    def __init__(
        self, coef: Coefficient, target: float | None = None, reduction: str | None = None
    ):
        super().__init__(coef, reduction)
        self.target = needs_target(coef, target)

    def forward(self, x: RegInputs) -> RegOutput:
        entropy = keep(x.need("entropy"), x.mask)
        total, count = sum_and_count(entropy, x.mask)
        return RegOutput(
            per_element=-self.weight * entropy,
            metrics={"entropy": total / count.clamp(min=1)},
            sync={"entropy": total, "count": count},
        )

    def update(self, sync: Mapping[str, Tensor]) -> None:
        super().update(sync)
        if isinstance(self.coef, DualVariable):
            self.coef.update(self.target - sync["entropy"] / sync["count"])


class EntropyAnchor(Regularizer):
    """SIREN: coef (h - h0)^2 holds the entropy of the uncertain tokens where training began.

    h is the mean over sequences of the mean over their peak tokens of the nucleus entropy, the
    entropy of the distribution restricted to its smallest set of mass 0.8 and renormalized; peak
    tokens lie above the 0.8 quantile of their sequence. h0 is h of the first optimizer step in
    training, frozen from then on; until it is known, loss and gradient are 0. Above h0 the gradient
    lowers the entropy, below it raises it; logits outside the nucleus get none.

    Args:
        coef: 0.005 in the released code.
        quantile, scope: of `peak_mask`; control actors (B,) need scope "batch".
        mass: of the nucleus; None takes the entropy of the whole distribution.
        include_crossing: with the token that crosses the mass the nucleus is never empty; without
            it, as in the released code, tokens with p_max >= 0.8 have an empty one, entropy 0 and
            no gradient. `mass` and `include_crossing` are attributes: who makes the statistic
            asks `token_stats` for `SetEntropy(Nucleus(mass, include_crossing))`.

    The anchor is of the whole first step on all ranks, h of one micro-batch on all ranks. Over the
    micro-batches of a step the loss is (their mean h - h0)^2 plus the variance of h among them: for
    the square of the step's mean the first backward pass would need the last micro-batch.

    Source: Jiang et al., "Rethinking Entropy Regularization in Large Reasoning Models", 2025,
    arXiv:2509.25133, and its code.
    """

    whole_batch = True
    anchor: Tensor
    anchored: Tensor

    def __init__(
        self,
        coef: Coefficient = 0.005,
        quantile: float = 0.8,
        scope: Scope = "sequence",
        mass: float | None = 0.8,
        include_crossing: bool = True,
    ):
        super().__init__(coef)
        self.quantile, self.scope = quantile, scope
        self.source = "entropy" if mass is None else "stats.nucleus_entropy"
        self.requires = frozenset({self.source})
        self.mass, self.include_crossing = mass, include_crossing
        self.register_buffer("anchor", torch.tensor(0.0))
        self.register_buffer("anchored", torch.tensor(0, dtype=torch.int64))

    def forward(self, x: RegInputs) -> RegOutput:
        entropy = keep(x.need(self.source), x.mask)
        peak = peak_mask(entropy, self.quantile, x.mask, self.scope, strict=True)
        level = masked_reduce(entropy, peak, "seq-mean-token-mean")
        count = (peak if peak.dim() == 1 else peak.any(-1)).sum()
        anchor = torch.where(self.anchored > 0, self.anchor.to(level.dtype), level.detach())
        return RegOutput(
            loss=self.weight * (level - anchor).square() * (count > 0),
            metrics={"entropy": level.detach(), "anchor": anchor},
            sync={"entropy": level.detach() * count, "count": count},
        )

    def update(self, sync: Mapping[str, Tensor]) -> None:
        super().update(sync)
        if not self.training:
            return
        fresh = (self.anchored == 0) & (sync["count"] > 0)
        level = (sync["entropy"] / sync["count"]).to(self.anchor)
        self.anchor.copy_(torch.where(fresh, level, self.anchor))
        self.anchored += fresh.to(self.anchored)


class EntropyBand(Regularizer):
    """EPO's smoothing: a price on entropies outside [low, high] times their history.

    The history of a turn is the mean over past optimizer steps of the batch's mean entropy at that
    turn, over the steps in which some episode reached it. An element whose turn has no history, or
    comes before `first`, costs nothing. With p = relu(H - high history) + relu(low history - H) an
    element costs coef p in mode "hinge", coef p^2 in "square" and coef 1[p > 0] in "indicator". The
    indicator is the released code's: **its gradient is 0**, so that only the bonus trained there.
    That code also pads short episodes on the left with zeros, which misaligns its history; nothing
    is padded here.

    In the released code the whole loss is -c (<H> - w alpha <1[p > 0]>): `EntropyBonus(c)` next to
    `EntropyBand(c alpha)`, c = 0.001, alpha = 0.05 (ScienceWorld) or 0.1 (ALFWorld), w the
    `Schedule("two-phase", c alpha, steps=150)`. A coefficient for the hinge was not published.

    Args:
        coef: price of a nat (of its square, of lying outside).
        turns: longest episode in turns; 1 needs no `turn` and keeps one history, for control actors
            and single answers. Later turns cost nothing and are not recorded.
        low, high: edges of the band; 0 and 2 in the released configurations.
        first: first turn with a cost; None is turns // 2. (The released code counts all rows of a
            micro-batch as soon as one has got that far.)

    Source: Xu et al., "EPO: Entropy-regularized Policy Optimization for LLM Agents RL", 2025,
    arXiv:2509.22576, and its code.
    """

    history: Tensor
    count: Tensor

    def __init__(
        self,
        coef: Coefficient,
        turns: int = 1,
        low: float = 0.0,
        high: float = 2.0,
        mode: Mode = "hinge",
        first: int | None = None,
        reduction: str | None = None,
    ):
        super().__init__(coef, reduction)
        if not 0 <= low <= high:
            raise ValueError(f"the band needs 0 <= low <= high, got {low} and {high}")
        self.requires = frozenset({"entropy"} if turns == 1 else {"entropy", "turn"})
        self.turns, self.low, self.high, self.mode = turns, low, high, mode
        self.first = turns // 2 if first is None else first
        self.register_buffer("history", torch.zeros(turns))
        self.register_buffer("count", torch.zeros(turns, dtype=torch.int64))

    def forward(self, x: RegInputs) -> RegOutput:
        entropy = keep(x.need("entropy"), x.mask)
        turn = torch.zeros_like(entropy, dtype=torch.int64) if self.turns == 1 else x.need("turn")
        valid = (turn >= 0) & (turn < self.turns)
        valid = valid if x.mask is None else valid & x.mask.bool()
        index = turn.clamp(0, self.turns - 1)
        history, known = self.history[index], self.count[index] > 0
        above = (entropy - self.high * history).relu()
        below = (self.low * history - entropy).relu()
        if self.mode == "hinge":
            cost = above + below
        elif self.mode == "square":
            cost = above.square() + below.square()
        else:
            cost = (above + below > 0).to(entropy.dtype) + 0 * entropy
        cost = torch.where(valid & known & (turn >= self.first), cost, 0.0)
        each = valid.to(entropy.dtype).reshape(-1)
        empty = each.new_zeros(self.turns)
        return RegOutput(
            per_element=self.weight * cost,
            metrics={"outside": masked_reduce((cost.detach() > 0).to(cost.dtype), x.mask)},
            sync={
                "entropy": empty.index_add(
                    0, index.reshape(-1), each * entropy.detach().reshape(-1)
                ),
                "count": empty.index_add(0, index.reshape(-1), each),
            },
        )

    def update(self, sync: Mapping[str, Tensor]) -> None:
        super().update(sync)
        if not self.training:
            return
        seen = sync["count"] > 0
        self.count += seen.to(self.count)
        gap = (sync["entropy"] / sync["count"]).to(self.history) - self.history
        self.history += torch.where(seen, gap / self.count.clamp(min=1), 0.0)


def reinforce_positive(logp: Tensor, correct: Tensor, mask: Tensor | None = None) -> Tensor:
    """REINFORCE on correct responses: -log pi where correct, 0 elsewhere.

    On responses drawn at another temperature T its mean is -E_T[R log pi], which pulls the policy
    towards its correct responses as T weighs them: flatter for T > 1, sharper for T < 1. The mean
    counts the wrong ones too; with no correct response it is 0 and entropy is not controlled.

    Args:
        logp: (B, T) or (B,), under the policy at temperature 1; receives the gradient.
        correct: (B,) bool or rewards in [0, 1]; detached.

    Returns:
        Of the shape of `logp`, unscaled.

    Source: Wang et al., "Arbitrary Entropy Policy Optimization", 2025, arXiv:2510.08141. Its code
    has no weight: it sets advantages above 0.05 to 1 and puts up to 60 such rows (30 when lowering
    the entropy) in place of rows of the batch.

    >>> reinforce_positive(torch.tensor([-1.0, -2.0]), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    logp = keep(logp, mask)
    return -times(over_tokens(correct.detach().to(logp.dtype), logp), logp)


class TemperatureController(Regularizer):
    """AEPO's bang-bang rule for the temperature at which extra responses are drawn.

    After a step whose entropy, measured as -<logp>, lay at or below the target the `temperature` is
    `hot`, otherwise `cold`; it is 1 before the first step. Adds nothing to the loss: the trainer
    samples extra responses at `temperature` and trains on them with `reinforce_positive`.

    Args:
        target: nats; 0.5 in the released script, 0.75 in the table of results.

    Source: as `reinforce_positive`.
    """

    requires = frozenset({"logp"})
    temperature: Tensor

    def __init__(self, target: float, hot: float = 1.2, cold: float = 0.8):
        super().__init__()
        self.target, self.hot, self.cold = target, hot, cold
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, x: RegInputs) -> RegOutput:
        total, count = sum_and_count(-x.need("logp"), x.mask)
        return RegOutput(
            loss=torch.zeros_like(total),
            metrics={"temperature": self.temperature.clone()},
            sync={"entropy": total, "count": count},
        )

    def update(self, sync: Mapping[str, Tensor]) -> None:
        super().update(sync)
        if not self.training:
            return
        chosen = torch.where(
            sync["entropy"] / sync["count"] <= self.target, self.hot, self.cold
        ).to(self.temperature)
        self.temperature.copy_(torch.where(sync["count"] > 0, chosen, self.temperature))
