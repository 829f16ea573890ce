from dataclasses import replace
from functools import partial

import torch

from tests.algos import cases, engineering
from tests.algos.cases import transitions as batch

SMALL = cases.CASES["ddpg"].config
make = partial(cases.make, "ddpg")


def test_truncated_steps_bootstrap_and_terminated_ones_do_not():
    algo, b = engineering.apart(make()), batch()
    y = algo.target(b)
    ended = b["terminal"] == 1
    assert torch.equal(y[ended], b["reward"][ended])
    q = algo.critics_target(b["next_obs"], algo.actor_target(b["next_obs"]))[0]
    torch.testing.assert_close(y[~ended], (b["reward"] + 0.99 * q)[~ended])


def test_targets_move_by_tau_on_every_update():
    pairs = [("actor_target", "actor"), ("critics_target", "critics")]
    engineering.targets_follow(make(), batch(), pairs, tau=0.005)


def test_exploration_adds_clipped_gaussian_noise_and_evaluation_none():
    algo = make()
    obs = torch.zeros(20_000, 3)
    plain, _ = algo.act({"obs": obs})
    stream = torch.Generator().manual_seed(3)
    noisy, _ = algo.act({"obs": obs, "explore": True, "generator": stream})
    assert abs(float((noisy - plain).std()) - 0.1) < 0.003
    assert noisy.abs().max() <= 1


def test_value_of_a_two_state_chain_is_found():
    algo = make(replace(SMALL, lr=3e-3, discount=0.5, tau=0.05))
    engineering.finds_the_value_of_a_chain(algo, lambda g: torch.rand(64, 2, generator=g) * 2 - 1)
