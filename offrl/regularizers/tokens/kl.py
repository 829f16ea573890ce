"""Divergence from a reference: estimators, penalties in the loss or the reward, moving references.

With d = log pi(a) - log ref(a) for a ~ pi, the estimators of KL(pi || ref) and what their gradient
is the gradient of, in expectation over a ~ pi (all checked by enumeration in the tests):

    kind                 mean under pi     grad="path"      grad="ratio"       grad="straight"
    k1 = d               KL(pi || ref)     zero             KL(pi || ref)      KL(pi || ref)
    k2 = d^2 / 2         E[d^2 / 2]        KL(pi || ref)    E_pi[d^2 / 2]      KL(pi || ref)
    k3 = e^-d - 1 + d    KL(pi || ref)     KL(ref || pi)    KL(pi || ref)      KL(pi || ref)

E[d^2 / 2] agrees with the divergence to second order only. All treat a sequence token by token: the
effect of a token on the divergence of later ones is not in these gradients, `kl_in_reward` has it.

Source: Schulman, "Approximating KL divergence", 2020 (the estimators); the meanings of `grad` in
other libraries: TRL `use_bias_correction_kl` is "ratio"; verl's suffix "+" and OpenRLHF's
`unbiased_gradient` are "straight".
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient, DualVariable, needs_target
from offrl.regularizers.divergences import closed_kl
from offrl.regularizers.reductions import (
    group_mean,
    held,
    keep,
    log_ratio,
    over_tokens,
    sum_and_count,
    times,
)

Kind = Literal["k1", "k2", "k3"]
Grad = Literal["path", "ratio", "straight"]


def kl_estimate(
    logp: Tensor,
    ref_logp: Tensor,
    kind: str = "k3",
    grad: str = "ratio",
    old_logp: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Sampled estimate of KL(pi || ref), elementwise; the module's table says what its gradient is.

    Args:
        logp: log-probabilities of the taken actions or tokens, shape L; receives the gradient.
        ref_logp: the same under the reference, L; detached.
        kind: k1, k2 or k3. In k3 the exponent is held within +-20, beyond which its gradient is 0:
            k3 reaches e^20 where the policy avoids what the reference likes.
        grad: `path` differentiates the estimate as it stands; `ratio` multiplies it by
            w = pi / pi_old (exponent within +-20), which also corrects for samples of an older
            policy; `straight` has the value of `kind` and the gradient of w k2, w detached and at
            most 10.
        old_logp: log-probabilities under the sampling policy, L; detached. None: `logp` itself,
            so that w is 1 and carries the score.
        mask: L, 1 where an element counts; the others give exactly 0.

    Returns:
        L, unreduced and unscaled. 0 where policy and reference agree; k2 and k3 are never negative
        and have no gradient there. Unbounded above; k1 and k2 are infinite, without gradient, where
        one of the two excludes the element.

    Raises:
        ValueError: unknown `kind` or `grad`.

    >>> kl_estimate(torch.tensor([0.0]), torch.tensor([-1.0]), "k3", "path")
    tensor([0.3679])
    """
    if kind not in ("k1", "k2", "k3") or grad not in ("path", "ratio", "straight"):
        raise ValueError(
            f"kind must be k1, k2 or k3 and grad path, ratio or straight, got {kind!r}, {grad!r}"
        )
    logp = keep(logp, mask)
    d = held(log_ratio(logp, keep(ref_logp.detach(), mask)))
    if kind == "k1":
        value = d
    elif kind == "k2":
        value = d.square() / 2
    else:
        exponent = (-d).clamp(-20, 20)
        value = torch.expm1(exponent) - exponent
    if grad == "path":
        return value
    drift = log_ratio(logp, (logp if old_logp is None else keep(old_logp, mask)).detach())
    if grad == "ratio":
        drift = torch.where(value.isinf(), drift.detach(), drift)
        return drift.clamp(-20, 20).exp() * value
    finite = torch.where(d.isinf(), 0.0, d)
    surrogate = drift.detach().clamp(max=math.log(10)).exp() * finite.square() / 2
    return value.detach() + (surrogate - surrogate.detach())


