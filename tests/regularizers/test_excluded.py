"""Zero times minus infinity: what a policy excludes changes no value and gets no gradient."""

import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, OneHotCategorical

from offrl.regularizers import (
    DRPO,
    INPO,
    LDDPO,
    RPO,
    Chi2Occupancy,
    ClipCov,
    Compose,
    DualVariable,
    GeometricMixture,
    InverseSoftQ,
    KLCov,
    KLReward,
    KLToReference,
    NLLAnchor,
    PeakEntropyMask,
    RegInputs,
    XPOTerm,
    functional,
)
from offrl.regularizers.base import Ranks
from offrl.regularizers.functional import (
    LogMass,
    MinP,
    Nucleus,
    SetEntropy,
    Threshold,
    bgpo_objective,
    covariance,
    dpo_loss,
    f_divergence,
    geometric_mixture,
    guided_logp,
    inpo_loss,
    kl_estimate,
    kl_in_reward,
    low_probability_loss,
    masked_quantile,
    reinforce_positive,
    robust_value,
    rto_rewards,
    sequence_chi2,
    smoothed_nll,
    soft_q_reward,
    token_stats,
    token_stats_from_logits,
)
from offrl.regularizers.tokens.statistics import PLAIN, RELATIVE
from tests.regularizers.cases import all_cases
from tests.regularizers.test_interface import (
    B,
    T,
    changed,
    generator,
    gradients,
    result,
    rowwise,
    tensors,
    trained,
)

INF, F64 = math.inf, torch.float64
ROWS, V = 4, 6
OUT, KEPT = [0, 3], [1, 2, 4, 5]  # excluded actions; with tiles of two, one of either kind comes
TAKEN = torch.tensor([0, 3, 1, 2])  # of those kept


def leaf(*numbers: float, dtype=torch.float32):
    return torch.tensor(numbers, dtype=dtype, requires_grad=True)


def near(found, *numbers: float):
    expected = torch.tensor(numbers, dtype=found.dtype)
    torch.testing.assert_close(found.detach().reshape(-1), expected, rtol=1e-5, atol=1e-6)


def slope(value, *leaves):
    found = torch.autograd.grad(value.sum(), leaves)
    return found if len(found) > 1 else found[0]


def draw(seed: int, dtype=F64):
    return torch.randn(ROWS, V, generator=generator(seed), dtype=F64).to(dtype)


def without(x: torch.Tensor, least: float = -INF) -> torch.Tensor:
    return x.detach().index_fill(-1, torch.tensor(OUT), least).requires_grad_()


# -- functions of whole distributions -------------------------------------------------------------


def categorical(logits):
    return Categorical(logits=logits, validate_args=False)


def by_module(make):
    def divergence(logits, other):
        x = RegInputs(dist=make(logits), ref_dist=make(other))
        return KLToReference(1.0, "dist")(x).per_element

    return divergence


def statistic(name, tile):
    def measured(logits, other):
        taken = TAKEN if logits.shape[-1] == len(KEPT) else torch.tensor(KEPT)[TAKEN]
        want, reference = {"it": name}, other if name in RELATIVE else None
        return token_stats_from_logits(logits, taken, want, reference, chunk_vocab=tile)["it"]

    return measured


def nll(blend):
    def value(logits, other):
        taken = TAKEN if logits.shape[-1] == len(KEPT) else torch.tensor(KEPT)[TAKEN]
        return smoothed_nll(logits, taken[: len(logits)], other, blend)

    return value


def divergence(kind, alpha=None):
    return lambda p, q: f_divergence(categorical(p), categorical(q), kind, alpha)


def mixed(weights):
    return lambda p, q: geometric_mixture([p, q], weights).exp()


def mixed_policies(p, q):
    return GeometricMixture([categorical(p), categorical(q)], [0.3, 0.7]).dist.probs


