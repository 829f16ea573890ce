from functools import partial

import pytest
import torch

from offrl.algos.bc import Config
from offrl.engine.state import load_state, state_of
from tests.algos import cases
from tests.algos.cases import pairs as batch

make = partial(cases.make, "bc")


def test_loss_is_the_mean_square_over_batch_and_action():
    algo, b = make(), batch()
    gap = algo.actor(b["obs"]) - b["act"]
    torch.testing.assert_close(algo.actor_loss(b)[0], gap.square().sum() / gap.numel())


def test_learns_the_data_policy():
    algo = make(Config(hidden=(32, 32), lr=3e-3), seeds=(2,))
    for step in range(600):
        algo.update(batch((2,), seed=step), 0)
    test = batch((2,), seed=10_000)
    error = (algo.act(test)[0] - test["act"]).square().mean((-2, -1))
    assert (error < 0.005).all()  # the actions' own variance is about 0.5


def test_a_checkpoint_of_other_sizes_is_refused_by_name():
    other = make(Config(hidden=(16,)))
    with pytest.raises(ValueError, match="actor"):
        load_state(make(), state_of(other))
