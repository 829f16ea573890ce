import doctest
import math

import pytest
import torch

from offrl.regularizers import RegInputs, occupancy
from offrl.regularizers.occupancy import (
    Chi2Occupancy,
    OccupancyReward,
    discriminator_loss,
    occupancy_penalty,
    sequence_chi2,
)

REFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)


def policy():
    logits = torch.tensor([0.3, -0.4, 0.1, 0.8, -0.6], dtype=torch.float64, requires_grad=True)
    return logits, logits.log_softmax(-1)


def test_docstring_examples():
    assert doctest.testmod(occupancy).failed == 0


def test_the_logistic_discriminator_is_the_log_ratio_at_its_optimum():
    current, base = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    score = (current / base).log().requires_grad_()
    on, off = (discriminator_loss(score, torch.full((3,), side)) for side in (True, False))
    (current @ on + base @ off).backward()
    torch.testing.assert_close(score.grad, torch.zeros(3), atol=1e-6, rtol=0)
    assert torch.equal(occupancy_penalty(score, "kl"), score.detach())


def test_the_bounded_discriminator_climbs_the_difference_and_shrinks():
    score = torch.tensor([0.5, 0.5], requires_grad=True)
    side = torch.tensor([True, False])
    discriminator_loss(score, side, "tv").sum().backward()
    slope = 1 - math.tanh(0.5) ** 2
    torch.testing.assert_close(score.grad, torch.tensor([-slope + 0.01, slope + 0.01]))
    assert torch.equal(discriminator_loss(score, side, "wasserstein"), torch.tensor([-0.5, 0.5]))


def test_penalties_average_to_their_divergence():
    current, base = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    score = (current / base).log()
    chi2 = ((current / base).square() * base).sum() - 1
    torch.testing.assert_close(current @ occupancy_penalty(score, "chi2"), chi2)
    tv = (current - base).abs().sum() / 2
    signs = occupancy_penalty(score, "tv")
    torch.testing.assert_close((current - base) @ signs / 2, tv)


def test_the_root_of_chi2_is_scaled_by_its_trimmed_mean():
    score = torch.arange(200).float() / 100
    score[0], score[1] = -5.0, 15.0  # the extremes, which the trim removes together with two more
    excess = torch.expm1(score)
    middle = excess.sort().values[2:-2].mean()
    torch.testing.assert_close(occupancy_penalty(score), excess / middle.sqrt())


def test_without_a_positive_mean_the_root_is_not_scaled():
    score = torch.tensor([-1.0, -2.0, 0.0])
    torch.testing.assert_close(occupancy_penalty(score), torch.expm1(score))


def test_what_is_not_finite_or_masked_costs_nothing():
    score = torch.tensor([math.nan, math.inf, -math.inf, 0.5, 0.7])
    mask = torch.tensor([1, 1, 1, 1, 0])
    for kind in ("kl", "chi2", "sqrt-chi2", "tv", "wasserstein"):
        penalty = occupancy_penalty(score, kind, mask)
        assert torch.equal(penalty[[0, 1, 2, 4]], torch.zeros(4))
        assert penalty[3] > 0
    assert occupancy_penalty(torch.tensor([300.0]), "chi2").isfinite()


def test_the_reward_loses_the_penalty_once():
    x = RegInputs(
        rewards=torch.tensor([1.0, 2.0]), extra={"discriminator": torch.tensor([0.0, 1.0])}
    )
    out = OccupancyReward(0.5, "kl")(x)
    torch.testing.assert_close(out.rewards, torch.tensor([1.0, 1.5]))


def test_the_second_term_is_a_control_variate():
    _, logp = policy()
    probs, ratio = logp.exp(), logp - REFERENCE.log()
    torch.testing.assert_close(probs @ torch.expm1(-ratio), torch.zeros((), dtype=torch.float64))
    exact = (probs.square() / REFERENCE).sum() - 1
    samples = sequence_chi2(logp, REFERENCE.log())
    torch.testing.assert_close(probs @ samples, exact)
    assert (samples >= 0).all()
    assert (torch.expm1(ratio) < 0).any()
    spread = [probs @ (x - exact).square() for x in (samples, torch.expm1(ratio))]
    assert spread[0] < spread[1]


def test_gradients_in_expectation_are_those_of_the_docstring():
    logits, logp = policy()
    probs, ref = logp.exp(), REFERENCE.log()

    def grad(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    chi2 = grad((probs.square() / REFERENCE).sum())
    reverse = grad(-(REFERENCE @ logp))
    fixed = probs.detach()
    torch.testing.assert_close(grad(fixed @ sequence_chi2(logp, ref)), chi2 / 2 + reverse)
    torch.testing.assert_close(grad(fixed @ sequence_chi2(logp, ref, grad="ratio")), chi2)


def test_beyond_ten_nats_it_continues_linearly_and_smoothly():
    ratio = torch.tensor([9.999, 10.001, -10.001, 12.0, 1e4], requires_grad=True)
    value = sequence_chi2(ratio, torch.zeros(5))
    torch.testing.assert_close(value[3], torch.tensor(math.exp(10) * 3 - 2), rtol=1e-5, atol=0)
    torch.testing.assert_close(value[1], value[2])
    value.sum().backward()
    torch.testing.assert_close(ratio.grad[0], ratio.grad[1], rtol=2e-3, atol=0)
    torch.testing.assert_close(ratio.grad[4], torch.tensor(math.exp(10)))
    assert ratio.grad[2] == -ratio.grad[1]


def test_tokens_of_a_sequence_add_up_before_the_exponent():
    logp, ref = torch.randn(3, 4), torch.randn(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    total = ((logp - ref) * mask).sum(-1)
    torch.testing.assert_close(sequence_chi2(logp, ref, mask), 2 * total.cosh() - 2)


def test_at_the_reference_the_loss_sits_on_its_floor_without_gradient():
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    out = Chi2Occupancy()(RegInputs(logp=logp, ref_logp=logp.detach()))
    torch.testing.assert_close(out.loss, torch.tensor(8e-4 * 0.01))
    out.loss.backward()
    assert torch.equal(logp.grad, torch.zeros(2, 3))
    assert out.metrics["floor"] == 1
    assert out.metrics["chi2"] == 0


def test_above_the_floor_the_loss_is_the_root_of_the_mean():
    logp, ref = torch.randn(4, 3), torch.randn(4, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
    out = Chi2Occupancy(0.5)(RegInputs(logp=logp, ref_logp=ref, mask=mask))
    values = sequence_chi2(logp, ref, mask)
    torch.testing.assert_close(out.loss, 0.5 * values[[0, 1, 3]].mean().sqrt())
    assert out.metrics["floor"] == 0


def test_a_batch_without_tokens_costs_nothing_and_keeps_a_gradient_path():
    logp = torch.randn(2, 3, requires_grad=True)
    x = RegInputs(logp=logp, ref_logp=torch.randn(2, 3), mask=torch.zeros(2, 3))
    loss = Chi2Occupancy()(x).loss
    assert loss == 0
    assert loss.grad_fn is not None


@pytest.mark.parametrize(
    "call",
    [
        lambda: occupancy_penalty(torch.zeros(1), "chi"),
        lambda: discriminator_loss(torch.zeros(1), torch.ones(1), "gan"),
        lambda: sequence_chi2(torch.zeros(1), torch.zeros(1), grad="none"),
    ],
)
def test_unknown_names_are_refused(call):
    with pytest.raises(ValueError, match="must be"):
        call()
