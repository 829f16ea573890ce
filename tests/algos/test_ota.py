"""OTA against its closed forms, its gradients' routes and its formulas term by term."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.harness.peers import per_term
from offrl.algos.ota import METHOD
from offrl.engine.method import Run, Spec, Task
from offrl.nets.goal import normal_log_prob
from tests.algos import cases, engineering
from tests.algos.cases import ACT, OBS
from tests.algos.cases import options as batch
from tests.algos.goal_conditioned import PIXELS, reaches, slopes, trained_apart, with_images
from tests.data.trajectories import toy

SMALL = cases.CASES["ota"].config
make = partial(cases.make, "ota")


# --- the values ----------------------------------------------------------------------------------


def closed_low(d, gamma):
    return -(1 - gamma**d) / (1 - gamma)


def closed_high(d, n, gamma):
    return -(1 - gamma ** max(math.ceil(d / n) - 1, 0)) / (1 - gamma)


def fixed_point(n, gamma, length=41):
    """Tables (2, E, length) of both levels, moved by the loss's own gradient until they rest."""
    algo = make(replace(SMALL, expectile=0.5, discount=gamma))
    i = torch.arange(length)
    end = (i + n).clamp(max=length - 1)
    success = torch.stack([i == length - 1, end == length - 1]).double()
    table = torch.zeros(2, 2, length, dtype=torch.float64)
    for _ in range(length + 5):
        now = table.clone().requires_grad_()
        following = torch.stack([table[0][:, (i + 1).clamp(max=length - 1)], table[1][:, end]])
        loss, _ = algo.value_loss(now, following, table, success)
        (slope,) = torch.autograd.grad(loss, now)
        table = table - length * slope  # half a squared error: one step is onto the target
    return table


@pytest.mark.parametrize("gamma", [0.9, 0.99])
@pytest.mark.parametrize("n", [1, 5, 7])
def test_values_of_a_chain_come_to_their_closed_forms(n, gamma):
    low, high = fixed_point(n, gamma)
    for i in range(41):
        d = 40 - i
        assert abs(low[:, i] - closed_low(d, gamma)).max() < 1e-10
        assert abs(high[:, i] - closed_high(d, n, gamma)).max() < 1e-10


@pytest.mark.parametrize(("n", "k"), [(1, 3), (5, 7), (7, 7), (5, 3)])
def test_the_advantage_of_going_on_is_positive_where_the_option_count_changes(n, k):
    high = fixed_point(n, 0.99)[1].mean(0)
    for i in range(40 - k):
        advantage = high[i + k] - high[i]
        fewer = math.ceil((40 - i - k) / n) < math.ceil((40 - i) / n)
        assert (advantage > 1e-9) if fewer else (abs(advantage) < 1e-9)


