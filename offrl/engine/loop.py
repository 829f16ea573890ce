"""The loop: stages, evaluation, metrics, checkpoints, exact resume. Knows no algorithm."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offrl.engine import checkpoint
from offrl.engine.async_evaluator import Beside
from offrl.engine.capture.updates import Speed, Updates
from offrl.engine.log import Diverged, Log, Meter
from offrl.engine.method import Algorithm, Sampler, Stage
from offrl.engine.stop import Interrupted, StopRequests, stop_requests
from offrl.engine.threads import fastest

Evaluate = Callable[[Algorithm, int], dict[str, Tensor]]  # (algo, episodes) -> name -> (*S, n)


@dataclass(frozen=True)
class Schedule:
    """How often things happen, in the steps that are shown.

    Attributes:
        log_every: updates between two rows of metrics.
        eval_every, eval_episodes: points of the learning curve.
        final_episodes: of the last evaluation, whose mean is the score.
        snapshot_every: keep a copy of the algorithm at these steps; None for none.
    """

    log_every: int = 1000
    eval_every: int = 5000
    eval_episodes: int = 10
    final_episodes: int = 100
    snapshot_every: int | None = None


@dataclass
class Progress:
    """What the caller is told: shown on one line. A resumed run's first step is not 0.

    Attributes:
        notes: how this stage's updates are made, as it is decided; told once.
    """

    stage: str
    first: int
    step: int
    total: int
    per_second: float
    score: float | None
    notes: list[str] = field(default_factory=list)


@dataclass
class Curve:
    """Evaluations so far: the step and, per name, raw values (*S, episodes) of each point.

    Attributes:
        threads: of each stage that chose their number.
        seconds: of training and evaluation until the last checkpoint, over all sessions of a run
            that was resumed.
    """

    steps: list[int] = field(default_factory=list)
    points: list[dict[str, Tensor]] = field(default_factory=list)
    final: dict[str, Tensor] | None = None
    threads: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


def fit(
    algo: Algorithm,
    stages: list[Stage],
    folder: Path,
    evaluate: Evaluate | None,
    schedule: Schedule,
    seeds: list[int],
    label: str,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    speed: Speed = "auto",
    beside: Beside | None = None,
    threads: Sequence[int] = (),
) -> Curve:
    """Run the stages to their end; returns the learning curve and the final evaluation.

    A checkpoint is written at every evaluation, at the end of every stage, on an interrupt, and
    when the run is done. Killed at any moment, the run continues from the last one; on a CPU it
    then ends bit-equal to an uninterrupted run.

    Args:
        folder: run directory of this group of seeds.
        evaluate: returns raw values per episode; None to skip evaluation.
        seeds: the seed behind each stacked entry.
        label: name of the method, checked on resume.
        resume: continue from the checkpoint in `folder` if there is one.
        report: told the progress about twice a second.
        speed: how updates are made; see `engine.capture.Updates`.
        beside: plays the points of the curve but the last, in a process of its own; values and
            files are those of `evaluate`, which then plays the last point and the final ones.
        threads: numbers among which each stage chooses by measurement when it begins; none to
            leave torch's.

    Raises:
        Diverged: when a metric or parameter stopped being finite, or a metric exploded; the last
            checkpoint stays.
        Interrupted: after SIGINT or SIGTERM, with the checkpoint written.
        ValueError: if the checkpoint belongs to another method.
        OSError: if the disk is full; the last checkpoint stays.
    """
    path = folder / "checkpoint.pt"
    saved = checkpoint.load(path) if resume and path.exists() else None
    if saved is not None and saved["label"] != label:
        raise ValueError(f"{path} belongs to {saved['label']}, not to {label}")
    runner = Runner(
        algo,
        stages,
        folder,
        evaluate,
        schedule,
        seeds,
        label,
        report,
        saved,
        speed,
        beside,
        threads,
    )
    try:
        return runner.run()
    finally:
        runner.log.close()
        if beside is not None:
            beside.close()


class Runner:
    """The state of one `fit`: where it stands, and what it writes."""

    def __init__(
        self,
        algo: Algorithm,
        stages: list[Stage],
        folder: Path,
        evaluate: Evaluate | None,
        schedule: Schedule,
        seeds: list[int],
        label: str,
        report: Callable[[Progress], None],
        saved: dict[str, Any] | None,
        speed: Speed,
        beside: Beside | None,
        threads: Sequence[int] = (),
    ):
        self.algo, self.stages, self.folder = algo, stages, folder
        self.evaluate, self.schedule, self.report = evaluate, schedule, report
        self.seeds, self.label, self.speed = seeds, label, speed
        self.notes: list[str] = []  # how updates are made
        self.beside, self.threads = beside, threads
        self.pending: int | None = None  # the step whose point is being played
        self.held: list[tuple[int, str, dict[str, list[float]]]] = []  # rows that come after it
        self.index = self.step = 0
        self.begun = False  # whether the current stage's `before` has run
        self.curve, self.meter = Curve(), Meter()
        self.parts = {name: part for stage in stages for name, part in stage.parts.items()}
        keep = purge = None
        if saved is not None:
            self.index, self.step, self.begun = saved["stage"], saved["step"], saved["begun"]
            self.curve, self.pending = Curve(**saved["curve"]), saved.get("pending")
            algo.load(saved["algo"])
            self.meter.load(saved["meter"])
            for name, part in self.parts.items():
                part.load(saved["parts"][name])
            keep, purge = saved["metrics_bytes"], saved["shown"] + 1
        self.log = Log(folder, seeds, keep, purge)
        self.first = self.shown if saved is not None else 0
        self.began = time.monotonic() - self.curve.seconds
        self.told = self.told_step = 0.0

    def run(self) -> Curve:
        if self.pending is not None:  # the checkpoint was written while its point was played
            self.begin()
        with stop_requests() as stopping:
            while self.index < len(self.stages):
                self.run_stage(self.stages[self.index], stopping)
                self.index, self.step, self.begun = self.index + 1, 0, False
                self.save()
        if self.evaluate is not None and self.curve.final is None:
            self.curve.final = self.evaluate(self.algo, self.schedule.final_episodes)
            self.save()
        return self.curve

    def run_stage(self, stage: Stage, stopping: StopRequests) -> None:
        with stopping.at_once():  # nothing is lost: the last stage's end is in the checkpoint
            if self.threads:
                torch.set_num_threads(1)  # until this stage's are known
            if not self.begun and stage.before is not None:
                stage.before()
            self.begun = True
            sample = stage.start()
            self.set_threads(stage, sample)
            say: Callable[[str], None] = lambda text: self.notes.append(text)  # noqa: E731
            update = Updates(stage, sample, self.algo.generator, self.speed, say)
        while stage.steps is None or self.step < stage.steps:
            at_border = self.step % stage.cycle == 0
            if stage.steps is None and at_border and stage.stop is not None and stage.stop():
                break
            for period, work in stage.between:
                if self.step % period == 0:
                    work()
            self.meter.add(update(self.step), self.step)
            self.step += 1
            self.after_update(stage)
            if stopping.received:
                self.save()
                raise Interrupted(f"stopped at step {self.shown}; checkpoint written")
        self.flush(stage)
        self.settle()

    def set_threads(self, stage: Stage, sample: Sampler) -> None:
        if len(self.threads) < 2:
            return
        if stage.name not in self.curve.threads:
            best, told = fastest(self.algo, stage, sample, self.threads, self.speed)
            self.curve.threads[stage.name] = best
            self.notes.append(told)
        torch.set_num_threads(self.curve.threads[stage.name])

    def after_update(self, stage: Stage) -> None:
        every = self.schedule
        if self.step % every.log_every == 0:
            self.flush(stage)
        last = self.step == stage.steps
        if self.passes(every.eval_every) or last:
            if self.evaluate is not None:
                self.flush(stage)
                self.settle()
                if stage.measure is not None:
                    found = stage.measure().items()
                    means = {name: value.double().reshape(-1).tolist() for name, value in found}
                    self.log.write(self.shown, "evaluation", means)
                self.pending = self.shown
                if self.beside is None or last:
                    self.collect(self.evaluate(self.algo, every.eval_episodes))
            if not last:
                self.save()
            if self.pending is not None:
                self.begin()
        if every.snapshot_every and (self.passes(every.snapshot_every) or last):
            snapshots = self.folder / "snapshots"
            snapshots.mkdir(exist_ok=True)
            content = {"format": 1, "label": self.label, "seeds": self.seeds, "step": self.shown}
            checkpoint.save(
                snapshots / f"{self.shown:09d}.pt", content | {"algo": self.algo.state()}
            )
        self.tell(stage)

    @property
    def shown(self) -> int:
        """The step that people see: updates, or environment steps of an online method."""
        return self.shown_at(self.step)

    def shown_at(self, step: int) -> int:
        if self.index == len(self.stages):
            return step
        stage = self.stages[self.index]
        return stage.offset + int(step * stage.stride)

    def passes(self, period: int) -> bool:
        """Whether the last update reached or passed a multiple of a period of shown steps."""
        return self.shown // period > self.shown_at(self.step - 1) // period

    def begin(self) -> None:
        """Play the point of the checkpoint just written or loaded."""
        if self.beside is not None:
            self.beside.begin(self.folder / "checkpoint.pt")
        elif self.evaluate is not None:
            self.collect(self.evaluate(self.algo, self.schedule.eval_episodes))

    def collect(self, point: dict[str, Tensor]) -> None:
        """Put the pending point into the curve and the log."""
        assert self.pending is not None
        step, self.pending = self.pending, None
        self.curve.steps.append(step)
        self.curve.points.append(point)
        for name, values in point.items():
            means = values.double().mean(-1).reshape(-1).tolist()
            self.log.write(step, "evaluation", {name: means})

    def settle(self) -> None:
        """Wait for the point that is being played beside."""
        if self.pending is not None and self.beside is not None:
            self.collect(self.beside.result())
        for row in self.held:
            self.log.write(*row)
        self.held = []

    def flush(self, stage: Stage) -> None:
        """One row of each metric, in the file once the point before it is there."""
        try:
            if self.meter.values:
                self.held.append((self.shown, stage.name, self.meter.flush()))
        except Diverged:
            self.settle()
            raise
        if self.pending is None or self.beside is None or self.beside.ready():
            self.settle()

    def tell(self, stage: Stage) -> None:
        now = time.perf_counter()
        if now - self.told < 0.5 and self.step != stage.steps:
            return
        updates = (self.step - self.told_step) / (now - self.told) if self.told else 0.0
        speed = updates * float(stage.stride)
        if self.step >= self.told_step:
            self.log.speed(self.shown, speed)
        self.told, self.told_step = now, self.step
        point = self.curve.points[-1] if self.curve.points else {}
        score = float(next(iter(point.values())).mean()) if point else None
        total = self.shown_at(stage.steps) if stage.steps else 0
        notes, self.notes = self.notes, []
        self.report(Progress(stage.name, self.first, self.shown, total, speed, score, notes))

    def save(self) -> None:
        if self.pending != self.shown:
            self.settle()
        state = self.algo.state()
        try:
            check_finite(state)
        except Diverged:
            self.meter.flush()  # a metric that went wrong before names the cause
            raise
        self.curve.seconds = time.monotonic() - self.began
        content = {
            "format": 1,
            "label": self.label,
            "seeds": self.seeds,
            "algo": state,
            "stage": self.index,
            "step": self.step,
            "begun": self.begun,
            "shown": self.shown,
            "parts": {name: part.state() for name, part in self.parts.items()},
            "meter": self.meter.state(),
            "curve": self.curve.state(),
            "pending": self.pending,
            "metrics_bytes": self.log.flush(),
        }
        checkpoint.save(self.folder / "checkpoint.pt", content)


def check_finite(state: dict[str, Any], where: str = "") -> None:
    """Walk a state; the first tensor with a NaN or infinity stops the run.

    Raises:
        Diverged: naming the tensor.
    """
    for name, value in state.items():
        if isinstance(value, dict):
            check_finite(value, f"{where}{name}.")
        elif isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise Diverged(
                f"{where}{name} holds NaN or infinite values; the last good checkpoint stays"
            )
