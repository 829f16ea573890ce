"""The number of threads of a stage: chosen by measurement, which trains nothing."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from offrl.engine.loop import Runner, Schedule, fit
from offrl.engine.threads import candidates, fastest
from tests.engine.test_loop import KINDS, assert_same, offline


@pytest.fixture(autouse=True)
def one_thread_after():
    yield
    torch.set_num_threads(1)


def paced(stage, seconds, monkeypatch):
    """The stage with updates that take as long as their number of threads says, by the clock."""
    now = [0.0]
    monkeypatch.setattr("offrl.engine.threads.LEAST", 0.0)
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("offrl.engine.threads.time", clock)

    def update(batch, step):
        now[0] += seconds[torch.get_num_threads()]
        return stage.update(batch, step)

    return replace(stage, update=update)


@pytest.mark.parametrize(
    ("most", "found"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])],
)
def test_candidates_are_powers_of_two_and_the_most(most, found):
    assert candidates(most) == found


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 2, 2: 1, 3: 3}, 2),
        ({1: 1, 2: 3, 3: 3}, 1),
        ({1: 3, 2: 3, 3: 1}, 3),
        ({1: 1, 2: 0.97, 3: 0.96}, 1),  # they gain too little
    ],
)
def test_the_number_with_the_shortest_update_is_found(monkeypatch, seconds, best):
    algo, (stage,) = offline()
    found, told = fastest(algo, paced(stage, seconds, monkeypatch), stage.start(), [1, 2, 3])
    assert (found, torch.get_num_threads()) == (best, best)
    assert told.startswith(f"{best} thread(s)")


@pytest.mark.parametrize("speed", ["eager", "graph"])
@pytest.mark.parametrize("kind", KINDS)
def test_measuring_leaves_no_trace(kind, speed, monkeypatch):
    """After some updates, so that optimizers and the replay are not empty."""
    algo, (stage,) = KINDS[kind]()
    if stage.before is not None:
        stage.before()
    sample = stage.start()
    for step in range(6):
        for period, work in stage.between:
            if step % period == 0:
                work()
        stage.update(sample(algo.generator), step)
    before = deepcopy(algo.state())
    monkeypatch.setattr("offrl.engine.threads.LEAST", 0.0)
    fastest(algo, stage, sample, [1, 2], speed)
    assert_same(before, algo.state())


@pytest.mark.parametrize("speed", ["eager", "graph"])
def test_a_single_batch_is_drawn(speed, monkeypatch):
    """A sampler may deal the rows of a rollout once."""
    monkeypatch.setattr("offrl.engine.threads.LEAST", 0.0)
    algo, (stage,) = offline()
    deal = iter([stage.start()(algo.generator)])
    fastest(algo, stage, lambda generator: next(deal), [1, 2], speed)


def test_a_resumed_run_keeps_the_threads_that_it_chose(tmp_path, monkeypatch):
    algo, (stage,) = offline()
    schedule = Schedule(log_every=10, eval_every=40)
    slow = paced(stage, {1: 2, 2: 1}, monkeypatch)
    monkeypatch.setattr(Runner, "after_update", stops_at(Runner.after_update, 50))
    with pytest.raises(InterruptedError):
        fit(
            algo, [slow], tmp_path, None, schedule, [0], "toy", False, speed="eager", threads=[1, 2]
        )
    monkeypatch.undo()
    torch.set_num_threads(1)
    seen = set()

    def update(batch, step):
        seen.add(torch.get_num_threads())
        return stage.update(batch, step)

    algo, (stage,) = offline()
    curve = fit(
        algo,
        [replace(stage, update=update)],
        tmp_path,
        None,
        schedule,
        [0],
        "toy",
        True,
        speed="eager",
        threads=[1, 2],
    )
    assert curve.threads == {"train": 2}
    assert seen == {2}


def stops_at(after_update, step):
    def stopping(runner, stage):
        after_update(runner, stage)
        if runner.step == step:
            raise InterruptedError

    return stopping


def test_a_run_that_measured_its_threads_ends_as_one_that_was_told_them(tmp_path, monkeypatch):
    states = []
    for threads in ((), (1, 2)):
        algo, (stage,) = offline()
        stage = paced(stage, {1: 1, 2: 2}, monkeypatch)
        folder = tmp_path / str(len(threads))
        folder.mkdir()
        fit(algo, [stage], folder, None, Schedule(), [0], "toy", speed="eager", threads=threads)
        states.append(algo.state())
    assert_same(*states)
