"""The loop: stages, evaluation, metrics, checkpoints, exact resume. Knows no algorithm."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from offrl.engine import checkpoint
from offrl.engine.capture.updates import Speed, Updates
from offrl.engine.curve import AsyncEvaluator, Curve, Points, Schedule
from offrl.engine.log import Log, Meter
from offrl.engine.method import Algorithm, Evaluate, Part, Stage
from offrl.engine.minimize import Host, Stopped
from offrl.engine.state import load_state, state_of, tensors
from offrl.engine.stop import stop_requests
from offrl.errors import Diverged, Interrupted


@dataclass
class Progress:
    """What the caller is told: shown on one line."""

    stage: str
    first: int  # step of this process; 0 unless the run was resumed
    step: int
    total: int  # steps at the end of the stage, 0 if not known
    per_second: float
    score: float | None
    headline: str = "return"  # name of the values whose mean is the score
    notes: list[str] = field(default_factory=list)  # how updates are made, told once it is decided


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
    worker: AsyncEvaluator | None = None,
    headline: str = "return",
) -> Curve:
    """Run the stages to their end; returns the learning curve and the final evaluation.

    A checkpoint is written when a stage begins and ends, at every point of the learning curve,
    before work between updates that is known to fit models, on an interrupt, and at the end. Killed
    at any moment, the run continues from the last one; on a CPU it then ends bit-equal to an
    uninterrupted run.

    Args:
        folder: of this group of seeds.
        evaluate: see `Task`, as for `headline`.
        seeds: the seed behind each stacked entry.
        label: name of the method, checked on resume.
        resume: continue from the checkpoint in `folder` if there is one.
        report: told the progress about twice a second.
        speed: how updates are made; see `engine.capture.updates.Updates`.
        worker: plays the points of the curve in a process of its own; values and files are those of
            `evaluate`, which then plays the final evaluation only.

    Raises:
        Diverged: when a metric or parameter stopped being finite, or a metric exploded.
        Interrupted: after SIGINT or SIGTERM, with the checkpoint written.
        ValueError: if the checkpoint belongs to another method.
        OSError: if the disk is full. After this and `Diverged` the last checkpoint stays.
    """
    path = folder / "checkpoint.pt"
    saved = checkpoint.load(path) if resume and path.exists() else None
    if saved is not None and saved["label"] != label:
        raise ValueError(f"{path} belongs to {saved['label']}, not to {label}")
    log = Log(folder, seeds, saved)
    curve = Curve(**saved["curve"]) if saved is not None else Curve(headline)
    points = Points(evaluate, schedule, curve, log, worker)
    about = {"label": label, "seeds": seeds, "headline": headline}
    try:
        loop = Loop(algo, stages, folder, schedule, about, report, speed, points)
        if saved is not None:
            loop.load(saved)
        return loop.run()
    except Diverged:
        points.settle()
        raise
    finally:
        log.close()
        if worker is not None:
            worker.close()


@dataclass
class Loop:
    """The state of one `fit`: where it stands, and what it writes."""

    algo: Algorithm
    stages: list[Stage]
    folder: Path
    schedule: Schedule
    about: dict[str, Any]  # label, seeds and headline, which the files of a run carry
    report: Callable[[Progress], None]
    speed: Speed
    points: Points
    index: int = 0  # of the stage
    step: int = 0  # updates made in it
    base: int = 0  # steps that people saw in the stages before
    begun: bool = False  # whether the current stage's `before` has run
    meter: Meter = field(default_factory=Meter)
    notes: list[str] = field(default_factory=list)  # how updates are made
    fitting: set[int] = field(default_factory=set)  # which of the stage's works fit models
    told: tuple[float, int] | None = None  # the last progress: its time and step
    saved: tuple[int, int] | None = None  # stage and step of the last checkpoint

    def load(self, saved: dict[str, Any]) -> None:
        self.index, self.step, self.base = saved["stage"], saved["step"], saved["base"]
        self.begun, self.points.pending = saved["begun"], saved["pending"]
        self.fitting = set(saved.get("fitting", ()))  # absent in older checkpoints
        load_state(self.algo, saved["algo"])
        self.meter.load(saved["meter"])
        for name, part in self.parts():
            part.load(saved["parts"][name], self.folder / name)

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Each once, for stages may share one; ValueError if two have the same name."""
        found: dict[str, Part] = {}
        for stage in self.stages:
            for name, part in stage.parts.items():
                if found.setdefault(name, part) is not part:
                    raise ValueError(f"two stages have different parts of the name {name!r}")
        yield from found.items()

    def run(self) -> Curve:
        self.first, self.began = self.global_step, time.monotonic() - self.points.curve.seconds
        if self.points.pending is not None:  # the checkpoint was written before it was played
            self.points.play(self.algo, self.folder / "checkpoint.pt")
        with stop_requests() as self.stopping:
            self.host = Host(self.speed, self.notes.append, self.row, self.stopping)
            with self.host.lent():
                while self.index < len(self.stages):
                    self.run_stage(self.stages[self.index])
                self.stop_if_asked()
        if self.points.finish(self.algo):
            self.save()
        return self.points.curve

    def run_stage(self, stage: Stage) -> None:
        with self.stopping.at_once():  # nothing is lost: the last stage's end is in the checkpoint
            if not self.begun and stage.before is not None:
                stage.before()
            drawn = self.algo.generator.get_state()
            sample = stage.start()
            if not torch.equal(drawn, self.algo.generator.get_state()):
                raise ValueError(
                    f"`start` of stage {stage.name} draws from the run's generator, but runs again "
                    "when the run is resumed: draw in `before`, or from a generator of its own"
                )
        if not self.begun:
            self.begun = True
            self.save()
        update = Updates(stage.update, sample, stage.turn, self.algo, self.speed, self.notes.append)
        while not self.at_end(stage):
            self.work_between(stage)
            self.meter.add(update(self.step), self.step)
            self.step += 1
            self.after_update(stage)
            if self.stopping:
                self.save()
                self.stop_if_asked()
        self.end(stage)

    def stop_if_asked(self) -> None:
        if self.stopping:
            raise Interrupted(f"stopped at step {self.global_step}; checkpoint written")

    def at_end(self, stage: Stage) -> bool:
        if stage.steps is not None:
            return self.step >= stage.steps
        return stage.stop is not None and stage.stop()

    def work_between(self, stage: Stage) -> None:
        """Do what is due before the next update. Stopped in a fit, the run goes back to here."""
        due = [i for i, (period, _) in enumerate(stage.between) if self.step % period == 0]
        if not self.fitting.isdisjoint(due) and self.saved != (self.index, self.step):
            self.save()
        try:
            for i in due:
                begun = self.host.begun
                if found := stage.between[i][1]():
                    self.meter.add(found, self.step)
                if self.host.begun > begun:
                    self.fitting.add(i)
        except Stopped:
            raise Interrupted(
                f"stopped in a fit of stage {stage.name}; the checkpoint is that of its update "
                f"{self.saved[1] if self.saved else 0}"
            ) from None

    def after_update(self, stage: Stage) -> None:
        """What is due at a step; the checkpoint comes last, for a resumed run goes on behind it."""
        every = self.schedule
        if self.step % every.log_every == 0:
            self.row(self.meter.flush())
        if every.snapshot_every and self.passes(every.snapshot_every):
            self.snapshot()
        if self.passes(every.eval_every) and self.step != stage.steps:
            self.add_point(stage)
        self.tell(stage)

    def end(self, stage: Stage) -> None:
        """The last point and copy of a stage, what it hands on, and the step to the next one."""
        self.row(self.meter.flush())
        if self.schedule.snapshot_every and stage.evaluate:
            self.snapshot()
        self.add_point(stage, here=True)
        self.tell(stage, last=True)
        self.points.settle()
        if stage.finish is not None:
            with self.stopping.at_once():
                stage.finish()
        self.base, self.index, self.step = self.global_step, self.index + 1, 0
        self.begun, self.fitting = False, set()
        self.save()

    def add_point(self, stage: Stage, here: bool = False) -> None:
        """A checkpoint, and its point of the learning curve where the stage has any.

        It is played `here` by a process that would wait for it anyway.
        """
        step = self.global_step
        if self.points.evaluate is None or not stage.evaluate or self.points.last == step:
            self.save()
            return
        self.row(self.meter.flush())
        if stage.measure is not None:
            found = stage.measure().items()
            means = {name: value.double().reshape(-1).tolist() for name, value in found}
            self.points.row(step, "evaluation", means)
        self.points.settle()
        self.points.pending = step
        self.save()
        self.points.play(self.algo, self.folder / "checkpoint.pt", here)

    @property
    def global_step(self) -> int:
        """The step that people see: updates, or environment steps of an online method."""
        ended = self.index == len(self.stages)
        return self.base if ended else self.base + self.stages[self.index].clock(self.step)

    def passes(self, period: int) -> bool:
        """Whether the last update reached or passed a multiple of a period of steps."""
        before = self.base + self.stages[self.index].clock(self.step - 1)
        return self.global_step // period > before // period

    def row(self, means: dict[str, list[float]]) -> None:
        """One row of each metric of the current stage."""
        self.points.row(self.global_step, self.stages[self.index].name, means)

    def tell(self, stage: Stage, last: bool = False) -> None:
        now, step = time.perf_counter(), self.global_step
        then, there = self.told or (-math.inf, step)
        if now - then < 0.5 and not last:
            return
        self.told, speed = (now, step), (step - there) / (now - then)
        self.points.log.speed(step, speed)
        total = self.base + stage.clock(stage.steps) if stage.steps else 0
        notes, self.notes[:] = list(self.notes), []
        score, headline = self.points.curve.score, self.points.curve.headline
        self.report(Progress(stage.name, self.first, step, total, speed, score, headline, notes))

    def snapshot(self) -> None:
        folder, step = self.folder / "snapshots", self.global_step
        folder.mkdir(exist_ok=True)
        content = self.about | {"step": step, "algo": self.state()}
        checkpoint.save(folder / f"{step:09d}.pt", content)

    def save(self) -> None:
        """Write the checkpoint, with the points and rows of metrics before it."""
        self.points.settle()
        self.points.curve.seconds = time.monotonic() - self.began
        content = {
            "algo": self.state(),
            "stage": self.index,
            "step": self.step,
            "base": self.base,
            "begun": self.begun,
            "fitting": sorted(self.fitting),
            "global_step": self.global_step,
            "parts": {name: part.save(self.folder / name) for name, part in self.parts()},
            "meter": self.meter.state(),
            "curve": vars(self.points.curve),
            "pending": self.points.pending,
            "metrics_bytes": self.points.log.flush(),
        }
        checkpoint.save(self.folder / "checkpoint.pt", self.about | content)
        self.saved = self.index, self.step

    def state(self) -> dict[str, Any]:
        """The algorithm's state, in which nothing is NaN and no network or optimizer infinite.

        Raises:
            Diverged: naming the first such tensor, or the metric that went wrong before.
        """
        state = state_of(self.algo)
        for name, part in state.items():
            for path, value in tensors(part, name):
                bad = ~value.isfinite() if isinstance(part, dict) else value.isnan()
                if bool(bad.any()):
                    self.meter.flush()
                    raise Diverged(
                        f"{path} holds NaN or infinite values; the last good checkpoint stays"
                    )
        return state