def test_half_an_expectile_is_half_the_squared_error():
    algo = make(replace(SMALL, expectile=0.5, discount=0.5))
    now, later, here = (
        torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    success = torch.zeros(2, 64)
    loss, _ = algo.value_loss(now, later, here, success)
    q = -1 + 0.5 * later
    torch.testing.assert_close(loss, 0.5 * (q - now).square().mean(-1).sum())


def test_an_advantage_of_zero_has_the_weight_of_a_positive_one():
    algo = make(replace(SMALL, expectile=0.7))
    zero, one = torch.zeros(2, 2, 1), torch.ones(2, 2, 1)
    success = torch.ones(2, 1)  # r = 0, no next value: A = 0 - mean of the target heads
    for here, weight in ((zero, 0.7), (one, 0.3), (-one, 0.7)):
        loss, _ = algo.value_loss(one, zero, here, success)
        torch.testing.assert_close(loss, torch.tensor(weight * 4))


def test_success_is_worth_zero_and_has_no_next_value():
    algo, success = make(), torch.ones(2, 64)
    now, wild = torch.zeros(2, 2, 64), torch.full((2, 2, 64), 1e6)
    loss, _ = algo.value_loss(now, wild, now, success)
    assert float(loss) == 0.0


# --- who learns from what ------------------------------------------------------------------------


def test_the_representation_learns_from_both_values_and_from_no_actor():
    algo = make()
    _, metrics = algo.loss(batch())
    for name in ("value/low_loss", "value/high_loss"):
        assert reaches(metrics[name], algo.rep)
        assert not reaches(metrics[name], algo.high)
        assert not reaches(metrics[name], algo.low)
    for name, actor, other in (
        ("low/loss", algo.low, algo.high),
        ("high/loss", algo.high, algo.low),
    ):
        assert reaches(metrics[name], actor)
        for module in (algo.rep, algo.values, other):
            assert not reaches(metrics[name], module)


def test_the_low_actor_teaches_the_representation_if_it_is_asked_to():
    algo = make(replace(SMALL, low_actor_rep_grad=True))
    _, metrics = algo.loss(batch())
    assert reaches(metrics["low/loss"], algo.rep)
    assert not reaches(metrics["high/loss"], algo.rep)
    assert not reaches(metrics["low/loss"], algo.values)


def test_a_level_moves_its_own_heads_only():
    algo = make()
    _, metrics = algo.loss(batch())
    for name, level in (("value/low_loss", 0), ("value/high_loss", 1)):
        for grad in torch.autograd.grad(
            metrics[name], list(algo.values.parameters()), retain_graph=True
        ):
            assert grad[1 - level].abs().max() == 0
            assert grad[level].abs().max() > 0


def test_targets_carry_no_gradient_and_no_representation():
    algo = make()
    loss, _ = algo.loss(batch())
    assert not any(p.requires_grad for p in algo.values_target.parameters())
    assert slopes(loss, algo.values).count(None) == 0
    names = {name for name, _ in algo.values_target.named_parameters()}
    assert names == {name for name, _ in algo.values.named_parameters()}
    assert not any("rep" in name for name in names)


def test_target_values_follow_the_online_representation():
    algo, b, seen = make(), batch(), []
    target = algo.values_target.net.forward
    algo.values_target.net.forward = lambda x: seen.append(x) or target(x)
    for _ in range(2):
        algo.loss(b)
        with torch.no_grad():
            for p in algo.rep.parameters():
                p.add_(0.1)
    first, second = (x[..., OBS:] for x in seen)  # what the targets see behind the state is phi
    assert float((first - second).abs().min(-1).values.max()) > 0.01


# --- policies and representation -----------------------------------------------------------------


def test_representations_have_the_length_of_their_root_dimension():
    algo, b = make(), batch()
    for scale in (1e-3, 1.0, 1e3):
        z = algo.rep(scale * b["obs"], scale * b["goal"])
        torch.testing.assert_close(z.norm(dim=-1), torch.full((64,), 5**0.5))


def test_acting_does_not_depend_on_the_length_of_the_named_subgoal():
    algo, b = make(), batch()
    now = {"obs": b["obs"], "goal": b["goal"]}
    act, _ = algo.act(now)
    with torch.no_grad():
        last = algo.high.net.layers[-1]
        last.weight.mul_(7)
        last.bias.mul_(7)
    torch.testing.assert_close(algo.act(now)[0], act)
    assert torch.equal(algo.act(now)[0], algo.act(now)[0])
    stream = torch.Generator().manual_seed(0)
    explored = now | {"explore": True, "generator": stream}
    noisy = algo.act(explored)[0]
    assert not torch.equal(noisy, algo.act(explored)[0])
    assert noisy.abs().max() <= 1


def test_temperatures_of_zero_clone_actions_and_subgoals():
    algo, b = make(replace(SMALL, low_alpha=0.0, high_alpha=0.0)), batch()
    _, metrics = algo.loss(b)
    assert float(metrics["low/weight"]) == float(metrics["high/weight"]) == 1.0
    z, subgoal = algo.rep(b["obs"], b["waypoint"]), algo.rep(b["obs"], b["ahead"])
    torch.testing.assert_close(
        metrics["low/loss"], -algo.low.log_prob(b["obs"], z, b["act"]).mean()
    )
    torch.testing.assert_close(
        metrics["high/loss"], -algo.high.log_prob(b["obs"], b["goal"], subgoal).mean()
    )


def test_weights_grow_with_the_gain_of_their_level_up_to_a_hundred():
    algo = make(replace(SMALL, low_alpha=10.0, high_alpha=15.0), dtype=torch.float64)
    b = batch(dtype=torch.float64)
    _, metrics = algo.loss(b)
    s, w, g = b["obs"], b["waypoint"], b["goal"]
    z, subgoal = algo.rep(s, w), algo.rep(s, b["ahead"])

    def value(level, obs, goal):
        pair = (obs, algo.rep(obs, goal))
        return algo.values((pair,), (pair,))[0][level].mean(0)

    for name, gain, log_prob in (
        (
            "low",
            10 * (value(0, b["next_obs"], w) - value(0, s, w)),
            algo.low.log_prob(s, z, b["act"]),
        ),
        (
            "high",
            15 * (value(1, b["ahead"], g) - value(1, s, g)),
            algo.high.log_prob(s, g, subgoal),
        ),
    ):
        weight = gain.exp().clamp(max=100)
        assert 0.1 < float((weight == 100).double().mean()) < 0.9
        torch.testing.assert_close(metrics[f"{name}/weight"], weight.mean())
        torch.testing.assert_close(metrics[f"{name}/loss"], -(weight * log_prob).mean())


def test_the_log_density_is_that_of_a_unit_gaussian():
    value, mean = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])
    normal = torch.distributions.Normal(mean, 1.0)
    torch.testing.assert_close(normal_log_prob(value, mean), normal.log_prob(value).sum(-1))


