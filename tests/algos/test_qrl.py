from dataclasses import replace
from functools import partial

import torch

from tests.algos import cases
from tests.algos.cases import two_goals as batch
from tests.algos.goal_conditioned import climbs_while_it_imitates, reaches

SMALL = cases.CASES["qrl"].config
make = partial(cases.make, "qrl")


def test_each_loss_moves_its_own_networks():
    algo, b = make(), batch()
    value, actor = algo.value_loss(b)[0], algo.actor_loss(b)[0]
    assert all(reaches(value, net) for net in (algo.metric, algo.model, algo.multiplier))
    assert not reaches(value, algo.actor)
    assert reaches(actor, algo.actor)
    assert not any(reaches(actor, net) for net in (algo.metric, algo.model, algo.multiplier))


def test_the_multiplier_rises_while_one_step_is_longer_than_one():
    algo, b = make(), batch()
    for scale, broken in ((100.0, True), (1e-4, False)):
        with torch.no_grad():
            algo.metric.net.layers[-1].weight.mul_(scale)
        loss, metrics = algo.value_loss(b)
        (slope,) = torch.autograd.grad(loss, [algo.multiplier["log"]])
        violation = metrics["value/violation"].detach()
        torch.testing.assert_close(slope, 0.05 - violation)
        assert (float(slope) < 0) == broken  # the step goes against it


def test_losses_are_those_of_the_formulas():
    algo, b = make(), batch()
    z, after, goal = (algo.metric(b[name]) for name in ("obs", "next_obs", "value_goal"))
    d = algo.metric.distance
    spread = (100 * torch.nn.functional.softplus(5 - d(z, goal) / 100)).mean()
    violation = (d(z, after) - 1).clamp(min=0).square().mean()
    predicted = z + algo.model(torch.cat([z, b["act"]], -1))
    model = (d(after, predicted) + d(predicted, after)).mean() / 2
    expected = spread + violation + (0.05 - violation) + model  # the multiplier is 1 at first
    torch.testing.assert_close(algo.value_loss(b)[0], expected, rtol=1e-5, atol=1e-4)


def test_the_actor_climbs_to_where_the_goal_is_near_while_it_imitates():
    algo = make(dtype=torch.float64, config=replace(SMALL, alpha=0.7))

    def critic(s, a, g):
        z = algo.metric(s)
        return -algo.metric.distance(z + algo.model(torch.cat([z, a], -1)), algo.metric(g))

    climbs_while_it_imitates(algo, critic)
