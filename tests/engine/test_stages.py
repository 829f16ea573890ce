"""Runs of several stages, fits within a stage, runs without an environment."""

import csv
import itertools
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from offrl.engine import checkpoint
from offrl.engine.curve import AsyncEvaluator
from offrl.engine.loop import fit
from offrl.engine.minimize import minimize
from offrl.engine.state import load_state
from offrl.errors import Diverged, Interrupted
from tests.engine import toys
from tests.engine.test_loop import SCHEDULE, assert_same_files, evaluation, offline, run


class Killed(Exception):
    """Ends a run as a crash would: nothing is written on the way."""


def dies_at(count):
    """Work that raises in its call number `count`."""
    steps = itertools.count()

    def work():
        if next(steps) == count:
            raise Killed

    return work


def scored(algo, episodes):
    """An evaluation that is no roll-out: an estimate on logged rows."""
    obs = toys.toy_data()["obs"][:episodes]
    return {"length": torch.ones(episodes), "fqe": algo.act({"obs": obs})[0].detach().sum(-1)}


def names(path, stage):
    with open(path / "metrics.csv") as file:
        return [(int(r["step"]), r["name"]) for r in csv.DictReader(file) if r["stage"] == stage]


def test_steps_that_people_see_grow_through_all_stages(tmp_path):
    algo, (stage,) = offline()
    both = [replace(stage, name=name, steps=100) for name in ("one", "two")]
    curve = fit(algo, both, tmp_path, scored, SCHEDULE, [0], "toy", headline="fqe")
    assert curve.steps == [40, 80, 100, 120, 160, 200]
    assert next(step for step, _ in names(tmp_path, "two")) == 110
    assert checkpoint.load(tmp_path / "checkpoint.pt")["global_step"] == 200


def test_a_stage_that_ends_by_its_own_criterion_has_a_last_point(tmp_path):
    algo, (stage,) = offline()
    steps = itertools.count()
    early = replace(stage, steps=None, stop=lambda: next(steps) == 25)
    curve = fit(algo, [early], tmp_path, scored, SCHEDULE, [0], "toy", headline="fqe")
    assert curve.steps == [25]
    assert curve.final is not None
    assert curve.final["fqe"].shape == (SCHEDULE.final_episodes,)


def test_a_stage_without_a_policy_has_no_points_and_the_next_one_goes_on_from_its_steps(tmp_path):
    algo, stages = toys.two_stages()
    curve = fit(algo, stages, tmp_path, scored, SCHEDULE, [0], "toy", headline="fqe")
    model = names(tmp_path, "model")
    updates = max(step for step, _ in model)
    assert updates >= 20
    assert (updates, "model/holdout") in model
    assert curve.steps[0] > updates
    assert curve.steps[-1] == updates + 180
    assert bool((algo.rows != 0).any())  # what the first stage handed on


@pytest.mark.parametrize("moment", ["model", "finish", "policy"])
def test_killed_in_any_stage_and_resumed_equals_uninterrupted(tmp_path, moment):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    run("two_stages", whole)
    algo, (model, policy) = toys.two_stages()
    if moment == "finish":
        finish = model.finish

        def half_done():
            finish()
            algo.rows.zero_()
            raise Killed

        model = replace(model, finish=half_done)
    elif moment == "model":
        model = replace(model, between=[*model.between, (1, dies_at(15))])
    else:
        policy = replace(policy, between=[(1, dies_at(50))])
    with pytest.raises(Killed):
        fit(algo, [model, policy], killed, evaluation(), SCHEDULE, [0], "two_stages")
    assert checkpoint.load(killed / "checkpoint.pt")["stage"] == (1 if moment == "policy" else 0)
    run("two_stages", killed, resume=True)
    assert_same_files(whole, killed)


