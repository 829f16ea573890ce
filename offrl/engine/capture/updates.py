"""How updates are made: eager, compiled, or captured once and replayed.

An update of a small network costs more in Python, autograd and launches than in arithmetic. So each
turn, one of the few patterns that updates have, is captured with its sampling, its optimizer steps
and its metrics, and replayed from then on: as a CUDA graph on a GPU, as a `Recording` on a CPU.
Updates that are made on the way there count like all others. On a CPU a replay is bit-equal to the
eager update, so a resumed run may choose otherwise and still end the same.

A replay repeats what is done to tensors, not what Python decides. Two guards keep it true. Before
every replay the algorithm's plain values and objects are compared with those of the capture
(`Watch`). And the replay is compared with the eager update on the whole state of the algorithm: in
the first `CHECKS` replays of a turn, then after as many again, twice as many, four times as many. A
comparison costs an eager update, 4 passes over the state and the memory of two copies of it.
"""

import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from offrl.engine.capture.recording import (
    NotRecordable,
    Recorder,
    Recording,
    everything,
    memory,
    written,
)
from offrl.engine.capture.watch import Watch
from offrl.engine.method import Batch, Metrics, Sampler

Speed = Literal["auto", "eager", "graph", "compile"]

WARM_UP = 3  # updates before the capture: optimizers make their state, libraries choose algorithms
CHECKS = 50  # replays in a row that are compared with the eager update
ROUNDS = 12  # updates of each kind that `auto` compares
TOLERANCE = 0.05  # on a GPU: share of what an update changes by which a replay may miss it
ROUNDING = 1e-6  # likewise, share of the value itself


class Updates:
    """Number of an update -> its metrics: updates made the way `speed` says.

    Args:
        update: (batch, turn) -> metrics; it is told the turn in every mode, never the number.
        sample: generator -> batch.
        turn: number of an update -> which of a few patterns it has; each is captured by itself.
        algo: what the update changes. Its `generator` is the run's, on the parameters' device.
        speed: `eager`; `graph` captured; `compile` by torch.compile, and on a GPU captured too;
            `auto` captured where that takes less time than eager. What cannot be captured or
            compiled is eager, all turns from the moment on at which that is found.
        say: told what was chosen, and why.

    A call raises ValueError if a later comparison finds that replays have left the eager update, or
    if CUDA fails to capture what looked capturable, after which its state is not to be trusted.
    """

    def __init__(
        self,
        update: Callable[[Batch, int], Metrics],
        sample: Sampler,
        turn: Callable[[int], int],
        algo: Any,
        speed: Speed = "auto",
        say: Callable[[str], None] = lambda text: None,
    ):
        self.update, self.sample, self.turn, self.algo = update, sample, turn, algo
        self.speed, self.say = speed, say
        self.on_gpu = algo.generator.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        if speed == "compile":
            self.compile()
        self.captures = speed in ("auto", "graph") or (speed == "compile" and self.on_gpu)
        self.courses: dict[int, Iterator[Metrics]] = {}  # by turn, as are all of these
        self.replays: dict[int, Captured] = {}
        self.made: Counter[int] = Counter()
        self.spent: dict[int, list[float]] = {}  # ms of an update, eager and captured
        self.told = False

    def __call__(self, step: int) -> Metrics:
        turn = self.turn(step)
        if not self.captures:
            return self.eager(turn)
        self.made[turn] += 1
        if turn not in self.courses:
            self.courses[turn] = self.course(turn)
        elif turn in self.replays and (change := self.replays[turn].watch.changes()):
            return self.stay_eager(f"{change} between updates", self.eager(turn))
        try:
            return next(self.courses[turn])
        except NotRecordable as no:
            return self.stay_eager(str(no), no.result)

    def eager(self, turn: int) -> Metrics:
        return self.update(self.sample(self.algo.generator), turn)

    def stay_eager(self, reason: str, metrics: Metrics) -> Metrics:
        """Make all further updates eagerly."""
        self.captures = False
        self.courses.clear()
        self.replays.clear()
        self.say(f"updates run eagerly: {reason}")
        return metrics

    def course(self, turn: int) -> Iterator[Metrics]:
        """The updates of a turn, one after another."""
        for _ in range(WARM_UP):
            yield self.eager(turn)
        piece = Captured(partial(self.eager, turn), self.algo, self.pool)
        self.replays[turn] = piece
        yield piece.first
        for _ in range(CHECKS):
            yield self.checked(piece, turn)
        if self.speed == "auto":
            yield from self.compared(piece, turn)
            slow, fast = self.spent[turn]
            if slow <= fast:
                del self.replays[turn]
                while True:
                    yield self.eager(turn)
        count = CHECKS
        while True:
            for _ in range(count):
                yield piece()
            try:
                metrics = self.checked(piece, turn)
            except NotRecordable as no:
                raise ValueError(
                    f"{no}, unlike {count} updates of this turn before; those since then may be "
                    "wrong. They depend on something outside of the algorithm's tensors and plain "
                    "attributes: start again with speed=eager"
                ) from no
            yield metrics
            count *= 2

    def checked(self, piece: "Captured", turn: int) -> Metrics:
        """A replay, then the eager update from the same state, which stands; they must agree.

        Raises:
            NotRecordable: if they do not.
        """
        before, again, failure = copies(piece.state()), None, ""
        try:
            again = piece()
        except (RuntimeError, NotImplementedError) as error:
            failure = str(error).splitlines()[0]
        after = copies(piece.state())
        piece.restore(before)
        metrics = self.eager(turn)
        if change := piece.watch.changes():
            failure = f"{change} during an update"
        elif again is not None and not (
            shapes(again) == shapes(metrics)
            and agree(after, piece.state(), before)
            and agree([packed(again)], [packed(metrics)], [torch.zeros(1)])
        ):
            failure = "a replay does not give what the update gives"
        if failure:
            raise NotRecordable(failure, metrics)
        return metrics

    def compared(self, piece: "Captured", turn: int) -> Iterator[Metrics]:
        """Eager updates and replays alternately, timed; says once how long most updates take."""
        times: tuple[list[float], list[float]] = ([], [])
        for i in range(2 * ROUNDS):
            start = self.now()
            metrics = piece() if i % 2 else self.eager(turn)
            times[i % 2].append(1e3 * (self.now() - start))
            yield metrics
        self.spent[turn] = [statistics.median(spent) for spent in times]
        known = sum(self.made[turn] for turn in self.spent)
        if not self.told and known >= 0.9 * self.made.total():
            self.told = True
            slow, fast = (
                sum(self.made[turn] * spent[i] for turn, spent in self.spent.items()) / known
                for i in (0, 1)
            )
            self.say(f"an update takes {slow:.2f} ms eager, {fast:.2f} ms captured")

    def compile(self) -> None:
        """Put the compiled update in the place of the eager one, if there is a compiler."""
        compiler = os.environ.get("CXX", "g++")
        if not self.on_gpu and shutil.which(compiler) is None:
            self.say(f"updates run eagerly: torch.compile needs {compiler}, which is not available")
            return
        self.update = torch.compile(self.update)

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize(self.algo.generator.device)
        return time.perf_counter()


