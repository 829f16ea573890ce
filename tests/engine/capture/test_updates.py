"""Captured updates: which way is chosen, and that a run never depends on it."""

import itertools
import shutil

import pytest
import torch

from offrl.engine.capture import updates as capture
from offrl.engine.capture.updates import CHECKS, MANY, ROUNDS, WARM_UP, Updates, close
from offrl.engine.optim import adam, descend

ALTERNATELY = lambda step: step % 2  # noqa: E731
AT_ODD_TIMES = lambda step: step * 2654435761 % 2**32 // 2**20 % 3  # noqa: E731


class Sums:
    """A running sum of random numbers, weighted by the turn."""

    def __init__(self, update=None):
        self.generator = torch.Generator().manual_seed(0)
        self.total, self.other = torch.zeros(3), torch.zeros(3)
        self.change = update

    def update(self, batch, turn):
        if self.change is not None:
            return self.change(self, batch["x"])
        self.total.add_(batch["x"], alpha=1 + turn)
        return {"x": batch["x"].sum(), "twice": 2 * batch["x"][:1]}


def course(speed, stop, algo=None, turn=lambda step: 0, start=0, between=lambda algo, step: None):
    """A run from one number to another; what it made of the algorithm, reported and said."""
    algo, said = algo or Sums(), []
    sample = lambda g: {"x": torch.rand(3, generator=g)}  # noqa: E731
    run, metrics = Updates(algo.update, sample, turn, algo, speed, said.append), []
    for step in range(start, stop):
        between(algo, step)
        metrics.append(run(step))
    return algo, metrics, said


def assert_equal(one, other):
    (algo, metrics, _), (theirs, expected, _) = one, other
    assert torch.equal(algo.total, theirs.total)
    assert torch.equal(algo.other, theirs.other)
    assert torch.equal(algo.generator.get_state(), theirs.generator.get_state())
    for x, y in zip(metrics, expected, strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) and x[k].shape == y[k].shape for k in x)


@pytest.mark.parametrize("turn", [ALTERNATELY, lambda step: int(step % 5 == 0), AT_ODD_TIMES])
@pytest.mark.parametrize("start", [0, 1, 503])
@pytest.mark.parametrize("speed", ["graph", "auto"])
def test_every_way_gives_the_same_run_from_any_start(speed, start, turn):
    found = course(speed, start + 400, turn=turn, start=start)
    assert not any("eagerly" in text for text in found[2])
    assert_equal(found, course("eager", start + 400, turn=turn, start=start))


def test_updates_are_replayed_once_they_have_been_checked_and_then_checked_ever_less_often():
    eager, now = [], []

    def noted(algo, x):
        eager.append(now[-1])
        return {}

    course("graph", 1000, Sums(noted), between=lambda algo, step: now.append(step))
    begin = WARM_UP + 1 + CHECKS
    gaps = [CHECKS, 1 + 2 * CHECKS, 1 + 4 * CHECKS, 1 + 8 * CHECKS]
    assert eager == [*range(begin), *itertools.accumulate(gaps[1:], initial=begin + gaps[0])]


