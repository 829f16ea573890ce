from dataclasses import replace
from functools import partial

import torch

from offrl.algos.gcbc import METHOD
from offrl.engine.method import Run, Spec, Task
from tests.algos import cases
from tests.algos.cases import two_goals as batch
from tests.data.trajectories import toy

SMALL = cases.CASES["gcbc"].config
make = partial(cases.make, "gcbc")


def test_the_loss_is_the_negative_log_likelihood_of_the_actions():
    algo, b = make(), batch()
    mean = algo.actor(b["obs"], b["goal"])
    normal = torch.distributions.Normal(mean, 1.0)
    torch.testing.assert_close(algo.loss(b)[0], -normal.log_prob(b["act"]).sum(-1).mean())


def test_goals_lie_ahead_on_the_trajectory():
    spec = Spec(2, 1)
    algo = make(replace(SMALL, batch=2000), spec=spec)
    (stage,) = METHOD.stages(algo, Task(spec, toy((5, 3, 9))), Run(1))
    found = stage.start()(algo.generator)
    assert bool((found["goal"][:, 0] > found["obs"][:, 0]).all())
