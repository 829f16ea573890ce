import doctest
import math

import pytest
import torch

from offrl.regularizers import EMPG, IGPO, STCR, RegInputs
from offrl.regularizers.tokens import advantage
from offrl.regularizers.tokens.advantage import (
    backward_scan,
    bgpo_objective,
    entropy_modulation,
    igpo_advantages,
    overlength_factor,
    rto_rewards,
    truncated_gae,
    turn_rewards,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_docstring_examples():
    assert doctest.testmod(advantage).failed == 0


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13])
def test_the_scan_is_the_recurrence(size):
    value = torch.randn(3, size, generator=generator(), dtype=torch.float64)
    decay = torch.rand(3, size, generator=generator(1), dtype=torch.float64)
    expected, x = torch.zeros_like(value), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(size)):
        x = value[:, t] + decay[:, t] * x
        expected[:, t] = x
    torch.testing.assert_close(backward_scan(value, decay), expected)


# -- EMPG -----------------------------------------------------------------------------------------

TURN = torch.tensor([[0, 0, -1, 1, 1, 2], [0, -1, 1, 1, -1, -1]])
MASK = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0]])
ENTROPY = torch.tensor([[1.0, 3.0, 9.0, 0.5, 0.5, 4.0], [2.5, 9.0, 1.5, 9.0, 9.0, 9.0]])
STEPS = [[2.0, 0.5, 4.0], [2.5, 1.5]]  # mean entropy of the steps above


def by_hand(k=1.0, k_next=1.0):
    h = [[(s - 0.5) / 3.5 for s in row] for row in STEPS]
    gains = [[math.exp(-k * v) for v in row] for row in h]
    mean = sum(map(sum, gains)) / 5
    gains = [[v / mean for v in row] for row in gains]
    clarity = [[math.exp(-k_next * v) for v in row[1:]] + [0.0] for row in h]
    return gains, clarity


def test_gain_and_clarity_equal_a_loop_over_steps():
    gain, clarity = entropy_modulation(ENTROPY, TURN, MASK, k=0.7, k_next=1.3)
    gains, clarities = by_hand(0.7, 1.3)
    for found, expected in ((gain, gains), (clarity, clarities)):
        for row in range(2):
            for t in range(6):
                turn = TURN[row, t].item()
                want = expected[row][turn] if turn >= 0 and MASK[row, t] else 0.0
                assert found[row, t].item() == pytest.approx(want, abs=1e-6)


def test_the_gain_has_mean_one_over_steps():
    gain, _ = entropy_modulation(ENTROPY, TURN, MASK, k=2.0)
    one_token_per_step = gain[[0, 0, 0, 1, 1], [0, 3, 5, 0, 2]]
    torch.testing.assert_close(one_token_per_step.mean(), torch.tensor(1.0))
    assert one_token_per_step.max() == gain[0, 3]  # the most certain step


def test_equal_entropies_give_gain_one():
    gain, clarity = entropy_modulation(torch.full((2, 6), 0.3), TURN, MASK)
    inside = (TURN >= 0) & MASK.bool()
    assert torch.equal(gain, inside.float())
    assert set(clarity[inside].tolist()) == {0.0, 1.0}


def test_the_gain_keeps_the_sign_of_the_advantage():
    entropy = torch.rand(50, 6, generator=generator()) * 10
    gain, _ = entropy_modulation(entropy, TURN.clamp(min=0)[:1].expand(50, 6), k=5.0)
    a = torch.randn(50, 1, generator=generator(1))
    assert torch.equal((a * gain).sign(), a.sign().expand(50, 6))
    assert gain.isfinite().all()


def test_empg_pays_the_bonus_for_the_next_step_and_centers_over_steps():
    a = torch.tensor([1.0, -1.0])
    x = RegInputs(advantages=a, entropy=ENTROPY, turn=TURN, mask=MASK)
    gains, clarity = by_hand()
    steps = [
        [sign * g + 0.05 * c for g, c in zip(gains[row], clarity[row], strict=True)]
        for row, sign in ((0, 1.0), (1, -1.0))
    ]
    mean = sum(map(sum, steps)) / 5
    out = EMPG()(x).advantages
    assert out[0, 0].item() == out[0, 1].item() == pytest.approx(steps[0][0] - mean, abs=1e-6)
    assert out[0, 5].item() == pytest.approx(steps[0][2] - mean, abs=1e-6)  # last step: no bonus
    assert out[1, 2].item() == pytest.approx(steps[1][1] - mean, abs=1e-6)
    assert torch.equal(out[0, 2], torch.tensor(0.0))
    assert torch.equal(out[1, 3:], torch.zeros(3))


