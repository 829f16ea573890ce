"""Updates per second of the methods, side by side in one process.

Machines are shared and change their clock, so the methods take turns in short rounds, and what
counts is the ratio of medians within one run. A calibration product beside every round tells how
fast the core was at that moment.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offrl import config as configuration
from offrl.data import Dataset, sources
from offrl.data.dataset import home
from offrl.engine import process
from offrl.engine.stage import Algorithm, Run, Spec
from offrl.experiment import pick_device
from offrl.outcome import cpu_name
from offrl.seeding import generator

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mv"}


@dataclass(frozen=True)
class Options:
    """Options of scripts/speed.py.

    env=halfcheetah dataset=medium rows=None source=auto     the data that updates draw from
    algos=[td3bc,prdc,bc]   methods; ratios are to the first
    warmup=1000             updates before the clock starts, so that the actor leaves its start
    rounds=9 updates=100    alternating rounds, and updates in each
    device=auto threads=1
    out=PATH                write the table as JSON
    """

    env: str = "halfcheetah"
    dataset: str = "medium"
    source: str = "auto"
    rows: int | None = None
    algos: tuple[str, ...] = ("td3bc", "prdc", "bc")
    warmup: int = 1000
    rounds: int = 9
    updates: int = 100
    device: str = "auto"
    threads: int = 1
    out: str | None = None


def measure_speed(options: Options) -> dict[str, Any]:
    """Measure, print a table, and return it."""
    process.prepare(options.threads, keep_memory=True)
    device = pick_device(options.device)
    data = sources.load(options.source, options.env, options.dataset, options.rows)
    steps = {name: updater(name, options, data, device) for name in options.algos}
    times: dict[str, list[float]] = {name: [] for name in steps}
    calibration = []
    for _ in range(options.rounds):
        calibration.append(product_rate(device))
        for name, (_, update) in steps.items():
            times[name].append(seconds(update, options.updates, device) / options.updates)
    first = options.algos[0]
    base = statistics.median(times[first])
    found: dict[str, Any] = {
        "data": data.name, "transitions": len(data), "device": device.type,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": options.threads, "torch": torch.__version__,
        "calibration_gflops": [round(min(calibration)), round(max(calibration))], "methods": {},
    }  # fmt: skip
    speed = f"{min(calibration):.0f} to {max(calibration):.0f} GFLOP/s"
    print(f"{data.name}: {len(data)} transitions")
    print(f"{found['hardware']}, {options.threads} thread(s), 256-cubed product {speed}")
    print(f"{'method':<8} {'updates/s':>9} {'range':>13} {'time':>7} {'outside products':>17}")
    for name, (algo, update) in steps.items():
        rates = sorted(1 / t for t in times[name])
        row = {
            "updates_per_second": round(1 / statistics.median(times[name]), 1),
            "range": [round(rates[0], 1), round(rates[-1], 1)],
            "time_ratio": round(statistics.median(times[name]) / base, 3),
            "outside_products": round(outside_products(update), 3),
        }
        found["methods"][name] = row
        print(f"{name:<8} {row['updates_per_second']:>9} {rates[0]:>6.0f}-{rates[-1]:<6.0f} "
              f"{row['time_ratio']:>7} {row['outside_products']:>17.0%}")  # fmt: skip
        if hasattr(algo, "neighbors"):
            found["certificate"] = by_share(algo, data, base, device)
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1))
    return found


def updater(
    name: str, options: Options, data: Dataset, device: torch.device
) -> tuple[Algorithm, Callable[[], None]]:
    """The algorithm after its warm-up, and a function that makes one complete update."""
    method = configuration.module(name)
    values = configuration.resolve(name, {"env": options.env, "dataset": options.dataset},
                                   shipped(name).get("tasks"))  # fmt: skip
    algo = method.make(
        values.config(), Spec(data.obs_dim, data.act_dim, *data.statistics()),
        generator(0, "speed", values.task, device=device),
    )  # fmt: skip
    (stage,) = method.stages(algo, data, Run(1, device=device, cache=str(home())))
    sample, count = stage.start(), iter(range(10**12))

    def update() -> None:
        stage.update(sample(algo.generator), next(count))

    seconds(update, options.warmup, device)
    return algo, update


def shipped(name: str) -> dict[str, Any]:
    """The stored task values of a method."""
    from importlib import resources

    import yaml

    return yaml.safe_load((resources.files("offrl.configs") / "algo" / f"{name}.yaml").read_text())


def seconds(update: Callable[[], Any], count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        update()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(device: torch.device) -> float:
    """GFLOP/s of a 256-cubed float32 product, now."""
    x, y = torch.randn(2, 256, 256, device=device)
    return 300 * 2 * 256**3 / seconds(lambda: torch.mm(x, y), 300, device) / 1e9


def outside_products(update: Callable[[], None]) -> float:
    """Share of an update's time that is not spent in matrix products, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(40):
            update()
    events = seen.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    return 1 - sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS) / total


def by_share(algo: Any, data: Dataset, base: float, device: torch.device) -> list[dict[str, float]]:
    """Time of the neighbor search against the share of rows that the lists certify.

    The policy's actions are replaced by the data's with Gaussian noise of growing size.
    """
    print(f"{'noise':>6} {'certified':>10} {'self match':>11} {'ms/search':>10} {'PRDC/first':>11}")
    stream, table = generator(0, "noise", device=device), []
    for noise in (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5):
        times, certified, own = [], [], []
        for _ in range(12):
            index = torch.randint(len(data), (256,), generator=stream, device=device)
            act = algo.neighbors.act[index]
            act = act + noise * torch.empty_like(act).normal_(generator=stream)
            ask = lambda i=index, a=act: algo.neighbors.nearest(i, a.clamp(-1, 1), algo.config.beta)  # noqa: E731
            times.append(seconds(ask, 1, device))
            info = ask()[1]
            certified.append(1 - float(info["uncertified"]))
            own.append(float(info["self_match"]))
        spent = statistics.median(times)
        row = {
            "noise": noise,
            "certified": statistics.mean(certified),
            "self_match": statistics.mean(own),
            "milliseconds": 1000 * spent,
            "time_ratio": 1 + spent / algo.config.actor_every / base,
        }
        table.append(row)
        print(f"{noise:>6} {row['certified']:>10.3f} {row['self_match']:>11.3f} "
              f"{row['milliseconds']:>10.2f} {row['time_ratio']:>11.2f}")  # fmt: skip
    return table
