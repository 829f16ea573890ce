from dataclasses import replace
from functools import partial

import pytest
import torch

from offrl.algos.dqn import METHOD
from offrl.engine.method import Run, Task
from offrl.engine.state import load_state, state_of
from offrl.envs.make import factory
from offrl.envs.vector import Vector
from tests.algos import cases, engineering
from tests.algos.cases import discrete as batch

SMALL = cases.CASES["dqn"].config
make = partial(cases.make, "dqn")


def test_target_takes_the_largest_value_and_stops_at_terminal_steps():
    algo, b = engineering.apart(make(replace(SMALL, double=False))), batch()
    y, act, _ = algo.target(b)
    q = algo.target_network(b["next_obs"])
    torch.testing.assert_close(y, b["reward"] + 0.99 * (1 - b["terminal"]) * q.amax(-1))
    assert torch.equal(act, q.argmax(-1))


def test_a_double_target_values_the_online_network_s_choice():
    algo, b = engineering.apart(make()), batch()
    y, act, _ = algo.target(b)
    choice, q = algo.network(b["next_obs"]).argmax(-1), algo.target_network(b["next_obs"])
    assert torch.equal(act, choice)
    expected = b["reward"] + 0.99 * (1 - b["terminal"]) * q[range(64), choice]
    torch.testing.assert_close(y, expected)


def test_epsilon_falls_linearly_with_the_steps_taken():
    algo = make(replace(SMALL, steps=1000, warmup=0))
    found = []
    for taken in (0, 250, 500, 1000):
        algo.taken.fill_(taken)
        found.append(algo.epsilon())
    assert found == pytest.approx([1.0, 0.525, 0.05, 0.05])


def test_exploring_actions_are_greedy_but_for_the_random_share():
    algo = make(replace(SMALL, steps=1000, warmup=500))  # epsilon 0.05, a quarter of it greedy
    obs = torch.zeros(40_000, 3)
    best, _ = algo.act({"obs": obs})
    act, _ = algo.act({"obs": obs, "explore": True, "generator": algo.generator})
    assert abs(float((act != best).float().mean()) - 0.75 * 0.05) < 0.004


def test_the_target_network_becomes_the_network():
    algo = make()
    algo.update(batch(), 0)
    assert not torch.equal(algo.network(batch()["obs"]), algo.target_network(batch()["obs"]))
    algo.renew_target()
    assert torch.equal(algo.network(batch()["obs"]), algo.target_network(batch()["obs"]))


def test_the_loss_is_the_squared_error_and_the_weighted_penalty():
    """The penalty of features in the blocks of their actions, written out; none between blocks."""
    plain, algo = (engineering.apart(make(replace(SMALL, beer=beer))) for beer in (0.0, 0.5))
    b = batch()
    choice = algo.network(b["next_obs"]).argmax(-1)
    b["act"][::2] = choice[::2]
    same = b["act"] == choice
    y, _, _ = plain.target(b)
    error = (plain.network(b["obs"])[range(64), b["act"]] - y).square().mean()
    torch.testing.assert_close(plain.loss(b)[0], error)
    f, g = (algo.network.features(b[name]) for name in ("obs", "next_obs"))
    t = algo.target_network.features(b["next_obs"])
    weight, (af, ag, at) = algo.network.layers[-1].weight, (x.norm(dim=-1) for x in (f, g, t))
    bound = af**2 + (0.99 * ag) ** 2 - b["reward"] ** 2 / weight.square().sum()
    excess = ((f * t).sum(-1) / (af * at) - bound / (2 * 0.99 * af * at)).clamp(min=0)
    penalty = excess * same * (1 - b["terminal"])
    loss, metrics = algo.loss(b)
    torch.testing.assert_close(loss - error, 0.5 * penalty.mean())
    counted = same * (1 - b["terminal"])
    torch.testing.assert_close(metrics["beer/open"], (penalty > 0).sum() / counted.sum())


def test_the_penalty_reaches_the_features_and_not_the_last_layer():
    algo, b = make(replace(SMALL, beer=1.0)), batch()
    plain = make(replace(SMALL, beer=0.0))
    params = list(algo.network.parameters()), list(plain.network.parameters())
    with_, without = (
        torch.autograd.grad(a.loss(b)[0], p) for a, p in zip((algo, plain), params, strict=True)
    )
    same = [torch.allclose(x, y, atol=1e-7) for x, y in zip(with_, without, strict=True)]
    assert same[-2:] == [True, True]
    assert not any(same[:2])


def test_value_of_a_two_state_chain_is_found():
    algo = make(replace(SMALL, lr=3e-3, discount=0.5, beer=0.0))
    renew = lambda step: step % 20 == 0 and algo.renew_target()  # noqa: E731
    draw = lambda g: torch.randint(4, (64,), generator=g)  # noqa: E731
    engineering.finds_the_value_of_a_chain(algo, draw, renew)


def test_a_saved_run_remembers_its_steps():
    algo, other = make(), make()
    algo.taken += 123
    load_state(other, state_of(algo))
    assert int(other.taken) == SMALL.warmup + 123


def test_a_stage_takes_ten_steps_per_update_and_renews_the_target_every_five_hundred():
    algo, stepped = make(), []
    task = Task(cases.CASES["dqn"].spec, envs=lambda: Vector([factory("CartPole-v1")], [0]))
    (stage,) = METHOD.stages(algo, task, Run(500_000))
    stage.parts["collector"].step_policy = stepped.append
    (every, collect), (period, renew) = stage.between
    collect()
    assert (every, len(stepped), int(algo.taken)) == (1, 10, 10_010)
    assert stage.clock(period) - stage.clock(0) == 500
    assert renew == algo.renew_target
    assert stage.clock(stage.steps) == 500_000
