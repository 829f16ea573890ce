from dataclasses import replace
from functools import partial

import torch

from tests.algos import cases
from tests.algos.cases import two_goals as batch
from tests.algos.goal_conditioned import climbs_while_it_imitates, reaches, trained_apart

SMALL = cases.CASES["gciql"].config
make = partial(cases.make, "gciql")


def test_the_value_regresses_on_the_smaller_target_critic():
    algo, b = make(), batch()
    trained_apart(algo.critics_target)
    s, goal = b["obs"], b["value_goal"]
    gap = algo.critics_target(s, goal, b["act"]).min(0).values - algo.values(s, goal)
    weight = torch.where(gap >= 0, 0.9, 0.1)
    torch.testing.assert_close(algo.value_loss(b)[0], (weight * gap.square()).mean())


def test_critics_regress_on_the_online_value_and_stop_at_the_goal():
    algo, b = make(), batch() | {"success": torch.ones(32)}
    q = algo.critics(b["obs"], b["value_goal"], b["act"])
    torch.testing.assert_close(algo.critic_loss(b)[0], q.square().mean(-1).sum())
    b["success"] = torch.zeros(32)
    y = -1 + 0.99 * algo.values(b["next_obs"], b["value_goal"])
    torch.testing.assert_close(algo.critic_loss(b)[0], (q - y).square().mean(-1).sum())


def test_each_loss_moves_its_own_network():
    algo, b = make(), batch()
    nets = {"value": algo.values, "critic": algo.critics, "actor": algo.actor}
    for name in nets:
        loss = getattr(algo, f"{name}_loss")(b)[0]
        assert [other for other, net in nets.items() if reaches(loss, net)] == [name]


def test_the_actor_climbs_the_smaller_critic_while_it_imitates():
    algo = make(dtype=torch.float64, config=replace(SMALL, alpha=0.7))
    trained_apart(algo.critics_target)
    climbs_while_it_imitates(algo, lambda s, a, g: algo.critics(s, g, a).min(0).values)
