"""What PRDC's neighbor lists certify, and what uncertified rows cost."""

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness.timing import seconds
from offrl.nets.kernels.opaque import opaque
from offrl.seeding import generator

if TYPE_CHECKING:
    from benchmarks.harness.speed import Method, Options


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
        names: list[str] = []

        def find(index: torch.Tensor, pi: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if self.noise is not None:
                own = self.act[index]
                away = torch.empty_like(own).normal_(0, self.noise, generator=self.generator)
                pi = (own + away).clamp(-1, 1)
            row, info = self.table.nearest(index, pi, beta)
            self.shares.append(info)
            names[:] = info
            return row, *info.values()

        row, *values = opaque(find, index, pi)
        return row, dict(zip(names, values, strict=True))


def certified(method: "Method", device: torch.device) -> float:
    """Share of the actor's own queries that the lists certify, over forty updates."""
    search = method.algo.neighbors
    method.algo.neighbors = Watched(search, None, generator(0, "noise", device=device))
    method.runner("eager")(40)
    shares, method.algo.neighbors = method.algo.neighbors.shares, search
    return 1 - float(torch.stack([info["uncertified"] for info in shares]).mean())


def by_share(
    method: "Method", base: "Method", options: "Options", device: torch.device
) -> list[dict[str, float]]:
    """Time of whole updates over the first method's, against the share that the lists certify.

    The search is asked for the data's actions with Gaussian noise of growing size; each noise is
    timed in rounds that alternate with the first method.
    """
    heads = ("noise", "certified", "self match", "ms", "ms, first", "ratio")
    print(" ".join(f"{head:>10}" for head in heads))
    table, search = [], method.algo.neighbors
    for noise in (0.0, 0.2, 0.3, 0.35, 0.4, 0.5):
        method.algo.neighbors = Watched(search, noise, generator(0, "noise", device=device))
        run = method.runner()
        run(6 * method.algo.cycle)  # captured; a first uncertified row may build a tree
        times: list[tuple[float, float]] = []
        for _ in range(max(3, options.rounds // 2)):
            count = max(2, options.updates // 4)
            one, other = (seconds(f, count, device) / count for f in (run, base.run))
            times.append((one, other))
        shares = {
            name: float(torch.stack([info[name] for info in method.algo.neighbors.shares]).mean())
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
    method.algo.neighbors = search
    return table