PLAIN_FUNCTIONS = {
    **{f"f-{kind}": divergence(kind) for kind in ("kl", "reverse-kl", "chi2", "tv", "js")},
    **{f"f-alpha{a}": divergence("alpha", a) for a in (-0.5, 0.3, 1.5)},
    "dist": by_module(categorical),
    "dist-one-hot": by_module(lambda z: OneHotCategorical(logits=z, validate_args=False)),
    "dist-independent": by_module(lambda z: Independent(categorical(z.unsqueeze(-2)), 1)),
    "mixture": mixed([0.3, 0.7]),
    "mixture-first": mixed([1.0, 0.0]),
    "mixture-tensor": mixed(torch.tensor([0.5, 0.0], dtype=F64)),
    "mixture-policies": mixed_policies,
    "guided": lambda p, q: guided_logp(p, q, 0.4).exp(),
    **{f"nll-{blend}": nll(blend) for blend in (0.0, 0.3, 1.0)},
}
BELOW_ZERO = {"mixture-less": mixed([2.0, -1.0])}
SETS = (Nucleus(0.7), Nucleus(0.7, include_crossing=False), MinP(0.3), Threshold(0.05))
WANTED = (*PLAIN, *RELATIVE, *(SetEntropy(s) for s in SETS), *(LogMass(s) for s in SETS))
STATISTICS = {f"{s}-{n}": statistic(s, n) for s in WANTED for n in (2, V)}
FUNCTIONS = PLAIN_FUNCTIONS | STATISTICS

every = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)


def weighed(value):
    """Infinite results, as the log mass of an empty set, have no gradient to compare."""
    value = torch.where(value.isinf(), 0.0, value)
    return (value.double() * torch.linspace(1, 2, value.numel(), dtype=F64).view_as(value)).sum()


@pytest.mark.parametrize(
    "f", [*FUNCTIONS.values(), *BELOW_ZERO.values()], ids=[*FUNCTIONS, *BELOW_ZERO]
)
def test_actions_that_both_exclude_might_as_well_not_be_there(f):
    p, q = draw(0), draw(1)
    whole, other = without(p), without(q)
    small, small_other = (x[:, KEPT].requires_grad_() for x in (p, q))
    found, expected = f(whole, other), f(small, small_other)
    if found.dim() == 2:
        assert (found[:, OUT] == 0).all()
        found = found[:, KEPT]
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(weighed(found), (whole, other), allow_unused=True),
        torch.autograd.grad(weighed(expected), (small, small_other), allow_unused=True),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours[:, OUT] == 0).all()
            torch.testing.assert_close(ours[:, KEPT], theirs)


@every
@pytest.mark.parametrize("side", [0, 1])
def test_what_one_side_excludes_is_the_limit_of_what_it_hardly_does(f, side):
    """Value and gradient tend to those found, or the value grows without bound and is infinite."""
    p, q = draw(0), draw(1)
    sides = [(without(p, least), q.clone().requires_grad_()) for least in (-INF, -75.0, -150.0)]
    if side == 1:
        sides = [(p.clone().requires_grad_(), without(q, least)) for least in (-INF, -75.0, -150.0)]
    found, close, closer = (f(*pair) for pair in sides)
    grows = (closer - close).abs() > 1e-6
    assert not found.isnan().any()
    assert torch.equal(found.isinf(), grows | close.isinf())
    torch.testing.assert_close(found[~grows], close[~grows])
    ours, theirs = (
        torch.autograd.grad(
            weighed(torch.where(grows, 0.0, v)), pair, allow_unused=True, retain_graph=True
        )
        for v, pair in ((found, sides[0]), (close, sides[1]))
    )
    for g, h in zip(ours, theirs, strict=True):
        if g is not None and h is not None:
            torch.testing.assert_close(g, h)
    of_all = torch.autograd.grad(found.double().sum(), sides[0], allow_unused=True)
    assert all(g.isfinite().all() for g in of_all if g is not None)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_with_excluded_actions_leaves_the_others_bit_equal(f, dtype):
    p, q = (draw(seed, dtype) for seed in (0, 1))
    plain = [x.clone().requires_grad_() for x in (p, q)]
    marred = [torch.cat([without(x)[:1], x[1:]]).detach().requires_grad_() for x in (p, q)]
    expected, found = f(*plain), f(*marred)
    assert torch.equal(found[1:], expected[1:])
    assert not found.isnan().any()
    for v, leaves in ((found, marred), (expected, plain)):
        total = weighed(v)
        for x, g in zip(leaves, torch.autograd.grad(total, leaves, allow_unused=True), strict=True):
            x.grad = torch.zeros_like(x) if g is None else g
    for x, y in zip(marred, plain, strict=True):
        assert x.grad.isfinite().all()
        assert (x.grad[0, OUT] == 0).all()
        assert torch.equal(x.grad[1:], y.grad[1:])


