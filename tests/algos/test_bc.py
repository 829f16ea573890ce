import pytest
import torch

from offrl.algos.bc import BC, Config
from offrl.engine.method import Spec
from tests.algos import engineering

SMALL = Config(hidden=(32, 32))


def make(config=SMALL, seeds=(), device="cpu"):
    generator = torch.Generator(device).manual_seed(0)
    return BC(config, Spec(obs_dim=3, act_dim=2), generator, seeds)


def batch(seeds=(), size=64, seed=1):
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(*seeds, size, 3, generator=g)
    return {"obs": obs, "act": torch.tanh(obs[..., :2] - obs[..., 1:])}


def test_loss_is_the_mean_square_over_batch_and_action():
    algo, b = make(), batch()
    gap = algo.actor(b["obs"]) - b["act"]
    torch.testing.assert_close(algo.actor_loss(b)[0], gap.square().sum() / gap.numel())


def test_learns_the_data_policy():
    algo = make(Config(hidden=(32, 32), lr=3e-3), seeds=(2,))
    for step in range(600):
        algo.update(batch((2,), seed=step), step)
    test = batch((2,), seed=10_000)
    error = (algo.act(test)[0] - test["act"]).square().mean((-2, -1))
    assert (error < 0.005).all()  # the actions' own variance is about 0.5


def test_updates_never_wait_for_the_device():
    engineering.updates_never_wait_for_the_device(make, lambda step: batch(seed=step))


@pytest.mark.gpu
def test_updates_on_cuda_never_wait():
    engineering.on_cuda_updates_never_wait(
        lambda: make(device="cuda"), lambda step: batch(seed=step)
    )


@pytest.mark.gpu
def test_captured_updates_on_cuda_follow_written_ones():
    engineering.captured_equals_written(
        lambda: make(device="cuda"), lambda step: batch(seed=step), tolerance=1e-4
    )


def test_every_seed_of_a_stacked_run_ends_where_its_own_run_does(monkeypatch):
    engineering.stacked_run_equals_single_runs(make, batch, monkeypatch)


def test_captured_updates_equal_written_ones():
    engineering.captured_equals_written(make, lambda step: batch(seed=step))


@pytest.mark.slow
def test_compiled_updates_follow_written_ones():
    engineering.compiled_follows_written(make, lambda step: batch(seed=step))


def test_calls_stay_within_budget():
    engineering.calls_stay_within_budget("bc", make, lambda step: batch(seed=step))


def test_same_seed_same_run():
    engineering.same_seed_same_run(make, lambda step: batch(seed=step))


def test_resume_is_exact():
    engineering.resume_is_exact(make, lambda step: batch(seed=step))


def test_seeds_do_not_touch_each_other():
    engineering.seeds_do_not_touch_each_other(
        lambda seeds: make(seeds=seeds), lambda step: batch((3,), seed=step), "actor"
    )


def test_stacked_losses_equal_single_ones():
    engineering.stacked_equals_single(
        lambda seeds: make(seeds=seeds), batch, lambda algo, b: algo.actor_loss(b)[0]
    )


def test_a_checkpoint_of_other_sizes_is_refused_by_name():
    other = BC(Config(hidden=(16,)), Spec(3, 2), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="actor"):
        make().load(other.state())
