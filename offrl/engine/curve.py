"""The learning curve: points played here or in a process of its own, rows of metrics in order."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from torch import Tensor

from offrl.engine.log import Log
from offrl.engine.method import Algorithm, Evaluate
from offrl.errors import Diverged

Play = Callable[[Path], dict[str, Tensor]]  # a checkpoint -> name -> (*S, episodes)
Row = tuple[int, str, dict[str, list[float]]]  # step, stage, means


@dataclass(frozen=True)
class Schedule:
    """How often things happen, in the steps that people see."""

    log_every: int = 1000  # updates between two rows of metrics
    eval_every: int = 5000  # steps between two points of the learning curve
    eval_episodes: int = 10  # of each point
    final_episodes: int = 100  # of the last evaluation, whose mean is the score
    snapshot_every: int | None = None  # steps between kept copies of the algorithm


@dataclass
class Curve:
    """Evaluations so far: the step and, per name, raw values (*S, episodes) of each point."""

    headline: str = "return"  # name of the values whose mean is the score
    steps: list[int] = field(default_factory=list)
    points: list[dict[str, Tensor]] = field(default_factory=list)
    final: dict[str, Tensor] | None = None
    seconds: float = 0.0  # until the last checkpoint, of all processes of a run that was resumed

    @property
    def score(self) -> float | None:
        """The newest value of the headline."""
        return float(self.points[-1][self.headline].mean()) if self.points else None


@dataclass
class Points:
    """Adds points to the curve and rows to the log, in the order of their steps.

    A point is of a checkpoint: `pending` is its step from when the checkpoint is written until its
    values are there, so that a run that dies in between plays it again. `evaluate` plays it here, a
    `worker` beside the training, where the rows that come after it wait.
    """

    evaluate: Evaluate | None
    schedule: Schedule
    curve: Curve
    log: Log
    worker: "AsyncEvaluator | None" = None
    pending: int | None = None
    playing: bool = False
    waiting: list[Row] = field(default_factory=list)

    @property
    def last(self) -> int | None:
        """The step of the newest point, played or not."""
        return self.pending if self.pending is not None else max(self.curve.steps, default=None)

    def play(self, algo: Algorithm, path: Path, here: bool = False) -> None:
        """Play the pending point, of the checkpoint at `path`, which `algo` equals."""
        if self.worker is not None and not here:
            self.worker.begin(path)
            self.playing = True
        elif self.evaluate is not None:
            self.put(self.evaluate(algo, self.schedule.eval_episodes))

    def put(self, point: dict[str, Tensor]) -> None:
        assert self.pending is not None
        self.curve.points.append(self.checked(point))
        self.curve.steps.append(self.pending)
        means = {name: x.double().mean(-1).reshape(-1).tolist() for name, x in point.items()}
        self.log.write(self.pending, "evaluation", means)
        self.pending, self.playing = None, False

    def row(self, step: int, stage: str, means: dict[str, list[float]]) -> None:
        """One row of each metric, in the file once the point before it is there."""
        self.waiting.append((step, stage, means))
        if not self.playing or (self.worker is not None and self.worker.ready()):
            self.settle()

    def finish(self, algo: Algorithm) -> bool:
        """Make the final evaluation unless it is there or there is none; tells whether it did."""
        if self.evaluate is None or self.curve.final is not None:
            return False
        self.settle()
        self.curve.final = self.checked(self.evaluate(algo, self.schedule.final_episodes))
        return True

    def checked(self, point: dict[str, Tensor]) -> dict[str, Tensor]:
        """Raises Diverged for a score that is NaN, as that of actions that are not finite."""
        if bool(point[self.curve.headline].isnan().any()):
            raise Diverged(
                f"the {self.curve.headline} of an evaluation is NaN; look at the policy's actions, "
                "or at the environment's rewards"
            )
        return point

    def settle(self) -> None:
        """Wait for the point that is being played, and write what waited for it."""
        if self.playing and self.worker is not None:
            self.put(self.worker.result())
        while self.waiting:
            self.log.write(*self.waiting.pop(0))


class AsyncEvaluator:
    """Plays one checkpoint at a time; the process starts when the first is given.

    Args:
        player: makes, in that process, the function that plays a checkpoint. Can be pickled.
    """

    def __init__(self, player: Callable[[], Play]):
        self.player = player
        self.worker: Any = None

    def begin(self, path: Path) -> None:
        """Start to play a checkpoint, which must stay as it is until `result` returns."""
        if self.worker is None:
            context = multiprocessing.get_context("spawn")
            self.ours, theirs = context.Pipe()
            self.worker = context.Process(target=serve, args=(self.player, theirs), daemon=True)
            resource_tracker.ensure_running()  # which unblocks signals: before they are blocked
            # blocked from its first moment on: what ends a whole group is the training's to handle
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            try:
                self.worker.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        with contextlib.suppress(OSError):  # of a process that died, as `result` will tell
            self.ours.send(path)

    def ready(self) -> bool:
        """Whether `result` would not wait."""
        return self.ours.poll()

    def result(self) -> dict[str, Tensor]:
        """Wait for the values of the checkpoint given last.

        Raises:
            OSError: if the process died, or playing failed there.
        """
        try:
            found = self.ours.recv()
        except (EOFError, OSError):
            self.worker.join()
            raise OSError(
                f"the process that evaluates died (exit code {self.worker.exitcode}); resume the "
                "run, or start it with evaluation=inline if memory was short"
            ) from None
        if isinstance(found, str):
            raise OSError(f"evaluation failed: {found}")
        return {name: value.clone() for name, value in found.items()}

    def close(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.join()


def serve(player: Callable[[], Play], orders: Any) -> None:
    """Body of the process, which ends when the training is gone."""
    play = None
    with contextlib.suppress(EOFError, OSError):
        while path := orders.recv():
            try:
                play = play or player()
                orders.send(play(path))
            except Exception as error:
                orders.send(f"{type(error).__name__}: {error}")
