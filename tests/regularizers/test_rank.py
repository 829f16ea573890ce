import doctest
import math

import pytest
import torch

from offrl.regularizers import Compose, RegInputs, rank
from offrl.regularizers.rank import (
    FeatureRank,
    action_features,
    beer_penalty,
    dr3_penalty,
    infer_penalty,
    representation_rank,
)

F64 = torch.float64
UNIT = torch.tensor([1.0, 0.0], dtype=F64)


def vector(*values):
    return torch.tensor([values], dtype=F64)


def random(count, size=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    f, t = (torch.randn(count, size, generator=g, dtype=F64) for _ in range(2))
    w, r = (torch.randn(n, generator=g, dtype=F64) for n in (size, count))
    return f.requires_grad_(), t, r * 3, w


def test_docstring_examples():
    assert doctest.testmod(rank).failed == 0


@pytest.mark.parametrize(
    ("reward", "shrink", "bound", "penalty"),
    [
        (1.0, None, 0.979848, 0.0),
        (2.0, None, 0.919242, 0.040758),
        (0.0, None, 1.000051, 0.0),
        (0.0, 0.9, 0.906001, 0.053999),
    ],
)
def test_worked_values(reward, shrink, bound, penalty):
    f, t = vector(3.0, 4.0), vector(4.0, 3.0)
    online = None if shrink is None else shrink * t
    value, stats = beer_penalty(f, t, torch.tensor([reward], dtype=F64), UNIT, 0.99, g=online)
    assert math.isclose(float(stats["cos"]), 0.96)
    assert math.isclose(float(stats["bound"]), bound, abs_tol=1e-6)
    assert math.isclose(float(value), penalty, abs_tol=1e-6)
    assert float(stats["open"]) == (penalty > 0)


def test_the_worked_gradient_rotates_the_features_apart():
    f = vector(3.0, 4.0).requires_grad_()
    penalty, _ = beer_penalty(f, vector(4.0, 3.0), torch.tensor([2.0], dtype=F64), UNIT, 0.99)
    penalty.sum().backward()
    torch.testing.assert_close(f.grad, vector(0.0448, -0.0336))


def test_the_gate_is_open_exactly_where_the_bellman_equation_cannot_hold():
    f, t, r, w = random(10_000)
    penalty, stats = beer_penalty(f, t, r, w, 0.99)
    impossible = (f - 0.99 * t).norm(dim=-1) * w.norm() < r.abs()
    assert torch.equal(penalty > 0, impossible)
    assert 0.05 < stats["open"] < 0.95
    torch.testing.assert_close(stats["open"], impossible.to(F64).mean())


def test_without_reward_nothing_is_penalized():
    f, t, r, w = random(10_000)
    assert torch.equal(beer_penalty(f, t, 0 * r, w, 0.9)[0], 0 * r)


def test_a_transition_that_obeys_the_bellman_equation_is_not_penalized():
    f, t, _, w = random(1000)
    penalty, _ = beer_penalty(f, t, (f - 0.99 * t) @ w, w, 0.99)
    assert torch.equal(penalty, torch.zeros(1000, dtype=F64))


def test_with_a_bias_the_bellman_equation_moves_the_reward():
    f, t, _, w = random(1000)
    bias = torch.tensor(5.0, dtype=F64)
    reward = f @ w + bias - 0.9 * (t @ w + bias)
    exact, _ = beer_penalty(f, t, reward, w, 0.9, bias=bias)
    assert torch.equal(exact, torch.zeros(1000, dtype=F64))
    moved, _ = beer_penalty(f, t, reward - 0.1 * bias, w, 0.9)
    assert torch.equal(exact, moved)
    assert (beer_penalty(f, t, reward, w, 0.9)[0] > 0).any()


def test_only_the_features_receive_a_gradient_and_it_is_the_closed_form():
    f, t, r, w = random(200)
    g, bias = torch.randn(200, 4, dtype=F64), torch.tensor([0.3], dtype=F64)
    others = [x.requires_grad_() for x in (t, r, w, g, bias)]
    penalty, _ = beer_penalty(f, t, r, w, 0.99, g=g, bias=bias)
    grad, *rest = torch.autograd.grad(penalty.sum(), [f, *others], allow_unused=True)
    assert all(x is None for x in rest)
    a, b = f.norm(dim=-1, keepdim=True), t.norm(dim=-1, keepdim=True)
    cosine = (f * t).sum(-1, keepdim=True) / (a * b)
    closed = (t / (a * b) - cosine * f / a**2) * (penalty > 0).unsqueeze(-1)
    torch.testing.assert_close(grad, closed)
    torch.testing.assert_close((grad * f).sum(-1), torch.zeros(200, dtype=F64))
    assert (grad.norm(dim=-1) * a.squeeze(-1) <= 1).all()


def test_a_step_lowers_the_cosine_where_open_and_does_nothing_where_closed():
    f, t, r, w = random(200)
    penalty, _ = beer_penalty(f, t, r, w, 0.99)
    penalty.sum().backward()
    moved = (f - 0.01 * f.grad).detach()
    before, after = (torch.cosine_similarity(x.detach(), t, dim=-1) for x in (f, moved))
    is_open = penalty > 0
    assert (after < before)[is_open].all()
    assert torch.equal(moved[~is_open], f[~is_open])


def test_features_of_zero_cost_nothing_and_give_no_gradient():
    f, t, r, w = random(4)
    dead = torch.where(torch.tensor([[True], [False], [True], [False]]), 0.0, f)
    dead = dead.detach().requires_grad_()
    t[2] = 0.0
    t[3] = 0.0
    penalty, _ = beer_penalty(dead, t, r + 100, w, 0.99)
    penalty.sum().backward()
    assert penalty.isfinite().all()
    assert torch.equal(penalty[[0, 2, 3]], torch.zeros(3, dtype=F64))
    assert penalty[1] > 0
    assert torch.equal(dead.grad[[0, 2, 3]], torch.zeros(3, 4, dtype=F64))
    assert dead.grad[1].any()


def test_scales_of_reward_and_of_features_cancel_against_the_weight():
    f, t, r, w = random(50)
    penalty, stats = beer_penalty(f, t, r, w, 0.99)
    torch.testing.assert_close(beer_penalty(f, t, 7 * r, 7 * w, 0.99)[1], stats)
    torch.testing.assert_close(beer_penalty(7 * f, 7 * t, r, w / 7, 0.99)[0], penalty)


def test_ends_of_episodes_and_masked_transitions_are_left_out():
    f, t, r, w = random(6)
    open_reward = r.abs() + 50
    terminal = torch.tensor([0, 1, 0, 0, 1, 0])
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    bad = f.detach().clone()
    bad[2] = math.nan
    penalty, stats = beer_penalty(bad, t, open_reward, w, 0.99, terminal=terminal, mask=mask)
    assert (penalty > 0).tolist() == [True, False, False, True, False, True]
    assert stats["open"] == 1
    kept = [0, 3, 5]
    alone, alone_stats = beer_penalty(f[kept], t[kept], open_reward[kept], w, 0.99)
    torch.testing.assert_close(penalty[kept], alone)
    torch.testing.assert_close(stats, alone_stats)


def test_a_value_head_is_penalized_at_the_reward_alone():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 8, generator=g)
    valid = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    both = valid[:, :-1] * valid[:, 1:]
    reward = torch.zeros(2, 5)
    reward[0, 2] = reward[1, 4] = 100.0
    reward[0, 4] = 100.0  # padding
    weight = torch.randn(1, 8, generator=g)
    penalty, _ = beer_penalty(hidden[:, :-1], hidden[:, 1:], reward, weight, 0.99, mask=both)
    assert (penalty > 0).nonzero().tolist() == [[0, 2], [1, 4]]