@pytest.mark.parametrize("f", PLAIN_FUNCTIONS.values(), ids=PLAIN_FUNCTIONS)
def test_functional_transforms_agree(f):
    p, q = without(draw(0)), without(draw(1))

    def one(row, other):
        value = f(row.unsqueeze(0), other.unsqueeze(0))
        return (value * torch.linspace(1, 2, value.numel(), dtype=F64).view_as(value)).sum()

    expected = torch.stack([slope(one(p[i], q[i]), p)[i] for i in range(ROWS)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(one))(p, q), expected)
    forward = torch.func.vmap(torch.func.jacfwd(one))(p.detach(), q.detach())
    torch.testing.assert_close(forward, expected)
    curvature = torch.func.vmap(torch.func.hessian(one))(p.detach(), q.detach())
    assert curvature.isfinite().all()
    assert (curvature[:, OUT] == 0).all()


def test_heads_with_a_bias_of_minus_infinity():
    hidden = torch.randn(3, 4, generator=generator()).double().requires_grad_()
    weight = torch.randn(V, 4, generator=generator(1)).double().requires_grad_()
    bias = without(draw(2)[0])
    found = token_stats(hidden, weight, bias, torch.tensor([1, 0, 5]), ("logp", "entropy"))
    logp = (hidden @ weight[KEPT].T + bias[KEPT]).log_softmax(-1)
    torch.testing.assert_close(found["entropy"], -(logp.exp() * logp).sum(-1))
    near(found["logp"], logp[0, 0].item(), -INF, logp[2, 3].item())
    grads = torch.autograd.grad(found["entropy"].sum(), (hidden, weight, bias))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][OUT] == 0).all()
    assert (grads[2][OUT] == 0).all()


# -- worked values -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_kl_of_a_masked_policy_to_the_uniform_one(dtype):
    """p = (0.731059, 0.268941): log 2 - H = 0.110944; p_0 p_1 log(p_0 / p_1) = 0.196612."""
    logits = leaf(1.0, 0.0, 2.0, dtype=dtype)
    masked = logits + torch.tensor([0.0, 0.0, -INF])
    for ref in ({"probs": [0.5, 0.5, 0.0]}, {"logits": [3.0, 3.0, -INF]}):
        ref = {name: torch.tensor(v, dtype=dtype) for name, v in ref.items()}
        x = RegInputs(dist=Categorical(logits=masked), ref_dist=Categorical(**ref))
        value = KLToReference(1.0, "dist")(x).per_element
        near(value, 0.110944)
        near(slope(value, logits), 0.196612, -0.196612, 0.0)


def test_kl_in_half_precision():
    logits = leaf(1.0, 0.0, -INF, dtype=torch.bfloat16)
    ref = Categorical(logits=torch.tensor([0.0, 0.0, -INF], dtype=torch.bfloat16))
    value = KLToReference(1.0, "dist")(RegInputs(dist=Categorical(logits=logits), ref_dist=ref))
    gradient = slope(value.per_element, logits).float()
    expected = torch.tensor([0.1966, -0.1966, 0.0])
    torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=2e-3)


def test_kl_of_certain_coins():
    """KL of p to 0.5 is log 2 at p = 0 and 1; to a coin that excludes what p does not it is inf."""
    logits = leaf(-INF, INF, 0.0, 0.0)
    ref = Bernoulli(logits=torch.tensor([0.0, 0.0, -INF, 0.0]), validate_args=False)
    x = RegInputs(dist=Bernoulli(logits=logits, validate_args=False), ref_dist=ref)
    value = KLToReference(1.0, "dist")(x).per_element
    near(value, math.log(2), math.log(2), INF, 0.0)
    assert slope(value, logits).isfinite().all()
    same = KLToReference(1.0, "dist")(replace(x, ref_dist=x.dist)).per_element
    near(same, 0.0, 0.0, 0.0, 0.0)


def test_mixtures_ignore_policies_of_weight_0_and_learn_their_weights():
    sure, even = torch.tensor([0.0, -INF]), torch.zeros(2)
    near(geometric_mixture([even, sure], [1.0, 0.0]).exp(), 0.5, 0.5)
    near(geometric_mixture([even, sure], [0.5, 0.5]).exp(), 1.0, 0.0)
    near(guided_logp(even, sure, 0.0).exp(), 0.5, 0.5)
    weights = leaf(0.5, 0.5)
    policies = [torch.tensor([0.0, 1.0, -INF]), torch.tensor([1.0, 0.0, -INF])]
    chosen = geometric_mixture(policies, weights)[0]
    near(chosen, math.log(0.5))
    # log sigmoid(w_1 - w_0): half of (-1, 1)
    near(slope(chosen, weights), -0.5, 0.5)


