"""Updates per second of the methods, side by side in one process.

Machines are shared and change their clock, so the methods take turns in short rounds, and what
counts is the ratio of medians within one run. A calibration product beside every round tells how
fast the core was at that moment.
"""

import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from offrl import config as configuration
from offrl.data import Dataset, prepare, sources
from offrl.data.dataset import home
from offrl.data.replay import Replay
from offrl.engine import process
from offrl.engine.stage import Run, Spec
from offrl.experiment import pick_device
from offrl.machine import cpu_name
from offrl.nets import Standardize
from offrl.results.plots import scores
from offrl.seeding import generator

FIELDS = ("obs", "act", "reward", "next_obs", "terminal")

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mv"}


@dataclass(frozen=True)
class Options:
    """Options of scripts/speed.py.

    env=halfcheetah dataset=medium rows=None source=auto     the data that updates draw from
    algos=[td3bc,prdc,bc]   methods; ratios are to the first. td3 and sac draw from a full replay
    peers=[plain,jax]       the same work elsewhere (offrl/peers): plain and jax make updates of
                            td3bc, sb3-td3 and sb3-sac those of td3 and sac; the last three need
                            the extra `peers`. Batch as the first of algos has it
    'set={prdc.alpha:2.5}'  options of methods
    warmup=1000             updates before the clock starts, so that the actor leaves its start
    rounds=9 updates=100    alternating rounds, and updates in each
    device=auto threads=1
    out=PATH                write the table as JSON, and a picture beside it
    """

    env: str = "halfcheetah"
    dataset: str = "medium"
    source: str = "auto"
    rows: int | None = None
    algos: tuple[str, ...] = ("td3bc", "prdc", "bc")
    peers: tuple[str, ...] = ()
    set: dict[str, Any] = field(default_factory=dict)
    warmup: int = 1000
    rounds: int = 9
    updates: int = 100
    device: str = "auto"
    threads: int = 1
    out: str | None = None


def measure_speed(options: Options) -> dict[str, Any]:
    """Measure, print a table, and return it.

    Raises:
        ConfigError: an unknown peer, a peer that is not installed, or an odd number of updates.
    """
    process.prepare(options.threads, keep_memory=True)
    device = pick_device(options.device)
    data = sources.load(options.source, options.env, options.dataset, options.rows)
    with held_to(options.threads if device.type == "cpu" else None):
        ours = {name: updater(name, options, data, device) for name in options.algos}
        batch = ours[options.algos[0]][0].config.batch
        others = {name: rival(name, options, data, batch, device) for name in options.peers}
        runs = {name: repeat(update) for name, (_, update) in ours.items()} | others
        return compared(options, data, device, ours, runs)


