from dataclasses import replace
from functools import partial

import gymnasium
import pytest
import torch

from offrl.algos import ppo
from offrl.algos.ppo import Rollouts
from offrl.data.collector import Collector
from offrl.engine.method import Run, Spec
from offrl.envs.make import factory
from offrl.envs.vector import Vector
from tests.algos import cases, engineering
from tests.algos.cases import minibatch as batch

SMALL = cases.CASES["ppo"].config
make = partial(cases.make, "ppo")
DISCRETE = Spec(3, 2, discrete=True)


def rollouts(name="Pendulum-v1", config=SMALL, seeds=(), envs=2, steps=10_000):
    groups = max(1, len(seeds) and seeds[0])
    made = Vector([factory(name)] * (envs * groups), range(envs * groups))
    algo = make(config, seeds, spec=Spec(made.obs_dim, made.act_dim, discrete=made.discrete))
    return algo, Rollouts(algo, Collector(made, seeds), Run(steps, seeds))


class Line(gymnasium.Env):
    """Counts its steps; pays 2, 0 and 4; ends after three steps."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, terminal):
        self.terminal = terminal

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return torch.zeros(1).numpy(), {}

    def step(self, action):
        self.at += 1
        over, reward = self.at == 3, (2.0, 0.0, 4.0)[self.at - 1]
        obs = torch.full((1,), float(self.at)).numpy()
        return obs, reward, over and self.terminal, over and not self.terminal, {}


@pytest.mark.parametrize(
    ("terminal", "bootstrap", "expected"),
    [
        (False, True, [2.477986, 1.682069, 1.898]),  # V = 0.2 after the last step
        (False, False, [2.302847, 1.49585, 1.7]),
        (True, True, [2.302847, 1.49585, 1.7]),
        (True, False, [2.302847, 1.49585, 1.7]),
    ],
)
def test_advantages_stop_at_ends_and_time_limits_bootstrap(terminal, bootstrap, expected):
    """Two episodes of scaled r = (1, 0, 2), V = (0.5, 0.4, 0.3), discount 0.99, trace 0.95."""
    config = replace(SMALL, rollout=6, batch=6, bootstrap_timeouts=bootstrap, hidden=())
    algo = make(config, spec=Spec(1, 1))
    with torch.no_grad():
        algo.critic.layers[0].weight.fill_(-0.1)
        algo.critic.layers[0].bias.fill_(0.5)
    algo.returns.variance.fill_(4.0)
    algo.returns.count.fill_(1e12)  # so many that they stay as they are
    made = Rollouts(algo, Collector(Vector([lambda: Line(terminal)], [0])), Run(100))
    made.collect()
    rows, wanted = ppo.unpack(made.table, made.columns), torch.tensor(expected)
    torch.testing.assert_close(rows["advantage"], wanted.repeat(2), atol=1e-5, rtol=0)
    wanted = wanted + torch.tensor([0.5, 0.4, 0.3])
    torch.testing.assert_close(rows["return"], wanted.repeat(2), atol=1e-5, rtol=0)


def test_the_loss_of_the_worked_example():
    """Both kinds of advantage at ratios 1.5 and 0.5; values beyond the clip, once within."""
    algo = make(replace(SMALL, hidden=(), entropy=0.1), spec=Spec(1, 1))
    with torch.no_grad():
        algo.actor.net.layers[0].weight.zero_()
        algo.actor.log_std.fill_(0.5)
        algo.critic.layers[0].weight.fill_(1.0)
    b = {
        "obs": torch.tensor([[0.5], [0.5], [-0.5], [0.1]]),
        "act": torch.zeros(4, 1),  # log-probability -1.418939
        "log_prob": -1.418939 - torch.tensor([1.5, 0.5, 0.5, 1.5]).log(),
        "advantage": torch.tensor([1.0, -1.0, 1.0, -1.0]),  # standardized +-0.866025
        "value": torch.zeros(4),
        "return": torch.tensor([1.0, 0.0, -1.0, 0.0]),
    }
    loss, metrics = algo.loss(b)
    expected = {
        "policy/loss": 0.866025 * (-1.2 + 0.8 - 0.5 + 1.5) / 4,
        "value/loss": 0.5 * (0.64 + 0.25 + 0.64 + 0.01) / 4,
        "policy/entropy": 1.918939,
        "policy/kl": 0.143841,
        "policy/clipped": 1.0,
    }
    found = {name: float(x.detach()) for name, x in metrics.items()}
    assert found == pytest.approx(expected, abs=1e-5)
    assert float(loss.detach()) == pytest.approx(0.129904 + 0.5 * 0.1925 - 0.1 * 1.918939, abs=1e-5)


def test_the_joint_gradient_is_clipped_to_its_largest_norm():
    algo, b = make(), batch()
    algo.update(b | {"return": 100 * b["return"]}, 0)
    grads = [p.grad.flatten() for module in (algo.actor, algo.critic) for p in module.parameters()]
    assert float(torch.cat(grads).norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1"])
def test_the_first_minibatch_is_judged_as_it_was_drawn(name):
    algo, made = rollouts(name)
    made.begin()
    made.collect()
    made.shuffle()
    _, metrics = algo.loss(made.sampler()(algo.generator))
    assert float(metrics["policy/kl"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["policy/clipped"]) == 0
    assert float(metrics["policy/loss"]) == pytest.approx(0, abs=1e-5)  # standardized advantages


def test_a_pass_meets_every_row_once_and_the_next_in_another_order():
    algo, made = rollouts(seeds=(2,))
    made.begin()
    made.collect()
    sample, passes = made.sampler(), []
    for _ in range(2):
        made.shuffle()
        parts = [sample(algo.generator)["obs"] for _ in range(made.minibatches)]
        passes.append(torch.cat(parts, 1))
    whole = ppo.unpack(made.table, made.columns)["obs"]
    for seen in passes:
        for i in range(2):
            assert torch.equal(seen[i].sort(0).values, whole[i].sort(0).values)
    assert not torch.equal(*passes)


def test_rewards_are_over_the_deviation_of_discounted_returns():
    _, made = rollouts(config=replace(SMALL, rollout=300, batch=60), envs=1)  # ends at 200
    rows = made.play()
    scaled = made.scaled_reward(rows)
    total, seen = 0.0, []
    for reward, end in zip(rows["reward"][:, 0], rows["timeout"][:, 0], strict=True):
        total = total * 0.99 + float(reward)
        seen.append(total)
        total *= 1 - float(end)
    std = torch.tensor(seen).std(unbiased=False)
    torch.testing.assert_close(scaled[:, 0], rows["reward"][:, 0] / std, rtol=1e-4, atol=1e-5)
    assert float(made.running) == pytest.approx(total, rel=1e-5)


def test_observations_are_standardized_by_the_rollouts_before():
    algo, made = rollouts()
    rollout = lambda: ppo.unpack(made.data.replay.table, made.data.replay.columns)["obs"].clone()  # noqa: E731
    made.begin()
    first = rollout()
    made.collect()
    second = rollout()
    found = ppo.unpack(made.table, made.columns)["obs"]
    expected = (second - first.mean(0)) / first.std(0, unbiased=False)
    torch.testing.assert_close(found, expected.clamp(-10, 10), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(algo.observations.mean[0], torch.cat([first, second]).mean(0))
    assert float(algo.observations.count) == float(algo.returns.count) == 2 * 64


def test_without_normalization_networks_see_plain_observations_and_rewards():
    config = replace(SMALL, rollout=6, batch=6, normalize=False, hidden=())
    algo = make(config, spec=Spec(1, 1))
    made = Rollouts(algo, Collector(Vector([lambda: Line(True)], [0])), Run(18))
    assert (made.iterations, made.first) == (3, 0)  # none is spent on statistics
    torch.nn.init.zeros_(algo.critic.layers[0].weight)
    made.begin()
    made.collect()
    rows = ppo.unpack(made.table, made.columns)
    assert rows["obs"].flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert rows["return"][[2, 5]].tolist() == [4, 4]  # the last reward, as it was paid
    assert algo.estimate({"obs": torch.full((1, 1), 99.0)}, rows["act"][:1]).tolist() == [0]
    assert float(algo.observations.count) == float(algo.returns.count) == 0


def test_statistics_of_parts_are_those_of_the_whole():
    from offrl.nets.mlp import Running

    rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * 4 + 7
    one = Running(3, (), torch.device("cpu"))
    for part in rows.split(30):
        one.add(part)
    torch.testing.assert_close(one.mean[0], rows.mean(0))
    torch.testing.assert_close(one.variance[0], rows.var(0, unbiased=False))


def test_clipping_stops_the_gradient_of_a_ratio_that_went_too_far():
    algo, b = make(replace(SMALL, entropy=0.0, value_weight=0.0)), batch()
    log_prob, _ = algo.actor.judge(b["obs"], b["act"])
    far = b | {"log_prob": log_prob.detach() - 1, "advantage": torch.ones(64)}
    far["advantage"][0] = 0.5  # standardized: all but the first are positive
    grads = torch.autograd.grad(algo.loss(far)[0], list(algo.actor.parameters()))
    only = {name: value[:1] for name, value in far.items()}
    alone, _ = algo.actor.judge(only["obs"], only["act"])
    ratio = (alone - only["log_prob"]).exp()
    advantage = ppo.standardized(far["advantage"])[0]
    expected = torch.autograd.grad(-(advantage * ratio).sum() / 64, list(algo.actor.parameters()))
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_actions_of_both_kinds_have_the_log_probabilities_of_their_distribution():
    obs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    algo = make()
    with torch.no_grad():
        algo.actor.log_std.fill_(0.3)
    normal = torch.distributions.Normal(algo.actor.net(obs), algo.actor.log_std.exp())
    act = torch.ones(5, 2)
    found = algo.actor.judge(obs, act)
    torch.testing.assert_close(found[0], normal.log_prob(act).sum(-1))
    torch.testing.assert_close(found[1], normal.entropy().sum(-1))
    discrete = make(spec=DISCRETE)
    choice = torch.distributions.Categorical(logits=discrete.actor.net(obs))
    act = torch.tensor([0, 1, 1, 0, 1])
    found = discrete.actor.judge(obs, act)
    torch.testing.assert_close(found[0], choice.log_prob(act))
    torch.testing.assert_close(found[1], choice.entropy())


def test_actions_are_drawn_from_their_distribution():
    algo, obs = make(), torch.zeros(40_000, 3)
    with torch.no_grad():
        algo.actor.net.layers[-1].bias.copy_(torch.tensor([[2.0, -1.0]]))
        algo.actor.log_std.copy_(torch.tensor([[0.7, -1.0]]))
    act, _ = algo.act({"obs": obs, "explore": True, "generator": algo.generator})
    torch.testing.assert_close(act.mean(0), torch.tensor([2.0, -1.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(act.std(0), torch.tensor([2.0138, 0.3679]), atol=0, rtol=0.02)
    algo = make(spec=DISCRETE)
    with torch.no_grad():
        algo.actor.net.layers[-1].bias.copy_(torch.tensor([[0.0, 1.0]]))
    act, _ = algo.act({"obs": obs, "explore": True, "generator": algo.generator})
    assert abs(float(act.float().mean()) - 0.7311) < 0.01


def test_the_learning_rate_falls_linearly_to_zero():
    algo, made = rollouts(steps=64 * 5)  # four iterations after the first rollout
    rates = []
    for _ in range(4):
        made.collect()
        rates.append(float(algo.opt.param_groups[0]["lr"]))
    assert rates == pytest.approx([3e-4, 2.25e-4, 1.5e-4, 0.75e-4])


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="batch=48 does not divide a rollout of 64"):
        rollouts(config=replace(SMALL, batch=48))
    with pytest.raises(ValueError, match="a rollout has 64 steps"):
        rollouts(steps=100)


def test_captured_updates_with_discrete_actions_equal_eager_ones():
    engineering.captured_equals_eager(partial(make, spec=DISCRETE), batch(discrete=True))
