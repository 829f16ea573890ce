"""OGBench's data: the published npz files, and files of the same layout made here.

A file holds M rows of whole trajectories: `observations`, `actions`, `terminals` (true on the last
row of each, a state without a successor, whose action means nothing), and `qpos`, `qvel`,
`button_states` where the simulator has them. Training uses `<env>-<dataset>-v0.npz`; beside it lies
a `-val.npz` with a tenth of the episodes. Trajectories end by a time limit: `terminal` is 0
everywhere, `timeout` marks their last transition. There are no rewards, and returns are 0. Images
become rows of uint8.

Park et al., ICLR 2025, arXiv:2410.20092; released code.
"""

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl.data.dataset import Arrays, Dataset, bounds, cached, home, store_episodes, stream
from offrl.data.sources import files, manipulation, mazes
from offrl.data.sources.download import located
from offrl.data.sources.rollout import in_processes
from offrl.envs import ogbench
from offrl.errors import DataError
from offrl.seeding import derive

ROOT = "https://rail.eecs.berkeley.edu/datasets/ogbench/"
REQUIRED = ("observations", "actions", "terminals")
LAYOUT = f"The layout has {', '.join(REQUIRED)}; a file with rewards is read by source=files"
RULES = 1  # of the conversion; raise it when rows would change
RECIPE = 1  # of generated data; likewise
BLOCK = 1 << 16  # rows converted at a time
CHUNK = 10_000  # steps of a job: about a second of a maze, a minute of manipulation


def load(env: str, dataset: str) -> Dataset:
    """A published data set, or any npz file of the same layout.

    A name is looked for in the cache, then where the ogbench package keeps its files, and
    downloaded when neither has it.

    Args:
        env: such as `antmaze-giant`.
        dataset: `navigate`, `stitch`, `explore`, `play` or `noisy`; or the path of a file.

    Raises DataError as `offrl.data.sources.files.load`, OSError if the download fails.
    """
    if Path(dataset).suffix == ".npz":
        path = Path(dataset)
        folder = files.entry(path, "ogbench")
    else:
        folder = home() / "ogbench" / f"{env}-{dataset}-{ogbench.VERSION}"
        path = folder.with_name(f"{folder.name}.npz")
        theirs = Path.home() / ".ogbench" / "data" / path.name
        path = located(ROOT + path.name, path, theirs, columns)
    info = {"source": "ogbench"}
    return files.converted(path, folder, f"ogbench/{path.stem}", RULES, convert, info)


