from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch

from tests.algos import cases, engineering
from tests.algos.cases import transitions as batch

SMALL = cases.CASES["td3"].config
make = partial(cases.make, "td3")


def test_truncated_steps_bootstrap_and_terminated_ones_do_not():
    algo, b = engineering.apart(make(replace(SMALL, noise=0.0))), batch()
    y, _ = algo.target(b)
    ended = b["terminal"] == 1
    assert torch.equal(y[ended], b["reward"][ended])
    act = algo.actor_target(b["next_obs"])
    q = algo.critics_target(b["next_obs"], act).amin(0)
    torch.testing.assert_close(y[~ended], (b["reward"] + 0.99 * q)[~ended])


def test_target_noise_is_clipped_at_half_the_range_and_the_action_at_the_range():
    algo, b, seen = engineering.apart(make(replace(SMALL, noise=1e6))), batch(), []
    algo.critics_target.features = lambda obs, act: seen.append(act) or torch.zeros(2, 64, 32)
    algo.target(b)
    plain = algo.actor_target(b["next_obs"])
    up, down = (plain + 0.5).clamp(max=1), (plain - 0.5).clamp(min=-1)
    higher = seen[0] > plain
    torch.testing.assert_close(seen[0], torch.where(higher, up, down))
    assert 0.4 < float(higher.float().mean()) < 0.6
    assert (plain.abs() > 0.5).any()


def test_targets_are_bit_identical_after_an_odd_update():
    algo = make()
    before = deepcopy(algo.actor_target.state_dict()) | deepcopy(algo.critics_target.state_dict())
    algo.update(batch(), 0)
    after = algo.actor_target.state_dict() | algo.critics_target.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_targets_move_by_tau_on_the_second_update():
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
    assert torch.equal(plain, algo.act({"obs": obs})[0])


def test_value_of_a_two_state_chain_is_found():
    algo = make(replace(SMALL, lr=3e-3, discount=0.5, tau=0.05))
    engineering.finds_the_value_of_a_chain(algo, lambda g: torch.rand(64, 2, generator=g) * 2 - 1)
