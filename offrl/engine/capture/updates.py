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

from offrl.engine.capture import recording
from offrl.engine.capture.recording import NotRecordable, Recording
from offrl.engine.capture.watch import Watch
from offrl.engine.method import Batch, Metrics, Sampler

Speed = Literal["auto", "eager", "graph", "compile"]

WARM_UP = 3  # updates before the capture: optimizers make their state, libraries choose algorithms
CHECKS = 50  # replays in a row that are compared with the eager update
ROUNDS = 12  # updates of each kind that `auto` compares
MANY = 32  # turns beyond which they are no few patterns
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
        compiler = os.environ.get("CXX", "g++")
        if speed == "compile" and not self.on_gpu and shutil.which(compiler) is None:
            say(f"updates run eagerly: torch.compile needs {compiler}, which is not available")
        elif speed == "compile":
            self.update = torch.compile(update)
        self.captures = speed in ("auto", "graph") or (speed == "compile" and self.on_gpu)
        self.courses: dict[int, Iterator[Metrics]] = {}  # by turn, as are all of these
        self.replays: dict[int, Captured] = {}
        self.made: Counter[int] = Counter()
        self.spent: dict[int, tuple[float, float]] = {}  # ms of an update, eager and captured
        self.told = self.many = False  # what is said once

    def __call__(self, step: int) -> Metrics:
        turn = self.turn(step)
        if not self.captures:
            return self.eager(turn)
        self.made[turn] += 1
        if len(self.made) > MANY and not self.many:
            self.many = True
            self.say(
                f"more than {MANY} turns so far, of which each is captured by itself and most "
                "never come to it: `turn` should name one of a few patterns and not count"
            )
        try:
            if turn in self.replays and (change := self.replays[turn].watch.changes()):
                raise NotRecordable(f"{change} between updates", self.eager(turn))
            return next(self.courses.setdefault(turn, self.course(turn)))
        except NotRecordable as no:  # from now on all updates are eager
            self.captures = False
            self.courses.clear()
            self.replays.clear()
            self.say(f"updates run eagerly: {no}")
            return no.result

    def eager(self, turn: int) -> Metrics:
        return self.update(self.sample(self.algo.generator), turn)

    def course(self, turn: int) -> Iterator[Metrics]:
        """The updates of a turn, one after another."""
        for _ in range(WARM_UP):
            yield self.eager(turn)
        piece = self.replays[turn] = Captured(partial(self.eager, turn), self.algo, self.pool)
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
        before, again, failed = copies(piece.state()), None, ""
        try:
            again = piece()
        except (RuntimeError, NotImplementedError) as error:
            failed = str(error).splitlines()[0]
        after = copies(piece.state())
        piece.restore(before)
        metrics = self.eager(turn)
        if change := piece.watch.changes():
            raise NotRecordable(f"{change} during an update", metrics)
        if again is None:
            raise NotRecordable(failed, metrics)
        if not (
            shapes(again) == shapes(metrics)
            and agree(after, piece.state(), before)
            and agree([packed(again)], [packed(metrics)], [torch.zeros(1)])
        ):
            raise NotRecordable("a replay does not give what the update gives", metrics)
        return metrics

    def compared(self, piece: "Captured", turn: int) -> Iterator[Metrics]:
        """Eager updates and replays alternately, timed; says once how long most updates take."""
        times: tuple[list[float], list[float]] = ([], [])
        for i in range(2 * ROUNDS):
            start = self.now()
            metrics = piece() if i % 2 else self.eager(turn)
            times[i % 2].append(1e3 * (self.now() - start))
            yield metrics
        self.spent[turn] = statistics.median(times[0]), statistics.median(times[1])
        known = sum(self.made[turn] for turn in self.spent)
        if not self.told and known >= 0.9 * self.made.total():
            self.told = True
            slow, fast = (
                sum(self.made[turn] * ms[i] for turn, ms in self.spent.items()) / known
                for i in (0, 1)
            )
            self.say(f"an update takes {slow:.2f} ms eager, {fast:.2f} ms captured")

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
    """An update, made here with the metrics `first`, and its replay.

    Args:
        update: makes the update, which changes `algo` and draws from its `generator`.
        pool: memory of a run's CUDA graphs, which never run at the same time.

    Raises:
        NotRecordable: after the update has been made.
        ValueError: if CUDA fails to capture it.
    """

    def __init__(self, update: Callable[[], Metrics], algo: Any, pool: Any):
        self.watch, device = Watch(algo), algo.generator.device
        self.generators = [algo.generator, torch.default_generator, *self.watch.generators]
        self.first: Metrics = {}
        self.replay: Any = None

        def work() -> Tensor:
            self.first = {name: value.detach() for name, value in update().items()}
            return packed(self.first)

        try:
            if device.type == "cuda":
                # nothing else is kept of the calls: they hold the nodes of parameters in the graph
                # of gradients; met again within the capture, these would make it wait for the
                # stream they were made on, which ends it
                changed = recording.written(recording.recorded(work)[1])
            else:
                self.replay = Recording(work)
                changed = self.replay.written
        except NotRecordable as no:
            no.result = self.first
            raise
        if change := self.watch.changes():
            raise NotRecordable(f"{change} during an update", self.first)
        if device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[device.index])
            self.replay = cuda_graph(lambda: packed(update()), algo.generator, pool)
        self.shapes = shapes(self.first)
        every = [x for x in self.watch.tensors if x.layout == torch.strided] + changed
        self.places = list({recording.memory(x): recording.everything(x) for x in every}.values())

    def __call__(self) -> Metrics:
        parts = self.replay().clone().split([shape.numel() for shape in self.shapes.values()])
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in pairs}

    def state(self) -> list[Tensor]:
        """The algorithm's tensors, what a replay changes beside them, and generators' states."""
        return [*self.places, *(g.get_state() for g in self.generators)]

    def restore(self, state: list[Tensor]) -> None:
        for x, value in zip(self.places, state, strict=False):
            x.copy_(value)
        for generator, value in zip(self.generators, state[len(self.places) :], strict=True):
            generator.set_state(value)


def cuda_graph(
    work: Callable[[], Tensor], generator: torch.Generator, pool: Any
) -> Callable[[], Tensor]:
    """Work captured as a CUDA graph, which does not run it.

    Raises:
        ValueError: if the capture fails; torch says nothing of its state after that.
    """
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = work()
    except RuntimeError as error:
        reason = str(error.__context__ or error).splitlines()[0]  # torch's own hides the first
        raise ValueError(f"CUDA cannot capture this update ({reason}): use speed=eager") from error

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