def compared(
    options: Options,
    data: Dataset,
    device: torch.device,
    ours: dict[str, tuple[Any, Callable[[], None]]],
    runs: dict[str, Callable[[int], None]],
) -> dict[str, Any]:
    """The rounds, and the table made of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    calibration = []
    for _ in tqdm(range(options.rounds), desc="rounds", leave=False):
        calibration.append(product_rate(device))
        for name, run in runs.items():
            times[name].append(seconds(run, options.updates, device) / options.updates)
    first = options.algos[0]
    base = statistics.median(times[first])
    found: dict[str, Any] = {
        "data": data.name, "transitions": len(data), "device": device.type,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": options.threads, "torch": torch.__version__,
        "peers": {name: metadata.version(name) for name in packages(options.peers)},
        "calibration_gflops": [round(min(calibration)), round(max(calibration))], "methods": {},
    }  # fmt: skip
    speed = f"{min(calibration):.0f} to {max(calibration):.0f} GFLOP/s"
    print(f"{data.name}: {len(data)} transitions")
    print(f"{found['hardware']}, {options.threads} thread(s), 256-cubed product {speed}")
    print(f"{'method':<10} {'updates/s':>9} {'range':>13} {'time':>7} {'outside products':>17}")
    for name in runs:
        rates = sorted(1 / t for t in times[name])
        row = found["methods"][name] = {
            "updates_per_second": round(1 / statistics.median(times[name]), 1),
            "range": [round(rates[0], 1), round(rates[-1], 1)],
            "time_ratio": round(statistics.median(times[name]) / base, 3),
        }
        if name in ours:
            row["options"] = chosen(name, options)
            row["outside_products"] = round(outside_products(ours[name][1]), 3)
        share = f"{row['outside_products']:.0%}" if name in ours else ""
        print(f"{name:<10} {row['updates_per_second']:>9} {rates[0]:>6.0f}-{rates[-1]:<6.0f} "
              f"{row['time_ratio']:>7} {share:>17}")  # fmt: skip
    for name, (algo, update) in ours.items():
        if hasattr(algo, "neighbors"):
            proved = found["methods"][name]["certified"] = round(certified(algo, update, device), 4)
            print(f"{name:<10} {proved:.2%} of its rows certified")
            found["certificate"] = by_share(algo, update, ours[first][1], options, device)
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1))
        title = f"{found['hardware']}, {options.threads} thread(s)"
        rounds = {name: 1 / np.array(values) for name, values in times.items()}
        scores(Path(options.out).with_suffix(".png"), {title: rounds}, "updates per second")
    return found


# what `peers` may name: the packages behind each
PEERS = {
    "plain": (),
    "jax": ("jax", "optax"),
    "sb3-td3": ("stable-baselines3",),
    "sb3-sac": ("stable-baselines3",),
}


def packages(names: Iterable[str]) -> list[str]:
    return sorted({package for name in names for package in PEERS[name]})


def rival(
    name: str, options: Options, data: Dataset, batch: int, device: torch.device
) -> Callable[[int], None]:
    """The peer's function that makes n updates, warmed up by one round. Two layers of 256 units."""
    if name not in PEERS:
        raise configuration.ConfigError(
            f"there is no peer {name!r}{configuration.nearest(name, PEERS)}; "
            f"known: {', '.join(PEERS)}"
        )
    for package in packages([name]):
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            raise configuration.ConfigError(
                f"the peer {name} needs {package}: pip install -c constraints.txt -e '.[peers]'"
            )
    fields = {key: data[key] for key in FIELDS}
    if name.startswith("sb3"):
        from offrl.peers import sb3

        arrays = {key: value.numpy() for key, value in fields.items()}
        run = sb3.filled(name.removeprefix("sb3-").upper(), arrays, batch, device)
    else:
        fields = prepare(Standardize(data.obs_dim, *data.statistics()))(fields)
        if name == "plain":
            from offrl.peers import plain

            run = plain.td3bc(fields, batch, device)
        else:
            if options.updates % 2:
                raise configuration.ConfigError("jax takes pairs of updates: updates must be even")
            from offrl.peers import in_jax

            arrays = {key: value.numpy() for key, value in fields.items()}
            run = in_jax.td3bc(arrays, batch, options.updates)
    seconds(run, options.updates, device)
    return run


@contextmanager
def held_to(cores: int | None) -> Iterator[None]:
    """Within it the process runs on so many cores, whatever a library's own threads want."""
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-cores:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def repeat(update: Callable[[], object]) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in range(count):
            update()

    return run


def updater(
    name: str, options: Options, data: Dataset, device: torch.device
) -> tuple[Any, Callable[[], None]]:
    """The algorithm after its warm-up, and a function that makes one complete update."""
    method = configuration.module(name)
    given = {"env": options.env, "dataset": options.dataset, "source": options.source}
    values = configuration.resolve(
        name, given | chosen(name, options), configuration.shipped(name).get("tasks")
    )
    algo = method.make(
        values.config(), Spec(data.obs_dim, data.act_dim, *data.statistics()),
        generator(0, "speed", values.task, device=device),
    )  # fmt: skip
    if configuration.online(name):
        sample, step = replayed(data, device).sampler(algo.config.batch), algo.update
    else:
        (stage,) = method.stages(algo, data, Run(1, device=device, cache=str(home())))
        sample, step = stage.start(), stage.update
    count = iter(range(10**12))

    def update() -> None:
        step(sample(algo.generator), next(count))

    seconds(repeat(update), options.warmup, device)
    return algo, update


def replayed(data: Dataset, device: torch.device) -> Replay:
    """A replay that holds the whole data set."""
    fields = {name: (tuple(data[name].shape[1:]), torch.float32) for name in FIELDS}
    replay = Replay(len(data), fields, device=device)
    replay.add({name: data[name].to(device) for name in FIELDS})
    return replay


