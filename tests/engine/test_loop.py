"""The loop: exact resume after SIGKILL, divergence, interrupts, checkpoints."""

import csv
import itertools
import multiprocessing
import os
import pickle
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from offrl.algos import decision_mamba, dqn, ppo, sac, td3bc
from offrl.engine import checkpoint
from offrl.engine.curve import AsyncEvaluator, Schedule
from offrl.engine.evaluate import Evaluator
from offrl.engine.loop import Loop, fit
from offrl.engine.method import Run, Spec, Task
from offrl.engine.state import load_state
from offrl.engine.stop import StopRequests
from offrl.envs.make import factory
from offrl.envs.vector import Vector
from offrl.errors import Diverged, Interrupted
from tests.engine import toys
from tests.engine.toys import toy_data

SCHEDULE = Schedule(log_every=10, eval_every=40, eval_episodes=2, final_episodes=4)
SPEC = Spec(11, 3)
HOPPER, CARTPOLE = factory("hopper"), factory("CartPole-v1")


def offline():
    config = td3bc.Config(batch=16, hidden=(16,))
    algo = td3bc.METHOD.make(config, SPEC, torch.Generator().manual_seed(1))
    return algo, td3bc.METHOD.stages(algo, Task(SPEC, toy_data()), Run(steps=200))


def online():
    config = sac.Config(batch=16, hidden=(16,), warmup=50, capacity=120)  # the ring wraps
    envs = Vector([HOPPER], [5])
    algo = sac.METHOD.make(config, SPEC, torch.Generator().manual_seed(1))
    return algo, sac.METHOD.stages(algo, Task(SPEC, envs=lambda: envs), Run(steps=250))


def sequence():
    """With a teacher that is refreshed every five updates, and two targets."""
    config = decision_mamba.Config(size="tiny", context=3, batch=2, steps=200, targets=(9.0, 5.0))
    algo = decision_mamba.METHOD.make(config, SPEC, torch.Generator().manual_seed(1))
    return algo, decision_mamba.METHOD.stages(algo, Task(SPEC, toy_data()), Run(steps=200))


def discrete():
    config = dqn.Config(
        batch=16, hidden=(16,), warmup=50, capacity=120, steps=900, update_every=4, target_every=40
    )
    envs, spec = Vector([CARTPOLE] * 2, [5, 6]), Spec(4, 2, discrete=True)
    algo = dqn.METHOD.make(config, spec, torch.Generator().manual_seed(1))
    return algo, dqn.METHOD.stages(algo, Task(spec, envs=lambda: envs), Run(steps=900))


def on_policy():
    """With a rate that falls, a pass that is under way, and statistics that move."""
    config = ppo.Config(batch=16, hidden=(16,), rollout=32, epochs=3)
    envs = Vector([HOPPER] * 2, [5, 6])
    algo = ppo.METHOD.make(config, SPEC, torch.Generator().manual_seed(1))
    return algo, ppo.METHOD.stages(algo, Task(SPEC, envs=lambda: envs), Run(steps=1100))


METHODS = {
    "offline": offline,
    "online": online,
    "sequence": sequence,
    "discrete": discrete,
    "on_policy": on_policy,
}
TOYS = {
    "two_stages": toys.two_stages,
    "inner_fit": toys.inner_fit,
    "recurrent": toys.recurrent,
    "two_players": toys.two_players,
}
KINDS = METHODS | TOYS


def evaluation(kind=None):
    make = {"discrete": CARTPOLE, "two_players": toys.Tug}.get(kind, HOPPER)
    player = Evaluator(make, width=2)
    return lambda algo, episodes: {"return": player(algo, episodes)["return"]}


def run(kind, folder, resume=False, pace=0.0, speed="auto"):
    torch.set_num_threads(1)
    algo, stages = KINDS[kind]()
    report = lambda told: time.sleep(pace)  # noqa: E731
    if pace:
        wait = (1, lambda: time.sleep(pace))
        stages = [replace(stage, between=[*stage.between, wait]) for stage in stages]
    curve = fit(
        algo, stages, Path(folder), evaluation(kind), SCHEDULE, [0], kind, resume, report, speed
    )
    return algo, curve