def test_a_run_that_dies_in_its_final_evaluation_keeps_its_history(tmp_path):
    """Its checkpoint knows the last step, after which alone TensorBoard's events are superseded."""
    algo, (stage,) = offline()

    def dies(algo, episodes):
        if episodes == SCHEDULE.final_episodes:
            raise Killed
        return scored(algo, episodes)

    with pytest.raises(Killed):
        fit(algo, [stage], tmp_path, dies, SCHEDULE, [0], "toy", headline="fqe")
    algo, (stage,) = offline()
    curve = fit(algo, [stage], tmp_path, scored, SCHEDULE, [0], "toy", resume=True, headline="fqe")
    assert curve.final is not None
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("evaluation/fqe")
    assert [event.step for event in events] == [40, 80, 120, 160, 200]


def test_a_run_without_an_evaluation_ends_without_a_score(tmp_path):
    algo, (stage,) = offline()
    curve = fit(algo, [stage], tmp_path, None, SCHEDULE, [0], "toy")
    assert (curve.steps, curve.final, curve.score) == ([], None, None)
    assert len(names(tmp_path, "train")) > 0


def test_the_headline_is_the_score_whatever_stands_before_it(tmp_path):
    algo, (stage,) = offline()
    told = []
    curve = fit(
        algo, [stage], tmp_path, scored, SCHEDULE, [0], "toy", report=told.append, headline="fqe"
    )
    assert curve.score == pytest.approx(float(curve.points[-1]["fqe"].mean()))
    assert told[-1].score == curve.score != 1.0


def test_a_fit_within_a_stage_is_logged_and_captured(tmp_path):
    found = []
    for speed in ("eager", "graph"):
        (tmp_path / speed).mkdir()
        run("inner_fit", tmp_path / speed, speed=speed)
        found.append([row for row in names(tmp_path / speed, "train") if "model" in row[1]])
    assert found[0] == found[1]
    assert (20, "model/model/loss") in found[0]
    assert (20, "model/updates") in found[0]
    assert_same_files(tmp_path / "eager", tmp_path / "graph")


class Slow(AsyncEvaluator):
    """Is done with a point only when somebody waits for it."""

    def ready(self):
        return False


def refitting_player():
    """As `offrl.runs.evaluate.player`, of the toy that fits within a stage."""
    (algo, _), play = toys.inner_fit(), evaluation()

    def played(path):
        load_state(algo, checkpoint.load(path)["algo"])
        return play(algo, SCHEDULE.eval_episodes)

    return played


@pytest.mark.parametrize("stopped", [False, True])
def test_a_fit_while_a_point_is_played_beside_it_changes_no_file(tmp_path, stopped):
    """Its rows of metrics come after the point's; stopped in it, the point is of its own step."""
    inline, beside = tmp_path / "inline", tmp_path / "beside"
    inline.mkdir(), beside.mkdir()
    run("inner_fit", inline)
    algo, (stage,) = toys.inner_fit()
    ((period, refit),) = stage.between
    calls = itertools.count()

    def work():
        if next(calls) == 3 and stopped:  # before update 60, while the point of 40 is played
            os.kill(os.getpid(), signal.SIGINT)
        return refit()

    stages = [replace(stage, between=[(period, work)])]
    train = lambda: fit(  # noqa: E731
        algo,
        stages,
        beside,
        evaluation(),
        SCHEDULE,
        [0],
        "inner_fit",
        worker=Slow(refitting_player),
    )
    if stopped:
        with pytest.raises(Interrupted, match="that of its update 60"):
            train()
        assert checkpoint.load(beside / "checkpoint.pt")["step"] == 60
        run("inner_fit", beside, resume=True)
    else:
        train()
    assert_same_files(inline, beside)


