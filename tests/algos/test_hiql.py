"""HIQL: what differs from OTA's tests is one value instead of two levels."""

from dataclasses import replace

import pytest
import torch

from offrl.algos import hiql
from offrl.algos.hiql import HIQL, Config, advantage_weight
from offrl.engine.method import Spec
from tests.algos import engineering
from tests.algos.goal_conditioned import (
    learns_to_walk_a_line,
    targets_follow_from_before_the_step,
    trained_apart,
)

SMALL = Config(hidden=(16, 16), batch=32, subgoal_steps=4, rep_dim=5)
OBS, ACT = 3, 2


def make(config=SMALL, seeds=(), dtype=torch.float32):
    algo = HIQL(config, Spec(OBS, ACT), torch.Generator().manual_seed(0), seeds)
    for name in algo.NAMES[:-1]:
        getattr(algo, name).to(dtype)
    return algo


def batch(seeds=(), size=64, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*seeds, size, *shape, generator=g, dtype=dtype)  # noqa: E731
    states = ("obs", "next_obs", "value_goal", "waypoint", "goal", "ahead")
    success = (torch.rand(*seeds, size, generator=g) < 0.2).to(dtype)
    return {name: draw(OBS) for name in states} | {"act": draw(ACT).tanh(), "success": success}


def batches(step):
    return batch(seed=step)


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


@pytest.mark.parametrize("images", [False, True])
def test_targets_move_towards_the_weights_from_before_the_step(images):
    targets_follow_from_before_the_step(hiql, SMALL, images, batch)


def test_same_seed_same_run():
    engineering.same_seed_same_run(make, batches)


def test_resume_is_exact():
    engineering.resume_is_exact(make, batches)


def test_captured_updates_equal_written_ones():
    engineering.captured_equals_written(make, batches, updates=30)


def test_calls_stay_within_budget():
    engineering.calls_stay_within_budget("hiql", make, batches)


def test_updates_never_wait_for_the_device():
    engineering.updates_never_wait_for_the_device(make, batches)


def test_a_stacked_seed_equals_a_single_run():
    stacked, b = make(seeds=(3,)), batch((3,))
    value = stacked.loss(b)[0]
    for i in range(3):
        single = make()
        engineering.copy_seed(stacked, single, i)
        alone = single.loss({name: v[i] for name, v in b.items()})[0]
        torch.testing.assert_close(value[i], alone, rtol=1e-5, atol=1e-5)


def test_learns_to_walk_a_line_to_either_end():
    # half of the goals are any states, which imitation alone does not lead to
    config = replace(SMALL, tau=0.1, discount=0.9, actor_goals=(0.0, 0.5, 0.5))
    learns_to_walk_a_line(hiql, config)
