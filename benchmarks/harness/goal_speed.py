"""Updates per second of OTA and HIQL against the passes that their losses ask of the networks.

    python scripts/goal_speed.py --out benchmarks/ogbench/speed.json

A pass is one batch of rows through one network. `formulas` is OTA's loss as it is written, in
torch's own operators, where every head computes its phi; `authors` shares phi between the heads of
a term, as the authors' code does (benchmarks/harness/peers/per_term.py); `ota` joins all passes and
computes each phi once. The three make the same update. They take turns, so that a busy machine
slows all. Times are of the processor, not of the clock, on one thread.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.peers import per_term
from offrl import config, system
from offrl.engine.method import Batch, Spec
from offrl.system import cpu_name

PASSES = {  # of phi, and of heads
    "formulas": (22, 20),
    "authors": (12, 20),
    "ota": (9, 20),
    "hiql": (7, 14),
}
GOALS = ("low_goal", "high_goal", "value_goal", "waypoint", "goal")
STATES = ("obs", "next_obs", "option_end", "ahead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256, help="of three hidden layers")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--obs", type=int, default=2, help="numbers of an observation")
    parser.add_argument("--act", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=5, help="in each round")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    system.prepare(1, keep_memory=True)
    runs = updates(given)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(given.rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            for _ in range(given.updates):
                run()
            if round_ > 0:  # the first warms up
                times[name].append((time.process_time() - start) / given.updates)
    base = statistics.median(times["ota"])
    found: dict[str, Any] = {
        "hardware": cpu_name(),
        "threads": 1,
        "torch": torch.__version__,
        "width": given.width,
        "batch": given.batch,
        "obs": given.obs,
        "act": given.act,
        "forms": {},
    }
    print(f"{found['hardware']}, one thread, width {given.width}, batch {given.batch}")
    print(f"{'':<9} {'phi':>4} {'heads':>6} {'updates/s':>10} {'time / ota':>11}")
    for name, taken in times.items():
        phi, heads = PASSES[name]
        middle = statistics.median(taken)
        found["forms"][name] = {
            "phi_passes": phi,
            "head_passes": heads,
            "updates_per_second": round(1 / middle, 2),
            "range": [round(1 / max(taken), 2), round(1 / min(taken), 2)],
            "time_ratio": round(middle / base, 3),
        }
        print(f"{name:<9} {phi:>4} {heads:>6} {1 / middle:>10.1f} {middle / base:>11.2f}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1))


def updates(given: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """name -> one update on a fixed batch."""
    stream = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=stream)
    batch: Batch = {name: draw(given.batch, given.obs) for name in STATES + GOALS}
    batch["act"] = draw(given.batch, given.act).tanh()
    for name in ("success", "low_success", "high_success"):
        batch[name] = (torch.rand(given.batch, generator=stream) < 0.2).float()
    sizes: dict[str, Any] = {"hidden": (given.width,) * 3, "batch": given.batch}
    spec = Spec(given.obs, given.act)

    def make(name: str) -> Any:
        method = config.method(name)
        return method.make(method.config(**sizes), spec, torch.Generator().manual_seed(0), ())

    formulas, authors, joined, low = map(make, ("ota", "ota", "ota", "hiql"))
    return {
        "formulas": lambda: per_term.update(formulas, batch, 0),
        "authors": lambda: per_term.update(authors, batch, 0, shared=True),
        "ota": lambda: joined.update(batch, 0),
        "hiql": lambda: low.update(batch, 0),
    }
