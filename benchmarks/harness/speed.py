"""Updates per second of the methods, side by side in one process.

Machines are shared and change their clock, so the methods take turns in short rounds, and what
counts is the ratio of medians within one run. A calibration product beside every round tells how
fast the core was at that moment.
"""

import json
import multiprocessing
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch.utils._pytree import tree_map
from tqdm import tqdm

from benchmarks.harness.peers.start import packages, rival
from benchmarks.harness.timing import held_to, product_rate, seconds
from offrl import cli, system
from offrl import config as configuration
from offrl.data import Dataset, sources
from offrl.data.dataset import home
from offrl.data.replay import Replay
from offrl.engine.capture.recording import Call, NotRecordable, Recorder, Recording
from offrl.engine.capture.updates import Speed, Updates
from offrl.engine.method import TRANSITION, Run, Sampler, Spec, Stage, Task, turns_of
from offrl.engine.state import state_of, tensors
from offrl.errors import ConfigError
from offrl.nets.kernels import matmul
from offrl.results.plots import scores
from offrl.runs.task import pick_device
from offrl.seeding import generator
from offrl.system import cores, cpu_name

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "_linear_pointwise"}


@dataclass(frozen=True)
class Options:
    """Options of scripts/speed.py.

    env=halfcheetah dataset=medium rows=None source=auto     the data that updates draw from
    algos=[td3bc,prdc,bc]   methods; ratios are to the first. td3 and sac draw from a full replay
    speeds=[graph,eager]    how updates are made, see offrl/engine/capture; each is a row of its own
    seeds=[1]               stacked seeds, each number a row; a row tells seed-updates per second
    peers=[plain,jax]       the same work elsewhere (harness/peers): plain, jax and d3rlpy make
                            updates of td3bc, sb3-td3 and sb3-sac those of td3 and sac. All but
                            plain need the extra `peers`. Batch as the first of algos has it
    peer_python=PATH        a Python that has d3rlpy, which cannot be installed beside the rest
    'set={prdc.alpha:2.5}'  options of methods
    warmup=1000             updates before the clock starts, so that the actor leaves its start
    rounds=9 updates=100    alternating rounds, and updates in each
    processes=1             up to so many processes of the first row at once, a core each, as
                            `train` runs seeds on a CPU
    device=auto threads=1
    out=PATH                write the table as JSON, and a picture beside it
    """

    env: str = "halfcheetah"
    dataset: str = "medium"
    source: str = "auto"
    rows: int | None = None
    algos: tuple[str, ...] = ("td3bc", "prdc", "bc")
    speeds: tuple[str, ...] = ("graph", "eager")
    seeds: tuple[int, ...] = (1,)
    peers: tuple[str, ...] = ()
    peer_python: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    warmup: int = 1000
    rounds: int = 9
    updates: int = 100
    processes: int = 1
    device: str = "auto"
    threads: int = 1
    out: str | None = None


def main() -> None:
    with cli.readable_errors():
        measure_speed(cli.options(Options, sys.argv[1:]))


def measure_speed(options: Options) -> dict[str, Any]:
    """Measure, print a table, and return it.

    Raises:
        ConfigError: an unknown peer or speed, a peer that is not installed, an odd number of
            updates beside jax, or more processes than cores.
    """
    if wrong := [name for name in options.speeds if name not in get_args(Speed)]:
        raise ConfigError(
            f"speeds are {', '.join(get_args(Speed))}, got {wrong[0]!r}"
            f"{configuration.nearest(wrong[0], get_args(Speed))}"
        )
    if options.processes > cores():
        raise ConfigError(
            f"processes={options.processes}, but this process may use {cores()} core(s)"
        )
    device, data = prepared(options)
    with held_to(options.threads if device.type == "cpu" else None):
        ours = [
            Entry.make(name, speed, count, options, data, device)
            for name in options.algos
            for speed in options.speeds
            for count in options.seeds
        ]
        batch = ours[0].algo.config.batch
        others = {
            name: rival(name, data, batch, options.updates, device, options.peer_python)
            for name in options.peers
        }
        for run in others.values():
            seconds(run, options.updates, device)
        found, rates = compared(options, data, device, ours, others)
    if options.processes > 1:
        found["processes"] = together(options)
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1))
        title = f"{found['hardware']}, {options.threads} thread(s)"
        scores(Path(options.out).with_suffix(".png"), {title: rates}, "updates per second")
    return found


def prepared(options: Options, say: Callable[[str], None] = print) -> tuple[torch.device, Dataset]:
    """Threads, memory and products as a run has them; the device, and the data."""
    system.prepare(options.threads, keep_memory=True)
    device = pick_device(options.device)
    if device.type == "cpu":
        say(matmul.select_backend(home(), cpu_name()))
    return device, sources.load(options.source, options.env, options.dataset, options.rows)


