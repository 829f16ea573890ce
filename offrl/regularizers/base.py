"""One interface for control actors and token policies: inputs, outputs, a module, a list of them.

A `Regularizer` acts at one hook of a trainer's step:

    reward     (B,) rewards before the baseline          length shapers, KL in the reward
    advantage  (B,) or (B, T) advantages                 entropy modulation, whitening
    token      weights of elements, detached             peak masks, selections
    loss       a per-element matrix or a scalar          KL, entropy, anchors, preference terms
    model      a scalar of features or modules           BEER, Lipschitz penalties

`forward` changes nothing; what a module learns from a step it returns in `sync` (raw sums and
counts), which the trainer adds up over micro-batches and ranks and hands to `update` once per
optimizer step. Until then coefficients are those of the previous step.

Data-parallel ranks average their gradients. A mean over elements comes out as that of all ranks'
elements when every rank divides by the same `count`. A module whose result for a row depends on
other rows (a function of a mean, a quantile, a group) says `whole_batch`; where the trainer fills
`RegInputs.ranks` it reads the rows of all ranks, of which the own ones carry gradient. n ranks of b
rows then equal one of n b rows. Micro-batches of one optimizer step, which come one after the
other, equal one large batch for means with a `count` alone: the gradient of a function of the
step's mean would need the later micro-batches before the earlier ones' backward pass. For a
`whole_batch` module the step's term is the mean of its micro-batches' terms.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offrl.regularizers.coefficients import Coefficient, Schedule, value_of
from offrl.regularizers.reductions import masked_reduce, times

Hook = Literal["reward", "advantage", "token", "loss", "model"]
HOOKS: tuple[Hook, ...] = ("reward", "advantage", "token", "loss", "model")


@dataclass
class RegInputs:
    """What a trainer hands over; L is (B, T) for token policies and (B,) for control.

    Attributes:
        logp, old_logp, ref_logp: L, log-probability of the taken action or token under the policy,
            the sampling policy and a reference.
        entropy: L, entropy of the policy's distribution at the element.
        stats: name -> L, further statistics of the distribution (`token_stats`).
        mask: L, 1 where the policy produced the element; None counts all.
        advantages: (B,) or L.
        rewards, lengths, correct: (B,): outcome reward, number of policy tokens, bool.
        finished: (B,) bool, 0 where generation was cut off.
        group: (B,) int64 in [0, B): rows of one prompt; any order.
        prompt_id: (B,) int64, a stable key of the prompt.
        level: (B,) int64, a requested length level.
        turn: (B, T) int64, index of the turn, -1 outside the policy's tokens.
        chosen: (B,) bool of preference batches: row i is preferred to row i + B/2.
        logits: (*L, V), only where a module needs the whole distribution.
        dist, ref_dist: torch distributions of batch shape L (control).
        features, next_features, q, target: critic side, (B, F), (B, F), (B,), (B,).
        step: 0-d int64, number of the trainer's step.
        extra: anything a module of your own needs.
        ranks: the same inputs of all data-parallel ranks (`across_ranks`); None for one process.
    """

    logp: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    entropy: Tensor | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    advantages: Tensor | None = None
    rewards: Tensor | None = None
    lengths: Tensor | None = None
    correct: Tensor | None = None
    finished: Tensor | None = None
    group: Tensor | None = None
    prompt_id: Tensor | None = None
    level: Tensor | None = None
    turn: Tensor | None = None
    chosen: Tensor | None = None
    logits: Tensor | None = None
    dist: Any = None
    ref_dist: Any = None
    features: Tensor | None = None
    next_features: Tensor | None = None
    q: Tensor | None = None
    target: Tensor | None = None
    step: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    ranks: "Ranks | None" = None

    def need(self, name: str) -> Any:
        """The named input; "stats.lse" looks into `stats`, "extra.k" into `extra`.

        Raises:
            ValueError: if the trainer did not provide it.
        """
        head, _, key = name.partition(".")
        value = getattr(self, head).get(key) if key else getattr(self, head)
        if value is None:
            raise ValueError(f"a regularizer needs {name!r}, which the trainer did not provide")
        return value

    def elements(self) -> Tensor | None:
        """The first tensor of shape L that is there."""
        given = (self.logp, self.entropy, self.ref_logp, *self.stats.values(), self.mask)
        return next((x for x in given if x is not None), None)


@dataclass
class Ranks:
    """Rows of all data-parallel ranks.

    Attributes:
        inputs: what `whole_batch` modules read; only this rank's rows carry gradient.
        own: int64 (B,), where this rank's rows stand in `inputs`, in their order.
    """

    inputs: RegInputs
    own: Tensor


def across_ranks(
    x: RegInputs,
    names: Iterable[str],
    gather: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    rank: int,
    pairs: bool = False,
) -> RegInputs:
    """`x` with `ranks` filled: one gathering of small tensors per micro-batch.

    Args:
        names: inputs to gather, `Compose.across`; the mask is gathered too.
        gather: detached tensors (B, ...) by name -> those of all ranks, stacked in rank order along
            the first axis; (B, T) ones padded with 0 to the longest T. B is the same on all ranks.
        rank: of this process.
        pairs: rows i and i + B/2 belong together, and shall in the gathered rows.
    """
    given = {name: x.need(name) for name in sorted(names)}
    if x.mask is not None:
        given["mask"] = x.mask
    given = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.dim() > 0}
    found = gather({name: value.detach() for name, value in given.items()})
    rows, total = (len(next(iter(part.values()))) for part in (given, found))
    order = torch.arange(total, device=next(iter(found.values())).device)
    if pairs:
        order = order.view(-1, 2, rows // 2).transpose(0, 1).flatten()
    own = order.argsort()[rank * rows : (rank + 1) * rows]
    inputs = RegInputs(step=x.step)
    for name, value in found.items():
        value, mine = value[order], given[name]
        if value.dim() == 1:
            value[own] = mine
        else:
            value[own, : mine.size(1)] = mine
        head, _, key = name.partition(".")
        if key:
            getattr(inputs, head)[key] = value
        else:
            setattr(inputs, head, value)
    return replace(x, ranks=Ranks(inputs, own))


@dataclass
class RegOutput:
    """What a module returns: at most one of the first five, and what it observed.

    Attributes:
        rewards: (B,), new rewards. advantages: (B,) or (B, T), new advantages.
        token_weight: L, detached, multiplied into the per-element losses of the loss hook.
        per_element: L, coefficient included; reduced by the module's `reduction`.
        loss: 0-d, coefficient and reduction included; of a `whole_batch` module.
        metrics: name -> detached 0-d tensor.
        sync: name -> raw sums and counts for `update`; they add over micro-batches and ranks.
    """

    rewards: Tensor | None = None
    advantages: Tensor | None = None
    token_weight: Tensor | None = None
    per_element: Tensor | None = None
    loss: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    sync: dict[str, Tensor] = field(default_factory=dict)


class Regularizer(nn.Module):
    """A term with its coefficient and state; subclasses write `forward`.

    Attributes:
        hook: where it acts.
        requires: names of the inputs that it reads, for adapters; "stats.lse" names a statistic.
        reduction: mode of `masked_reduce` for a per-element loss.
        whole_batch: a row's result depends on other rows, so that the rows of all ranks are needed;
            at the token, loss and model hook (the two before see gathered rows anyway).
        coef: number, `DualVariable` or `Schedule`; with 0, `Compose` leaves the module out, so
            that it costs nothing and needs no input.

    Everything that changes is a buffer; there are no parameters.
    """

    hook: Hook = "loss"
    requires: frozenset[str] = frozenset()
    reduction: str = "token-mean"
    whole_batch: bool = False

    def __init__(self, coef: Coefficient = 1.0, reduction: str | None = None):
        super().__init__()
        self.coef: Any = float(coef) if isinstance(coef, (int, float)) else coef
        if reduction is not None:
            self.reduction = reduction

    @property
    def weight(self) -> Tensor | float:
        """The coefficient now."""
        return value_of(self.coef)

    @property
    def idle(self) -> bool:
        """True if the coefficient is the constant 0."""
        return isinstance(self.coef, float) and self.coef == 0.0

    def forward(self, x: RegInputs) -> RegOutput:
        raise TypeError(f"{type(self).__name__} must define forward")

    def update(self, sync: Mapping[str, Tensor]) -> None:
        """Learn from one optimizer step's sums; inert in evaluation.

        The default counts a `Schedule` on; modules with a `DualVariable` or histories override it.
        """
        if isinstance(self.coef, Schedule):
            self.coef.update()


class Compose(nn.Module):
    """A list of regularizers, run by hook in the order given.

    Metrics and sync entries carry the module's name, `<index>_<ClassName>` by default.
    """

    def __init__(self, regularizers: Iterable[Regularizer] | Mapping[str, Regularizer] = ()):
        super().__init__()
        named = (
            dict(regularizers)
            if isinstance(regularizers, Mapping)
            else {f"{i}_{type(r).__name__}": r for i, r in enumerate(regularizers)}
        )
        self.parts = nn.ModuleDict(named)
        self.layout: list[tuple[str, torch.Size]] = []

    def at(self, hook: Hook) -> dict[str, Regularizer]:
        """The active modules of a hook."""
        found = {}
        for name, part in self.parts.items():
            assert isinstance(part, Regularizer)
            if part.hook == hook and not part.idle:
                found[name] = part
        return found

    @property
    def hooks(self) -> set[Hook]:
        """Stages at which there is something to do."""
        return {hook for hook in HOOKS if self.at(hook)}

    @property
    def requires(self) -> frozenset[str]:
        """Inputs that the active modules read."""
        return frozenset(n for h in HOOKS for part in self.at(h).values() for n in part.requires)

    @property
    def across(self) -> frozenset[str]:
        """Inputs that `across_ranks` has to gather; none if no active module reads all rows."""
        parts = [p for h in ("token", "loss", "model") for p in self.at(h).values()]
        return frozenset(n for part in parts if part.whole_batch for n in part.requires)

    def run(self, hook: Hook, x: RegInputs) -> RegOutput:
        """Chain the modules of the reward, advantage or token hook.

        Returns:
            The final rewards or advantages, or the product of the token weights; None in its place
            when the hook is empty.
        """
        total = RegOutput()
        for name, part in self.at(hook).items():
            out: Any = output(part, x)
            if hook == "token":
                before = total.token_weight
                total.token_weight = (
                    out.token_weight if before is None else before * out.token_weight
                )
            else:
                value = getattr(out, f"{hook}s")
                setattr(total, f"{hook}s", value)
                x = replace(x, **{f"{hook}s": value})
            collect(total, name, out)
        return total

    def run_loss(
        self,
        x: RegInputs,
        count: Tensor | float | None = None,
        sequences: Tensor | float | None = None,
        token: RegOutput | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Token, loss and model hook: the term to add to the trainer's loss.

        Args:
            count: see `masked_reduce`; of tokens.
            sequences: the same for modules that reduce over sequences, of those with a token.
            token: what `run("token", x)` returned, if the trainer ran that hook before its loss.

        Returns:
            A 0-d loss with a gradient path, metrics, and sync entries for `update`.
        """
        total = self.run("token", x) if token is None else token
        anchor = x.elements()
        loss = torch.zeros((), device=None if anchor is None else anchor.device)
        for hook in ("loss", "model"):
            for name, part in self.at(hook).items():
                out = output(part, x)
                if out.per_element is not None:
                    per = out.per_element
                    if hook == "loss" and total.token_weight is not None:
                        per = times(total.token_weight, per)
                    number = count if part.reduction == "token-mean" else sequences
                    loss = loss + masked_reduce(per, x.mask, part.reduction, number)
                elif out.loss is not None:
                    loss = loss + out.loss
                collect(total, name, out)
        return loss, total.metrics, total.sync

    def flatten(self, sync: Mapping[str, Tensor]) -> Tensor:
        """All entries as one float64 vector, for one all-reduce; `unflatten` is the inverse.

        Raises:
            ValueError: if the entries are not those of the call before.
        """
        layout = [(name, value.shape) for name, value in sync.items()]
        if self.layout and layout != self.layout:
            raise ValueError(f"sync entries changed from {self.layout} to {layout}")
        self.layout = layout
        if not sync:
            return torch.zeros(0, dtype=torch.float64)
        return torch.cat([value.detach().double().reshape(-1) for value in sync.values()])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for _, shape in self.layout]
        pieces = zip(self.layout, flat.split(sizes), strict=True)
        return {name: piece.view(shape) for (name, shape), piece in pieces}

    @torch.no_grad()
    def update(self, sync: Mapping[str, Tensor]) -> None:
        """Hand every active module its sums, once per optimizer step; inert in evaluation."""
        if not self.training:
            return
        for hook in HOOKS:
            for name, part in self.at(hook).items():
                prefix = f"{name}/"
                own = {k.removeprefix(prefix): v for k, v in sync.items() if k.startswith(prefix)}
                part.update(own)