def generate(
    env: str, dataset: str, rows: int | None = None, workers: int = 0, seed: int = 0
) -> Dataset:
    """Data by the published recipe, from the cache, made first if they are not there.

    The cache entry also holds the two npz files of the published layout.

    Args:
        env: `pointmaze-medium`, `-large`, `-giant` or `-teleport`, `cube-*`, `scene`, `puzzle-*`,
            the last three also `visual-`.
        dataset: `navigate` or `stitch` in mazes, `play` or `noisy` in manipulation.
        rows: transitions, rounded down to whole episodes; None for the published number.
        workers: processes; 0 for one per core. The rows do not depend on it.

    Raises DataError if there is no recipe for the data, ValueError without the extra `ogbench`.
    """
    family, _, maze = env.partition("-")
    recipe: Any
    if family == "pointmaze" and dataset in mazes.KINDS:
        recipe, where = mazes, maze
    elif ogbench.family(env) in ogbench.MANIPULATION and dataset in manipulation.KINDS:
        recipe, where = manipulation, env
    else:
        raise DataError(
            f"{env}-{dataset} cannot be generated (pointmaze-* with {' or '.join(mazes.KINDS)} and "
            f"{', '.join(ogbench.MANIPULATION)} with {' or '.join(manipulation.KINDS)} can be): "
            "source=ogbench downloads the published file, dataset=FILE.npz source=ogbench takes "
            "your own"
        )
    ogbench.register()
    episodes, length = recipe.size(where, dataset)
    episodes = episodes if rows is None else rows // length
    if episodes < 1:
        raise DataError(f"rows must be at least one episode of {length}, got {rows}")
    counts = {"": episodes, "-val": max(1, episodes // 10)}
    versions = {name: metadata.version(name) for name in ("ogbench", "gymnasium", "mujoco")}
    decided = [RECIPE, RULES, CHUNK, env, dataset, counts, length, seed, versions]
    key = hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:10]
    name, each = f"{env}-{dataset}", max(1, CHUNK // length)

    def fill(place: Path) -> dict[str, Any]:
        for suffix, count in counts.items():
            stem = f"{name}-{ogbench.VERSION}{suffix}"
            part, jobs = suffix.removeprefix("-") or "train", []
            for first in range(0, count, each):
                chunk_seed = derive(seed, where, dataset, part, first)
                jobs.append((where, dataset, min(each, count - first), length, chunk_seed))
            chunks = in_processes(recipe.play, jobs, workers)
            write_npz(place / f"{stem}.npz", chunks, count * (length + 1), f"{name}{suffix}")
        path = place / f"{name}-{ogbench.VERSION}.npz"
        found = convert(path, place) | {"sha256": files.digest(path)}
        about = {"source": "generated", "recipe": RECIPE, "seed": seed, "versions": versions}
        title = f"generated/{name} (ogbench {versions['ogbench']}, mujoco {versions['mujoco']})"
        return {"name": title, "info": about | found}

    return cached(home() / "generated" / f"{name}-{episodes * length}-v{RECIPE}-{key}", fill)


def write_npz(path: Path, chunks: Iterable[Arrays], rows: int, label: str) -> None:
    """Chunks of rows one after the other as an npz file, which never lies in memory whole.

    Equal rows make equal bytes, so that a file can be checked against another's digest.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as parts, zipfile.ZipFile(path, "w") as file:
        for name in stream(Path(parts), chunks, rows, label):
            info = zipfile.ZipInfo(f"{name}.npy")  # without the time
            part = Path(parts, info.filename)
            with part.open("rb") as source, file.open(info, "w", force_zip64=True) as member:
                shutil.copyfileobj(source, member)


def columns(path: Path) -> Arrays:
    """The arrays that training reads; DataError as for `load`."""
    with files.opened(path, REQUIRED, (), LAYOUT) as arrays:
        last = arrays["terminals"].reshape(-1).astype(bool)
        if len(last) < 2 or not last[-1]:
            raise DataError(f"{path}: the last row must end a trajectory (terminals = 1)")
        short = np.flatnonzero(last & np.append(True, last[:-1]))
        if len(short):
            raise DataError(f"{path}: the trajectory that ends in row {short[0]} has no transition")
        return arrays | {"terminals": last}


def convert(path: Path, place: Path) -> dict[str, Any]:
    """Write the transitions (s_i, a_i, s_{i+1}) of a file into the folder `place`."""
    arrays = columns(path)
    last, act = arrays["terminals"], arrays["actions"]
    obs = arrays["observations"].reshape(len(last), -1)  # images are rows
    keep = np.flatnonzero(~last)
    timeout = last[keep + 1]
    plain = lambda rows: rows.astype(np.float32) if rows.dtype.kind in "fb" else rows  # noqa: E731

    def blocks() -> Iterator[Arrays]:
        for first in range(0, len(keep), BLOCK):
            rows = keep[first : first + BLOCK]
            found = {"obs": obs[rows], "act": act[rows], "next_obs": obs[rows + 1]}
            found |= {"terminal": np.zeros(len(rows), bool), "timeout": last[rows + 1]}
            yield {name: plain(value) for name, value in found.items()}

    stream(place, blocks(), len(keep))
    starts = bounds(torch.from_numpy(timeout))
    store_episodes(place, starts, torch.zeros(len(keep)))
    return {"episodes": len(starts), "notes": ["no rewards; returns are 0"]}
