import doctest
import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from offrl.regularizers import (
    DADS,
    Compose,
    DualVariable,
    EMAAnchor,
    GeometricMixture,
    KLReward,
    KLToReference,
    RegInputs,
)
from offrl.regularizers.functional import (
    dads_weight,
    geometric_mixture,
    kl_estimate,
    kl_in_reward,
    masked_reduce,
)
from offrl.regularizers.tokens import kl

close = torch.testing.assert_close
REF = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
OLD = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64).log()


def policy():
    logits = torch.tensor([0.5, -0.4, 1.1, -0.2], dtype=torch.float64, requires_grad=True)
    return logits, logits.log_softmax(-1)


def forward_kl(logp):
    return (logp.exp() * (logp - REF)).sum()


def backward_kl(logp):
    return (REF.exp() * (REF - logp)).sum()


def mean_square(logp):
    return (logp.exp() * (logp - REF).square() / 2).sum()


def nothing(logp):
    return 0 * logp.sum()


def test_docstring_examples():
    assert doctest.testmod(kl).failed == 0


def test_k1_and_k3_have_the_divergence_as_their_mean():
    logp = policy()[1]
    for kind in ("k1", "k3"):
        close((logp.exp() * kl_estimate(logp, REF, kind, "path")).sum(), forward_kl(logp))


def test_k2_has_the_divergence_as_its_mean_to_second_order_only():
    direction = torch.tensor([1.0, -1.0, 0.5, 0.2], dtype=torch.float64)
    gap = []
    for size in (1e-1, 1e-2):
        logp = (REF + size * direction).log_softmax(-1)
        gap.append(mean_square(logp) - forward_kl(logp))
    assert gap[0].abs() > 1e-5
    assert gap[0] / gap[1] == pytest.approx(1000, rel=0.2)  # third order


@pytest.mark.parametrize(
    ("kind", "grad", "objective"),
    [
        ("k1", "path", nothing),
        ("k2", "path", forward_kl),
        ("k3", "path", backward_kl),
        ("k1", "ratio", forward_kl),
        ("k2", "ratio", mean_square),
        ("k3", "ratio", forward_kl),
        ("k1", "straight", forward_kl),
        ("k2", "straight", forward_kl),
        ("k3", "straight", forward_kl),
    ],
)
def test_expected_gradient_on_policy(kind, grad, objective):
    logits, logp = policy()
    loss = (logp.exp().detach() * kl_estimate(logp, REF, kind, grad)).sum()
    expected = torch.autograd.grad(objective(logp), logits, retain_graph=True)[0]
    close(torch.autograd.grad(loss, logits)[0], expected)


@pytest.mark.parametrize(
    ("kind", "grad"),
    [("k1", "ratio"), ("k3", "ratio"), ("k1", "straight"), ("k2", "straight"), ("k3", "straight")],
)
def test_expected_gradient_on_samples_of_an_older_policy(kind, grad):
    logits, logp = policy()
    loss = (OLD.exp() * kl_estimate(logp, REF, kind, grad, old_logp=OLD)).sum()
    expected = torch.autograd.grad(forward_kl(logp), logits, retain_graph=True)[0]
    close(torch.autograd.grad(loss, logits)[0], expected)


def test_straight_has_the_value_of_its_kind_whatever_the_older_policy():
    logp = policy()[1]
    close(kl_estimate(logp, REF, "k3", "straight", OLD), kl_estimate(logp, REF, "k3", "path"))


def test_weight_of_the_straight_gradient_is_at_most_ten():
    logp = torch.tensor([-1.0], requires_grad=True)
    ref, old = torch.tensor([-2.0]), torch.tensor([-50.0])
    kl_estimate(logp, ref, "k3", "straight", old).sum().backward()
    close(logp.grad, torch.tensor([10.0]))


