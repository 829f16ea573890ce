"""An inner training loop: a model that is fitted in the middle of a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from offrl.engine.capture.updates import Speed, Updates
from offrl.engine.log import Log, Meter
from offrl.engine.method import Batch, Metrics, Sampler
from offrl.engine.stop import StopRequests

Work = Callable[[], Metrics | None]
BLOCK = 1000  # updates whose metrics are kept on the device


class Stopped(Exception):
    """Raised within a fit when the run is asked to stop."""


class Inner:
    """The fits of one run: how their updates are made, and where their metrics go."""

    def __init__(
        self, log: Log | None = None, speed: Speed = "eager", say: Callable[[str], None] = print
    ):
        self.log, self.speed, self.say = log, speed, say
        self.stopping: StopRequests | None = None
        self.long: list[Work] = []  # works that have fitted something
        self.work: Work | None = None
        self.stage, self.step = "", 0
        self.made: dict[Any, tuple[Sampler, Updates]] = {}  # by update

    def expected(self, due: list[Work]) -> bool:
        """Whether one of the works is known to fit something."""
        return any(work in self.long for work in due)

    def updates(self, update: Any, sample: Sampler, turn: Any, algo: Any) -> Updates:
        """The updates of a fit, captured once for a sampler that stays the same."""
        if self.log is None:
            return Updates(update, sample, turn, algo, "eager")
        if update not in self.made or self.made[update][0] is not sample:
            self.made[update] = (sample, Updates(update, sample, turn, algo, self.speed, self.say))
        return self.made[update][1]

    @contextmanager
    def within(self, stopping: StopRequests) -> Iterator[None]:
        """Within it `minimize` belongs to this run."""
        global running
        before, running, self.stopping = running, self, stopping
        try:
            yield
        finally:
            running = before

    @contextmanager
    def of(self, work: Work, stage: str, step: int) -> Iterator[None]:
        """Within it a work of a stage is done, at a step that people see."""
        self.work, self.stage, self.step = work, stage, step
        try:
            yield
        finally:
            self.work = None


running = Inner()


def minimize(
    update: Callable[[Batch, int], Metrics],
    sample: Sampler,
    algo: Any,
    stop: Callable[[int], bool],
    turn: Callable[[int], int] = lambda step: 0,
    name: str = "fit",
) -> int:
    """Make updates until `stop`; returns how many were made.

    Captured as a stage's updates are, where update and sampler are the same as at the last call
    from its first update on. The mean of every metric and the number of updates are logged as
    <name>/<metric> at the step of the run. Asked to stop, the run goes back to where the work that
    called this began, and does it again when it is resumed.

    Args:
        update: (batch, turn) -> metrics; see `Stage`.
        sample: generator -> batch.
        algo: what the update changes and the run saves, with the run's `generator`.
        stop: asked before every update with its number; True ends the fit.
    """
    inner, meter, step = running, Meter(), 0
    if inner.work is not None and inner.work not in inner.long:
        inner.long.append(inner.work)
    make = inner.updates(update, sample, turn, algo)
    sums: dict[str, list[float]] = {}
    while not stop(step):
        if inner.stopping:
            raise Stopped
        meter.add(make(step), step)
        step += 1
        if step % BLOCK == 0:
            add_up(sums, meter.flush(), BLOCK)
    add_up(sums, meter.flush(), step % BLOCK)
    if inner.log is not None and step:
        means = {f"{name}/{key}": [x / step for x in values] for key, values in sums.items()}
        inner.log.write(inner.step, inner.stage, means | {f"{name}/updates": [float(step)]})
    return step


def add_up(sums: dict[str, list[float]], means: dict[str, list[float]], count: int) -> None:
    for key, values in means.items():
        before = sums.get(key, [0.0] * len(values))
        sums[key] = [x + count * value for x, value in zip(before, values, strict=True)]