def test_block_features_make_one_weight_of_a_discrete_critic():
    psi, after = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    rows, action, follow = (
        torch.randn(4, 3, dtype=F64),
        torch.arange(5) % 4,
        torch.tensor([0, 1] * 2 + [1]),
    )
    f, t = action_features(psi, action, 4), action_features(after, follow, 4)
    torch.testing.assert_close(f @ rows.flatten(), (psi * rows[action]).sum(-1))
    cosine = torch.cosine_similarity(f, t, dim=-1)
    expected = torch.cosine_similarity(psi, after, dim=-1) * (action == follow)
    torch.testing.assert_close(cosine, expected)


def test_the_module_averages_and_scales_once_and_mixes_norms_by_default():
    f, t, r, w = random(32)
    g, bias, terminal = 0.5 * t, torch.tensor([2.0]), torch.arange(32) % 2
    given = {"weight": w, "online_next_features": g, "bias": bias, "terminal": terminal}
    x = RegInputs(features=f, next_features=t, rewards=r, extra=given)
    expected = [
        (FeatureRank(0.1), beer_penalty(f, t, r, w, 0.99, g=g, terminal=terminal)),
        (FeatureRank(0.1, skip_terminal=False), beer_penalty(f, t, r, w, 0.99, g=g)),
        (
            FeatureRank(0.1, norm_source="target", skip_terminal=False),
            beer_penalty(f, t, r, w, 0.99),
        ),
        (
            FeatureRank(0.1, 0.9, bias_aware=True, skip_terminal=False),
            beer_penalty(f, t, r, w, 0.9, g=g, bias=bias),
        ),
        (FeatureRank(0.1, kind="dr3"), dr3_penalty(f, t, g=g, terminal=terminal)),
        (FeatureRank(0.1, kind="infer"), infer_penalty(f, t)),
    ]
    losses = [Compose([module]).run_loss(x)[0].detach() for module, _ in expected]
    for loss, (_, (penalty, _)) in zip(losses, expected, strict=True):
        torch.testing.assert_close(loss, 0.1 * penalty.mean())
    assert len({float(loss) for loss in losses}) == len(losses)


