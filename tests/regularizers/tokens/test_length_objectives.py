import doctest
import math

import pytest
import torch

from offrl.regularizers import DLER, DRPO, RegInputs
from offrl.regularizers.tokens import length_objectives
from offrl.regularizers.tokens.length_objectives import dler_advantages, drpo_loss, drpo_weights


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_docstring_examples():
    assert doctest.testmod(length_objectives).failed == 0


# -- DLER -----------------------------------------------------------------------------------------

GROUP = torch.tensor([1, 0, 1, 0, 2, 2, 1, 0])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0])  # group 0 is all wrong


def test_advantages_are_centered_by_group_and_whitened_over_the_batch():
    found = dler_advantages(REWARDS, GROUP)
    centered = torch.tensor([1 / 3, -2 / 3, 0.5, -0.5, 1 / 3])
    expected = centered / centered.std()
    torch.testing.assert_close(found[[0, 2, 4, 5, 6]], expected)
    assert found[[1, 3, 7]].tolist() == [0.0, 0.0, 0.0]


def test_whitening_over_tokens_counts_a_response_by_its_length():
    lengths = torch.tensor([3, 50, 1, 60, 2, 4, 5, 70])
    found = dler_advantages(REWARDS, GROUP, lengths)
    rows = [0, 2, 4, 5, 6]
    centered = torch.tensor([1 / 3, -2 / 3, 0.5, -0.5, 1 / 3])
    tokens = centered.repeat_interleave(lengths[rows])
    expected = (centered - tokens.mean()) / tokens.std()
    torch.testing.assert_close(found[rows], expected)
    x = RegInputs(rewards=REWARDS, group=GROUP, lengths=lengths)
    assert torch.equal(DLER("tokens")(x).advantages, found)


@pytest.mark.parametrize("lengths", [None, torch.arange(1, 9)])
def test_scale_and_offset_of_rewards_do_not_matter(lengths):
    rewards = torch.rand(8, generator=generator(), dtype=torch.float64)
    one, other = (dler_advantages(r, GROUP, lengths) for r in (rewards, 7 * rewards - 3))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_batch_of_equal_rewards_has_no_advantages():
    assert not dler_advantages(torch.ones(4), torch.tensor([0, 0, 1, 1])).any()


# -- DRPO -----------------------------------------------------------------------------------------


def test_weights_prefer_short_correct_responses_of_the_group():
    lengths, group = torch.tensor([100, 300, 10, 200, 900]), torch.tensor([0, 0, 0, 1, 1])
    correct = torch.tensor([True, True, False, True, False])
    found = drpo_weights(lengths, correct, group, max_length=1000, temperature=0.1)
    first = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(found, torch.tensor([first, 1 - first, 0, 1, 0]))


def test_weights_become_uniform_with_the_temperature_and_sharp_without():
    lengths, group = torch.tensor([1, 4000, 8000, 5]), torch.zeros(4, dtype=torch.int64)
    correct = torch.tensor([True, True, True, False])
    hot = drpo_weights(lengths, correct, group, 8192, temperature=1e9)
    torch.testing.assert_close(hot, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]))
    cold = drpo_weights(lengths, correct, group, 8192, temperature=1e-6)
    torch.testing.assert_close(cold, torch.tensor([1.0, 0, 0, 0]))


def by_hand(score, weights, correct, group, tau):
    total, valid = 0.0, 0
    for g in group.unique().tolist():
        plus, minus = (group == g) & correct, (group == g) & ~correct
        if plus.any() and minus.any():
            mean = tau * (score[minus] / tau).exp().mean().log()
            total = total - (weights[plus] * (score[plus] - mean)).sum()
            valid += 1
    return total, valid


def drpo_inputs():
    score = (-torch.rand(9, generator=generator(), dtype=torch.float64) * 3).requires_grad_()
    correct = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0, 1]).bool()
    group = torch.tensor([4, 4, 1, 1, 1, 4, 2, 0, 2])  # 2 is all correct, 0 all wrong
    lengths = torch.randint(1, 900, (9,), generator=generator(1))
    return score, correct, group, drpo_weights(lengths.double(), correct, group, 1000)


@pytest.mark.parametrize("tau", [0.1, 10.0])
def test_the_loss_equals_a_loop_over_groups_in_value_and_gradient(tau):
    score, correct, group, weights = drpo_inputs()
    expected, _ = by_hand(score, weights, correct, group, tau)
    found = drpo_loss(score, weights, correct, ~correct, group, tau)
    torch.testing.assert_close(found.sum(), expected)
    grads = [torch.autograd.grad(v, score)[0] for v in (found.sum(), expected)]
    torch.testing.assert_close(*grads)
    assert (grads[0][correct] <= 0).all()
    assert (grads[0][~correct] >= 0).all()
    assert grads[0][group == 0].item() == 0
    assert not found[~correct].any()


def test_no_length_pushes_a_correct_response_down():
    score, correct, group, _ = drpo_inputs()
    weights = drpo_weights(torch.full((9,), 999), correct, group, 1000)
    (grad,) = torch.autograd.grad(drpo_loss(score, weights, correct, ~correct, group).sum(), score)
    assert (grad[correct & ((group == 4) | (group == 1))] < 0).all()


def test_extreme_scores_stay_finite():
    score = torch.tensor([-1e4, -2e4, -3e4], requires_grad=True)
    correct, group = torch.tensor([True, False, False]), torch.zeros(3, dtype=torch.int64)
    loss = drpo_loss(score, torch.tensor([1.0, 0, 0]), correct, ~correct, group, tau=0.1).sum()
    assert loss.item() == pytest.approx(-1e4 - 0.1 * math.log(2), abs=1e-2)
    (grad,) = torch.autograd.grad(loss, score)
    torch.testing.assert_close(grad, torch.tensor([-1.0, 1.0, 0.0]))


def module_inputs(drift):
    score, correct, group, _ = drpo_inputs()
    logp = score.detach().unsqueeze(-1).expand(9, 3).clone().requires_grad_()
    lengths = torch.randint(1, 900, (9,), generator=generator(1))
    return RegInputs(
        logp=logp, old_logp=logp.detach() + drift, lengths=lengths, correct=correct, group=group
    )


def test_the_mean_is_over_valid_groups_or_as_released_over_all():
    x = module_inputs(0.0)
    valid, every = (DRPO(max_length=1000, over=over)(x).loss for over in ("valid", "all"))
    score, correct, group, _ = drpo_inputs()
    weights = drpo_weights(x.lengths, correct, group, 1000).double()
    total, count = by_hand(score, weights, correct, group, 10.0)
    assert count == 2
    torch.testing.assert_close(valid, total / 2)
    torch.testing.assert_close(every, total / 4)


def test_the_constraint_pulls_only_beyond_its_limit():
    free = DRPO(max_length=1000, beta=0.0)
    for drift, slope in ((5e-5, 0.0), (0.01, 1e3 * (0.01 - 1e-4))):
        x = module_inputs(drift)
        out, plain = DRPO(max_length=1000)(x), free(x)
        torch.testing.assert_close(out.metrics["kl"].item(), drift)
        torch.testing.assert_close(out.loss - plain.loss, torch.tensor(slope * drift).double())
        own, without = (torch.autograd.grad(o.loss, x.logp)[0] for o in (out, plain))
        torch.testing.assert_close(own - without, torch.full_like(own, -slope / 27))
