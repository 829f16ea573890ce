"""What PRDC's neighbor lists certify, and what the rows that they do not certify cost.

    python scripts/certificate.py env=halfcheetah dataset=medium 'set={prdc.alpha:2.5}' warmup=3000

First the share of the actor's own queries that the lists certify. Then the search is asked for the
data's actions with Gaussian noise of growing size; whole updates with each noise are timed in
rounds that alternate with another method's.
"""

import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.speed import Entry, prepared
from benchmarks.harness.speed import Options as SpeedOptions
from benchmarks.harness.timing import held_to, seconds
from offrl import cli
from offrl.nets.kernels.opaque import opaque
from offrl.seeding import generator

NOISES = (0.0, 0.2, 0.3, 0.35, 0.4, 0.5)


@dataclass(frozen=True)
class Options:
    """Options of scripts/certificate.py.

    env=halfcheetah dataset=medium rows=None source=auto     the data that updates draw from
    base=td3bc              the method whose time is the measure
    'set={prdc.alpha:2.5}'  options of the two methods
    warmup=1000             updates before the clock starts, so that the actor leaves its start
    rounds=5 updates=50     alternating rounds, and updates in each
    device=auto threads=1
    out=PATH                write the table as JSON
    """

    env: str = "halfcheetah"
    dataset: str = "medium"
    source: str = "auto"
    rows: int | None = None
    base: str = "td3bc"
    set: dict[str, Any] = field(default_factory=dict)
    warmup: int = 1000
    rounds: int = 5
    updates: int = 50
    device: str = "auto"
    threads: int = 1
    out: str | None = None


@dataclass(frozen=True)
class Watched:
    """A neighbor search whose shares are kept, asked for the data's actions with noise if given.

    Attributes:
        table: the search itself.
        noise: (N, a), one of every row; None leaves the actor's own actions.
        shares: what the search told, one entry per query batch.
    """

    table: Any
    noise: Tensor | None = None
    shares: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def act(self) -> Tensor:
        return self.table.act

    def nearest(self, index: Tensor, pi: Tensor, beta: float) -> Any:
        names: list[str] = []

        def find(index: Tensor, pi: Tensor) -> tuple[Tensor, ...]:
            if self.noise is not None:
                pi = (self.act[index] + self.noise[index]).clamp(-1, 1)
            row, info = self.table.nearest(index, pi, beta)
            self.shares.append(info)
            names[:] = info
            return row, *info.values()

        row, *values = opaque(find, index, pi)
        return row, dict(zip(names, values, strict=True))

    def share(self, name: str) -> float:
        """Mean over all queries so far."""
        return float(torch.stack([info[name] for info in self.shares]).mean())


def main() -> None:
    with cli.readable_errors():
        measure_certificate(cli.options(Options, sys.argv[1:]))


def measure_certificate(options: Options) -> dict[str, Any]:
    """Measure, print two tables, and return them."""
    shared = {name: value for name, value in vars(options).items() if name not in ("base", "out")}
    told = SpeedOptions(**shared, algos=(options.base, "prdc"), speeds=("graph",))
    device, data = prepared(told)
    with held_to(options.threads if device.type == "cpu" else None):
        base, prdc = (Entry.make(name, "graph", 1, told, data, device) for name in told.algos)
        search = prdc.algo.neighbors
        prdc.algo.neighbors = own = Watched(search)
        prdc.runner("eager")(40)
        found = {"data": data.name, "certified": round(1 - own.share("uncertified"), 4)}
        print(f"{found['certified']:.2%} of the actor's own queries certified")
        found["noises"] = by_noise(base, prdc, search, options, device)
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1))
    return found


def by_noise(
    base: Entry, prdc: Entry, search: Any, options: Options, device: torch.device
) -> list[dict[str, float]]:
    """Time of whole updates over the base's, against the share that the lists certify."""
    heads = ("noise", "certified", "self match", "ms", "ms, base", "ratio")
    print(" ".join(f"{head:>10}" for head in heads))
    table = []
    draw = torch.empty_like(search.act).normal_(generator=generator(0, "noise", device=device))
    for noise in NOISES:
        prdc.algo.neighbors = watched = Watched(search, noise * draw)
        run = prdc.runner()
        run(20)  # captured; a first uncertified row may build a tree
        times = [
            [seconds(f, options.updates, device) / options.updates for f in (run, base.run)]
            for _ in range(options.rounds)
        ]
        mine, other = (statistics.median(column) for column in zip(*times, strict=True))
        row = {
            "noise": noise,
            "certified": 1 - watched.share("uncertified"),
            "self_match": watched.share("self_match"),
            "milliseconds": 1000 * mine,
            "milliseconds_base": 1000 * other,
            "time_ratio": statistics.median(one / two for one, two in times),
        }
        table.append(row)
        print(" ".join(f"{value:>10.3f}" for value in row.values()))
    return table