def test_robust_values_pass_over_states_of_probability_0():
    values, probs = leaf(0.0, 1.0, -INF), torch.tensor([0.5, 0.5, 0.0])
    for kind, lam in (("kl", 0.7), ("chi2", 0.7)):
        value = robust_value(values, probs, kind, lam)
        near(value, robust_value(values[:2], probs[:2], kind, lam).item())
        gradient = slope(value, values)
        near(gradient.sum(), 1.0)
        assert gradient[2] == 0
    assert robust_value(values, probs, "tv", 0.7) == -INF  # it knows states of probability 0


def test_quantiles_of_log_probabilities():
    x = torch.tensor([-INF, -INF, -INF, -2.0, -1.0])
    near(masked_quantile(x, 0.25), -INF)
    near(masked_quantile(x, 0.6), -INF)
    near(masked_quantile(x, 0.75), -2.0)


# -- log-probabilities of taken actions -----------------------------------------------------------

# k3 of a ratio of 0 or infinity is held at exponents of 20
HIGH, LOW = math.expm1(20) - 20, math.expm1(-20) + 20


@pytest.mark.parametrize("grad", ["path", "ratio", "straight"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("k1", (0, -INF, INF, 1)), ("k2", (0, INF, INF, 0.5)), ("k3", (0, HIGH, LOW, 1 / math.e))],
)
def test_estimates_of_what_both_or_one_exclude(kind, grad, expected):
    logp, ref = leaf(-INF, -INF, -1.0, -1.0), torch.tensor([-INF, -2.0, -INF, -2.0])
    value = kl_estimate(logp, ref, kind, grad)
    near(value, *expected)
    gradient = slope(value, logp)
    assert gradient.isfinite().all()
    assert gradient[0] == 0
    alone = leaf(-1.0)
    assert gradient[3] == slope(kl_estimate(alone, torch.tensor([-2.0]), kind, grad), alone)
    old = torch.tensor([-INF, -1.0, -1.0, -INF])
    gradient = slope(kl_estimate(logp, ref, kind, grad, old), logp)
    assert gradient.isfinite().all()


def test_a_price_of_0_costs_0():
    logp, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-INF, -1.0]])
    near(kl_in_reward(torch.tensor([3.0]), logp, ref, 0.0), 0.0, 3.0)
    near(rto_rewards(torch.tensor([3.0]), logp, logp, ref, beta_dpo=0.0), 0.0, 3.0)
    x = RegInputs(rewards=torch.tensor([3.0]), old_logp=logp, ref_logp=ref, logp=logp)
    near(KLReward(DualVariable(0.0), target=0.1)(x).rewards, 3.0)
    near(KLToReference(DualVariable(0.0), "k1", "path", 0.1)(x).per_element, 0.0, -0.0)


def test_token_rewards_of_what_both_exclude():
    dpo, ref, same = (torch.tensor([[x, -1.0]]) for x in (-INF, -INF, -1.0))
    found = rto_rewards(torch.tensor([0.0]), same, same, dpo, beta_dpo=0.05)
    near(found, -0.05, 0.0)  # the DPO policy alone excludes it: clipped
    near(rto_rewards(torch.tensor([0.0]), ref, ref, dpo, beta_dpo=0.05), 0.0, 0.0)


def test_a_wrong_response_may_be_impossible():
    logp = leaf(-INF, -2.0)
    value = reinforce_positive(logp, torch.tensor([False, True]))
    near(value, 0.0, 2.0)
    near(slope(value, logp), 0.0, -1.0)


def test_tokens_that_both_exclude_leave_a_margin_alone():
    logp = torch.tensor([[-1.0, -INF], [-2.0, -3.0]], requires_grad=True)
    ref = torch.tensor([[-2.0, -INF], [-2.0, -2.0]])
    x = RegInputs(logp=logp, ref_logp=ref, chosen=torch.tensor([True, False]))
    out = LDDPO(beta=0.5)(x)  # rho = 1 and -1
    near(out.metrics["margin"], 2.0)
    near(out.loss, math.log1p(math.exp(-1)))
    share = 0.5 / (1 + math.e)
    near(slope(out.loss, logp), -share, 0.0, share, share)
    near(dpo_loss(torch.tensor([-INF]), torch.tensor([-INF]), 0.5), math.log(2))
    # alpha = 0 counts as many tokens as the shorter response has
    x.mask = torch.tensor([[1, 1], [1, 0]])
    x.ref_logp = torch.tensor([[-2.0, -3.0], [-2.0, -2.0]])
    near(LDDPO(beta=0.5, alpha=0.0)(x).metrics["margin"], 1.0)


