"""Speed and agreement of the neighbor search on a data set or on random rows.

    python scripts/neighbors.py --data ~/.cache/offrl/generated/<entry>
    python scripts/neighbors.py --rows 100000 --obs 11 --act 3

Queries take their states from the data. Their actions lie around the data's (sd 0.1 and 0.3), as a
trained actor's do, or around zero, as a fresh actor's do. Times are wall times of whole batches on
the threads of torch; every answer is compared with a float64 search over all rows.
"""

import argparse
import logging
import time
from pathlib import Path

import torch
from tqdm import tqdm

from offrl.data.dataset import read
from offrl.data.neighbors import StateNeighbors, brute_force


def rows(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Standardized states, actions and a digest."""
    if options.data:
        data = read(options.data)
        mean, std = data.statistics()
        return (data["obs"].float() - mean) / std, data["act"].float(), data.digest
    g = torch.Generator().manual_seed(0)
    obs = torch.randn(options.rows, options.obs, generator=g)
    act = torch.rand(options.rows, options.act, generator=g) * 2 - 1
    return obs, act, f"random-{options.rows}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a cache entry; without it, random rows")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--obs", type=int, default=17)
    parser.add_argument("--act", type=int, default=6)
    parser.add_argument("--k", type=int, default=16, help="length of the lists")
    parser.add_argument("--beta", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--unchecked", action="store_true", help="times only, no float64 search")
    parser.add_argument("--cache", type=Path, help="keep the lists in this folder")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    obs, act, digest = rows(options)
    before = time.perf_counter()
    table = StateNeighbors.build(
        obs, act, digest, options.k, options.cache, options.device, progress=True
    )
    seconds = time.perf_counter() - before
    print(f"{len(obs)} rows of {obs.shape[-1]} + {act.shape[-1]}: lists ready in {seconds:.1f} s")
    obs, act = table.obs, table.act

    g = torch.Generator().manual_seed(1)
    index = torch.randint(len(obs), (options.batches, options.batch), generator=g)
    noise = torch.randn(*index.shape, act.shape[-1], generator=g)
    index, noise = index.to(options.device), noise.to(options.device)
    queries = {f"near, sd {sd}": (act[index] + sd * noise).clamp(-1, 1) for sd in (0.1, 0.3)}
    queries["fresh"] = 0.05 * noise
    print("actions        certified    self  median ms  worst ms            same")
    for name, pi in queries.items():
        table.nearest(index[0], pi[0], options.beta)  # a first hard batch may build the tree
        times, same, infos = [], 0, []
        for i, p in zip(index, tqdm(pi, desc=name, leave=False), strict=True):
            before = time.perf_counter()
            row, info = table.nearest(i, p, options.beta)
            infos.append([float(value) for value in info.values()])
            times.append(1e3 * (time.perf_counter() - before))
            if not options.unchecked:
                same += int((row == brute_force(obs, act, i, p, options.beta)).sum())
        share = dict(zip(info, torch.tensor(infos).mean(0).tolist(), strict=True))
        agreement = "unchecked" if options.unchecked else f"{same} of {index.numel()}"
        times.sort()
        print(
            f"{name:14}{1 - share['uncertified']:10.3f}{share['self_match']:8.3f}"
            f"{times[len(times) // 2]:11.2f}{times[-1]:10.2f}{agreement:>16}"
        )
