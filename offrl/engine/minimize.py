"""An inner training loop: a model that is fitted in the middle of a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offrl.engine.capture.updates import Speed, Updates
from offrl.engine.log import Meter
from offrl.engine.method import Batch, Metrics, Sampler

BLOCK = 1000  # updates whose metrics are kept on the device


class Stopped(Exception):
    """Raised within a fit when the run is asked to stop."""


@dataclass
class Host:
    """What a run lends to the fits within it; outside of a run there is none."""

    speed: Speed = "eager"  # how updates are made, and who is told; see `Updates`
    say: Callable[[str], None] = print
    write: Callable[[dict[str, list[float]]], None] = lambda means: None  # takes means of metrics
    stopping: Any = False  # true once the run is asked to stop
    begun: int = 0  # fits so far
    # by the name of a fit, what its updates are made of, and these
    made: dict[str, tuple[tuple[Any, ...], Updates]] = field(default_factory=dict)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within it `minimize` belongs to this run."""
        global running
        before, running = running, self
        try:
            yield
        finally:
            running = before


running: Host | None = None


def minimize(
    update: Callable[[Batch, int], Metrics],
    sample: Sampler,
    algo: Any,
    stop: Callable[[int], bool],
    turn: Callable[[int], int] = lambda step: 0,
    name: str = "fit",
) -> int:
    """Make updates until `stop`; returns how many were made.

    Captured as a stage's updates are, once for fits of one name whose update, sampler and turn stay
    the same. The mean of every metric and the number of updates are logged as <name>/<metric> at
    the step of the run. Asked to stop, the run goes back to where the work that called this began,
    and does it again when it is resumed.

    Args:
        update: (batch, turn) -> metrics; see `Stage`.
        sample: generator -> batch.
        algo: what the update changes and the run saves, with the run's `generator`.
        stop: asked before every update with its number; True ends the fit.
    """
    host, meter, step = running or Host(), Meter(), 0
    host.begun += 1
    how = update, sample, turn, algo
    if name not in host.made or host.made[name][0] != how:
        host.made[name] = how, Updates(*how, host.speed, host.say)
    make = host.made[name][1]
    sums: dict[str, Any] = {}
    while not stop(step):
        if host.stopping:
            raise Stopped
        meter.add(make(step), step)
        step += 1
        if step % BLOCK == 0:
            add_up(sums, meter.flush(), BLOCK)
    add_up(sums, meter.flush(), step % BLOCK)
    if step:
        means = {f"{name}/{key}": (total / step).tolist() for key, total in sums.items()}
        host.write(means | {f"{name}/updates": [float(step)]})
    return step


def add_up(sums: dict[str, Any], means: dict[str, list[float]], count: int) -> None:
    for key, values in means.items():
        sums[key] = sums.get(key, 0.0) + count * np.array(values)
