import doctest

import pytest
import torch

from offrl.regularizers import (
    Compose,
    ConstrainedRewards,
    DualVariable,
    LagrangianPenalty,
    RegInputs,
    constraints,
)
from offrl.regularizers.constraints import lagrangian_advantages, mixed_advantages


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def observe(module, *means, count=4.0):
    total = torch.tensor(means) * count
    module.update({"objectives": total, "count": torch.tensor(count)})


def test_docstring_examples():
    assert doctest.testmod(constraints).failed == 0


def by_hand(x):
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def test_the_mix_is_the_weighted_sum_of_standardized_advantages():
    kl, a = torch.randn(9, generator=generator()), torch.randn(9, 2, generator=generator(1))
    mu = torch.tensor([0.3, -0.5])
    expected = (2 + 0.2) * by_hand(kl) + 0.3 * by_hand(a[:, 0]) - 0.5 * by_hand(a[:, 1])
    torch.testing.assert_close(mixed_advantages(kl, a, mu), expected)


def test_the_mix_of_tokens_standardizes_over_valid_tokens_only():
    kl, a = torch.randn(2, 3, generator=generator()), torch.randn(2, 3, 1, generator=generator(1))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    valid = mask.bool()
    spoiled = torch.where(valid.unsqueeze(-1), a, torch.nan)
    found = mixed_advantages(kl, spoiled, torch.tensor([0.25]), mask)
    expected = 0.75 * by_hand(kl[valid]) + 0.25 * by_hand(a[valid].squeeze(-1))
    torch.testing.assert_close(found[valid], expected)
    assert torch.equal(found[~valid], torch.zeros(3))


def test_scales_and_offsets_of_reward_models_do_not_matter():
    kl, a = (torch.randn(9, 2, generator=generator(i)).double() for i in (0, 1))
    kl, mu = kl[:, 0], torch.tensor([0.3, 0.9])
    other = a * torch.tensor([100.0, 0.01]) + torch.tensor([-5.0, 7.0])
    torch.testing.assert_close(
        mixed_advantages(kl, other, mu), mixed_advantages(kl, a, mu), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["inequality", "equality"])
def test_multipliers_rise_below_the_threshold_and_fall_above(kind):
    module = ConstrainedRewards([0.5, 0.5, 0.5], kind)
    start = module.mu
    observe(module, 0.1, 0.9, 0.5)
    assert module.mu[0] > start[0]
    assert module.mu[1] < start[1]
    assert module.mu[2] == start[2]
    for _ in range(20):
        observe(module, 0.9, 0.1, 0.5)
    assert module.mu[0] < start[0]
    assert module.mu[1] > start[1]