@pytest.mark.parametrize("speed", ["eager", "graph", "auto", "compile"])
def test_an_update_is_told_its_turn_and_no_number(speed, monkeypatch):
    told = set()

    class Turns(Sums):
        def update(self, batch, turn):
            told.add(turn)
            return super().update(batch, turn)

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda update: update)
    course(speed, 300, Turns(), turn=lambda step: step % 7 // 5)
    assert told == {0, 1}


@pytest.mark.parametrize(("turns", "times"), [(MANY, 0), (MANY + 1, 1), (1000, 1)])
def test_turns_that_are_no_few_patterns_are_told_once(turns, times):
    _, _, said = course("graph", 200, turn=lambda step: step % turns)
    assert [f"more than {MANY} turns" in text for text in said] == [True] * times


def test_metrics_stay_what_they_were_while_later_updates_run():
    _, metrics, said = course("graph", 200)
    assert not said
    assert len({float(m["x"]) for m in metrics}) == 200


def test_auto_measures_and_says_once_what_it_found():
    enough = 2 * (WARM_UP + 1 + CHECKS + 2 * ROUNDS)
    _, _, said = course("auto", enough + 10, turn=ALTERNATELY)
    (text,) = said
    assert text.startswith("an update takes ")
    assert "ms eager, " in text
    assert text.endswith(" ms captured")


def test_the_time_that_is_said_counts_each_turn_as_often_as_it_comes(monkeypatch):
    """One update in five takes 10 s, the others 0 s; on a clock that only they move."""
    clock = [0.0]

    class Slow(Sums):
        def update(self, batch, turn):
            clock[0] += 10 * turn
            return super().update(batch, turn)

    monkeypatch.setattr(capture.Updates, "now", lambda self: clock[0])
    _, _, said = course("auto", 500, Slow(), turn=lambda step: int(step % 5 == 0))
    (text,) = said
    assert 1900 < float(text.split()[3]) < 2100
    assert text.endswith("ms eager, 0.00 ms captured")


# --- what a replay cannot repeat -----------------------------------------------------------------


def test_updates_that_cannot_be_captured_are_eager_and_say_why():
    seen = []

    def waiting(algo, x):
        seen.append(x)
        return {"x": x * float(x.sum())}

    _, metrics, said = course("auto", 40, Sums(waiting))
    assert len(seen) == 40  # each made once
    assert said == [
        "updates run eagerly: aten._local_scalar_dense.default makes the host wait for a value"
    ]
    assert len({float(m["x"][0]) for m in metrics}) == 40


class Copies(Sums):
    """`total` moves; a target is a copy of it that a counter of Python renews."""

    def __init__(self, period):
        super().__init__()
        self.period, self.count = period, 0

    def update(self, batch, turn):
        metrics = super().update(batch, turn)
        self.count += 1
        if self.count % self.period == 0:
            self.other.copy_(self.total)
        return metrics


@pytest.mark.parametrize("speed", ["graph", "auto"])
def test_a_target_that_a_counter_renews_is_renewed(speed):
    found = course(speed, 3000, Copies(500))
    assert_equal(found, course("eager", 3000, Copies(500)))
    assert torch.equal(found[0].other, found[0].total)
    assert found[2] == ["updates run eagerly: Copies.count changes during an update"]


class Scaled(Sums):
    """Reads plain values of every kind."""

    def __init__(self):
        super().__init__()
        self.beta, self.scales, self.by_name = 1.0, [1.0, (1, 1.0)], {"on": True}
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.0))
        torch.nn.init.eye_(self.net[0].weight)
        torch.nn.init.zeros_(self.net[0].bias)
        self.opt = adam(self.net, 0.1)
        self.weight = torch.ones(3)

    def update(self, batch, turn):
        x = batch["x"] * self.beta * self.scales[0] * self.scales[1][1] * self.weight
        x = x if self.by_name["on"] else -x
        x = x * 2 if self.net[1].training else x
        descend(self.opt, self.net(x).sum(), {})
        self.other.copy_(self.net[0].bias.detach())
        self.total.add_(x)
        return {"x": x.sum()}