def test_inpo_of_what_all_exclude():
    near(inpo_loss(*(torch.tensor([x]) for x in (3.0, 1.0, -INF)), 0.5, 1.0), 1.0)
    logp = torch.tensor([[-1.0, -INF], [-2.0, -3.0]], requires_grad=True)
    other = torch.tensor([[-2.0, -INF], [-2.0, -2.0]])
    x = RegInputs(logp=logp, ref_logp=other, old_logp=other, chosen=torch.tensor([True, False]))
    loss = INPO(eta=0.5)(x).loss  # policy 4, others 2, 1 / (2 eta) = 1
    near(loss, 1.0)
    near(slope(loss, logp), 2.0, 0.0, -2.0, -2.0)


def test_sequences_that_policy_and_reference_exclude():
    logp = torch.tensor([[-1.0, -INF], [-1.0, -INF], [-1.0, -1.0]], requires_grad=True)
    ref = torch.tensor([[-2.0, -INF], [-2.0, -1.0], [-1.0, -1.0]])
    for grad in ("path", "ratio"):
        value = sequence_chi2(logp, ref, grad=grad)
        near(value, 2 * math.cosh(1) - 2, INF, 0.0)
        assert slope(value, logp).isfinite().all()
        loss = Chi2Occupancy(grad=grad)(RegInputs(logp=logp, ref_logp=ref)).loss
        assert slope(loss, logp).isfinite().all()


def test_cross_entropy_as_soft_q_learning_of_an_impossible_token():
    logp, lse = leaf(-INF, -1.0), torch.tensor([1.0, 2.0])
    for alpha in (INF, 0.5):
        out = InverseSoftQ(alpha)(RegInputs(logp=logp, stats={"lse": lse}))
        assert out.per_element[0] == INF
        gradient = slope(out.per_element, logp)
        near(gradient, -1.0, -1.0 if alpha == INF else 0.0)  # -1 + r / (2 alpha), r = 1
    near(soft_q_reward(torch.tensor([-1.0]), torch.tensor([3.0]), torch.tensor([-INF]), 0.0), 2.0)


def test_bounds_and_selections():
    elbo = torch.tensor([[-INF, 0.5]], requires_grad=True)
    gain = bgpo_objective(elbo, torch.tensor([[-INF, 0.0]]), torch.tensor([1.0]))
    near(gain, 1.0, 1.5)
    near(slope(gain, elbo), 0.0, 1.0)
    near(bgpo_objective(elbo, torch.zeros(1, 2), torch.tensor([0.0])), 0.0, 0.0)
    logp, advantages = leaf(-INF, -1.0, -3.0), torch.tensor([-1.0, 1.0, -1.0])
    near(covariance(logp, advantages), INF, 1.0, 1.0)
    near(covariance(torch.tensor([-INF, -1.0]), torch.tensor([1.0, 1.0])), 0.0, 0.0)
    loss = low_probability_loss(logp, logp, advantages, logp)
    near(loss, 1.0, -1.0, 1.0)
    assert slope(loss, logp).isfinite().all()
    x = RegInputs(logp=logp, old_logp=logp.detach(), advantages=advantages)
    near(KLCov(fraction=1.0)(x).per_element, 0.0, 0.0, 0.0)
    weight = ClipCov(generator(), fraction=1.0, low=0.5)(x).token_weight
    near(weight, 1.0, 0.0, 0.0)


def test_drpo_contains_an_impossible_token_in_its_row():
    logp = torch.tensor([[-1.0, -INF], [-1.0, -2.0], [-2.0, -2.0], [-1.0, -1.0]])
    logp.requires_grad_()
    x = RegInputs(
        logp=logp,
        old_logp=torch.full_like(logp, -1.5),
        lengths=torch.tensor([2, 2, 2, 2]),
        correct=torch.tensor([False, True, False, True]),
        group=torch.tensor([0, 0, 0, 0]),
    )
    out = DRPO(max_length=10, tau=10.0)(x)
    # s = (-inf, -1.5, -2, -1); weights 1/2 each; log mean exp(s / 10) = -0.2 - log 2
    policy = 1.25 + 10 * (-0.2 - math.log(2))
    near(out.metrics["policy"], policy)
    near(out.metrics["kl"], -0.5 / 7)  # of drifts -1/2 x 4 and 1/2 x 3
    gradient = slope(out.loss, logp)
    assert gradient.isfinite().all()
    assert (gradient[1:] != 0).all()