def test_multipliers_rest_while_all_thresholds_are_met_exactly():
    module = ConstrainedRewards([0.25, -1.0])
    for _ in range(5):
        observe(module, 0.25, -1.0)
    assert torch.equal(module.mu, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("kind", ["inequality", "equality"])
def test_multipliers_descend_the_loss_of_the_released_code(kind):
    squash = torch.sigmoid if kind == "inequality" else torch.tanh
    module, raw = (
        ConstrainedRewards([0.44, 0.238], kind, lr=0.1),
        torch.zeros(2, requires_grad=True),
    )
    optimizer = torch.optim.SGD([raw], lr=0.1, momentum=0.1)
    for means in ((0.1, 0.9), (0.3, -8.0), (0.5, 0.2)):  # the second reaches the bound 0.5
        optimizer.zero_grad()
        (squash(raw) * (torch.tensor(means) - torch.tensor([0.44, 0.238]))).sum().backward()
        raw.grad.clamp_(-0.5, 0.5)
        optimizer.step()
        observe(module, *means)
        torch.testing.assert_close(module.mu, squash(raw).detach())


def test_multipliers_stay_within_their_link():
    for kind, low, high in (("inequality", 0, 1), ("equality", -1, 1)):
        module = ConstrainedRewards([0.0, 0.0], kind, lr=1.0)
        for _ in range(200):
            observe(module, 50.0, -50.0)
        assert low <= module.mu[0] < low + 0.1
        assert high - 0.1 < module.mu[1] <= high


def test_multipliers_survive_saving_with_their_momentum():
    module, other = ConstrainedRewards([0.5, 0.1]), ConstrainedRewards([0.5, 0.1])
    observe(module, 0.2, 0.4)
    other.load_state_dict(module.state_dict())
    observe(module, 0.3, 0.3)
    observe(other, 0.3, 0.3)
    assert torch.equal(module.mu, other.mu)
    assert not torch.equal(other.mu, torch.tensor([0.5, 0.5]))


def rewarded(objectives):
    rows = len(objectives)
    extra = {"reward_advantages": torch.randn(rows, 2), "objectives": torch.tensor(objectives)}
    return RegInputs(advantages=torch.randn(rows), extra=extra)


def test_objectives_are_averaged_over_all_rows_of_a_step():
    module, whole = ConstrainedRewards([0.5, 0.5]), ConstrainedRewards([0.5, 0.5])
    rows = [[0.0, 1.0], [0.2, 0.0], [0.9, 0.0]]
    parts = [module(rewarded(part)).sync for part in (rows[:2], rows[2:])]
    module.update({key: parts[0][key] + parts[1][key] for key in parts[0]})
    whole.update(whole(rewarded(rows)).sync)
    torch.testing.assert_close(module.mu, whole.mu)
    assert module.mu[0] > 0.5


def test_a_wrong_number_of_reward_models_is_refused():
    with pytest.raises(ValueError, match="3 thresholds"):
        ConstrainedRewards([0.1, 0.2, 0.3])(rewarded([[0.0, 1.0]]))


def test_lagrangian_advantages_run_from_the_reward_to_the_cost():
    a, cost = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    assert torch.equal(lagrangian_advantages(a, cost, 0.0), a)
    torch.testing.assert_close(lagrangian_advantages(a, cost, 1e7), -cost)
    torch.testing.assert_close(lagrangian_advantages(a, cost, 3.0), (a - 3 * cost) / 4)


def cost_of(values):
    return RegInputs(extra={"cost": torch.tensor(values, requires_grad=True)})


def test_the_penalty_grows_while_the_cost_exceeds_the_limit():
    module = LagrangianPenalty(1.0)
    values = []
    for cost in ([3.0, 1.0], [0.5, 1.5], [0.0, 0.0]):
        module.update(module(cost_of(cost)).sync)
        values.append(module.weight.item())
    assert values[0] > 0.5
    assert values[1] == values[0]  # the cost is at the limit
    assert values[2] < values[1]


def test_the_penalty_is_the_multiplier_times_the_mean_cost():
    x = cost_of([3.0, 1.0])
    loss, _, _ = Compose([LagrangianPenalty(1.0)]).run_loss(x)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(1.0))
    torch.testing.assert_close(x.extra["cost"].grad, torch.tensor([0.25, 0.25]))


def test_dual_ascent_finds_the_multiplier_of_a_small_program():
    # maximize -(a - 2)^2 subject to a <= 1: a = 1 and lambda = 2
    a = torch.tensor(0.0, requires_grad=True)
    module = LagrangianPenalty(1.0, DualVariable(0.5, "softplus", lr=0.3))
    reg = Compose([module])
    for _ in range(300):
        penalty, _, sync = reg.run_loss(RegInputs(extra={"cost": a.view(1)}))
        ((a - 2).square() + penalty).backward()
        with torch.no_grad():
            a -= 0.1 * a.grad
            a.grad = None
        reg.update(sync)
    assert a.item() == pytest.approx(1.0, abs=1e-3)
    assert module.weight.item() == pytest.approx(2.0, abs=1e-2)