# --- the joined passes ---------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_joined_passes_have_the_value_and_gradient_of_the_terms(shared):
    algo, b = make(dtype=torch.float64), batch(dtype=torch.float64)
    trained_apart(algo.values_target)
    joined, terms = algo.loss(b)[0], per_term.loss(algo, b, shared)
    torch.testing.assert_close(joined, terms, rtol=1e-12, atol=1e-12)
    nets = [
        p for name in ("rep", "values", "high", "low") for p in getattr(algo, name).parameters()
    ]
    pairs = zip(*(torch.autograd.grad(loss, nets) for loss in (joined, terms)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_ten_joined_updates_equal_ten_updates_term_by_term():
    joined, terms = make(dtype=torch.float64), make(dtype=torch.float64)
    for step in range(10):
        joined.update(batch(seed=step, dtype=torch.float64), 0)
        per_term.update(terms, batch(seed=step, dtype=torch.float64), step)
    left, right = engineering.tensors(joined), engineering.tensors(terms)
    for name, value in left.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, right[name], rtol=1e-10, atol=1e-10)


class Passes:
    """Rows that a network was given, in batches of `size`."""

    def __init__(self, net, size):
        self.count, forward = 0.0, net.forward

        def counted(x):
            out = forward(x)
            self.count += out.shape[:-1].numel() / size
            return out

        net.forward = counted


def test_an_update_makes_nine_passes_of_phi_and_twenty_of_heads():
    algo = make()
    phi = Passes(algo.rep.net, 64)
    online, target = Passes(algo.values.net, 64), Passes(algo.values_target.net, 64)
    algo.update(batch(), 0)
    assert (phi.count, online.count, target.count) == (9, 12, 8)


# --- goals ---------------------------------------------------------------------------------------


def test_the_sampler_tells_successes_by_index():
    spec = Spec(2, 1)
    algo = make(spec=spec)
    (stage,) = METHOD.stages(algo, Task(spec, toy((5, 3, 9))), Run(10))
    found = stage.start()(torch.Generator().manual_seed(1))
    assert torch.equal(found["low_success"], (found["low_goal"] == found["obs"]).all(-1).float())
    assert torch.equal(
        found["high_success"], (found["high_goal"] == found["option_end"]).all(-1).float()
    )
    assert torch.equal(found["next_obs"][:, 0], found["obs"][:, 0] + 1)
    torch.testing.assert_close(found["act"][:, 0], found["obs"][:, 0] / 100)
    assert 0 < float(found["high_success"].mean()) < 1


def test_goals_may_be_a_part_of_the_observation():
    algo = make(replace(SMALL, goal_columns=(2, 0)))
    b = batch()
    changed = b | {name: b[name].clone() for name in ("low_goal", "high_goal", "goal", "waypoint")}
    for name in ("low_goal", "high_goal", "goal", "waypoint"):
        changed[name][:, 1] += 5
    assert torch.equal(algo.loss(b)[0], algo.loss(changed)[0])
    now = {"obs": b["obs"], "goal": b["goal"]}
    assert torch.equal(algo.act(now)[0], algo.act(now | {"goal": changed["goal"]})[0])


def test_columns_outside_of_the_observation_are_refused():
    with pytest.raises(ValueError, match=r"goal_columns=\[0, 3\] must lie in \[0, 3\)"):
        make(replace(SMALL, goal_columns=(0, 3)))


# --- images --------------------------------------------------------------------------------------


def test_every_network_sees_images_through_an_encoder_of_its_own():
    config = replace(SMALL, images=True, low_actor_rep_grad=True)
    algo, b = make(config, spec=Spec(PIXELS, ACT)), with_images(batch(size=4))
    _, metrics = algo.loss(b)
    low, high = algo.values.sights
    for name, seen, unseen in (
        ("value/low_loss", (algo.rep, low), (high, algo.low, algo.high)),
        ("value/high_loss", (algo.rep, high), (low, algo.low, algo.high)),
        ("low/loss", (algo.rep, algo.low.sight), (low, high, algo.high)),
        ("high/loss", (algo.high.sight,), (low, high, algo.rep, algo.low)),
    ):
        assert all(reaches(metrics[name], module) for module in seen)
        assert not any(reaches(metrics[name], module) for module in unseen)