@pytest.mark.parametrize("grad", ["path", "ratio", "straight"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_distant_policies_give_finite_values_and_gradients(grad, sign):
    logp = torch.tensor([-200.0, -1.0], requires_grad=True)
    value = kl_estimate(logp, logp.detach() + sign * 300, "k3", grad, logp.detach() - sign * 90)
    value.sum().backward()
    assert value.isfinite().all()
    assert logp.grad.isfinite().all()


def test_k3_keeps_its_precision_near_the_reference():
    logp = torch.tensor([-1.0])
    value = kl_estimate(logp, logp + 2**-12, "k3", "path")
    assert value.item() == pytest.approx(2**-25, rel=1e-3)


def test_reference_and_older_policy_receive_no_gradient():
    logp, ref, old = (torch.randn(3, requires_grad=True) for _ in range(3))
    kl_estimate(logp, ref, "k3", "ratio", old).sum().backward()
    assert logp.grad.abs().sum() > 0
    assert ref.grad is None
    assert old.grad is None


def test_padding_reaches_neither_values_nor_gradients():
    logp = torch.tensor([-1.0, torch.nan], requires_grad=True)
    ref, mask = torch.tensor([-2.0, torch.inf]), torch.tensor([1, 0])
    value = kl_estimate(logp, ref, "k3", "ratio", mask=mask)
    value.sum().backward()
    assert value[1] == 0
    assert logp.grad[0].isfinite()
    assert logp.grad[1] == 0


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind must be"):
        kl_estimate(REF, REF, "k4")
    with pytest.raises(ValueError, match="kind must be"):
        kl_estimate(REF, REF, "k3", "none")


def test_token_rewards_sum_to_the_reward_minus_the_sequence_divergence():
    g = torch.Generator().manual_seed(0)
    logp, ref = torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    rewards = torch.tensor([1.0, 2.0, 3.0])
    token = kl_in_reward(rewards, logp, ref, 0.3, mask)
    d = ((logp - ref) * mask).sum(-1)
    close(token.sum(-1), rewards * torch.tensor([1, 1, 0]) - 0.3 * d)
    close(token[0, 4], rewards[0] - 0.3 * (logp - ref)[0, 4])  # the last valid one has it
    assert (token[mask == 0] == 0).all()


def test_kl_in_reward_ascends_the_regularized_objective_to_its_optimum():
    beta, rewards = 0.7, torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=torch.float64)
    best = (REF + rewards / beta).log_softmax(-1)
    log_z = (REF + rewards / beta).logsumexp(-1)
    logits, logp = policy()
    objective = (logp.exp() * rewards).sum() - beta * forward_kl(logp)
    close(objective, beta * log_z - beta * (logp.exp() * (logp - best)).sum())

    def reinforce(logp):
        token = kl_in_reward(rewards, logp, REF, beta)
        return logp.exp() * (token - (logp.exp() * token).sum())

    expected = torch.autograd.grad(objective, logits)[0]
    close(reinforce(logp.detach()), expected)
    now = logits.detach()
    for _ in range(400):
        now = now + 2.0 * reinforce(now.log_softmax(-1))
    close(now.log_softmax(-1), best, atol=1e-6, rtol=0)


def test_reward_hook_subtracts_the_sequence_divergence():
    x = RegInputs(
        rewards=torch.tensor([1.0, 2.0]),
        old_logp=torch.tensor([[-1.0, -1.0], [-1.0, torch.nan]]),
        ref_logp=torch.tensor([[-2.0, -1.5], [-3.0, 0.0]]),
        mask=torch.tensor([[1, 1], [1, 0]]),
    )
    out = KLReward(0.1)(x)
    close(out.rewards, torch.tensor([1 - 0.15, 2 - 0.2]))
    close(out.metrics["kl"], torch.tensor(3.5 / 3))


def sums(mean, count=8.0):
    return {"kl": torch.tensor(mean * count), "count": torch.tensor(count)}


@pytest.mark.parametrize("make", [KLToReference, KLReward])
def test_controller_of_ziegler_multiplies_by_the_clipped_relative_error(make):
    coef = DualVariable(0.2, rule="proportional", clip=0.2, scale=64 / 10_000)
    module = make(coef, target=0.1)
    expected = 0.2
    for mean, error in [(0.11, 0.1), (5.0, 0.2), (0.0, -0.2), (0.1, 0.0)]:
        module.update(sums(mean))
        expected *= 1 + error * 64 / 10_000
        close(coef.value, torch.tensor(expected))


def test_controller_of_ppo_doubles_above_the_target_and_halves_below():
    coef = DualVariable(1.0, rule="factor", factor=2.0)
    module = KLToReference(coef, target=0.01)
    for mean, value in [(0.02, 2.0), (0.02, 4.0), (0.005, 2.0)]:
        module.update(sums(mean))
        close(coef.value, torch.tensor(value))


def test_controller_ignores_a_step_without_tokens_and_rests_in_evaluation():
    coef = DualVariable(1.0, rule="factor")
    module = KLToReference(coef, target=0.01)
    module.update(sums(0.0, count=0.0))
    module.eval()
    module.update(sums(1.0))
    assert coef.value == 1


def test_adaptive_coefficient_needs_a_target():
    with pytest.raises(ValueError, match="target"):
        KLToReference(DualVariable(0.1))


def test_sums_of_parts_give_the_mean_of_the_whole():
    g = torch.Generator().manual_seed(0)
    logp, ref = -torch.rand(4, 3, generator=g), -torch.rand(4, 3, generator=g)
    module = KLToReference(0.1, "k1", "path")
    whole = module(RegInputs(logp=logp, ref_logp=ref)).sync
    parts = [module(RegInputs(logp=logp[i], ref_logp=ref[i])).sync for i in (slice(3), slice(3, 4))]
    for name in whole:
        close(whole[name], sum(part[name] for part in parts))


def test_a_spike_moves_the_metric_by_ten_at_most():
    x = RegInputs(logp=torch.tensor([-40.0]), ref_logp=torch.tensor([0.0]))
    assert KLToReference(0.1, grad="path")(x).metrics["kl"] == 10


@pytest.mark.parametrize("grad", ["ratio", "straight"])
def test_corrected_gradients_ask_for_the_policy_that_sampled(grad):
    module = KLToReference(0.1, grad=grad)
    assert module.requires == {"logp", "ref_logp", "old_logp"}
    with pytest.raises(ValueError, match="old_logp"):
        module(RegInputs(logp=REF, ref_logp=REF))


def test_exact_kind_takes_the_given_divergence_and_its_gradient():
    divergence = torch.tensor([[0.5, torch.nan]], requires_grad=True)
    x = RegInputs(stats={"kl": divergence}, mask=torch.tensor([[1, 0]]))
    module = KLToReference(0.2, "exact")
    assert module.requires == {"stats.kl"}
    module(x).per_element.sum().backward()
    close(divergence.grad, torch.tensor([[0.2, 0.0]]))


def test_distributions_of_a_control_actor_give_their_closed_form():
    mean = torch.tensor([[0.3, -0.2]], requires_grad=True)
    dist = Independent(Normal(mean, torch.ones(1, 2)), 1)
    ref = Independent(Normal(torch.zeros(1, 2), torch.ones(1, 2)), 1)
    module = KLToReference(0.5, "dist")
    assert module.requires == {"dist", "ref_dist"}
    loss = Compose([module]).run_loss(RegInputs(dist=dist, ref_dist=ref))[0]
    loss.backward()
    close(loss, 0.5 * mean.square().sum() / 2)
    close(mean.grad, 0.5 * mean.detach())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "exact", "dist"])