def test_without_gain_and_bonus_empg_only_centers():
    x = RegInputs(advantages=torch.tensor([2.0, -1.0]), entropy=ENTROPY, turn=TURN, mask=MASK)
    out = EMPG(k=0.0, zeta=0.0)(x).advantages
    mean = (3 * 2.0 - 2 * 1.0) / 5
    torch.testing.assert_close(out[0, 0], torch.tensor(2.0 - mean))
    torch.testing.assert_close(out[1, 2], torch.tensor(-1.0 - mean))


def test_scaling_advantages_scales_empg_but_for_its_bonus():
    x = RegInputs(advantages=torch.tensor([2.0, -1.0]), entropy=ENTROPY, turn=TURN, mask=MASK)
    y = RegInputs(advantages=torch.tensor([6.0, -3.0]), entropy=ENTROPY, turn=TURN, mask=MASK)
    torch.testing.assert_close(EMPG(zeta=0.0)(y).advantages, 3 * EMPG(zeta=0.0)(x).advantages)
    bonus = EMPG()(x).advantages - EMPG(zeta=0.0)(x).advantages
    torch.testing.assert_close(EMPG()(y).advantages - EMPG(zeta=0.0)(y).advantages, bonus)


# -- STCR -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("excess", "factor"), [(1000, 1.00995), (4096, 1.040)])
def test_overlength_factors_of_the_released_base(excess, factor):
    lengths, correct = torch.tensor([500, 500 + excess]), torch.tensor([True, False])
    found = overlength_factor(lengths, correct, torch.tensor([0, 0]))
    assert found[0] == 1
    assert found[1].item() == pytest.approx(factor, abs=1e-3 if excess == 4096 else 1e-5)


def test_overlength_reaches_only_long_wrong_responses_of_solved_groups():
    group = torch.tensor([1, 0, 1, 0, 1, 1])
    lengths = torch.tensor([100, 900, 300, 100, 500, 150])
    correct = torch.tensor([True, False, True, False, False, False])
    x = RegInputs(advantages=torch.full((6,), -2.0), lengths=lengths, correct=correct, group=group)
    out = STCR(base=1.001)(x).advantages
    expected = torch.full((6,), -2.0)
    expected[4] *= 2 - 1.001**-300  # 500 against a mean of 200
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(STCR(base=1.0)(x).advantages, x.advantages)


# -- RTO ------------------------------------------------------------------------------------------


def test_unclipped_token_rewards_telescope_to_the_implicit_reward_of_dpo():
    logp, ref, dpo = (-torch.rand(3, 7, generator=generator(i)) * 4 for i in range(3))
    mask = torch.rand(3, 7, generator=generator(3)) > 0.3
    outcome = torch.tensor([1.0, -2.0, 20.0])
    found = rto_rewards(outcome, logp, ref, dpo, mask, clip=math.inf, beta_kl=0.0)
    expected = 0.05 * ((dpo - ref) * mask).sum(-1) + outcome.clamp(-10, 10)
    torch.testing.assert_close(found.sum(-1), expected)
    assert torch.equal(found[~mask], torch.zeros(int((~mask).sum())))


def test_token_rewards_are_clipped_before_the_rest_is_added():
    dpo, ref = torch.tensor([[0.0, -9.0, 0.0]]), torch.tensor([[-0.4, 0.0, -9.0]])
    found = rto_rewards(torch.tensor([1.0]), ref - 1, ref, dpo)
    torch.testing.assert_close(found, torch.tensor([[0.02 + 0.01, -0.05 + 0.01, 1.05 + 0.01]]))


# -- IGPO -----------------------------------------------------------------------------------------


def test_turn_rewards_telescope():
    logp = -torch.rand(4, 5, generator=generator())
    reward = turn_rewards(logp, torch.full((4,), 7.0), torch.tensor([4, 2, 0, -1]))
    p = logp.exp()
    torch.testing.assert_close(reward[0, :4].sum(), p[0, 4] - p[0, 0])
    torch.testing.assert_close(reward[1, :2].sum(), p[1, 2] - p[1, 0])
    assert torch.equal(reward[[0, 1, 2], [4, 2, 0]], torch.full((3,), 7.0))
    assert torch.equal(reward[1, 3:], torch.zeros(2))
    assert torch.equal(reward[3], torch.zeros(5))


