from dataclasses import replace

import pytest
import torch

from offrl.algos.ddpg import DDPG, Config
from offrl.engine.method import Spec
from tests.algos import engineering
from tests.algos.test_td3bc import batch

SMALL = Config(hidden=(32, 32))


def make(config=SMALL, seeds=(), device="cpu"):
    generator = torch.Generator(device).manual_seed(0)
    return DDPG(config, Spec(obs_dim=3, act_dim=2), generator, seeds)


def test_truncated_steps_bootstrap_and_terminated_ones_do_not():
    algo, b = engineering.apart(make()), batch()
    y = algo.target(b)
    ended = b["terminal"] == 1
    assert torch.equal(y[ended], b["reward"][ended])
    q = algo.critics_target(b["next_obs"], algo.actor_target(b["next_obs"]))[0]
    torch.testing.assert_close(y[~ended], (b["reward"] + 0.99 * q)[~ended])


def test_targets_move_by_tau_on_every_update():
    pairs = [("actor_target", "actor"), ("critics_target", "critics")]
    engineering.targets_follow(make(), batch(), pairs, tau=0.005)


def test_exploration_adds_clipped_gaussian_noise_and_evaluation_none():
    algo = make()
    obs = torch.zeros(20_000, 3)
    plain, _ = algo.act({"obs": obs})
    noisy, _ = algo.act({"obs": obs}, explore=True, generator=torch.Generator().manual_seed(3))
    assert abs(float((noisy - plain).std()) - 0.1) < 0.003
    assert noisy.abs().max() <= 1


def test_value_of_a_two_state_chain_is_found():
    algo = make(replace(SMALL, lr=3e-3, discount=0.5, tau=0.05))
    engineering.finds_the_value_of_a_chain(algo, lambda g: torch.rand(64, 2, generator=g) * 2 - 1)


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
    engineering.calls_stay_within_budget("ddpg", make, lambda step: batch(seed=step))


def test_same_seed_same_run():
    engineering.same_seed_same_run(make, lambda step: batch(seed=step))


def test_resume_is_exact():
    engineering.resume_is_exact(make, lambda step: batch(seed=step))


def test_seeds_do_not_touch_each_other():
    engineering.seeds_do_not_touch_each_other(
        lambda seeds: make(seeds=seeds), lambda step: batch((3,), seed=step), "critics"
    )


def test_stacked_losses_equal_single_ones():
    engineering.stacked_equals_single(
        lambda seeds: make(seeds=seeds), batch, lambda algo, b: algo.actor_loss(b)[0]
    )
