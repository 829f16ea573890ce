"""The loop: stages, evaluation, metrics, checkpoints, exact resume. Knows no algorithm."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from offrl.engine import checkpoint, minimize
from offrl.engine.capture.updates import Speed, Updates
from offrl.engine.curve import AsyncEvaluator, Curve, Points, Schedule
from offrl.engine.log import Log, Meter
from offrl.engine.method import Algorithm, Evaluate, Stage
from offrl.engine.state import load_state, state_of, tensors
from offrl.engine.stop import stop_requests
from offrl.errors import Diverged, Interrupted


@dataclass
class Progress:
    """What the caller is told: shown on one line. A resumed run's first step is not 0.

    Attributes:
        total: steps that people will have seen at the end of the stage, 0 if not known.
        notes: how this stage's updates are made, as it is decided; told once.
    """

    stage: str
    first: int
    step: int
    total: int
    per_second: float
    score: float | None
    notes: list[str] = field(default_factory=list)


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

    A checkpoint is written when a stage begins, at every point of the learning curve, at the end of
    every stage, on an interrupt, and when the run is done. Killed at any moment, the run continues
    from the last one; on a CPU it then ends bit-equal to an uninterrupted run.

    Args:
        folder: run directory of this group of seeds.
        evaluate: returns raw values per episode; None to skip evaluation.
        seeds: the seed behind each stacked entry.
        label: name of the method, checked on resume.
        resume: continue from the checkpoint in `folder` if there is one.
        report: told the progress about twice a second.
        speed: how updates are made; see `engine.capture.updates.Updates`.
        headline: name of the values of `evaluate` whose mean is the score.
        worker: plays the points of the curve in a process of its own; values and files are those of
            `evaluate`, which then plays the final evaluation only.

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
    log = Log(folder, seeds, saved)
    curve = Curve(**saved["curve"]) if saved is not None else Curve(headline)
    points = Points(evaluate, schedule, curve, log, worker)
    try:
        return Loop(
            algo, stages, folder, schedule, seeds, label, report, speed, points, saved
        ).run()
    finally:
        log.close()
        if worker is not None:
            worker.close()


class Loop:
    """The state of one `fit`: where it stands, and what it writes."""

    def __init__(
        self,
        algo: Algorithm,
        stages: list[Stage],
        folder: Path,
        schedule: Schedule,
        seeds: list[int],
        label: str,
        report: Callable[[Progress], None],
        speed: Speed,
        points: Points,
        saved: dict[str, Any] | None,
    ):
        self.algo, self.stages, self.folder = algo, stages, folder
        self.schedule, self.report, self.speed = schedule, report, speed
        self.seeds, self.label = seeds, label
        self.points, self.curve, self.log = points, points.curve, points.log
        self.notes: list[str] = []  # how updates are made
        self.index = self.step = 0  # stage, and updates made in it
        self.base = 0  # steps that people saw in the stages before
        self.begun = False  # whether the current stage's `before` has run
        self.meter = Meter()
        self.parts = {name: part for stage in stages for name, part in stage.parts.items()}
        if saved is not None:
            self.index, self.step, self.base = saved["stage"], saved["step"], saved["base"]
            self.begun, points.pending = saved["begun"], saved["pending"]
            load_state(algo, saved["algo"])
            self.meter.load(saved["meter"])
            for name, part in self.parts.items():
                part.load(saved["parts"][name], self.place(name))
        self.first = self.global_step
        self.began = time.monotonic() - self.curve.seconds
        self.told, self.told_step = 0.0, self.first
        self.inner = minimize.Inner(self.log, speed, self.notes.append)

    def run(self) -> Curve:
        if self.points.pending is not None:  # the checkpoint was written before it was played
            self.points.play(self.algo, self.folder / "checkpoint.pt")
        with stop_requests() as self.stopping, self.inner.within(self.stopping):
            while self.index < len(self.stages):
                self.run_stage(self.stages[self.index])
            self.stop_if_asked()
        if self.points.finish(self.algo):
            self.save()
        return self.curve

    def run_stage(self, stage: Stage) -> None:
        with self.stopping.at_once():  # nothing is lost: the last stage's end is in the checkpoint
            if not self.begun and stage.before is not None:
                stage.before()
            sample = stage.start()
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
        """Do what is due before the next update. Stopped within, the run goes back to this place.

        Works that fit models by `minimize` take long: before them the state is kept in memory.
        """
        due = [work for period, work in stage.between if self.step % period == 0]
        content = self.content(copied=True) if self.inner.expected(due) else None
        try:
            for work in due:
                with self.inner.of(work, stage.name, self.global_step):
                    if found := work():
                        self.meter.add(found, self.step)
        except minimize.Stopped:
            if content is not None:
                checkpoint.save(self.folder / "checkpoint.pt", content)
            raise Interrupted(
                f"stopped before update {self.step} of stage {stage.name}; checkpoint written"
            ) from None

    def after_update(self, stage: Stage) -> None:
        every = self.schedule
        if self.step % every.log_every == 0:
            self.flush(stage)
        if self.passes(every.eval_every) and self.step != stage.steps:
            self.add_point(stage)
        if every.snapshot_every and self.passes(every.snapshot_every):
            self.snapshot()
        self.tell(stage)

    def end(self, stage: Stage) -> None:
        """The last point and copy of a stage, what it hands on, and the step to the next one."""
        self.flush(stage)
        self.add_point(stage, here=True)
        if self.schedule.snapshot_every and stage.evaluate:
            self.snapshot()
        self.tell(stage, last=True)
        self.points.settle()
        if stage.finish is not None:
            with self.stopping.at_once():
                stage.finish()
        self.base, self.index, self.step = self.global_step, self.index + 1, 0
        self.begun = False
        self.save()

    def add_point(self, stage: Stage, here: bool = False) -> None:
        """A checkpoint, and its point of the learning curve where the stage has any.

        Args:
            here: the point is played in this process, which would wait for it anyway.
        """
        step = self.global_step
        if self.points.evaluate is None or not stage.evaluate or self.points.last == step:
            self.save()
            return
        self.flush(stage)
        self.points.settle()
        if stage.measure is not None:
            found = stage.measure().items()
            means = {name: value.double().reshape(-1).tolist() for name, value in found}
            self.log.write(step, "evaluation", means)
        self.points.pending = step
        self.save()
        self.points.play(self.algo, self.folder / "checkpoint.pt", here)

    def snapshot(self) -> None:
        folder, step = self.folder / "snapshots", self.global_step
        folder.mkdir(exist_ok=True)
        content = {"label": self.label, "seeds": self.seeds, "step": step}
        checkpoint.save(folder / f"{step:09d}.pt", content | {"algo": state_of(self.algo)})

    @property
    def global_step(self) -> int:
        """The step that people see: updates, or environment steps of an online method."""
        return self.base + self.clock(self.step)

    def clock(self, step: int) -> int:
        return self.stages[self.index].clock(step) if self.index < len(self.stages) else 0

    def passes(self, period: int) -> bool:
        """Whether the last update reached or passed a multiple of a period of steps."""
        before = self.base + self.clock(self.step - 1)
        return self.global_step // period > before // period

    def flush(self, stage: Stage) -> None:
        """One row of each metric."""
        try:
            if self.meter.values:
                self.points.row(self.global_step, stage.name, self.meter.flush())
        except Diverged:
            self.points.settle()
            raise

    def tell(self, stage: Stage, last: bool = False) -> None:
        now, step = time.perf_counter(), self.global_step
        if now - self.told < 0.5 and not last:
            return
        speed = (step - self.told_step) / (now - self.told) if self.told else 0.0
        self.log.speed(step, speed)
        self.told, self.told_step = now, step
        total = self.base + self.clock(stage.steps) if stage.steps else 0
        notes, self.notes[:] = list(self.notes), []
        self.report(Progress(stage.name, self.first, step, total, speed, self.curve.score, notes))

    def save(self) -> None:
        self.points.settle()
        checkpoint.save(self.folder / "checkpoint.pt", self.content())

    def content(self, copied: bool = False) -> dict[str, Any]:
        """What a checkpoint holds; `copied` apart from what goes on."""
        state = state_of(self.algo)
        try:
            check_finite(state)
        except Diverged:
            self.meter.flush()  # a metric that went wrong before names the cause
            raise
        self.curve.seconds = time.monotonic() - self.began
        content = {
            "label": self.label,
            "seeds": self.seeds,
            "algo": state,
            "stage": self.index,
            "step": self.step,
            "base": self.base,
            "begun": self.begun,
            "global_step": self.global_step,
            "parts": {
                name: part.save(self.place(name), copied) for name, part in self.parts.items()
            },
            "meter": self.meter.state(),
            "curve": self.curve.state(),
            "pending": self.points.pending,
            "metrics_bytes": self.log.flush(),
        }
        return copies(content) if copied else content

    def place(self, name: str) -> Path:
        """Where the files of a part begin."""
        return self.folder / name


def copies(value: Any) -> Any:
    """The same structure with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copies(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copies(part) for part in value)
    return value


def check_finite(state: dict[str, Any]) -> None:
    """Stop at the first network or optimizer with a NaN or infinity, or other tensor with a NaN.

    Raises:
        Diverged: naming the tensor.
    """
    for name, part in state.items():
        for path, value in tensors(part, name):
            bad = ~value.isfinite() if isinstance(part, dict) else value.isnan()
            if bool(bad.any()):
                raise Diverged(
                    f"{path} holds NaN or infinite values; the last good checkpoint stays"
                )
