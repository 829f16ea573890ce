"""What is asked of every method, whatever it learns."""

import json
import operator
import shutil
import sys
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offrl import config
from offrl.engine.capture.recording import Recorder, Recording, syncs_host
from offrl.engine.method import turns_of
from offrl.engine.state import load_state, state_of
from tests.algos.cases import CASES, make, method
from tests.algos.engineering import (
    assert_equal,
    captured_equals_eager,
    matched,
    read_back,
    run,
    sampler,
    stacked_run_equals_single_runs,
)

STACKING = [name for name, case in CASES.items() if method(name).stacks(case.config)]
ON_CUDA = ["bc", "td3bc", "prdc", "ddpg", "td3", "sac", "beer", "dqn", "ppo"]
COUNTED = {"dqn": {"hidden": (32, 32)}}  # cases whose calls are counted with other options
BUDGET = json.loads(Path(__file__).with_name("budget.json").read_text())
every = pytest.mark.parametrize("name", CASES)
stacking = pytest.mark.parametrize("name", STACKING)
on_cuda = pytest.mark.parametrize("name", ON_CUDA)


def batches(name, *seeds):
    """Number of an update -> its batch."""
    return lambda step: CASES[name].batch(*seeds, seed=step)


def turns(algo):
    """Every pattern that an update of the method has."""
    return sorted({turns_of(algo)(step) for step in range(12)})


def test_there_is_a_case_of_every_method():
    assert set(CASES) == set(config.algorithms()) == set(BUDGET)
    assert {name for name in CASES if not name.startswith("decision")} == set(STACKING)


@every
def test_options_have_defaults_and_the_file_names_its_differences(name):
    found = method(name)
    options = fields(found.config)
    assert "steps" in {option.name for option in options}
    assert not [option.name for option in options if option.default is MISSING]
    assert config.shipped(name).keys() <= {"tasks", "presets"}
    assert "Differences from" in sys.modules[found.make.__module__].__doc__


@every
def test_same_seed_same_run(name):
    assert_equal(*(run(make(name), batches(name), stop=10) for _ in range(2)))


@every
def test_resume_is_exact(name):
    """Saved at 13 into a file and continued to 30 in a fresh object: bit-equal."""
    whole, first, second = (make(name) for _ in range(3))
    run(whole, batches(name))
    run(first, batches(name), stop=13)
    load_state(second, read_back(state_of(first)))
    run(second, batches(name), start=13)
    assert_equal(whole, second)
    draw = lambda algo: torch.rand(3, generator=algo.generator)  # noqa: E731
    assert torch.equal(draw(whole), draw(second))


@every
@pytest.mark.parametrize("updates", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_captured_updates_equal_eager_ones(name, updates):
    captured_equals_eager(partial(make, name), batches(name)(0), updates)


@every
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_updates_follow_eager_ones(name):
    captured_equals_eager(
        partial(make, name), batches(name)(0), updates=200, tolerance=1e-3, speed="compile"
    )


class NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not syncs_host(func, args, kwargs or {}), str(func)
        return func(*args, **(kwargs or {}))


@every
def test_updates_never_sync_the_host(name):
    """Updates of every kind can be queued without the host reading a value."""
    algo = make(name)
    inputs = {turn: batches(name)(turn) for turn in turns(algo)}
    with NoHostSync():
        for turn, batch in inputs.items():
            algo.update(batch, turn)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostSync():
        float(torch.ones(1))


@every
def test_calls_stay_within_budget(name):
    """Updates, one of every kind, take no more calls than budget.json allows: eager, captured.

    Eager these are operators, views included; captured, what a replay calls. The numbers do not
    depend on how fast the machine is: each call costs its microseconds.
    """
    algo = make(name, method(name).config(**COUNTED[name]) if name in COUNTED else None)
    sample, eager, captured = sampler(batches(name)(0)), 0, 0
    work = lambda turn: algo.update(sample(algo.generator), turn)  # noqa: E731
    for turn in [*turns(algo), *turns(algo)]:  # the first updates make the optimizer's state
        work(turn)
    for turn in turns(algo):
        with Recorder() as recorder:
            work(turn)
        eager += len(recorder.calls)
        captured += len(Recording(partial(work, turn)).steps)
    found = [eager, captured]
    assert all(map(operator.le, found, BUDGET[name])), f"{found} calls, allowed are {BUDGET[name]}"


@stacking
def test_seeds_do_not_touch_each_other(name):
    """Disturbing all networks of the last of three seeds leaves the others bit-equal."""
    one, other = (make(name, seeds=(3,)) for _ in range(2))
    with torch.no_grad():
        for _, _, p in matched(one, other):
            p[2] *= 2
    run(one, batches(name, (3,)), stop=6)
    run(other, batches(name, (3,)), stop=6)
    for network, p, q in matched(one, other):
        assert torch.equal(p[:2], q[:2]), network


@stacking
@pytest.mark.parametrize("updates", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_every_seed_of_a_stacked_run_goes_as_its_own_run_does(name, updates, monkeypatch):
    stacked_run_equals_single_runs(partial(make, name), CASES[name].batch, monkeypatch, updates)


@on_cuda
@pytest.mark.gpu
def test_updates_on_cuda_never_sync_the_host(name):
    """The same, as CUDA's own check sees it."""
    algo = make(name, device="cuda")
    move = lambda batch: {key: value.cuda() for key, value in batch.items()}  # noqa: E731
    inputs = {turn: move(batches(name)(turn)) for turn in turns(algo)}
    for turn, batch in inputs.items():  # the first updates make the optimizer's state
        algo.update(batch, turn)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for turn, batch in inputs.items():
            algo.update(batch, turn)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
@pytest.mark.gpu
def test_captured_updates_on_cuda_follow_eager_ones(name):
    captured_equals_eager(
        partial(make, name, device="cuda"), batches(name)(0), updates=200, tolerance=1e-4
    )
