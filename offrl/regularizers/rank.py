"""Rank of representations: penalties between consecutive features, and what to log.

For a value network Q(s, a) = f . w the Bellman equation f . w = r + gamma g . w, with f the
features of (s, a) and g those of (s', a'), holds for some w of the network's norm only if

    cos(f, g) <= U = (|f|^2 + gamma^2 |g|^2 - r^2 / |w|^2) / (2 gamma |f| |g|)

BEER penalizes the similarity of f and g above that limit; DR3 and InFeR, its comparators, act
without one. The gate of BEER is open exactly where |f - gamma g| |w| < |r|, so a transition without
temporal difference is never penalized, and with r = 0 and one network for all norms none is.

Source: He et al., arXiv:2404.12754 and its released code; DR3 and InFeR from memory of Kumar et
al., ICLR 2022, and Lyle et al., ICLR 2022, not checked.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from offrl.regularizers.base import RegInputs, RegOutput, Regularizer
from offrl.regularizers.coefficients import Coefficient
from offrl.regularizers.reductions import keep, masked_mean, masked_reduce

Stats = dict[str, Tensor]


def beer_penalty(
    f: Tensor,
    t: Tensor,
    r: Tensor,
    w: Tensor,
    gamma: float | Tensor,
    *,
    g: Tensor | None = None,
    bias: Tensor | None = None,
    terminal: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Stats]:
    """max(0, cos(f, t) - U) per transition; only `f` within the cosine receives gradient.

    Where the gate is open the gradient is t / (|f| |t|) - cos f / |f|^2: it rotates f away from t,
    orthogonally to f, with norm at most 1 / |f|. The value is dominated by U and unbounded; read
    the share of open gates and the mean cosine instead.

    Args:
        f: features of (s, a) of the online network, after the last activation, (*L, m). Discrete
            actions: `action_features`.
        t: features of (s', a') of the target network, the target policy's a', (*L, m).
        r: rewards, L. For soft values r - gamma alpha log pi(a'|s'); for n steps their return, with
            gamma^n and the features n steps on.
        w: weight of the last layer of the online network, whose norm counts: m entries in one or
            two axes; or (*K, m, n) for a stack of networks, K the leading axes of L.
        gamma: discount, above 0.
        g: features of (s', pi(s')) of the online network and policy, (*L, m): their norm replaces
            that of t in the numerator of U, as in the released code (norms mixed; then even r = 0
            can open the gate, if |g| is small against |t|). None: norms of the target, as in the
            theorem.
        bias: of the last layer; r becomes r - (1 - gamma) bias, which the theorem then asks for.
            The released code has a bias and leaves it out: None.
        terminal: L, 1 where the episode ended: no penalty, there being no successor. None, as in
            the released code, treats all alike.
        mask: L, 1 where a transition counts.
        eps: least norm in the cosine. U has a floor of its own: where |f| |t| < 1e-12 the penalty
            and its gradient are 0.

    Returns:
        Penalty L, to be averaged and weighted (1e-3 in the paper), and detached statistics over
        what counts, 0-d, or K for a stack: "open" share, mean "cos", mean "bound" U.

    For the value head of a language model L is (B, T - 1): features of consecutive tokens, rewards
    per token, `mask` on pairs of valid tokens. With a reward at the end alone and `g` None the
    penalty is 0 everywhere except where the reward is.

    >>> f, t = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    >>> beer_penalty(f, t, torch.tensor([2.0]), torch.tensor([1.0, 0.0]), 0.99)[0]
    tensor([0.0408])
    >>> hidden = torch.randn(2, 5, 8)  # (B, T, m), the first row has three tokens
    >>> valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    >>> now, after, both = hidden[:, :-1], hidden[:, 1:], valid[:, :-1] * valid[:, 1:]
    >>> reward = torch.zeros(2, 4)
    >>> beer_penalty(now, after, reward, torch.randn(1, 8), 0.99, mask=both)[0].sum()
    tensor(0.)
    """
    f, t = vectors(f, mask), vectors(t, mask).detach()
    r = keep(r.detach(), mask)
    lead = w.dim() - 2 if w.dim() > 2 else 0  # axes of K
    if bias is not None:
        r = r - (1 - gamma) * per_network(keep(bias.detach(), None), lead, r.dim())
    norm = torch.linalg.vector_norm(f, dim=-1)
    length = norm.detach()
    follow = torch.linalg.vector_norm(t, dim=-1)
    online = follow if g is None else torch.linalg.vector_norm(vectors(g, mask).detach(), dim=-1)
    weight = per_network(keep(w.detach(), None).square(), lead, r.dim()).clamp(min=1e-12)
    numerator = length.square() + (gamma * online).square() - r.square() / weight
    product = length * follow
    bound = numerator / (2 * gamma * product.clamp(min=1e-12))
    cosine = torch.linalg.vecdot(f, t) / (norm.clamp(min=eps) * follow.clamp(min=eps))
    counted = product >= 1e-12
    if terminal is not None:
        counted = counted & ~keep(terminal, mask).bool()
    penalty = keep((cosine - bound).clamp(min=0), counted)
    seen = (counted if mask is None else counted & mask.bool()).flatten(lead)
    values = {
        "open": (penalty.detach() > 0).to(penalty.dtype),
        "cos": cosine.detach(),
        "bound": bound,
    }
    return penalty, {name: masked_mean(x.flatten(lead), seen) for name, x in values.items()}


def per_network(x: Tensor, lead: int, dims: int) -> Tensor:
    """The sum over all but `lead` axes, as a tensor that broadcasts against `dims` axes."""
    total = x.flatten(lead).sum(-1)
    return total.view(*total.shape, *[1] * (dims - lead))


def vectors(x: Tensor, mask: Tensor | None) -> Tensor:
    return keep(x, None if mask is None else mask.unsqueeze(-1))


def action_features(features: Tensor, action: Tensor, count: int) -> Tensor:
    """The features of a discrete critic Q(s, .) = W psi + b as f . w with one w for all actions.

    psi stands in the block of its action, zeros in the others; with w the stacked rows of W,
    |w| is W's Frobenius norm and the cosine of different actions is 0.

    Args:
        features: psi(s), (*L, m). action: int64 L, in [0, count).

    Returns:
        (*L, count m). What the authors of BEER did for discrete actions is not known.

    >>> action_features(torch.tensor([[1.0, 2.0]]), torch.tensor([1]), 2)
    tensor([[0., 0., 1., 2.]])
    """
    # not one_hot, which looks at the values to check them
    place = action.unsqueeze(-1) == torch.arange(count, device=action.device)
    return (place.unsqueeze(-1) * features.unsqueeze(-2)).flatten(-2)


def dr3_penalty(
    f: Tensor,
    t: Tensor,
    r: Tensor | None = None,
    w: Tensor | None = None,
    gamma: float | Tensor | None = None,
    *,
    g: Tensor | None = None,
    bias: Tensor | None = None,
    terminal: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Stats]:
    """DR3: the product f . g of consecutive features, negative where they point apart.

    The arguments are those of `beer_penalty`; `r`, `w`, `gamma` and `bias` are not looked at.

    Args:
        f, g: receive gradient, both. Without `g` the product is that with `t`, detached.

    Returns:
        Penalty L, unbounded on both sides, coefficients 1e-3 to 3e-2; statistic "cos".

    From memory of the paper; not checked.

    >>> dr3_penalty(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]))[0]
    tensor([3.])
    """
    f, other = vectors(f, mask), vectors(t.detach() if g is None else g, mask)
    product = (f * other).sum(-1)
    seen = torch.ones_like(product, dtype=torch.bool) if mask is None else mask.bool()
    if terminal is not None:
        seen = seen & ~keep(terminal, mask).bool()
    cosine = F.cosine_similarity(f.detach(), other.detach(), dim=-1, eps=eps)
    return keep(product, seen), {"cos": masked_reduce(cosine, seen)}


def infer_penalty(
    f: Tensor,
    t: Tensor,
    r: Tensor | None = None,
    w: Tensor | None = None,
    gamma: float | Tensor | None = None,
    *,
    g: Tensor | None = None,
    bias: Tensor | None = None,
    terminal: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    scale: float = 100.0,
) -> tuple[Tensor, Stats]:
    """InFeR: mean over k auxiliary linear heads of (h(s) - scale h_0(s))^2.

    Keeps the network able to express `scale` times what it said at initialization. The arguments
    are those of `beer_penalty`, of which `f`, `t` and `mask` are looked at.

    Args:
        f: outputs of the heads on the current features, (*L, k); receive the gradient. k = 10.
        t: outputs of the same heads on a frozen copy of the initial network, (*L, k); detached.

    Returns:
        Penalty L, 0 where f = scale t, coefficient 0.1; no statistics.

    From memory of the paper; not checked.

    >>> infer_penalty(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.01, 0.0]]))[0]
    tensor([2.])
    """
    return (vectors(f, mask) - scale * vectors(t, mask).detach()).square().mean(-1), {}


class FeatureRank(Regularizer):
    """Model hook: coef mean of `beer_penalty`, `dr3_penalty` or `infer_penalty`.

    Inputs: `features` (f) and `next_features` (t), (*L, m), `mask` L; for "beer" also `rewards` of
    the transitions in shape L and extra["weight"], the last layer's. In token trainers `rewards`
    are outcomes (B,): for a value head hand the module inputs of its own.

    Args:
        coef: 1e-3 in the paper, for all tasks.
        gamma: of the critic. The released code has 0.99 in the bound whatever the discount is.
        kind: "infer" takes the outputs of heads for features.
        norm_source: "mixed" as in the released code: extra["online_next_features"], the g of
            `beer_penalty` and the other factor of "dr3", is needed; "target": t alone.
        bias_aware: extra["bias"] of the last layer enters BEER's bound.
        skip_terminal: reads extra["terminal"], L, and leaves ends of episodes out, which the
            released code does not. For tokens the mask does that: False.

    Twin critics: one input each; average the two losses.
    """

    hook = "model"

    def __init__(
        self,
        coef: Coefficient = 1e-3,
        gamma: float = 0.99,
        kind: Literal["beer", "dr3", "infer"] = "beer",
        norm_source: Literal["mixed", "target"] = "mixed",
        bias_aware: bool = False,
        skip_terminal: bool = True,
    ):
        super().__init__(coef)
        self.gamma = gamma
        self.penalty: Any = {"beer": beer_penalty, "dr3": dr3_penalty, "infer": infer_penalty}[kind]
        needs = {"features", "next_features"}
        if kind == "beer":
            needs |= {"rewards", "extra.weight"} | ({"extra.bias"} if bias_aware else set())
        if kind != "infer":
            needs |= {"extra.online_next_features"} if norm_source == "mixed" else set()
            needs |= {"extra.terminal"} if skip_terminal else set()
        self.requires = frozenset(needs)

    def forward(self, x: RegInputs) -> RegOutput:
        given = {name: x.need(name) for name in self.requires}
        penalty, stats = self.penalty(
            given["features"],
            given["next_features"],
            given.get("rewards"),
            given.get("extra.weight"),
            self.gamma,
            g=given.get("extra.online_next_features"),
            bias=given.get("extra.bias"),
            terminal=given.get("extra.terminal"),
            mask=x.mask,
        )
        return RegOutput(per_element=self.weight * penalty, metrics=stats)


class Rank(NamedTuple):
    """Two counts of the directions that features span, and the singular values behind them."""

    feature: Tensor
    effective: Tensor
    singular: Tensor


@torch.no_grad()
def representation_rank(
    features: Tensor, mask: Tensor | None = None, threshold: float = 0.01, delta: float = 0.01
) -> Rank:
    """Rank of a representation, in float64, by the Gram matrix of the features: no full SVD.

    Args:
        features: (*L, m), not centered; at least 4 m rows for a stable count.
        mask: L, 1 where a row counts.
        threshold: `feature` is the number of singular values of features / sqrt(N) above it.
        delta: `effective` is the least k whose k largest ones hold the share 1 - delta of their
            sum; free of the features' scale.

    Returns:
        `Rank`: two 0-d int64 counts, 0 for features that are 0, up to m for orthogonal ones of
        large scale, and (m,) singular values of features / sqrt(N), descending. To be logged at
        evaluations: an eigenvalue problem of size m.

    Source: Lyle et al., ICLR 2022 (feature rank, from memory) and Kumar et al., ICLR 2021
    (effective rank). The released code of BEER has no rank, so its curves cannot be matched.

    >>> representation_rank(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))[:2]
    (tensor(2), tensor(2))
    """
    rows = vectors(features, mask).double().flatten(0, -2)
    count = torch.as_tensor(len(rows) if mask is None else mask.bool().sum(), device=rows.device)
    gram = rows.T @ rows / count.clamp(min=1)
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(-1)
    total = singular.cumsum(-1)
    effective = (total < (1 - delta) * total[-1]).sum() + (total[-1] > 0)
    return Rank((singular > threshold).sum(), effective, singular)


def ranks(features: Tensor) -> Stats:
    """Both ranks of every network of a stack, as metrics.

    Args:
        features: (*K, N, m) of N rows; see `representation_rank`.

    Returns:
        "rank/feature" and "rank/effective", float32 K.

    >>> ranks(torch.eye(4).expand(2, 4, 4))["rank/feature"]
    tensor([4., 4.])
    """
    lead = features.shape[:-2]
    found = [representation_rank(rows) for rows in features.reshape(-1, *features.shape[-2:])]
    return {
        "rank/feature": torch.stack([rank.feature for rank in found]).view(lead).float(),
        "rank/effective": torch.stack([rank.effective for rank in found]).view(lead).float(),
    }
