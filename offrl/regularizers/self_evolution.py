"""Targets that move from the data towards what an earlier self would do."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient
from offrl.regularizers.reductions import keep, times


def progressive_target(act: Tensor, previous: Tensor, blend: float | Tensor) -> Tensor:
    """(1 - blend) act + blend previous; no gradient.

    Args:
        act: actions of the data. previous: those of the policy at the end of the stage before, of
            the same shape.
        blend: in [0, 1]; 0 is the data, 1 the earlier policy.

    >>> progressive_target(torch.tensor([1.0]), torch.tensor([0.0]), 0.25)
    tensor([0.7500])
    """
    return (1 - blend) * keep(act.detach(), None) + blend * keep(previous.detach(), None)


def smoothed_nll(
    logits: Tensor,
    tokens: Tensor,
    previous_logits: Tensor,
    blend: float | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy to (1 - blend) one-hot + blend softmax(previous): smoothing by an earlier self.

    Args:
        logits: (*L, V), receive the gradient softmax(logits) - target. previous_logits: of the
            earlier policy, (*L, V); detached.
        tokens: int64 L, the data's.
        mask: L.

    Returns:
        L: -log pi(token) at blend 0; at blend 1 at least the entropy of the earlier policy.

    >>> even = torch.zeros(1, 2)
    >>> smoothed_nll(even, torch.tensor([0]), even, 0.5)
    tensor([0.6931])
    """
    rows = None if mask is None else mask.unsqueeze(-1)
    logp = keep(logits, rows).log_softmax(-1)
    soft = keep(previous_logits.detach(), rows).softmax(-1)
    hard = logp.gather(-1, keep_index(tokens, mask).unsqueeze(-1)).squeeze(-1)
    return keep(-times(1 - blend, hard) - times(blend, times(soft, logp).sum(-1)), mask)


def keep_index(index: Tensor, mask: Tensor | None) -> Tensor:
    return index if mask is None else torch.where(mask.bool(), index, 0)


class ProgressiveTarget(Regularizer):
    """Imitation of a target that mixes the data with the policy of the stage before.

        blend_k = min(cap, final k / stages), k the number of finished stages of `stage_steps`

    Stage 0 imitates the data alone. The caller keeps the frozen copy, evaluates it without gradient
    and in evaluation mode on the same inputs, and refreshes it at the end of a stage:

        reg.update(sync)
        if reg.stage_ends:
            EMAAnchor(tau=1.0).update(teacher, policy)

    With the policy itself for a teacher the gradient would be 1 - blend times the plain one (the
    square of that, were the target not detached): nothing is regularized. Only a lagged teacher
    does that.

    Args:
        form: "action": squared distance, averaged over the action's dimensions, of
            extra["prediction"] to the target of extra["act"] and extra["previous"], (*L, a) each;
            "token": `smoothed_nll` of `logits` and extra["previous_logits"], (*L, V), and
            extra["tokens"] L.
        final, cap: 0.85 and 0.5 in the released example (hopper-medium), where the cap is reached
            at k = 24. The paper has values per task, not seen. 0 imitates the data throughout.
        stages: 40 of 2500 updates in the released code.

    The released code computes blend and then sets it to 0, and takes the current policy for the
    teacher; this is the method as the paper describes it (from secondary text; not checked).

    Source: Lv et al., NeurIPS 2024, arXiv:2406.05427.
    """

    step: Tensor

    def __init__(
        self,
        coef: Coefficient = 1.0,
        form: Literal["action", "token"] = "action",
        final: float = 0.85,
        cap: float = 0.5,
        stages: int = 40,
        stage_steps: int = 2500,
        reduction: str | None = None,
    ):
        super().__init__(coef, reduction)
        if not (0 <= final <= 1 and 0 <= cap <= 1):
            raise ValueError(f"final and cap must lie in [0, 1], got {final} and {cap}")
        self.form, self.final, self.cap = form, final, cap
        self.stages, self.stage_steps = stages, stage_steps
        self.requires = frozenset(
            {"logits", "extra.tokens", "extra.previous_logits"}
            if form == "token"
            else {"extra.prediction", "extra.act", "extra.previous"}
        )
        self.register_buffer("step", torch.tensor(0, dtype=torch.int64))

    @property
    def blend(self) -> Tensor:
        """Share of the earlier policy in the target, 0-d float32."""
        stage = self.step // self.stage_steps
        return (self.final * stage.float() / self.stages).clamp(max=self.cap)

    @property
    def stage_ends(self) -> Tensor:
        """0-d bool: the last update was the last one of a stage."""
        return (self.step > 0) & (self.step % self.stage_steps == 0)

    def forward(self, x: RegInputs) -> RegOutput:
        blend = self.blend
        if self.form == "token":
            logits, tokens = x.need("logits"), x.need("extra.tokens")
            loss = smoothed_nll(logits, tokens, x.need("extra.previous_logits"), blend, x.mask)
        else:
            rows = None if x.mask is None else x.mask.unsqueeze(-1)
            given = (x.need(f"extra.{name}") for name in ("prediction", "act", "previous"))
            prediction, act, previous = (keep(part, rows) for part in given)
            loss = (prediction - progressive_target(act, previous, blend)).square().mean(-1)
        # errors of actions are finite; a log-probability may not be
        weighted = times(self.weight, loss) if self.form == "token" else self.weight * loss
        return RegOutput(per_element=weighted, metrics={"blend": blend})

    @torch.no_grad()
    def update(self, sync: Mapping[str, Tensor]) -> None:
        super().update(sync)
        if self.training:
            self.step += 1