def test_control_actor_and_token_policy_of_one_token_agree(kind):
    g = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    action = torch.randint(0, 5, (6,), generator=g)
    values, grads = [], []
    for shape in ((6, 5), (6, 1, 5)):
        leaf = logits.view(shape).clone().requires_grad_()
        dist, ref_dist = Categorical(logits=leaf), Categorical(logits=ref.view(shape))
        taken = action.view(shape[:-1])
        x = RegInputs(
            logp=dist.log_prob(taken),
            old_logp=dist.log_prob(taken).detach(),
            ref_logp=ref_dist.log_prob(taken),
            stats={"kl": kl_divergence(dist, ref_dist)},
            dist=dist,
            ref_dist=ref_dist,
        )
        values.append(Compose([KLToReference(0.3, kind)]).run_loss(x)[0])
        grads.append(torch.autograd.grad(values[-1], leaf)[0].view(6, 5))
    close(values[0], values[1])
    close(grads[0], grads[1])


@pytest.mark.parametrize(("solved", "weight"), [(7, 0.907), (4, 0.743), (1, 0.288), (8, 1), (0, 1)])
def test_dads_weights_of_eight_responses(solved, weight):
    correct = torch.arange(8) < solved
    found = dads_weight(torch.ones(8), correct, torch.zeros(8, dtype=torch.int64))
    close(found, torch.full((8,), float(weight)), atol=5e-4, rtol=0)


def test_dads_other_form_decreases_with_difficulty():
    correct, group = torch.arange(8) < 2, torch.zeros(8, dtype=torch.int64)
    found = dads_weight(torch.ones(8), correct, group, "difficulty")
    close(found, torch.full((8,), math.exp(-math.e * 0.75)))


def test_dads_weighs_positive_advantages_only_in_any_order_of_groups():
    group = torch.tensor([3, 0, 3, 0, 3, 3])
    correct = torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0, 0.0, 2.0])
    weight = 1 - math.exp(-math.e / 4)
    expected = torch.tensor([weight, 1, 1, 1, 1, weight])
    close(dads_weight(advantages, correct, group), expected)