def output(part: Regularizer, x: RegInputs) -> RegOutput:
    """What a module says of this rank's rows, from those of all ranks if it reads them.

    A scalar's gradient is that of the own rows times the number of ranks, so that the ranks' mean
    is the gradient of the scalar; its sums are divided by that number, so that they add up.
    """
    if x.ranks is None or not part.whole_batch:
        return part(x)
    whole, own, out = x.ranks.inputs, x.ranks.own, part(x.ranks.inputs)
    here: Any = x.elements()
    there: Any = whole.elements()
    ranks, loss = len(there) / len(own), out.loss
    if loss is not None:
        loss = ranks * loss - (ranks - 1) * torch.where(loss.isinf(), 0.0, loss.detach())
    place = (own,) if here.dim() == 1 else (own, slice(here.size(1)))
    return RegOutput(
        token_weight=None if out.token_weight is None else out.token_weight[place],
        per_element=None if out.per_element is None else out.per_element[place],
        loss=loss,
        metrics=out.metrics,
        sync={name: value / ranks for name, value in out.sync.items()},
    )


def collect(total: RegOutput, name: str, out: RegOutput) -> None:
    total.metrics |= {f"{name}/{key}": value.detach() for key, value in out.metrics.items()}
    total.sync |= {f"{name}/{key}": value.detach() for key, value in out.sync.items()}