def test_answers_of_unplayed_turns_do_not_matter():
    logp = torch.tensor([[-1.0, -0.5, torch.nan, torch.inf]])
    reward = turn_rewards(logp, torch.tensor([1.0]), torch.tensor([1]))
    expected = torch.tensor([[math.exp(-0.5) - math.exp(-1), 1.0, 0.0, 0.0]])
    torch.testing.assert_close(reward, expected)


def igpo_inputs():
    turn = torch.tensor([[0, -1, 1, 1, 2], [0, 0, 1, -1, -1], [0, 1, -1, 2, 2], [0, 0, 0, -1, -1]])
    p = torch.rand(4, 3, generator=generator(), dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.float64)
    return p.log(), rewards, turn, torch.tensor([2, 0, 2, 0])


def returns_by_hand(p, rewards, turn, discount):
    rows = []
    for row in range(len(rewards)):
        last = turn[row].max().item()
        r = [(p[row, k + 1] - p[row, k]).item() for k in range(last)] + [rewards[row].item()]
        rows.append(
            [sum(discount ** (j - k) * r[j] for j in range(k, last + 1)) for k in range(last + 1)]
        )
    return rows


@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_advantages_of_turns_are_relative_to_the_same_turn_of_the_group(discount):
    logp, rewards, turn, group = igpo_inputs()
    returns = returns_by_hand(logp.exp(), rewards, turn, discount)
    found = igpo_advantages(logp, rewards, turn, group, discount=discount)
    for row in range(4):
        for t in range(5):
            k = turn[row, t].item()
            peers = [
                returns[o][k] for o in range(4) if group[o] == group[row] and k < len(returns[o])
            ]
            want = returns[row][k] - sum(peers) / len(peers) if k >= 0 else 0.0
            assert found[row, t].item() == pytest.approx(want, abs=1e-12)


def test_rewards_of_turns_may_be_standardized_in_the_group_first():
    logp, rewards, turn, group = igpo_inputs()
    p, found = logp.exp(), igpo_advantages(logp, rewards, turn, group, baseline="reward")
    mine = torch.stack([p[1, 1] - p[1, 0], rewards[1], rewards[3]])  # group 0
    z = (mine - mine.mean()) / (mine.std(correction=0) + 1e-6)
    torch.testing.assert_close(found[1, :3], torch.stack([z[0] + z[1], z[0] + z[1], z[1]]))
    torch.testing.assert_close(found[3, 0], z[2])


def test_positions_of_the_group_are_compared_as_released():
    logp, rewards, turn, group = igpo_inputs()
    returns = returns_by_hand(logp.exp(), rewards, turn, 1.0)
    found = igpo_advantages(logp, rewards, turn, group, baseline="position")
    assert found[1, 2].item() == pytest.approx(returns[1][1] - (returns[1][1] + returns[3][0]) / 2)
    assert found[0, 4].item() == pytest.approx(returns[0][2] - (returns[0][2] + returns[2][2]) / 2)
    assert found[2, 1].item() == pytest.approx(returns[2][1] - (0 + returns[2][1]) / 2)


def test_igpo_does_not_see_a_constant_added_to_outcomes_of_equally_long_dialogs():
    logp, rewards, _, group = igpo_inputs()
    turn = torch.tensor([[0, 1, 2]]).expand(4, 3)
    x = RegInputs(rewards=rewards, turn=turn, group=group, extra={"answer_logp": logp})
    y = RegInputs(rewards=rewards + 5, turn=turn, group=group, extra={"answer_logp": logp})
    torch.testing.assert_close(IGPO()(x).advantages, IGPO()(y).advantages)


# -- GAE ------------------------------------------------------------------------------------------


def gae_by_hand(rewards, values, end, discount, lam):
    found, a, following = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + discount * following * (1 - end[t]) - values[t]
        a = delta + discount * lam * (1 - end[t]) * a
        found[t], following = a, values[t]
    return found


def test_a_known_case_of_gae():
    rewards, values = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 0.4, 0.3])
    no = torch.zeros(3)
    found = truncated_gae(
        rewards, values, no, 0.99, 0.95, next_values=torch.tensor([0.4, 0.3, 0.2])
    )
    torch.testing.assert_close(found, torch.tensor([2.477986, 1.682069, 1.898]))


def test_egae_is_gae_where_nothing_is_cut():
    rewards, values = (torch.randn(9, generator=generator(i), dtype=torch.float64) for i in (0, 1))
    end = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 1.0])
    expected = gae_by_hand(rewards, values, end, 0.9, 0.8)
    torch.testing.assert_close(truncated_gae(rewards, values, end, 0.9, 0.8), expected)
    finished = truncated_gae(rewards[3:], values[3:], torch.tensor(True), 0.9, 0.8)
    torch.testing.assert_close(finished, expected[3:])