def test_dads_loss_is_a_mean_over_sequences_of_weighted_token_means():
    g = torch.Generator().manual_seed(0)
    logp, ref = -torch.rand(4, 3, generator=g), -torch.rand(4, 3, generator=g)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    advantages, correct = torch.tensor([1.0, -1.0, -1.0, -1.0]), torch.tensor([1, 0, 0, 0]).bool()
    x = RegInputs(
        logp=logp,
        ref_logp=ref,
        mask=mask,
        advantages=advantages,
        correct=correct,
        group=torch.zeros(4, dtype=torch.int64),
    )
    k3 = torch.exp(ref - logp) - 1 + logp - ref
    weight = torch.tensor([1 - math.exp(-math.e / 4), 1, 1, 1])
    rows = (k3 * mask).sum(-1) / mask.sum(-1)
    module = DADS(0.01)
    loss = masked_reduce(module(x).per_element, mask, module.reduction)
    close(loss, 0.01 * (weight * rows).mean())


def test_geometric_mixture_minimizes_the_weighted_divergences():
    g = torch.Generator().manual_seed(0)
    refs = [torch.randn(5, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(3)]
    weights = [0.5, 0.2, 0.3]
    logits = geometric_mixture(refs, weights).requires_grad_()
    close(logits.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    logp = logits.log_softmax(-1)
    loss = sum(w * (logp.exp() * (logp - ref)).sum() for w, ref in zip(weights, refs, strict=True))
    close(torch.autograd.grad(loss, logits)[0], torch.zeros(5, dtype=torch.float64))


def test_mixture_of_sampled_log_probabilities_lacks_the_constant_of_its_state():
    refs = [torch.tensor([0.8, 0.2]).log(), torch.tensor([0.3, 0.7]).log()]
    raw = geometric_mixture(refs, [0.5, 0.5], normalized=False)
    constant = raw - geometric_mixture(refs, [0.5, 0.5])
    close(constant[0], constant[1])
    with pytest.raises(ValueError, match="weights"):
        geometric_mixture(refs, [1.0])


def test_product_of_gaussians_is_the_weighted_product_of_densities():
    refs = [Independent(Normal(torch.randn(3, 2), torch.rand(3, 2) + 0.5), 1) for _ in range(2)]
    mixture = GeometricMixture(refs, [0.7, 0.3])
    a, b = torch.randn(3, 2), torch.randn(3, 2)
    raw = [geometric_mixture([r.log_prob(v) for r in refs], [0.7, 0.3], False) for v in (a, b)]
    close(mixture.log_prob(a) - mixture.log_prob(b), raw[0] - raw[1], atol=1e-5, rtol=1e-4)
    assert isinstance(mixture.dist, Independent)


def test_product_of_categoricals_and_of_mixed_kinds():
    first, second = torch.tensor([0.8, 0.2]), torch.tensor([0.5, 0.5])
    mixture = GeometricMixture([Categorical(first), Categorical(second)], [0.5, 0.5])
    close(mixture.dist.probs, torch.tensor([2 / 3, 1 / 3]))
    with pytest.raises(TypeError, match="Categorical, Normal"):
        _ = GeometricMixture([Categorical(first), Normal(0.0, 1.0)], [0.5, 0.5]).dist


def test_moving_anchor_is_the_exponential_average_of_the_policy():
    policy = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    reference = deepcopy(policy)
    kept = list(reference.parameters())
    start, policy_start = kept[0].clone(), policy[0].weight.detach().clone()
    with torch.no_grad():
        policy[0].weight += 1
        policy[1].running_mean += 2
    for _ in range(3):
        EMAAnchor(0.25).update(reference, policy)
    close(kept[0], start + (1 - 0.75**3))
    close(reference[1].running_mean, torch.full((2,), 2.0))
    close(policy[0].weight, policy_start + 1)  # the policy is left alone


def test_moving_anchor_takes_plain_tensors_and_other_dtypes():
    reference, policy = [torch.zeros(2)], [torch.ones(2, dtype=torch.bfloat16)]
    EMAAnchor(1.0).update(reference, policy)
    close(reference[0], torch.ones(2))
    with pytest.raises(ValueError, match="tensors"):
        EMAAnchor(0.5).update(reference, [])
    with pytest.raises(ValueError, match="tau"):
        EMAAnchor(1.5)