CHANGES = {
    "Scaled.beta changes": lambda algo: setattr(algo, "beta", algo.beta * 0.9),
    "Scaled.scales[0] changes": lambda algo: algo.scales.__setitem__(0, 2.0),
    "Scaled.scales[1] changes": lambda algo: algo.scales.__setitem__(1, (1, 2.0)),
    "Scaled.by_name.on changes": lambda algo: algo.by_name.update(on=False),
    "Scaled.by_name is replaced": lambda algo: setattr(algo, "by_name", {"on": False}),
    "Scaled.opt.param_groups[0].lr changes": lambda algo: algo.opt.param_groups[0].update(lr=0.2),
    "Scaled.net.training changes": lambda algo: algo.net.eval(),
    "Scaled.weight is replaced": lambda algo: setattr(algo, "weight", torch.ones(3) * 2),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_is_changed_between_updates_counts_from_then_on(reason):
    def between(algo, step):
        if step in (200, 201):
            CHANGES[reason](algo)

    found = course("graph", 300, Scaled(), between=between)
    assert_equal(found, course("eager", 300, Scaled(), between=between))
    unlike = course("eager", 300, Scaled())[0]
    assert not torch.equal(found[0].total + found[0].other, unlike.total + unlike.other)
    assert found[2] == [f"updates run eagerly: {reason} between updates"]


def test_a_value_that_is_set_to_itself_is_no_change():
    between = lambda algo, step: setattr(algo, "beta", float("1.0"))  # noqa: E731
    assert not course("graph", 200, Scaled(), between=between)[2]


def hidden(rarely):
    """Updates that do more when a counter says so that is not on the algorithm."""
    count = itertools.count()

    def update(algo, x):
        algo.total.add_(x)
        if rarely(next(count)):
            algo.other.add_(1)
        return {"x": x.sum()}

    return Sums(update)


def test_a_tensor_that_the_replay_does_not_touch_is_compared_too():
    """The captured update left `other` alone; every twentieth does not."""
    rarely = lambda n: n % 20 == 19  # noqa: E731
    found = course("graph", 400, hidden(rarely))
    assert_equal(found, course("eager", 400, hidden(rarely)))
    assert found[2] == ["updates run eagerly: a replay does not give what the update gives"]


def test_a_metric_that_comes_later_is_a_difference():
    count = itertools.count()

    def update(algo, x):
        return {"x": x.sum()} | ({"late": x.mean()} if next(count) > 10 else {})

    _, metrics, said = course("graph", 40, Sums(update))
    assert said == ["updates run eagerly: a replay does not give what the update gives"]
    assert ["late" in m for m in metrics] == [n > 10 for n in range(40)]


def test_a_difference_that_shows_later_stops_the_run():
    algo = hidden(lambda n: n >= WARM_UP + 1 + CHECKS)
    with pytest.raises(ValueError, match="start again with speed=eager"):
        course("graph", 200, algo)


def test_a_replay_that_fails_leaves_the_eager_update():
    """An LSTM's kernel does not take given memory."""
    seen, lstm = [], torch.nn.LSTM(3, 2)

    def recurrent(algo, x):
        seen.append(x)
        return {"x": lstm(x.view(1, 1, 3))[0].sum()}

    _, metrics, said = course("auto", 40, Sums(recurrent))
    assert len(seen) == 40
    assert len(said) == 1 and said[0].startswith("updates run eagerly: ")  # noqa: PT018
    g = torch.Generator().manual_seed(0)
    for found in metrics:
        x = torch.rand(3, generator=g)
        assert torch.equal(found["x"], lstm(x.view(1, 1, 3))[0].sum())


def test_a_metric_that_is_nan_is_no_difference():
    undefined = lambda algo, x: {"x": x.sum() * float("nan"), "count": torch.tensor(3)}  # noqa: E731
    _, metrics, said = course("graph", 100, Sums(undefined))
    assert not said
    assert all(bool(m["x"].isnan()) and int(m["count"]) == 3 for m in metrics)


def test_nearly_the_same_is_measured_by_how_far_an_update_goes():
    """What is allowed where the order of sums varies: rounding, but no step left out."""
    g = torch.Generator().manual_seed(0)
    before = torch.randn(1000, generator=g)
    after = before + 1e-4 * torch.randn(1000, generator=g)
    assert close(after * (1 + 1e-7), after, before)
    assert not close(before, after, before)
    assert not close(before + 0.9 * (after - before), after, before)
    assert not close(after * float("nan"), after, before)


def test_without_a_compiler_updates_are_eager(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = course("compile", 20)
    assert "torch.compile needs" in found[2][0]
    assert_equal(found, course("eager", 20))
