import doctest

import pytest
import torch

from offrl.regularizers import control
from offrl.regularizers.functional import imitation, nearest_pair, normalized_trust


def test_docstring_examples():
    assert doctest.testmod(control).failed == 0


def test_imitation_gradient_is_by_the_formula_and_spares_the_anchor():
    act, anchor = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    imitation(act, anchor).mean().backward()
    torch.testing.assert_close(act.grad, 2 * (act - anchor).detach() / (5 * 3))
    assert anchor.grad is None


def test_masked_entries_count_nothing():
    act = torch.randn(4, 3, requires_grad=True)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    imitation(act, torch.zeros(4, 3), mask).sum().backward()
    assert torch.equal(act.grad[1::2], torch.zeros(2, 3))
    assert (act.grad[::2] != 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_nearest_pair_equals_a_loop(beta):
    g = torch.Generator().manual_seed(0)
    obs, act = torch.randn(20, 4, generator=g), torch.randn(20, 2, generator=g)
    table = torch.randn(50, 4, generator=g), torch.randn(50, 2, generator=g)
    found = nearest_pair(obs, act, *table, beta, block=16)
    for i in range(20):
        distance = (beta * (obs[i] - table[0]).double()).square().sum(-1)
        distance += (act[i] - table[1]).double().square().sum(-1)
        assert int(distance.argmin()) == int(found[i])


def test_ties_go_to_the_lowest_row():
    zero = torch.zeros(10, 2)
    assert torch.equal(nearest_pair(zero[:3], zero[:3], zero, zero, 1.0, block=4), torch.zeros(3))


def test_trust_is_per_seed_and_detached():
    q = torch.tensor([[1.0, -3.0], [10.0, 30.0]], requires_grad=True)
    weight = normalized_trust(q, 2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 0.1]))
    assert not weight.requires_grad
