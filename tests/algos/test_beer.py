"""BEER and the hosts that take its penalty: TD3 and SAC; DQN in test_dqn.py."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from offrl.algos import ddpg, sac, td3
from offrl.engine.method import Spec
from offrl.regularizers.rank import beer_penalty
from tests.algos import cases, engineering
from tests.algos.cases import transitions as batch

SMALL = cases.CASES["beer"].config
make = partial(cases.make, "beer")
HOSTS = {"td3": (td3.TD3, td3.Config), "sac": (sac.SAC, sac.Config)}


def host(name, weight, seeds=()):
    algo, config = HOSTS[name]
    generator = torch.Generator().manual_seed(0)
    return algo(config(hidden=(32, 32), beer=weight), Spec(obs_dim=3, act_dim=2), generator, seeds)


@pytest.mark.parametrize("seeds", [(), (3,)])
def test_without_its_weight_it_is_ddpg_bit_for_bit(seeds):
    plain = ddpg.DDPG(
        ddpg.Config(hidden=(32, 32)),
        Spec(obs_dim=3, act_dim=2),
        torch.Generator().manual_seed(0),
        seeds,
    )
    other = make(replace(SMALL, beta=0.0), seeds)
    data = lambda step: batch(seeds, seed=step)  # noqa: E731
    engineering.assert_equal(engineering.run(plain, data), engineering.run(other, data))
    changed = engineering.run(make(replace(SMALL, beta=1.0), seeds), data)
    pairs = zip(changed.critics.parameters(), plain.critics.parameters(), strict=True)
    assert not all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("norm_source", ["mixed", "target"])
@pytest.mark.parametrize("bias_aware", [False, True])
def test_the_penalty_is_the_regularizer_s_of_every_seed_s_own_network(norm_source, bias_aware):
    config = replace(SMALL, norm_source=norm_source, bias_aware=bias_aware)
    algo, b = engineering.apart(make(config, (2,))), batch((2,))
    t = algo.critics_target.features(b["next_obs"], algo.actor_target(b["next_obs"]))
    f = algo.critics.features(b["obs"], b["act"])
    found, stats = algo.penalty(f, t, b)
    g = algo.critics.features(b["next_obs"], algo.actor(b["next_obs"]))
    weight, bias = algo.critics.last
    for i in range(2):
        expected, alone = beer_penalty(
            f[i, 0],
            t[i, 0],
            b["reward"][i],
            weight[i, 0],
            0.99,
            g=g[i, 0] if norm_source == "mixed" else None,
            bias=bias[i, 0] if bias_aware else None,
            terminal=b["terminal"][i],
        )
        torch.testing.assert_close(found[i, 0], expected)
        torch.testing.assert_close(stats["open"][i, 0], alone["open"])
        torch.testing.assert_close(stats["cos"][i, 0], alone["cos"])
    assert (found > 0).any()


def test_the_penalty_moves_hidden_layers_of_the_critic_and_nothing_else():
    algo, b = make(), batch()
    _, t = algo.target(b)
    penalty, _ = algo.penalty(algo.critics.features(b["obs"], b["act"]), t, b)
    modules = (algo.critics, algo.actor)
    *hidden, weight, bias = algo.critics.parameters()
    grads = torch.autograd.grad(penalty.sum(), hidden, retain_graph=True)
    assert all(grad.abs().max() > 0 for grad in grads)
    rest = [weight, bias, *algo.actor.parameters()]
    assert all(g is None for g in torch.autograd.grad(penalty.sum(), rest, allow_unused=True))
    targets = (algo.critics_target, algo.actor_target)
    assert not any(p.requires_grad for module in targets for p in module.parameters())
    assert all(p.requires_grad for module in modules for p in module.parameters())


def test_terminal_transitions_are_not_penalized():
    algo, b = make(), batch()
    _, t = algo.target(b)
    penalty, _ = algo.penalty(algo.critics.features(b["obs"], b["act"]), t, b)
    assert torch.equal(penalty[0] * b["terminal"], torch.zeros(64))
    assert (penalty > 0).any()


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_average_the_penalties_of_both_critics(name):
    plain, other, b = host(name, 0.0), host(name, 0.5), batch()
    temperature = (torch.tensor(0.7),) if name == "sac" else ()
    losses = [engineering.apart(algo).critics_loss(b, *temperature)[0] for algo in (plain, other)]
    again, reward = engineering.apart(host(name, 0.5)), b["reward"]
    if name == "sac":
        act, log_prob = again.actor.sample(b["next_obs"], again.generator)
        after, reward = act, reward - 0.99 * 0.7 * log_prob
    else:
        noise = torch.empty(64, 2).normal_(0, 0.2, generator=again.generator).clamp(-0.5, 0.5)
        act = again.actor(b["next_obs"])
        after = (again.actor_target(b["next_obs"]) + noise).clamp(-1, 1)
    f, g = again.critics.features(b["obs"], b["act"]), again.critics.features(b["next_obs"], act)
    t = again.critics_target.features(b["next_obs"], after)
    parts = [
        beer_penalty(
            f[e], t[e], reward, again.critics.last[0][e], 0.99, g=g[e], terminal=b["terminal"]
        )[0].mean()
        for e in range(2)
    ]
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * (parts[0] + parts[1]) / 2)
    assert losses[1] > losses[0]


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_with_the_penalty_are_captured_bit_equal(name):
    engineering.captured_equals_eager(lambda: host(name, 1e-3), batch())


@pytest.mark.parametrize("name", HOSTS)
def test_stacked_hosts_with_the_penalty_end_where_single_ones_do(name, monkeypatch):
    make_host = lambda seeds: host(name, 1e-3, seeds)  # noqa: E731
    engineering.stacked_run_equals_single_runs(make_host, batch, monkeypatch, updates=50)


def test_ranks_are_measured_for_every_seed():
    algo = make(seeds=(2,))
    with torch.no_grad():
        for p in algo.critics.net.layers[-2].parameters():
            p[1] = 0.0  # no features at all
    found = algo.measure(batch((2,), size=200))
    assert found["rank/feature"][0] > 3
    assert found["rank/feature"][1] == found["rank/effective"][1] == 0
