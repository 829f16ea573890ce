from dataclasses import replace

import pytest
import torch

from offrl.algos import gcivl
from tests.algos.goal_conditioned import (
    batch,
    learns_to_walk_a_line,
    maker,
    passes_engineering,
    passes_with_images,
    reaches,
    targets_follow_from_before_the_step,
    trained_apart,
)

SMALL = gcivl.Config(hidden=(16, 16), batch=16)
make = maker(gcivl, SMALL)


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


@pytest.mark.parametrize("images", [False, True])
def test_targets_move_towards_the_weights_from_before_the_step(images):
    targets_follow_from_before_the_step(gcivl, SMALL, images)


def test_learns_to_walk_a_line_to_either_end():
    # half of the goals are any states, which imitation alone does not lead to
    config = replace(SMALL, tau=0.1, discount=0.9, actor_goals=(0.0, 0.5, 0.5))
    learns_to_walk_a_line(gcivl, config)


def test_engineering():
    passes_engineering(gcivl, make, ["value_loss", "actor_loss"])


def test_images_go_through_encoders_of_their_own():
    passes_with_images(gcivl, SMALL, {"value_loss": ["values"], "actor_loss": ["actor"]})