def test_weights_of_0_drop_an_infinite_loss():
    logp = leaf(-INF, -2.0)
    x = RegInputs(logp=logp, entropy=torch.tensor([0.0, 1.0]), chosen=torch.tensor([True, False]))
    loss, _, _ = Compose([PeakEntropyMask(0.6), NLLAnchor(1.0, rows="all")]).run_loss(x)
    near(loss, 1.0)
    near(slope(loss, logp), 0.0, -0.5)
    nothing = DualVariable(0.0)
    x.extra["from_reference"] = torch.tensor([True, False])
    x.ref_logp = torch.zeros(2)
    for module in (NLLAnchor(nothing), XPOTerm(nothing), RPO(nothing), LDDPO(nothing)):
        near(module(x).loss, 0.0)
    near(RPO(eta=0.0)(x).metrics["nll"], INF)


@pytest.mark.parametrize("rows", [2, 4])
def test_an_infinite_loss_of_all_ranks_is_infinite(rows):
    logp = torch.tensor([-INF, -2.0, -1.0, -1.0], requires_grad=True)
    x = RegInputs(logp=logp, chosen=torch.tensor([True, True, False, False]))
    own = replace(x, logp=logp[:rows], ranks=Ranks(x, torch.arange(rows)))
    loss, _, _ = Compose([NLLAnchor(1.0)]).run_loss(own)
    near(loss, INF)
    each = -4 / rows / 2  # the mean of the ranks' gradients is that of the loss
    near(slope(loss, logp), each, each, 0.0, 0.0)


# -- every module ----------------------------------------------------------------------------------

LOGP = ("logp", "ref_logp", "old_logp", "stats.proxy_logp", "extra.answer_logp")
WHOLE = ("logits", "extra.previous_logits")
CASES = [
    case
    for case in all_cases()
    if {*LOGP, *WHOLE} & set(tensors(case.inputs(generator(), B, T)))
    and {*LOGP, *WHOLE} & set(case.make().requires)
]
EXCLUDERS = {"all": LOGP + WHOLE, "policy": ("logp", "logits"), "others": LOGP[1:] + WHOLE[1:]}


@pytest.mark.parametrize("who", EXCLUDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_excluded_element_spoils_no_gradient_and_no_other_row(case, who):
    module, x = trained(case), case.inputs(generator(), B, T)

    def exclude(name, value):
        value = value.clone()
        if name in EXCLUDERS[who]:
            token = x.extra["tokens"][1, 0] if "tokens" in x.extra else 0
            place = (1, 0) if name in LOGP else (1, 0, (token + 1) % value.shape[-1])
            value[place] = -INF
        return value

    marred = changed(x, exclude)
    plain, found = module(x), module(marred)
    assert not result(found).isnan().any()
    assert not any(v.isnan().any() for v in (*found.metrics.values(), *found.sync.values()))
    rest = torch.arange(B) != 1
    if rowwise(case):
        assert torch.equal(result(found)[rest], result(plain)[rest])
    names = case.differentiable
    for g in gradients(module, marred, names):
        assert g.isfinite().all()


def test_the_sweep_knows_every_function_that_takes_log_probabilities():
    words = ("logp", "logps", "logits", "lse", "elbo", "probs", "log_mass", "score", "p")
    source = Path(__file__).read_text()
    others = {
        "discriminator_loss",  # a network's output
        "occupancy_penalty",  # the same; infinities give 0
        "drpo_loss",  # through DRPO
        "low_probability_mask",  # through LowProbability
        "proxy_logp",  # gives -inf; compares only
        "sequence_nll",  # through RPO
        "log_ratio",
        "times",
    }
    for name in functional.__all__:
        function = getattr(functional, name)
        taken = inspect.signature(function).parameters if inspect.isfunction(function) else ()
        if any(word in taken or f"ref_{word}" in taken for word in words):
            assert name in others or f"{name}(" in source, name
