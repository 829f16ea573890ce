"""HIQL: what differs from OTA's tests is one value instead of two levels."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from offrl.algos.hiql import advantage_weight
from tests.algos import cases
from tests.algos.cases import subgoals as batch
from tests.algos.goal_conditioned import trained_apart

SMALL = cases.CASES["hiql"].config
make = partial(cases.make, "hiql")


@pytest.mark.parametrize("gamma", [0.9, 0.99])
def test_the_value_of_a_chain_comes_to_its_closed_form(gamma):
    algo = make(replace(SMALL, expectile=0.5, discount=gamma))
    i = torch.arange(41)
    table = torch.zeros(2, 41, dtype=torch.float64)
    for _ in range(45):
        now = table.clone().requires_grad_()
        following = table[:, (i + 1).clamp(max=40)]
        loss, _ = algo.value_loss(now, following, table, (i == 40).double())
        table = table - 41 * torch.autograd.grad(loss, now)[0]
    exact = -(1 - gamma ** (40 - i).double()) / (1 - gamma)
    assert (table - exact).abs().max() < 1e-10


@pytest.mark.parametrize("taught", [False, True])
def test_joined_passes_have_the_value_and_gradient_of_the_terms(taught):
    config = replace(SMALL, low_alpha=2.0, high_alpha=4.0, low_actor_rep_grad=taught)
    algo, b = make(config, dtype=torch.float64), batch(dtype=torch.float64)
    trained_apart(algo.values_target)
    s, g, w = b["obs"], b["goal"], b["waypoint"]

    def heads(net, obs, goal):
        return net(((obs, algo.rep(obs, goal)),))[0]

    with torch.no_grad():
        later = heads(algo.values_target, b["next_obs"], b["value_goal"])
        here = heads(algo.values_target, s, b["value_goal"])
        low_gain = (heads(algo.values, b["next_obs"], w) - heads(algo.values, s, w)).mean(0)
        high_gain = (heads(algo.values, b["ahead"], g) - heads(algo.values, s, g)).mean(0)
        subgoal = algo.rep(s, b["ahead"])
    z = algo.rep(s, w) if taught else algo.rep(s, w).detach()
    reward, discount = b["success"] - 1, 0.99 * (1 - b["success"])
    error = reward + discount * later.min(0).values - here.mean(0)
    weight = (error >= 0) * 0.7 + (error < 0) * 0.3
    gap = reward + discount * later - heads(algo.values, s, b["value_goal"])
    value = (weight * gap.square()).mean(-1).sum()
    low = -((2 * low_gain).exp().clamp(max=100) * algo.low.log_prob(s, z, b["act"])).mean()
    high = -((4 * high_gain).exp().clamp(max=100) * algo.high.log_prob(s, g, subgoal)).mean()
    joined, terms = algo.loss(b)[0], value + low + high
    torch.testing.assert_close(joined, terms, rtol=1e-12, atol=1e-12)
    nets = [p for net in (algo.rep, algo.values, algo.high, algo.low) for p in net.parameters()]
    pairs = zip(*(torch.autograd.grad(loss, nets) for loss in (joined, terms)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_weights_grow_with_the_advantage_up_to_a_hundred():
    gain = torch.linspace(-5, 5, 101)
    weight = advantage_weight(3.0, torch.stack([gain - 1, gain + 1]))  # the mean of two heads
    torch.testing.assert_close(weight, (3 * gain).exp().clamp(max=100.0))
    assert bool((weight.diff() >= 0).all())
    assert bool((weight[gain < 1.5].diff() > 0).all())
    assert torch.equal(advantage_weight(0.0, gain.unsqueeze(0)), torch.ones(101))


def test_the_representation_learns_from_the_value_alone():
    algo = make()
    _, metrics = algo.loss(batch())
    params = list(algo.rep.parameters())
    for name, reached in (("value/loss", True), ("low/loss", False), ("high/loss", False)):
        grads = torch.autograd.grad(metrics[name], params, allow_unused=True, retain_graph=True)
        assert all((g is not None) == reached for g in grads)
