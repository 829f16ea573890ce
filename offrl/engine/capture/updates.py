"""How a stage's updates are made: as written, compiled, or captured once and replayed.

An update of a small network costs more in Python, autograd and launches than in arithmetic. So each
of the `cycle` updates of a stage's pattern is captured with its sampling, its optimizer steps and
its metrics, and replayed from then on: as a CUDA graph on a GPU, as a `Recording` on a CPU. Updates
that are made on the way there count like all others. On a CPU a replay is bit-equal to the update
as written, which is checked before it is relied on and once per `CHECKED` cycles; so a resumed run
may choose otherwise and still end the same.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from offrl.engine.capture.recording import NotRecordable, Recorder, Recording
from offrl.engine.method import Metrics, Sampler, Stage

Speed = Literal["auto", "eager", "graph", "compile"]
Update = Callable[[int], Metrics]

WARM_UP = 3  # cycles before the capture: optimizers make their state, libraries choose algorithms
ROUNDS = 12  # cycles of each kind that `auto` compares
CHECKED = 1000  # cycles between two checks of the replays


class Updates:
    """Number of an update -> its metrics: the updates of a stage, made the way `speed` says.

    Args:
        stage, sample: what is run, and the sampler that its `start` returned.
        generator: of the run; its device is the parameters'.
        speed: `eager` as written; `graph` captured; `compile` by torch.compile, and on a GPU
            captured too; `auto` captured if that takes less time than as written. What cannot be
            captured or compiled is run as written.
        say: told what was chosen, and why.

    A call raises ValueError if a later check finds that replays have left the update as written, or
    if CUDA fails to capture what looked capturable, after which its state is not to be trusted.
    """

    def __init__(
        self,
        stage: Stage,
        sample: Sampler,
        generator: torch.Generator,
        speed: Speed = "auto",
        say: Callable[[str], None] = lambda text: None,
    ):
        self.update, self.sample, self.cycle = stage.update, sample, stage.cycle
        self.generator, self.say = generator, say
        self.on_gpu = generator.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        self.course = self.run(speed)
        next(self.course)

    def __call__(self, step: int) -> Metrics:
        return self.course.send(step)

    def written(self, step: int) -> Metrics:
        return self.update(self.sample(self.generator), step)

    def run(self, speed: Speed) -> Generator[Metrics, int, None]:
        """All updates in turn: takes the number of the next one, yields its metrics."""
        step = yield {}
        if speed == "compile":
            self.compile()
        if speed == "eager" or (speed == "compile" and not self.on_gpu):
            yield from endless(self.written, step)
        while step % self.cycle:  # a resumed run
            step = yield self.written(step)
        for _ in range(WARM_UP * self.cycle):
            step = yield self.written(step)
        try:
            pieces: list[Captured] = []
            for _ in range(self.cycle):
                pieces.append(Captured(partial(self.written, step), self.generator, self.pool))
                step = yield pieces[-1].first
            for _ in range(self.cycle):
                step = yield self.checked(pieces[step % self.cycle], step)
        except NotRecordable as no:
            self.say(f"updates run as written: {no}")
            step = yield no.result
            yield from endless(self.written, step)

        def captured(step: int) -> Metrics:
            return pieces[step % self.cycle]()

        best: Update = captured
        if speed == "auto":
            times: dict[Update, list[float]] = {self.written: [], captured: []}
            for way, spent in list(times.items()) * ROUNDS:
                seconds = 0.0
                for _ in range(self.cycle):
                    start = self.now()
                    metrics = way(step)
                    seconds += self.now() - start
                    step = yield metrics
                spent.append(seconds / self.cycle)
            slow, fast = (1e3 * statistics.median(spent) for spent in times.values())
            best = captured if fast < slow else self.written
            self.say(f"an update takes {slow:.2f} ms as written, {fast:.2f} ms captured")
        if best == self.written:
            yield from endless(best, step)
        while True:
            for _ in range(CHECKED * self.cycle):
                step = yield captured(step)
            for _ in range(self.cycle):
                try:
                    metrics = self.checked(pieces[step % self.cycle], step)
                except NotRecordable as no:
                    raise ValueError(
                        f"at update {step} {no}, as it did {CHECKED} cycles before: it depends on "
                        "something outside of its tensors, and updates since then may be wrong. "
                        "Start again with speed=eager"
                    ) from no
                step = yield metrics

    def checked(self, piece: "Captured", step: int) -> Metrics:
        """The update as written and its replay from the same state; they must agree in every bit.

        Raises:
            NotRecordable: if they do not; the state is that of the update as written.
        """
        if self.on_gpu:
            return piece()
        changed = piece.replay.written
        before = self.saved(changed)
        metrics = self.written(step)
        after = self.saved(changed)
        self.restore(changed, before)
        try:
            again = piece()
        except (RuntimeError, NotImplementedError) as error:
            self.restore(changed, after)
            raise NotRecordable(str(error).splitlines()[0], metrics) from error
        wanted = {name: value.detach().to(again[name].dtype) for name, value in metrics.items()}
        pairs = [*zip(self.saved(changed), after, strict=True)]
        pairs += [(again[name], value) for name, value in wanted.items()]
        if all(torch.equal(bits(one), bits(other)) for one, other in pairs):
            return again
        self.restore(changed, after)
        raise NotRecordable("a replay does not give what the update gives", metrics)

    def saved(self, changed: list[Tensor]) -> list[Tensor]:
        """What a replay changes, and the states of the run's generator and of torch's own."""
        return [*(x.clone() for x in changed), self.generator.get_state(), torch.get_rng_state()]

    def restore(self, changed: list[Tensor], saved: list[Tensor]) -> None:
        *values, own, common = saved
        for x, value in zip(changed, values, strict=True):
            x.copy_(value)
        self.generator.set_state(own)
        torch.set_rng_state(common)

    def compile(self) -> None:
        """Put the compiled update in the place of the written one, if there is a compiler."""
        compiler = os.environ.get("CXX", "g++")
        if not self.on_gpu and shutil.which(compiler) is None:
            self.say(f"updates run as written: torch.compile needs {compiler}, which is not here")
            return
        compiled, cycle = torch.compile(self.update), self.cycle
        self.update = lambda batch, step: compiled(batch, step % cycle)  # one graph per place

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize(self.generator.device)
        return time.perf_counter()


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: NaN equals itself."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def endless(update: Update, step: int) -> Generator[Metrics, int, None]:
    while True:
        step = yield update(step)


class Captured:
    """An update and its replay.

    Args:
        work: makes the update.
        generator: that it draws from.
        pool: memory of a run's CUDA graphs, which never run at the same time.

    Attributes:
        first: metrics of the update that was made here.

    Raises:
        NotRecordable: after the update has been made.
    """

    def __init__(self, work: Callable[[], Metrics], generator: torch.Generator, pool: Any):
        self.shapes: dict[str, torch.Size] = {}

        def packed() -> Tensor:
            metrics = work()
            self.shapes = {name: value.shape for name, value in metrics.items()}
            parts = [value.detach().reshape(-1) for value in metrics.values()]
            return torch.cat(parts) if parts else torch.empty(0, device=generator.device)

        self.replay: Any
        try:
            if generator.device.type == "cuda":
                first = tried(packed)
                self.replay = CudaGraph(packed, generator, pool)
            else:
                self.replay = Recording(packed)
                first = self.replay.first
        except NotRecordable as no:
            raise NotRecordable(str(no), self.named(no.result)) from no
        self.first = self.named(first)

    def __call__(self) -> Metrics:
        return self.named(self.replay().clone())

    def named(self, values: Tensor) -> Metrics:
        if not self.shapes:
            return {}
        parts = values.split([shape.numel() for shape in self.shapes.values()])
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in pairs}


def tried(work: Callable[[], Tensor]) -> Tensor:
    """Do work that is to be captured, and keep nothing of it but its result.

    What a recorder keeps holds the nodes of parameters in the graph of gradients; met again within
    the capture, they would make it wait for the stream they were made on, which ends it.

    Raises:
        NotRecordable: after the work, if it cannot be captured.
    """
    with Recorder() as recorder:
        result = work()
    recorder.calls.clear()
    recorder.check(result)
    return result


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
