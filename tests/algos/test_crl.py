import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.algos import cases
from tests.algos.cases import two_goals as batch
from tests.algos.goal_conditioned import climbs_while_it_imitates, reaches

SMALL = cases.CASES["crl"].config
make = partial(cases.make, "crl")


def test_logits_of_zero_cost_log_two():
    algo = make()
    with torch.no_grad():
        algo.psi.net.layers[-1].weight.zero_()
    torch.testing.assert_close(algo.critic_loss(batch())[0], torch.tensor(math.log(2)))


def test_the_positives_are_the_pairs_of_a_row():
    algo, b = make(), batch()
    phi = algo.phi(b["obs"], b["act"])
    psi = algo.psi(b["value_goal"])
    total = 0.0
    for e in range(2):
        for i in range(32):
            for j in range(32):
                logit = phi[e, i] @ psi[e, j] / 4
                total = total + torch.nn.functional.softplus(-logit if i == j else logit)
    torch.testing.assert_close(algo.critic_loss(b)[0], total / (2 * 32 * 32))


def test_each_loss_moves_its_own_networks():
    algo, b = make(), batch()
    critic, actor = algo.critic_loss(b)[0], algo.actor_loss(b)[0]
    assert reaches(critic, algo.phi)
    assert reaches(critic, algo.psi)
    assert not reaches(critic, algo.actor)
    assert reaches(actor, algo.actor)
    assert not reaches(actor, algo.phi)
    assert not reaches(actor, algo.psi)


@pytest.mark.parametrize(("scale", "below"), [(1, False), (40, True)])
def test_the_actor_climbs_the_smaller_logit_above_the_floor_while_it_imitates(scale, below):
    algo, met = make(dtype=torch.float64, config=replace(SMALL, alpha=0.7)), []
    with torch.no_grad():
        algo.psi.net.layers[-1].weight.mul_(scale)

    def critic(s, a, g):
        q = (algo.phi(s, a) * algo.psi(g)).sum(-1).min(0).values / 4  # the root of 16
        met.append(bool((q < -13.9).any()))
        return q.clamp(min=math.log(1e-6))

    climbs_while_it_imitates(algo, critic)
    assert met == [below]
