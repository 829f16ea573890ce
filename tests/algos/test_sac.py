from dataclasses import replace
from functools import partial

import pytest
import torch

from offrl.nets import squashed_log_prob
from tests.algos import cases, engineering
from tests.algos.cases import transitions as batch

SMALL = cases.CASES["sac"].config
make = partial(cases.make, "sac")


def test_log_probability_of_a_squashed_gaussian():
    """Mean 0.3, std 0.5, u = 0.8: -0.144284, worked by hand in two forms."""
    u, mean, std = torch.tensor([0.8]), 0.3, torch.tensor([0.5])
    value = squashed_log_prob(u, (u - mean) / std, std.log())
    assert float(value) == pytest.approx(-0.144284, abs=1e-6)
    direct = torch.distributions.Normal(mean, std).log_prob(u) - (1 - u.tanh().square()).log()
    assert float(value) == pytest.approx(float(direct), abs=1e-6)


def test_log_probabilities_integrate_to_one():
    u = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    std, mean = torch.tensor(0.7, dtype=torch.float64), -0.4
    density = squashed_log_prob(
        u.unsqueeze(-1), ((u - mean) / std).unsqueeze(-1), std.log().expand(40_001, 1)
    ).exp()
    assert float(torch.trapezoid(density, u.tanh())) == pytest.approx(1, abs=1e-6)


def test_alpha_rises_when_entropy_is_below_its_target_and_falls_above():
    algo = make()  # target entropy -2
    for log_prob, sign in ((3.0, 1), (1.0, -1)):
        loss, _ = algo.temperature_loss(torch.full((64,), log_prob))
        (grad,) = torch.autograd.grad(loss, list(algo.temperature.parameters()))
        assert torch.sign(-grad) == sign


def test_target_is_the_smaller_soft_value_and_stops_at_terminal_steps():
    algo, b = engineering.apart(make()), batch()
    state = algo.generator.get_state()
    y, _ = algo.target(b, torch.tensor(0.7))
    algo.generator.set_state(state)
    act, log_prob = algo.actor.sample(b["next_obs"], algo.generator)
    one, two = algo.critics_target(b["next_obs"], act)
    soft = torch.minimum(one, two) - 0.7 * log_prob
    torch.testing.assert_close(y, b["reward"] + 0.99 * (1 - b["terminal"]) * soft)


def test_losses_are_half_the_squared_errors_and_the_smaller_value():
    algo, b = engineering.apart(make()), batch() | {"terminal": torch.ones(64)}
    one, two = algo.critics(b["obs"], b["act"])
    loss, _ = algo.critics_loss(b, torch.ones(()))
    errors = (one - b["reward"]).square() + (two - b["reward"]).square()
    torch.testing.assert_close(loss, errors.mean() / 2)
    log_prob = b["reward"]
    loss, _ = algo.actor_loss(b, b["act"], log_prob, torch.tensor(0.7))
    torch.testing.assert_close(loss, (0.7 * log_prob - torch.minimum(one, two)).mean())


def test_actor_loss_leaves_no_gradient_in_the_critics():
    algo, b = make(), batch()
    act, log_prob = algo.actor.sample(b["obs"], algo.generator)
    loss, _ = algo.actor_loss(b, act, log_prob, torch.ones(()))
    used = torch.autograd.grad(loss, list(algo.critics.parameters()), allow_unused=True)
    assert all(grad is None for grad in used)


def test_targets_move_by_tau_on_every_update():
    engineering.targets_follow(make(), batch(), [("critics_target", "critics")], tau=0.005)


def test_evaluation_is_deterministic_and_exploration_is_not():
    algo, obs = make(), torch.randn(5, 3)
    assert torch.equal(algo.act({"obs": obs})[0], algo.act({"obs": obs})[0])
    now = {"obs": obs, "explore": True, "generator": algo.generator}
    assert not torch.equal(*(algo.act(now)[0] for _ in range(2)))


def test_finds_the_best_arm_of_a_continuous_bandit():
    algo = make(replace(SMALL, lr=3e-3, alpha=0.1), seeds=(2,))
    g = torch.Generator().manual_seed(0)
    obs = torch.zeros(2, 64, 3)
    for _ in range(500):
        act = torch.rand(2, 64, 2, generator=g) * 2 - 1
        reward = 10 * (1 - (act - 0.5).square().sum(-1))
        b = dict(obs=obs, next_obs=obs, act=act, reward=reward, terminal=torch.ones(2, 64))
        algo.update(b, 0)
    best, _ = algo.act({"obs": torch.zeros(2, 1, 3)})
    assert ((best - 0.5).square().sum(-1) < 0.05).all()


def test_value_of_a_two_state_chain_is_found():
    algo = make(replace(SMALL, lr=3e-3, discount=0.5, tau=0.05, alpha=1e-8))
    engineering.finds_the_value_of_a_chain(algo, lambda g: torch.rand(64, 2, generator=g) * 2 - 1)
