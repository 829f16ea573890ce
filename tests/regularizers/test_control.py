import doctest

import pytest
import torch

from offrl.regularizers import AdvantageGatedClone, Compose, RegInputs, control
from offrl.regularizers.functional import gated_clone, imitation, nearest_pair, q_scale


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
    weight = q_scale(q, 2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 0.1]))
    assert not weight.requires_grad


def test_masked_entries_may_hold_anything():
    act = torch.tensor([[0.5, 0.5], [0.1, 0.1]], requires_grad=True)
    anchor = torch.tensor([[0.0, 0.0], [float("nan"), float("inf")]])
    penalty = imitation(act, anchor, torch.tensor([1, 0]))
    penalty.sum().backward()
    assert penalty.tolist() == [0.25, 0.0]
    assert act.grad.tolist() == [[0.5, 0.5], [0.0, 0.0]]


LEVELS = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)  # candidate, data, value


def clone(act, candidate, data, levels=LEVELS, **options):
    return gated_clone(act, candidate, data, *levels.unbind(-1), **options)


def test_the_gate_follows_its_truth_table_with_ties():
    act, candidate, data = torch.zeros(27, 1), torch.ones(27, 1), torch.full((27, 1), 2.0)
    distance, gate, wins = clone(act, candidate, data)
    for row, (c, d, v) in enumerate(LEVELS.tolist()):
        assert bool(wins[row]) == (c >= d)
        assert bool(gate[row]) == (c >= v or d > v)
        expected = (1.0 if c >= d else 4.0) if gate[row] else 0.0
        assert distance[row] == expected
        assert not gate[row] or max(c, d) >= v


def test_closed_gates_give_no_gradient():
    act = torch.randn(5, 2, requires_grad=True)
    q = torch.tensor([[-1.0, -2.0, 0.0]]).expand(5, 3)
    distance, gate, _ = clone(act, torch.randn(5, 2), torch.randn(5, 2), q)
    distance.sum().backward()
    assert not gate.any()
    assert torch.equal(act.grad, torch.zeros(5, 2))


def test_a_data_action_that_wins_everywhere_makes_it_plain_imitation():
    act, data = torch.randn(5, 2), torch.randn(5, 2)
    q = torch.tensor([[0.0, 2.0, 1.0]]).expand(5, 3)
    distance, _, _ = clone(act, torch.randn(5, 2), data, q)
    torch.testing.assert_close(distance, imitation(act, data))


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_flows_through_the_reconstruction_unless_detached(detach):
    act, share = torch.randn(6, 3, requires_grad=True), 0.7
    q = torch.tensor([[2.0, 1.0, 0.0]]).expand(6, 3)
    distance, _, _ = clone(act, share * act, torch.randn(6, 3), q, ref_detach=detach)
    distance.mean().backward()
    power = 1 if detach else 2
    expected = 2 * (1 - share) ** power * act.detach() / (6 * 3)
    torch.testing.assert_close(act.grad, expected)


def test_the_module_scales_once_and_reports_its_gates():
    given = dict(
        act=torch.zeros(27, 1), candidate=torch.ones(27, 1), data_act=2 * torch.ones(27, 1)
    )
    q = dict(zip(("q_candidate", "q_data", "value"), LEVELS.unbind(-1), strict=True))
    out = AdvantageGatedClone(0.5, "action")(RegInputs(extra=given | q))
    distance, gate, wins = clone(*given.values())
    torch.testing.assert_close(out.per_element, 0.5 * distance)
    torch.testing.assert_close(out.metrics["open"], gate.float().mean())
    torch.testing.assert_close(out.metrics["candidate"], wins.float().mean())
    torch.testing.assert_close(out.metrics["distance"], distance[gate].mean())


def test_only_responses_of_positive_advantage_are_cloned():
    logp = torch.randn(3, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    x = RegInputs(logp=logp, advantages=torch.tensor([0.5, 0.0, -1.0]), mask=mask)
    loss, _, _ = Compose([AdvantageGatedClone(2.0)]).run_loss(x)
    torch.testing.assert_close(loss, -2 * logp[0, :2].sum() / 9)
    loss.backward()
    assert torch.equal(logp.grad != 0, (mask * torch.tensor([[1], [0], [0]])).bool())
    with pytest.raises(ValueError, match="form"):
        AdvantageGatedClone(1.0, "policy")