def compared(
    options: Options,
    data: Dataset,
    device: torch.device,
    ours: list["Entry"],
    others: dict[str, Callable[[int], None]],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The rounds: the table made of them, and each row's updates per second."""
    first = ours[0]
    products = {m.label: m.products() for m in ours if m.speed == options.speeds[0]}
    runs = {m.label: m.run for m in ours} | others
    runs |= {f"products of {label}": run for label, run in products.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    calibration = []
    for _ in tqdm(range(options.rounds), desc="rounds", leave=False):
        calibration.append(product_rate(device))
        for name, run in runs.items():
            times[name].append(seconds(run, options.updates, device) / options.updates)
    base = statistics.median(times[first.label])
    found: dict[str, Any] = {
        "data": data.name,
        "transitions": len(data),
        "device": device.type,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "peers": {name: metadata.version(name) for name in packages(options.peers)},
        "calibration_gflops": [round(min(calibration)), round(max(calibration))],
        "methods": {},
    }
    speed = f"{min(calibration):.0f} to {max(calibration):.0f} GFLOP/s"
    print(f"{data.name}: {len(data)} transitions")
    print(f"{found['hardware']}, {options.threads} thread(s), 256-cubed product {speed}")
    print(
        f"{'method':<16} {'updates/s':>9} {'range':>13} {'time':>7} {'products':>9} {'calls':>6} "
        f"{'MB':>6}"
    )
    counts = {m.label: m for m in ours}
    for name in [*counts, *others]:
        many = counts[name].count if name in counts else 1
        rates = sorted(many / t for t in times[name])
        row: dict[str, Any] = {
            "updates_per_second": round(many / statistics.median(times[name]), 1),
            "range": [round(rates[0], 1), round(rates[-1], 1)],
            "time_ratio": round(statistics.median(times[name]) / base, 3),
        }
        found["methods"][name] = row
        share = calls = memory = ""
        if name in counts:
            row |= counts[name].about(device)
            calls = f"{row['calls']:.0f}"
            memory = f"{row['state_mb'] + (row['working_mb'] or 0):.1f}"
            alone = f"products of {counts[name].beside(options.speeds[0])}"
            row["products"] = round(
                statistics.median(times[alone]) / statistics.median(times[name]), 3
            )
            share = f"{row['products']:.0%}"
        print(
            f"{name:<16} {row['updates_per_second']:>9} {rates[0]:>6.0f}-{rates[-1]:<6.0f} "
            f"{row['time_ratio']:>7} {share:>9} {calls:>6} {memory:>6}"
        )
    shown = {n: t for n, t in times.items() if not n.startswith("products of")}
    return found, {
        n: (counts[n].count if n in counts else 1) / np.array(t) for n, t in shown.items()
    }


@dataclass
class Entry:
    """One of our methods with its sampler, made one way.

    Attributes:
        count: stacked seeds.
        run: makes n updates of every seed.
        turns: pattern of update -> how many of a thousand updates make it.
    """

    name: str
    speed: Speed
    count: int
    options: Options
    algo: Any
    stage: Stage
    sample: Sampler
    step: int = 0
    run: Callable[[int], None] = field(init=False)
    turns: Counter[int] = field(init=False)

    @classmethod
    def make(
        cls,
        name: str,
        speed: str,
        count: int,
        options: Options,
        data: Dataset,
        device: torch.device,
    ) -> "Entry":
        """The method after its warm-up."""
        given = {"env": options.env, "dataset": options.dataset, "source": options.source}
        values = configuration.configured(name, given | chosen(name, options))
        method, seeds = configuration.method(name), (count,) if count > 1 else ()
        spec = Spec(data.obs_dim, data.act_dim, *data.statistics())
        stream = generator(0, "speed", values.task, device=device)
        algo = method.make(values.config(), spec, stream, seeds)
        if method.online:
            replay = replayed(data, seeds, device)
            start = lambda: replay.sampler(algo.config.batch)  # noqa: E731
            stage = Stage("train", None, start, algo.update, turns_of(algo))
        else:
            run = Run(1, seeds, device, method.fields, str(home()))
            (stage,) = method.stages(algo, Task(spec, data), run)
        made = cls(name, cast(Speed, speed), count, options, algo, stage, stage.start())
        made.turns, made.run = Counter(map(stage.turn, range(1000))), made.runner()
        seconds(made.run, options.warmup, device)
        return made

    @property
    def label(self) -> str:
        return self.beside(self.speed)

    def beside(self, speed: str) -> str:
        """The name of the row that differs from this one in how updates are made."""
        parts = [self.name]
        parts += [speed] if len(self.options.speeds) > 1 else []
        parts += [f"x{self.count}"] if len(self.options.seeds) > 1 else []
        return " ".join(parts)

    def runner(self, speed: Speed | None = None) -> Callable[[int], None]:
        """Updates from here on, made as this row's or as told; captured anew if so."""
        stage = self.stage
        update = Updates(stage.update, self.sample, stage.turn, self.algo, speed or self.speed)

        def run(count: int) -> None:
            for _ in range(count):
                update(self.step)
                self.step += 1

        return run

    def recorded(self) -> dict[int, list[Call]]:
        """Pattern of update -> the operators that one calls as written."""
        found = {}
        for turn in self.turns:
            with Recorder() as recorder:
                self.once(turn)
            found[turn] = recorder.calls
        return found

    def products(self) -> Callable[[int], None]:
        """The matrix products of updates and nothing else."""
        parts = {
            turn: [
                tree_map(detached, (c.run, c.args, c.kwargs))
                for c in calls
                if str(c.run).split(".")[1] in PRODUCTS
            ]
            for turn, calls in self.recorded().items()
        }

        def run(count: int) -> None:
            with torch.inference_mode():
                for step in range(count):
                    for product, args, kwargs in parts[self.stage.turn(step)]:
                        product(*args, **kwargs)

        return run

    def about(self, device: torch.device) -> dict[str, Any]:
        """Its options, what an update as written calls, and what it keeps in memory."""
        on_gpu = device.type == "cuda"
        calls = self.launches() if on_gpu else {t: len(c) for t, c in self.recorded().items()}
        held = sum(x.nbytes for _, x in tensors(state_of(self.algo)))
        working = self.peak() if on_gpu else self.planned()  # None: it cannot be recorded
        return {
            "options": chosen(self.name, self.options),
            "calls": sum(calls[t] * n for t, n in self.turns.items()) / self.turns.total(),
            "state_mb": round(held / 1e6, 3),
            "working_mb": None if working is None else round(working / 1e6, 3),
        }

    def once(self, turn: int) -> dict[str, torch.Tensor]:
        """An update as written that makes a pattern."""
        return self.stage.update(self.sample(self.algo.generator), turn)

    def planned(self) -> int | None:
        """Bytes of intermediate results on a CPU.

        Those of the largest pattern; of all together where each is captured apart.
        """
        try:
            found = [Recording(partial(self.once, turn)).memory for turn in self.turns]
        except NotRecordable:
            return None
        return max(found) if self.speed in ("eager", "compile") else sum(found)

    def peak(self) -> int:
        """Bytes that an update of any pattern takes as written above what lies on the GPU."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for turn in self.turns:
            self.once(turn)
        return torch.cuda.max_memory_allocated() - before

    def launches(self) -> dict[int, int]:
        """Pattern of update -> kernels and copies on the GPU of one as written."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        cuda, found = torch.autograd.DeviceType.CUDA, {}
        for turn in self.turns:
            with torch.profiler.profile(activities=activities) as profile:
                self.once(turn)
                torch.cuda.synchronize()
            work = profile.events()
            found[turn] = sum(e.device_type == cuda and not e.is_user_annotation for e in work)
        return found


def together(options: Options) -> dict[str, float]:
    """Updates per second of 1, 2, ... processes of the first row at once, summed over them."""
    places = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    places = places or list(range(options.processes))
    context, found = multiprocessing.get_context("spawn"), {}
    for count in range(1, options.processes + 1):
        start, rates = context.Barrier(count), context.Queue()
        workers = [
            context.Process(target=one_of, args=(options, place, start, rates))
            for place in places[-count:]
        ]
        for worker in workers:
            worker.start()
        rounds = [rates.get() for _ in workers]  # (rounds,) each
        for worker in workers:
            worker.join()
        found[str(count)] = round(float(np.median(np.sum(rounds, 0))), 1)
        print(
            f"{count} process(es): {found[str(count)]} updates/s, "
            f"{found[str(count)] / found['1']:.2f} times one"
        )
    return found


def one_of(options: Options, place: int, start: Any, rates: Any) -> None:
    """Body of one of the processes: its updates per second of every round."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {place})
    device, data = prepared(replace(options, threads=1, device="cpu"), say=lambda line: None)
    method = Entry.make(options.algos[0], options.speeds[0], 1, options, data, device)
    found = []
    for _ in range(options.rounds):
        start.wait()
        found.append(options.updates / seconds(method.run, options.updates, device))
    rates.put(found)


def detached(x: Any) -> Any:
    """Without the graph of gradients, whose nodes must not outlive an update that is captured."""
    return x.detach() if isinstance(x, torch.Tensor) else x


def replayed(data: Dataset, seeds: tuple[int, ...], device: torch.device) -> Replay:
    """A replay that holds the whole data set, for every seed."""
    fields = {name: (tuple(data[name].shape[1:]), torch.float32) for name in TRANSITION}
    replay = Replay(len(data), fields, seeds, device)
    rows = {name: data[name].to(device) for name in TRANSITION}
    replay.add({name: value.expand(*seeds, *value.shape) for name, value in rows.items()})
    return replay


def chosen(name: str, options: Options) -> dict[str, Any]:
    """The options in `set` that are this method's, by their full names.

    Raises:
        ConfigError: an option of a method that is not measured.
    """
    for key in options.set:
        if key.split(".")[0] not in options.algos:
            raise ConfigError(f"set takes method.option: value with a method of algos, got {key!r}")
    own = f"{name}."
    return {
        f"algo.{key.removeprefix(own)}": value
        for key, value in options.set.items()
        if key.startswith(own)
    }