def kl_in_reward(
    rewards: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    beta: float | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Rewards of the objective E[r] - beta KL(pi || ref): -beta d per token, r on the last one.

    With these rewards REINFORCE follows the objective, whose optimum is ref exp(r / beta) / Z and
    whose value is beta log Z - beta KL(pi || optimum). As beta -> 0 the optimum is all on the best
    response; large beta keeps the reference.

    Args:
        rewards: outcome rewards (B,).
        logp, ref_logp: of the sampled tokens, (B, T), or of actions (B,); detached.
        beta: price of a nat.
        mask: of the shape of `logp`; a row without a valid token gets no reward.

    Returns:
        Token rewards (B, T), or (B,) for actions; no gradient.

    Source: Korbak, Perez and Buckley, EMNLP Findings 2022, arXiv:2205.11275; the identities are
    derived.

    >>> logp, ref_logp = torch.tensor([[0.0, 0.0]]), torch.tensor([[-1.0, -2.0]])
    >>> kl_in_reward(torch.tensor([1.0]), logp, ref_logp, 0.1)
    tensor([[-0.1000,  0.8000]])
    """
    penalty = times(-beta, kl_estimate(logp.detach(), ref_logp, "k1", "path", mask=mask))
    if penalty.dim() == 1:
        return penalty + keep(rewards.detach(), mask)
    place = torch.arange(penalty.shape[-1], device=penalty.device).expand_as(penalty)
    valid = place if mask is None else torch.where(mask.bool(), place, -1)
    last = place == valid.amax(-1, keepdim=True)
    return penalty + torch.where(last, over_tokens(rewards.detach(), penalty), 0.0)


def geometric_mixture(
    logps: Sequence[Tensor], weights: Sequence[float] | Tensor, normalized: bool = True
) -> Tensor:
    """Log-probabilities of the product prod_i pi_i^(w_i) of several policies.

    Args:
        logps: with `normalized` the logits or log-probabilities of every action, each (..., V);
            otherwise log-probabilities of the taken actions, each L. Receive the gradient.
        weights: one number per policy; they need not sum to 1. (1, 0) is the first policy.
        normalized: without it the result lacks -log Z of its state. As a reference that constant
            shifts every estimate; the gradients of k1, k2 and "straight" stay right in expectation
            on policy, since scores have mean 0, and the path gradient of k3 does not.

    Returns:
        (..., V), whose exponentials sum to 1, or L. -inf, without gradient, for what one of them
        excludes, unless its weight is 0; NaN in a row in which nothing is left.

    >>> half = geometric_mixture([torch.tensor([0.8, 0.2]).log(), torch.zeros(2)], [0.5, 0.5])
    >>> half.exp()
    tensor([0.6667, 0.3333])
    """
    if len(logps) != len(weights):
        raise ValueError(f"{len(logps)} policies but {len(weights)} weights")
    total: Any = 0.0
    excluded: Any = False
    for w, logp in zip(weights, logps, strict=True):
        none = logp == -torch.inf
        total = total + w * torch.where(none, 0.0, keep(logp, None))
        excluded = excluded | (none & (w != 0))
    total = torch.where(excluded, -torch.inf, total)
    return total.log_softmax(-1) if normalized else total


class GeometricMixture:
    """The normalized product prod_i pi_i^(w_i) of control policies, of the same kind as they are.

    With weights that sum to 1 it is the policy that minimizes sum_i w_i KL(pi || pi_i): the one
    reference that stands for several auxiliary policies. Log-probabilities go through
    `geometric_mixture`.

    Args:
        refs: `Categorical` distributions, or `Normal` ones, alone or within `Independent`.
        weights: one number per policy. Those of Gaussians must have a positive precision in sum.

    Raises:
        TypeError: other or mixed kinds.
    """

    def __init__(self, refs: Sequence[Distribution], weights: Sequence[float] | Tensor):
        self.refs, self.weights = list(refs), weights

    @property
    def dist(self) -> Distribution:
        """The mixture, for `RegInputs.ref_dist`."""
        return product(self.refs, self.weights)

    def log_prob(self, action: Tensor) -> Tensor:
        """Normalized log-probability of an action, of the batch shape of the policies."""
        return self.dist.log_prob(action)


def product(refs: Sequence[Any], weights: Sequence[float] | Tensor) -> Distribution:
    if all(isinstance(ref, Independent) for ref in refs):
        inner = product([ref.base_dist for ref in refs], weights)
        return Independent(inner, refs[0].reinterpreted_batch_ndims)
    if all(isinstance(ref, Categorical) for ref in refs):
        return Categorical(logits=geometric_mixture([ref.logits for ref in refs], weights))
    if all(isinstance(ref, Normal) for ref in refs):
        precisions = [w / ref.stddev.square() for w, ref in zip(weights, refs, strict=True)]
        total = torch.stack(precisions).sum(0)
        mean = sum(p * ref.mean for p, ref in zip(precisions, refs, strict=True)) / total
        return Normal(mean, total.rsqrt())
    raise TypeError(f"no product of {', '.join(type(ref).__name__ for ref in refs)}")


class KLToReference(Regularizer):
    """Penalty coef <KL(pi || reference)> in the loss.

    The reference is a frozen model, a cloned policy (Demo-Reg), a moving average (`EMAAnchor`), the
    previous policy or a `GeometricMixture`; it comes in as log-probabilities or as a distribution.

    Demo-Reg first clones demonstrations, then maximizes V - lambda KL(pi || clone). If the
    demonstrator's divergence from the clone is at most e^2 and the second stage is solved to within
    eps of its regularized objective, the result falls short of the demonstrator by at most
    eps + lambda e^2 (derived from the definitions); lambda* = eps / e^2 makes both parts equal.
    Source: Tiapkin et al., ICLR 2024, arXiv:2310.17303.

    Args:
        coef: a `DualVariable` needs `target`; its violation is <KL> / target - 1 of the last
            optimizer step: rule "proportional" with clip 0.2 and scale = samples / horizon is
            Ziegler's controller (horizon 10000), rule "factor" that of PPO-KLPEN (target 0.01).
        kind: k1, k2 or k3 of `kl_estimate`; "exact" takes stats["kl"]; "dist" computes
            `torch.distributions.kl_divergence(dist, ref_dist)`, where an undefined divergence at
            padding would reach the gradients, so padding must hold valid distributions; actions of
            probability 0 count 0 and get no gradient.
        grad: of `kl_estimate`; all but "path" need `old_logp`, which is `logp.detach()` on policy.
            "exact" and "dist" differentiate the divergence itself.
        target: nats per element.

    Metrics and the controller see values clamped to +-10, so that one spike of k3 moves neither.
    """

    def __init__(
        self,
        coef: Coefficient,
        kind: Literal["k1", "k2", "k3", "exact", "dist"] = "k3",
        grad: Grad = "ratio",
        target: float | None = None,
        reduction: str | None = None,
    ):
        super().__init__(coef, reduction)
        sampled = {"logp", "ref_logp"} | ({"old_logp"} if grad != "path" else set())
        needs = {"exact": {"stats.kl"}, "dist": {"dist", "ref_dist"}}
        self.requires = frozenset(needs.get(kind, sampled))
        self.kind, self.grad, self.target = kind, grad, needs_target(coef, target)

    def divergence(self, x: RegInputs) -> Tensor:
        if self.kind == "exact":
            return keep(x.need("stats.kl"), x.mask)
        if self.kind == "dist":
            return keep(closed_kl(x.need("dist"), x.need("ref_dist")), x.mask)
        old = None if self.grad == "path" else x.need("old_logp")
        return kl_estimate(x.need("logp"), x.need("ref_logp"), self.kind, self.grad, old, x.mask)

    def forward(self, x: RegInputs) -> RegOutput:
        kl = self.divergence(x)
        sync = observed(kl, x.mask)
        per_element = times(self.weight, kl)
        return RegOutput(per_element=per_element, metrics={"kl": mean_of(sync)}, sync=sync)

    def update(self, sync: Mapping[str, Tensor]) -> None:
        super().update(sync)
        if isinstance(self.coef, DualVariable):
            self.coef.update(sync["kl"] / sync["count"] / self.target - 1)


class KLReward(Regularizer):
    """Reward hook: r - coef sum_t d_t with d = old_logp - ref_logp, the sequence form of A2.

    `kl_in_reward` is the form with a reward per token. The hook follows the rollout, so the
    log-probabilities are those of the sampling policy.

    Args:
        coef, target: as of `KLToReference`; nats per token, not per sequence.
    """

    hook = "reward"
    requires = frozenset({"rewards", "old_logp", "ref_logp"})

    def __init__(self, coef: Coefficient, target: float | None = None):
        super().__init__(coef)
        self.target = needs_target(coef, target)

    def forward(self, x: RegInputs) -> RegOutput:
        old, ref = x.need("old_logp").detach(), x.need("ref_logp")
        kl = kl_estimate(old, ref, "k1", "path", mask=x.mask)
        total = kl if kl.dim() == 1 else kl.sum(-1)
        rewards = x.need("rewards") - times(self.weight, total)
        sync = observed(kl, x.mask)
        return RegOutput(rewards=rewards, metrics={"kl": mean_of(sync)}, sync=sync)

    def update(self, sync: Mapping[str, Tensor]) -> None:
        super().update(sync)
        if isinstance(self.coef, DualVariable):
            self.coef.update(sync["kl"] / sync["count"] / self.target - 1)


def observed(kl: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    total, count = sum_and_count(kl.detach().clamp(-10, 10), mask)
    return {"kl": total, "count": count}


def mean_of(sync: Mapping[str, Tensor]) -> Tensor:
    return sync["kl"] / sync["count"].clamp(min=1)


def dads_weight(
    advantages: Tensor,
    correct: Tensor,
    group: Tensor,
    form: Literal["solved", "difficulty"] = "solved",
) -> Tensor:
    """Weight of the KL term by the difficulty of a prompt, for what has a positive advantage.

    With d = 1 - share of correct responses in the group, "solved" is 1 - exp(-e (1 - d)), so that
    hard prompts that were solved get a weaker KL (d = 0.125, 0.5, 0.875 give 0.907, 0.743, 0.288);
    "difficulty" is exp(-e d), which the released code holds commented out. Which of the two made
    the paper's numbers is not stated. Where d is 0 or 1, or the advantage is not positive, it is 1.

    Args:
        advantages: (B,) or (B, T).
        correct: (B,) bool. group: (B,) int64 in [0, B).

    Returns:
        Of the shape of `advantages`, in (0, 1]; no gradient.
    """
    share = group_mean(correct.to(torch.float32), group)
    weight = 1 - torch.exp(-math.e * share) if form == "solved" else torch.exp(math.e * (share - 1))
    weight = torch.where((share == 0) | (share == 1), 1.0, weight)
    return torch.where(advantages > 0, over_tokens(weight, advantages), 1.0)


class DADS(KLToReference):
    """KL penalty of APO: coef mean over sequences of w mean over tokens of k3; see `dads_weight`.

    Defaults are those of the released code: coef 1e-3 with 8 responses per prompt, and the path
    gradient of k3, which pulls along KL(ref || pi); grad="ratio" is the corrected one.

    Source: "APO: Enhancing Reasoning of MLLMs via Asymmetric Policy Optimization", 2025,
    arXiv:2506.21655, and its code.
    """

    reduction = "seq-mean-token-mean"
    whole_batch = True

    def __init__(
        self,
        coef: Coefficient = 1e-3,
        form: Literal["solved", "difficulty"] = "solved",
        kind: Kind = "k3",
        grad: Grad = "path",
        target: float | None = None,
    ):
        super().__init__(coef, kind, grad, target)
        self.form = form
        self.requires |= {"advantages", "correct", "group"}

    def forward(self, x: RegInputs) -> RegOutput:
        out = super().forward(x)
        assert out.per_element is not None
        weight = dads_weight(x.need("advantages"), x.need("correct"), x.need("group"), self.form)
        return replace(out, per_element=out.per_element * over_tokens(weight, out.per_element))


class EMAAnchor:
    """Moves a reference that the caller owns towards the policy: ref <- (1 - tau) ref + tau policy.

    Serves references of a KL penalty, target networks and teachers. Nothing is stored here; call
    `update` after an optimizer step, or every n of them (TRL's `sync_ref_model`: tau 0.6 every 512
    steps). A reference in bfloat16 loses updates below 1 / 256 of a weight; keep it in float32 for
    small tau.

    Args:
        tau: in [0, 1]; 0 leaves the reference frozen, 1 copies the policy.

    Source: the "dynamic anchor" of T1, Hou et al., ICML 2025, arXiv:2501.11651, next to an entropy
    bonus and sampling above temperature 1; its coefficients are not verified.
    """

    def __init__(self, tau: float):
        if not 0 <= tau <= 1:
            raise ValueError(f"tau must lie in [0, 1], got {tau}")
        self.tau = tau

    @torch.no_grad()
    def update(
        self, reference: nn.Module | Iterable[Tensor], policy: nn.Module | Iterable[Tensor]
    ) -> None:
        """In place; of modules the parameters are averaged and the buffers copied.

        Raises:
            ValueError: if the two do not have as many tensors.
        """
        if isinstance(reference, nn.Module) and isinstance(policy, nn.Module):
            for mine, theirs in zip(reference.buffers(), policy.buffers(), strict=True):
                mine.copy_(theirs)
        old, new = (
            list(x.parameters() if isinstance(x, nn.Module) else x) for x in (reference, policy)
        )
        if len(old) != len(new):
            raise ValueError(f"the reference has {len(old)} tensors, the policy {len(new)}")
        moved = [theirs.to(mine) for mine, theirs in zip(old, new, strict=True)]
        torch._foreach_lerp_(old, moved, self.tau)