def test_at_a_cut_the_value_stands_in_for_the_next_one():
    values = torch.tensor([[0.3, -0.2, 0.7, 0.9]])
    found = truncated_gae(torch.zeros(1, 4), values, torch.tensor([False]), 1.0, 1.0)
    torch.testing.assert_close(found, values[:, -1:] - values)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 2.0]])
    found = truncated_gae(rewards, values, torch.tensor([False]), 0.9, 0.5)
    torch.testing.assert_close(found[0, -1], torch.tensor(2.0 - 0.1 * 0.9))


def test_a_time_limit_inside_a_row_separates_episodes():
    rewards, values = (torch.randn(2, 6, generator=generator(i)) for i in (0, 1))
    cut = torch.tensor([0, 0, 1, 0, 0, 0]).expand(2, 6)
    no = torch.zeros(2, 6)
    whole = truncated_gae(rewards, values, no, 0.9, 0.7, cut=cut)
    for part in (slice(0, 3), slice(3, 6)):
        alone = truncated_gae(rewards[:, part], values[:, part], no[:, part], 0.9, 0.7)
        torch.testing.assert_close(whole[:, part], alone)
    known = torch.full((2, 6), 5.0)
    found = truncated_gae(rewards, values, no, 0.9, 0.0, cut=cut, next_values=known)
    torch.testing.assert_close(found, rewards + 0.9 * 5.0 - values)


def test_steps_that_do_not_count_are_skipped():
    mask = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 0]], dtype=torch.bool)
    rewards, values = (torch.randn(1, 8, generator=generator(i)) for i in (0, 1))
    rewards, values = rewards.where(mask, torch.nan), values.where(mask, torch.inf)
    for finished in (True, False):
        found = truncated_gae(rewards, values, torch.tensor([finished]), 0.9, 0.8, mask=mask)
        packed = truncated_gae(
            rewards[mask][None], values[mask][None], torch.tensor([finished]), 0.9, 0.8
        )
        torch.testing.assert_close(found[mask][None], packed)
        assert torch.equal(found[~mask], torch.zeros(4))


def test_monte_carlo_returns_are_advantages_plus_values():
    rewards, values = (torch.randn(2, 5, generator=generator(i)) for i in (0, 1))
    found = truncated_gae(rewards, values, torch.tensor([True, True]), 1.0, 1.0) + values
    torch.testing.assert_close(found, rewards.flip(-1).cumsum(-1).flip(-1))


# -- BGPO -----------------------------------------------------------------------------------------


def test_both_branches_bound_the_exponential_of_the_mean():
    x = torch.randn(500, 4, generator=generator(), dtype=torch.float64)
    a = torch.randn(500, generator=generator(1), dtype=torch.float64)
    bound = bgpo_objective(x, torch.zeros_like(x), a).mean(-1)
    target = a * x.mean(-1).exp()
    assert (bound <= target + 1e-12).all()
    assert (bound < target - 1e-3).float().mean() > 0.5
    same = torch.zeros(2, 3, dtype=torch.float64)
    torch.testing.assert_close(bgpo_objective(same, same, a[:2]).mean(-1), a[:2])


def test_the_bound_touches_in_value_and_gradient():
    old = torch.randn(3, 4, generator=generator(), dtype=torch.float64)
    a = torch.tensor([1.5, -2.0, 0.0], dtype=torch.float64)
    grads = []
    for target in (False, True):
        elbo = old.clone().requires_grad_()
        value = a * (elbo - old).mean(-1).exp() if target else bgpo_objective(elbo, old, a).mean(-1)
        torch.testing.assert_close(value, a)
        grads += torch.autograd.grad(value.sum(), elbo)
    torch.testing.assert_close(grads[0], grads[1])


def test_samples_may_be_accumulated_one_by_one():
    old = torch.randn(3, 4, generator=generator())
    elbo = (old + torch.randn(3, 4, generator=generator(1))).requires_grad_()
    a = torch.tensor([1.5, -2.0, 0.5])
    (whole,) = torch.autograd.grad(bgpo_objective(elbo, old, a).mean(-1).sum(), elbo)
    parts = [
        torch.autograd.grad(
            bgpo_objective(elbo[:, j : j + 1], old[:, j : j + 1], a).sum() / 4, elbo
        )
        for j in range(4)
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), whole)
