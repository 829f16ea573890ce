from functools import partial

import torch

from tests.algos import cases
from tests.algos.cases import two_goals as batch
from tests.algos.goal_conditioned import reaches, trained_apart

make = partial(cases.make, "gcivl")


def test_joined_passes_equal_each_term_by_itself():
    algo, b = make(dtype=torch.float64), batch(dtype=torch.float64)
    trained_apart(algo.values_target)
    online, target, s, after = algo.values, algo.values_target, b["obs"], b["next_obs"]
    goal = b["value_goal"]
    reward, discount = b["success"] - 1, 0.99 * (1 - b["success"])
    later = target(after, goal)
    error = reward + discount * later.min(0).values - target(s, goal).mean(0)
    weight = torch.where(error >= 0, 0.9, 0.1)
    gap = reward + discount * later - online(s, goal)
    torch.testing.assert_close(algo.value_loss(b)[0], (weight * gap.square()).mean(-1).sum())
    gain = (online(after, b["goal"]) - online(s, b["goal"])).mean(0)
    weight = (10 * gain).exp().clamp(max=100).detach()
    assert 0.1 < float((weight == 100).double().mean()) < 0.9
    log_prob = algo.actor.log_prob(s, b["goal"], b["act"])
    torch.testing.assert_close(algo.actor_loss(b)[0], -(weight * log_prob).mean())


def test_each_loss_moves_its_own_network():
    algo, b = make(), batch()
    value, actor = algo.value_loss(b)[0], algo.actor_loss(b)[0]
    assert reaches(value, algo.values)
    assert not reaches(value, algo.actor)
    assert reaches(actor, algo.actor)
    assert not reaches(actor, algo.values)