def test_stopped_within_a_fit_and_resumed_equals_uninterrupted(tmp_path):
    """Within two seconds, though the fit would go on for a minute."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    run("inner_fit", whole)
    algo, (stage,) = toys.inner_fit()
    ((period, refit),) = stage.between
    calls, asked = itertools.count(), []

    def slow(batch, turn):
        time.sleep(0.05)
        return algo.fit_model(batch, turn)

    def work():
        if next(calls) < 4:
            return refit()
        timer = threading.Timer(0.3, lambda: (asked.append(time.monotonic()), interrupt()))
        timer.start()
        draw = stage.start()
        return minimize(slow, draw, algo, stop=lambda step: step == 1200) and {}

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="checkpoint is that of its update 80"):
        fit(
            algo,
            [replace(stage, between=[(period, work)])],
            stopped,
            evaluation(),
            SCHEDULE,
            [0],
            "inner_fit",
            speed="eager",
        )
    assert time.monotonic() - asked[0] < 2
    saved = checkpoint.load(stopped / "checkpoint.pt")
    assert saved["step"] == 80  # nothing before it is lost
    assert saved["fitting"] == [0]  # nor will it be once the run is resumed
    run("inner_fit", stopped, resume=True)
    assert_same_files(whole, stopped)


def test_a_fit_at_the_end_of_a_stage_is_logged_as_of_there(tmp_path):
    algo, (stage,) = toys.inner_fit()
    last = lambda: minimize(algo.fit_model, stage.start(), algo, lambda n: n == 7, name="last")  # noqa: E731
    stages = [replace(stage, steps=30, between=(), finish=last)]
    fit(algo, stages, tmp_path, None, SCHEDULE, [0], "toy")
    assert (30, "last/updates") in names(tmp_path, "train")


def test_a_run_that_dies_while_a_point_is_played_has_the_copy_of_its_step(tmp_path):
    schedule = replace(SCHEDULE, snapshot_every=40)

    def dies(algo, episodes):
        raise Killed

    for evaluate, resume in ((dies, False), (scored, True)):
        algo, (stage,) = offline()
        try:
            fit(algo, [stage], tmp_path, evaluate, schedule, [0], "toy", resume, headline="fqe")
        except Killed:
            assert checkpoint.load(tmp_path / "checkpoint.pt")["pending"] == 40
    found = sorted(int(path.stem) for path in (tmp_path / "snapshots").iterdir())
    assert found == [40, 80, 120, 160, 200]


class Counted:
    """A part that counts how often it is saved."""

    def __init__(self):
        self.saves = 0

    def save(self, place):
        self.saves += 1
        return {}

    def load(self, state, place): ...


def test_a_part_of_two_stages_is_saved_once_and_names_are_its_own(tmp_path):
    """A replay deletes old rows when it is saved: twice in one checkpoint, those of the last."""
    algo, (stage,) = offline()
    alone, shared = Counted(), Counted()
    for part, count in ((alone, 1), (shared, 2)):
        both = [
            replace(stage, name=str(i), parts={"rows": part} if i < count else {}) for i in (0, 1)
        ]
        (tmp_path / str(count)).mkdir()
        fit(algo, both, tmp_path / str(count), None, SCHEDULE, [0], "toy")
    assert alone.saves == shared.saves > 2
    other = [replace(stage, name=str(i), parts={"rows": Counted()}) for i in (0, 1)]
    with pytest.raises(ValueError, match="different parts of the name 'rows'"):
        fit(algo, other, tmp_path, None, SCHEDULE, [0], "toy")


def test_a_start_that_draws_from_the_runs_generator_is_refused(tmp_path):
    """It runs again on resume, where the generator has gone on."""
    algo, (stage,) = offline()

    def start():
        torch.rand(1, generator=algo.generator)
        return stage.start()

    with pytest.raises(ValueError, match="`start` of stage train draws from the run's generator"):
        fit(algo, [replace(stage, start=start)], tmp_path, None, SCHEDULE, [0], "toy")


def test_a_score_that_is_nan_ends_the_run(tmp_path):
    algo, (stage,) = offline()
    nan = lambda algo, episodes: {"return": torch.full((episodes,), torch.nan)}  # noqa: E731
    with pytest.raises(Diverged, match="the return of an evaluation is NaN"):
        fit(algo, [stage], tmp_path, nan, SCHEDULE, [0], "toy")


def test_a_resumed_run_misses_no_rows_of_metrics_in_silence(tmp_path):
    run("offline", tmp_path)
    rows = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(rows[:40])
    with pytest.raises(ValueError, match=r"metrics\.csv has 40 bytes, the checkpoint knows"):
        run("offline", tmp_path, resume=True)