def assert_same_files(one, other):
    left, right = (checkpoint.load(folder / "checkpoint.pt") for folder in (one, other))
    assert all(saved["curve"].pop("seconds") > 0 for saved in (left, right))
    assert_same(left, right)
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


def assert_same(left, right, path=""):
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), path
        for i, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right, path


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        *itertools.product(["offline", "online"], [0.15, 0.5, 0.85]),
        *itertools.product(["sequence", "discrete", "on_policy", *TOYS], [0.5]),
    ],
)
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(tmp_path, kind, moment):
    """SIGKILL, then resume: parameters, generators, replay, metrics and score are bit-equal."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    run(kind, whole)
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=run, args=(kind, killed, False, 0.005))
    worker.start()
    target = 1 + int(moment * 4)  # points behind it, the last perhaps unplayed, when it dies
    deadline = time.monotonic() + 60
    while worker.is_alive() and time.monotonic() < deadline:
        path = killed / "checkpoint.pt"
        if path.exists():
            saved = checkpoint.load(path)
            if len(saved["curve"]["steps"]) + (saved["pending"] is not None) >= target:
                break
        time.sleep(0.01)
    time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    run(kind, killed, resume=True)
    assert_same_files(whole, killed)


@pytest.mark.parametrize("kind", list(KINDS))
def test_captured_runs_write_the_files_of_eager_runs(tmp_path, monkeypatch, kind):
    """A replay that grows and wraps, and a teacher that is refreshed, are seen by replays."""
    said = []
    monkeypatch.setattr(Loop, "tell", lambda self, stage, last=False: said.extend(self.notes))
    for speed in ("eager", "graph"):
        (tmp_path / speed).mkdir()
        run(kind, tmp_path / speed, speed=speed)
    assert not said  # captured indeed
    assert_same_files(tmp_path / "eager", tmp_path / "graph")


def test_how_updates_are_made_is_told_once_it_is_decided(tmp_path):
    algo, (stage,) = offline()
    told = []
    fit(algo, [stage], tmp_path, None, SCHEDULE, [0], "toy", report=lambda p: told.extend(p.notes))
    assert len(told) == 1
    assert "eager" in told[0]
    assert "captured" in told[0]


def test_interrupted_between_two_rows_of_metrics_and_resumed_equals_uninterrupted(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    run("offline", whole)
    algo, stages = offline()
    update, steps = stages[0].update, itertools.count()

    def interrupting(batch, turn):
        if next(steps) == 77:
            os.kill(os.getpid(), signal.SIGINT)
        return update(batch, turn)

    stages = [replace(stages[0], update=interrupting)]
    with pytest.raises(Interrupted, match="checkpoint written"):
        fit(algo, stages, stopped, evaluation(), SCHEDULE, [0], "offline", speed="eager")
    saved = checkpoint.load(stopped / "checkpoint.pt")
    assert saved["step"] == 78
    saved["curve"]["seconds"] = 1e6
    checkpoint.save(stopped / "checkpoint.pt", saved)
    _, curve = run("offline", stopped, resume=True)
    assert 1e6 < curve.seconds < 1e6 + 60  # of both processes
    assert_same_files(whole, stopped)


def test_a_stop_is_received_although_nobody_reads_what_is_said_about_it(monkeypatch):
    def broken(*args):
        raise BrokenPipeError

    monkeypatch.setattr("os.write", broken)
    stopping = StopRequests()
    stopping.handle(signal.SIGTERM, None)
    stopping.handle(signal.SIGINT, None)
    assert stopping.received == [signal.SIGTERM, signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        stopping.handle(signal.SIGINT, None)


def toy_player():
    """As `offrl.runs.evaluate.player`, of the offline toy."""
    algo, _ = offline()
    play = evaluation()

    def played(path):
        load_state(algo, checkpoint.load(path)["algo"])
        return play(algo, SCHEDULE.eval_episodes)

    return played


def deadly_player():
    os._exit(3)


def failing_player():
    raise ValueError("no such robot")


class Killed(Exception):
    pass


def trained_beside(folder, player=toy_player, between=()):
    folder.mkdir(exist_ok=True)
    algo, (stage,) = offline()
    return fit(
        algo,
        [replace(stage, between=between)],
        folder,
        evaluation(),
        SCHEDULE,
        [0],
        "offline",
        worker=AsyncEvaluator(player),
    )


def test_points_played_beside_the_training_are_those_played_within_it(tmp_path):
    inline = tmp_path / "inline"
    inline.mkdir()
    run("offline", inline)
    curve = trained_beside(tmp_path / "beside")
    assert curve.steps == [40, 80, 120, 160, 200]
    assert_same_files(inline, tmp_path / "beside")


def patient_player(sign):
    play = toy_player()

    def played(path):
        for _ in range(300):
            if sign.exists():
                return play(path)
            time.sleep(0.1)
        raise ValueError("training waited for the point")

    return played


def test_training_goes_on_past_rows_of_metrics_while_a_point_is_played(tmp_path):
    """The point of 40 is played only after update 60 has begun; the files are in order."""
    inline, sign = tmp_path / "inline", tmp_path / "sign"
    inline.mkdir()
    run("offline", inline)
    steps = itertools.count()
    signs = lambda: sign.touch() if next(steps) == 60 else None  # noqa: E731
    trained_beside(tmp_path / "beside", partial(patient_player, sign), between=[(1, signs)])
    assert_same_files(inline, tmp_path / "beside")


def test_a_run_that_dies_while_a_point_is_played_plays_it_again(tmp_path):
    inline, died = tmp_path / "inline", tmp_path / "died"
    inline.mkdir()
    run("offline", inline)

    steps = itertools.count()

    def dies():
        if next(steps) == 85:
            raise Killed

    with pytest.raises(Killed):
        trained_beside(died, between=[(1, dies)])
    saved = checkpoint.load(died / "checkpoint.pt")
    assert (saved["pending"], saved["curve"]["steps"]) == (80, [40])
    run("offline", died, resume=True)
    assert_same_files(inline, died)


@pytest.mark.parametrize(
    ("player", "error", "told"),
    [(deadly_player, OSError, "exit code 3"), (failing_player, OSError, "no such robot")],
)
def test_a_failure_of_the_process_that_evaluates_ends_the_run(tmp_path, player, error, told):
    with pytest.raises(error, match=told):
        trained_beside(tmp_path, player)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["pending"] == 40


def slow_player():
    play = toy_player()
    return lambda path: time.sleep(1) or play(path)


def stopped_run(folder):
    """In a process group of its own: exit code 7 for an interrupt with its checkpoint."""
    os.setsid()
    torch.set_num_threads(1)
    try:
        trained_beside(folder, slow_player, between=[(1, lambda: time.sleep(0.02))])
    except Interrupted:
        os._exit(7)


def test_a_signal_to_the_whole_group_leaves_the_interrupts_checkpoint(tmp_path):
    """The evaluating process gets it too, while a point is pending."""
    inline, stopped = tmp_path / "inline", tmp_path / "stopped"
    inline.mkdir()
    run("offline", inline)
    worker = multiprocessing.get_context("fork").Process(target=stopped_run, args=(stopped,))
    worker.start()
    path, deadline = stopped / "checkpoint.pt", time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and checkpoint.load(path)["pending"] == 40:
            break
        time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(worker.pid, signal.SIGTERM)
    worker.join(60)
    assert worker.exitcode == 7
    saved = checkpoint.load(path)
    assert saved["step"] > 40
    assert (saved["pending"], saved["curve"]["steps"]) == (None, [40])
    run("offline", stopped, resume=True)
    assert_same_files(inline, stopped)


def test_divergence_names_the_first_bad_quantity_and_keeps_the_last_good_checkpoint(tmp_path):
    algo, stages = offline()
    update, steps = stages[0].update, itertools.count()

    def poisoned(batch, turn):
        if next(steps) == 95:
            batch = batch | {"reward": batch["reward"] * float("nan")}
        return update(batch, turn)

    stages = [replace(stages[0], update=poisoned)]
    with pytest.raises(Diverged, match=r"critics/loss .* at update 95"):
        fit(algo, stages, tmp_path, evaluation(), SCHEDULE, [0], "offline", speed="eager")
    kept = checkpoint.load(tmp_path / "checkpoint.pt")
    assert kept["step"] == 80
    assert all(v.isfinite().all() for v in kept["algo"]["actor"].values() if torch.is_tensor(v))


def test_metrics_are_means_over_the_updates_of_a_row(tmp_path):
    algo, stages = offline()
    seen, update = [], stages[0].update

    def recording(batch, turn):
        metrics = update(batch, turn)
        seen.append(float(metrics["critics/loss"]))
        return metrics

    stages = [replace(stages[0], update=recording)]
    fit(algo, stages, tmp_path, None, SCHEDULE, [0], "offline", speed="eager")
    with open(tmp_path / "metrics.csv") as file:
        rows = [r for r in csv.DictReader(file) if r["name"] == "critics/loss"]
    assert [int(r["step"]) for r in rows] == list(range(10, 201, 10))
    for i, row in enumerate(rows):
        assert float(row["value"]) == pytest.approx(sum(seen[10 * i : 10 * i + 10]) / 10, rel=1e-6)


def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path):
    run("offline", tmp_path)
    with pytest.raises(ValueError, match="belongs to offline, not to sac"):
        fit(*offline(), tmp_path, None, SCHEDULE, [0], "sac", resume=True)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/offrl-was-here",)


def test_a_tampered_checkpoint_is_refused_and_runs_no_code(tmp_path):
    marker = Path("/tmp/offrl-was-here")
    marker.unlink(missing_ok=True)
    path = tmp_path / "checkpoint.pt"
    torch.save({"algo": Evil()}, path)
    with pytest.raises(ValueError, match="never loaded"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.load(path)
    assert not marker.exists()


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"x": torch.zeros(10_000)})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        checkpoint.load(path)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"x": torch.ones(3)})

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="previous checkpoint is intact"):
        checkpoint.save(path, {"x": torch.zeros(3)})
    assert torch.equal(checkpoint.load(path)["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_metric_that_explodes_stops_the_run_while_it_is_finite(tmp_path):
    algo, (stage,) = offline()
    huge = {"critics/q": torch.tensor(1e20)}
    steps = itertools.count()
    update = lambda *given: huge if next(steps) == 57 else stage.update(*given)  # noqa: E731
    stages = [replace(stage, update=update)]
    with pytest.raises(Diverged, match=r"critics/q became .* larger than 1e\+15 at update 57"):
        fit(algo, stages, tmp_path, None, SCHEDULE, [0], "toy", speed="eager")


def test_an_interrupt_after_a_divergence_names_the_metric_that_went_wrong(tmp_path):
    algo, (stage,) = offline()

    steps = itertools.count()

    def update(batch, turn):
        metrics = stage.update(batch, turn)
        if next(steps) == 3:
            for p in algo.actor.parameters():
                p.data.fill_(torch.nan)
            os.kill(os.getpid(), signal.SIGINT)
            return {"actor/loss": torch.tensor(torch.nan)}
        return metrics

    stages = [replace(stage, update=update)]
    with pytest.raises(Diverged, match=r"actor/loss became NaN.* at update 3"):
        fit(algo, stages, tmp_path, None, SCHEDULE, [0], "toy", speed="eager")
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 0  # of the stage's beginning


def test_a_resumed_run_tells_where_it_began(tmp_path):
    told = []
    algo, (stage,) = offline()

    steps = itertools.count()

    def update(batch, turn):
        if next(steps) == 79:
            os.kill(os.getpid(), signal.SIGINT)
        return stage.update(batch, turn)

    stages = [replace(stage, update=update)]
    with pytest.raises(Interrupted):
        fit(algo, stages, tmp_path, None, SCHEDULE, [0], "toy", speed="eager")
    algo, stages = offline()
    fit(algo, stages, tmp_path, None, SCHEDULE, [0], "toy", resume=True, report=told.append)
    assert (told[-1].first, told[-1].step) == (80, 200)