def copies(values: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in values]


def shapes(metrics: Metrics) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in metrics.items()}


def packed(metrics: Metrics) -> Tensor:
    """All values in one row."""
    parts = [value.detach().reshape(-1) for value in metrics.values()]
    return torch.cat(parts) if parts else torch.empty(0)


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: NaN equals itself."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def agree(found: list[Tensor], wanted: list[Tensor], before: list[Tensor]) -> bool:
    """Whether tensors are equal in every bit; nearly, on a GPU, where sums vary in order."""
    return all(
        torch.equal(bits(x), bits(y)) or (x.is_cuda and close(x, y, old.to(y)))
        for x, y, old in zip(found, wanted, before, strict=True)
    )


def close(x: Tensor, y: Tensor, before: Tensor) -> bool:
    """Whether `x` misses `y` by a small part only of the way that `y` has come from `before`."""
    x, y, before = x.double(), y.double(), before.double()
    return bool((x - y).norm() <= TOLERANCE * (y - before).norm() + ROUNDING * y.norm())


class Captured:
    """An update and its replay.

    Args:
        work: makes the update.
        algo: what it changes; draws from its `generator`.
        pool: memory of a run's CUDA graphs, which never run at the same time.

    Attributes:
        first: metrics of the update that was made here.
        watch: what the replay takes for granted.

    Raises:
        NotRecordable: after the update has been made.
    """

    def __init__(self, work: Callable[[], Metrics], algo: Any, pool: Any):
        self.shapes: dict[str, torch.Size] = {}
        self.watch, generator = Watch(algo), algo.generator
        known = {id(g): g for g in (generator, torch.default_generator, *self.watch.generators)}

        def row() -> Tensor:
            metrics = work()
            self.shapes = shapes(metrics)
            return packed(metrics)

        self.replay: Any
        try:
            if generator.device.type == "cuda":
                common = torch.cuda.default_generators[generator.device.index]
                known[id(common)] = common
                first, changed = tried(row)
                self.refuse_changes(first)
                self.replay = CudaGraph(row, generator, pool)
            else:
                self.replay = Recording(row)
                first, changed = self.replay.first, self.replay.written
                self.refuse_changes(first)
        except NotRecordable as no:
            raise NotRecordable(str(no), self.named(no.result)) from no
        self.first = self.named(first)
        self.generators = list(known.values())
        every = [x for x in self.watch.tensors if x.layout == torch.strided] + changed
        self.places = list({memory(x): everything(x) for x in every}.values())

    def __call__(self) -> Metrics:
        return self.named(self.replay().clone())

    def refuse_changes(self, first: Tensor) -> None:
        if change := self.watch.changes():
            raise NotRecordable(f"{change} during an update", first)

    def named(self, values: Tensor) -> Metrics:
        if not self.shapes:
            return {}
        parts = values.split([shape.numel() for shape in self.shapes.values()])
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in pairs}

    def state(self) -> list[Tensor]:
        """The algorithm's tensors, what a replay changes beside them, and generators' states."""
        return [*self.places, *(g.get_state() for g in self.generators)]

    def restore(self, state: list[Tensor]) -> None:
        count = len(self.places)
        for x, value in zip(self.places, state[:count], strict=True):
            x.copy_(value)
        for generator, value in zip(self.generators, state[count:], strict=True):
            generator.set_state(value)


def tried(work: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Do work that is to be captured; returns its result, and what it has changed.

    Nothing else is kept of it: what a recorder keeps holds the nodes of parameters in the graph of
    gradients; met again within the capture, they would make it wait for the stream they were made
    on, which ends it.

    Raises:
        NotRecordable: after the work, if it cannot be captured.
    """
    with Recorder() as recorder:
        result = work()
    calls, recorder.calls = recorder.calls, []
    recorder.check(result)
    return result, written(calls)


class CudaGraph:
    """Work captured as a CUDA graph, which does not run it.

    Raises:
        ValueError: if the capture fails; torch says nothing of its state after that.
    """

    def __init__(self, work: Callable[[], Tensor], generator: torch.Generator, pool: Any):
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(self.graph, pool=pool):
                self.result = work()
        except RuntimeError as error:
            reason = str(error.__context__ or error).splitlines()[0]  # torch's own hides the first
            raise ValueError(
                f"CUDA cannot capture this update ({reason}): use speed=eager"
            ) from error

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.result