def test_a_coefficient_of_zero_needs_no_input():
    module = Compose([FeatureRank(0.0)])
    assert module.requires == frozenset()
    assert module.run_loss(RegInputs())[0] == 0
    with pytest.raises(ValueError, match="did not provide"):
        FeatureRank()(RegInputs())


def test_the_product_of_features_trains_both_networks():
    f, t, _, _ = random(8)
    g = torch.randn(8, 4, dtype=F64, requires_grad=True)
    penalty, _ = dr3_penalty(f, t, g=g, terminal=torch.tensor([1.0] + [0.0] * 7))
    torch.testing.assert_close(penalty[1:], (f * g).sum(-1)[1:])
    penalty.sum().backward()
    torch.testing.assert_close(f.grad[1:], g.detach()[1:])
    torch.testing.assert_close(g.grad[1:], f.detach()[1:])
    assert penalty[0] == 0
    assert not f.grad[0].any()


def test_heads_rest_at_their_scaled_beginning():
    first = torch.randn(8, 10)
    assert torch.equal(infer_penalty(100 * first, first)[0], torch.zeros(8))
    penalty, _ = infer_penalty(100 * first + 2, first)
    torch.testing.assert_close(penalty, torch.full((8,), 4.0), rtol=1e-3, atol=0)


def test_rank_of_identical_rows_is_one_and_of_nothing_zero():
    same = representation_rank(torch.randn(1, 6).expand(50, 6))
    assert (int(same.feature), int(same.effective)) == (1, 1)
    none = representation_rank(torch.zeros(50, 6))
    assert (int(none.feature), int(none.effective)) == (0, 0)


def test_rank_counts_singular_values_above_the_threshold():
    features = 0.02 * math.sqrt(8) * torch.linalg.qr(torch.randn(8, 8, dtype=F64))[0]
    found = representation_rank(features)
    torch.testing.assert_close(found.singular, torch.full((8,), 0.02, dtype=F64))
    assert int(found.feature) == 8
    assert int(representation_rank(features, threshold=0.03).feature) == 0
    assert int(representation_rank(features, threshold=0.03).effective) == 8


def test_the_gram_route_equals_the_decomposition():
    features = torch.randn(100, 12) @ torch.diag(torch.logspace(1, -4, 12))
    exact = torch.linalg.svdvals(features.double()) / 10
    found = representation_rank(features, delta=0.05)
    torch.testing.assert_close(found.singular, exact, rtol=1e-6, atol=1e-7)
    assert int(found.feature) == int((exact > 0.01).sum())
    share = exact.cumsum(0) / exact.sum()
    assert int(found.effective) == int((share >= 0.95).nonzero()[0]) + 1


def test_rank_ignores_masked_rows():
    features = torch.randn(2, 20, 5)
    mask = torch.rand(2, 20) > 0.4
    spoiled = torch.where(mask.unsqueeze(-1), features, math.nan)
    found, alone = representation_rank(spoiled, mask), representation_rank(features[mask])
    torch.testing.assert_close(found.singular, alone.singular)