def chosen(name: str, options: Options) -> dict[str, Any]:
    """The options in `set` that are this method's, by their full names.

    Raises:
        ConfigError: an option of a method that is not measured.
    """
    for key in options.set:
        if key.split(".")[0] not in options.algos:
            raise configuration.ConfigError(
                f"set takes method.option: value with a method of algos, got {key!r}"
            )
    own = f"{name}."
    return {
        f"algo.{key.removeprefix(own)}": value
        for key, value in options.set.items()
        if key.startswith(own)
    }


def seconds(run: Callable[[int], None], count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(device: torch.device) -> float:
    """GFLOP/s of a 256-cubed float32 product, now."""
    x, y = torch.randn(2, 256, 256, device=device)
    return 300 * 2 * 256**3 / seconds(repeat(lambda: torch.mm(x, y)), 300, device) / 1e9


def outside_products(update: Callable[[], None]) -> float:
    """Share of an update's time that is not spent in matrix products, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(40):
            update()
    events = seen.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    return 1 - sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS) / total


@dataclass
class Watched:
    """A neighbor search whose shares are kept, asked for the data's actions with noise if given.

    Attributes:
        table: the search itself.
        noise: standard deviation per action dimension; None leaves the actor's own actions.
        generator: of the noise.
        shares: what the search told, one entry per query batch.
    """

    table: Any
    noise: float | None
    generator: torch.Generator
    shares: list[dict[str, torch.Tensor]] = field(default_factory=list)

    @property
    def act(self) -> torch.Tensor:
        return self.table.act

    def nearest(self, index: torch.Tensor, pi: torch.Tensor, beta: float) -> Any:
        if self.noise is not None:
            own = self.act[index]
            away = torch.empty_like(own).normal_(0, self.noise, generator=self.generator)
            pi = (own + away).clamp(-1, 1)
        row, info = self.table.nearest(index, pi, beta)
        self.shares.append(info)
        return row, info


def certified(algo: Any, update: Callable[[], None], device: torch.device) -> float:
    """Share of the actor's own queries that the lists certify, over forty updates."""
    search = algo.neighbors
    algo.neighbors = Watched(search, None, generator(0, "noise", device=device))
    for _ in range(40):
        update()
    shares, algo.neighbors = algo.neighbors.shares, search
    return 1 - float(torch.stack([info["uncertified"] for info in shares]).mean())


def by_share(
    algo: Any,
    update: Callable[[], None],
    base: Callable[[], None],
    options: Options,
    device: torch.device,
) -> list[dict[str, float]]:
    """Time of whole updates over the first method's, against the share that the lists certify.

    The search is asked for the data's actions with Gaussian noise of growing size; each noise is
    timed in rounds that alternate with the first method.
    """
    heads = ("noise", "certified", "self match", "ms", "ms, first", "ratio")
    print(" ".join(f"{head:>10}" for head in heads))
    table, search = [], algo.neighbors
    for noise in (0.0, 0.2, 0.3, 0.35, 0.4, 0.5):
        algo.neighbors = Watched(search, noise, generator(0, "noise", device=device))
        seconds(repeat(update), 2, device)  # a first uncertified row may build a tree
        times: list[tuple[float, float]] = []
        for _ in range(max(3, options.rounds // 2)):
            count = max(2, options.updates // 4)
            one, other = (seconds(repeat(f), count, device) / count for f in (update, base))
            times.append((one, other))
        shares = {
            name: float(torch.stack([info[name] for info in algo.neighbors.shares]).mean())
            for name in ("uncertified", "self_match")
        }
        mine, first = (statistics.median(column) for column in zip(*times, strict=True))
        row = {
            "noise": noise,
            "certified": 1 - shares["uncertified"],
            "self_match": shares["self_match"],
            "milliseconds": 1000 * mine,
            "milliseconds_first": 1000 * first,
            "time_ratio": statistics.median(one / other for one, other in times),
        }
        table.append(row)
        print(" ".join(f"{value:>10.3f}" for value in row.values()))
    algo.neighbors = search
    return table
