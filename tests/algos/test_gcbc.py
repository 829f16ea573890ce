from dataclasses import replace

import torch

from offrl.algos import gcbc
from offrl.engine.method import Run, Spec
from tests.algos.goal_conditioned import (
    batch,
    learns_to_walk_a_line,
    maker,
    passes_engineering,
    passes_with_images,
)
from tests.data.trajectories import toy

SMALL = gcbc.Config(hidden=(16, 16), batch=16)
make = maker(gcbc, SMALL)


def test_the_loss_is_the_negative_log_likelihood_of_the_actions():
    algo, b = make(), batch()
    mean = algo.actor(b["obs"], b["goal"])
    normal = torch.distributions.Normal(mean, 1.0)
    torch.testing.assert_close(algo.loss(b)[0], -normal.log_prob(b["act"]).sum(-1).mean())


def test_goals_lie_ahead_on_the_trajectory():
    algo = gcbc.make(replace(SMALL, batch=2000), Spec(2, 1), torch.Generator().manual_seed(0))
    found = gcbc.stages(algo, toy((5, 3, 9)), Run(1))[0].start()(algo.generator)
    assert bool((found["goal"][:, 0] > found["obs"][:, 0]).all())


def test_learns_to_walk_a_line_to_either_end():
    learns_to_walk_a_line(gcbc, SMALL)


def test_engineering():
    passes_engineering(gcbc, make, ["loss"])


def test_images_go_through_encoders_of_their_own():
    passes_with_images(gcbc, SMALL, {"loss": ["actor"]})
