from dataclasses import replace

import torch

from offrl.algos import td3bc
from offrl.algos.prdc import METHOD, PRDC, Config
from offrl.data import Dataset
from offrl.data.neighbors import StateNeighbors
from offrl.engine.method import Run, Spec, Task
from tests.algos import cases, engineering
from tests.algos.cases import ACTIONS as ACT
from tests.algos.cases import STATES as OBS
from tests.algos.cases import TASK
from tests.algos.cases import known as batch

SMALL = cases.CASES["prdc"].config
TABLE = StateNeighbors.build(OBS, ACT, "toy", k=8)


def make(config=SMALL):
    """With the exact search, for which an update asks how many queries are open."""
    algo = cases.make("prdc", config)
    algo.neighbors = TABLE
    return algo


def test_penalty_never_exceeds_that_of_the_own_action():
    algo, b = make(), batch()
    act = algo.actor(b["obs"]).detach()
    row, _ = TABLE.nearest(b["index"], act, 2.0)
    to_neighbor = (act - ACT[row]).square().sum(-1)
    to_own = (act - b["act"]).square().sum(-1)
    assert (to_neighbor <= to_own + 1e-6).all()
    assert (to_neighbor < to_own - 1e-3).any()  # and the search does find better ones


def test_large_beta_gives_the_actor_loss_of_td3bc():
    algo, b = make(replace(SMALL, beta=1e6)), batch()
    twin = td3bc.TD3BC(td3bc.Config(hidden=(32, 32)), Spec(3, 2), torch.Generator().manual_seed(0))
    loss, metrics = algo.actor_loss(b)
    torch.testing.assert_close(loss, twin.actor_loss(b)[0])
    assert metrics["actor/self_match"] == 1


def test_beta_zero_takes_the_nearest_action_anywhere():
    algo, b = make(replace(SMALL, beta=0.0)), batch()
    act = algo.actor(b["obs"]).detach()
    row, _ = TABLE.nearest(b["index"], act, 0.0)
    assert torch.equal(row, torch.cdist(act.double(), ACT.double()).argmin(-1))


def test_penalty_gradient_is_by_the_formula_and_zero_at_a_data_pair():
    act = (
        ACT[:64] + 0.01 * torch.randn(64, 2, generator=torch.Generator().manual_seed(5))
    ).requires_grad_()
    index = torch.arange(64)
    row, _ = TABLE.nearest(index, act.detach(), 2.0)
    algo = make()
    algo.actor.forward = lambda obs: act
    algo.config = replace(SMALL, alpha=0.0)
    b = batch() | {"index": index, "obs": OBS[:64]}
    (grad,) = torch.autograd.grad(algo.actor_loss(b)[0], [act])
    torch.testing.assert_close(grad, 2 * (act - ACT[row]).detach() / (64 * 2))
    exact = ACT[:64].clone().requires_grad_()
    algo.actor.forward = lambda obs: exact
    (grad,) = torch.autograd.grad(algo.actor_loss(b)[0], [exact])
    assert torch.equal(grad, torch.zeros(64, 2))


def lineworld():
    """Two states 0.1 apart; at the first only the bad action was seen, at the second the good."""
    obs = torch.tensor([[0.0], [0.1]]).repeat(100, 1)
    act = torch.tensor([[-0.5], [0.5]]).repeat(100, 1)
    fields = dict(obs=obs, next_obs=obs, act=act, reward=act[:, 0] + 1, terminal=torch.ones(200))
    return Dataset(fields, torch.arange(200), fields["reward"], "lineworld")


def learned(beta):
    """The action at the first state, where Q favors the good action."""
    config = Config(hidden=(32, 32), lr=3e-3, alpha=1.3, beta=beta, batch=64)
    algo = PRDC(config, Spec(1, 1), torch.Generator().manual_seed(0))
    (stage,) = METHOD.stages(algo, Task(Spec(1, 1), lineworld()), Run(steps=600))
    sample = stage.start()
    for step in range(600):
        algo.update(sample(algo.generator), step % 2)
    return algo.act({"obs": torch.tensor([[0.0]])})[0].item()


def test_a_better_action_of_a_nearby_state_is_reached_only_if_the_state_weighs_little():
    # Q pushes either way by about alpha / (2 |Q|) = 0.4 beyond the action that is copied
    assert learned(beta=0.1) > 0.5
    assert learned(beta=100.0) < 0.2


def test_table_and_batches_hold_the_same_standardized_states():
    fields = dict(obs=OBS, next_obs=OBS, act=ACT, reward=OBS[:, 0], terminal=torch.zeros(300))
    data = Dataset(fields, torch.zeros(1, dtype=torch.int64), torch.zeros(1), "toy")
    algo = PRDC(SMALL, Spec(3, 2, *data.statistics()), torch.Generator().manual_seed(0))
    (stage,) = METHOD.stages(algo, Task(TASK, data), Run(steps=1, progress=False))
    b = stage.start()(algo.generator)
    assert torch.equal(b["obs"], algo.neighbors.obs[b["index"]])
    assert torch.equal(b["obs"], algo.standardize(OBS[b["index"]]))


def test_captured_updates_with_the_exact_search_equal_eager_ones():
    engineering.captured_equals_eager(make, batch())
