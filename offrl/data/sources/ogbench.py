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
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl.data.dataset import Dataset, allocate, bounds, home, once, read, store, write
from offrl.data.sources import manipulation, mazes
from offrl.data.sources.download import fetch
from offrl.data.sources.files import DAMAGE, damaged
from offrl.data.sources.mazes import Arrays
from offrl.data.sources.rollout import in_processes
from offrl.envs import ogbench
from offrl.errors import DataError
from offrl.seeding import derive

ROOT = "https://rail.eecs.berkeley.edu/datasets/ogbench/"
REQUIRED = ("observations", "actions", "terminals")
FIELDS = ("obs", "act", "next_obs", "terminal", "timeout")
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

    Raises:
        DataError: if the file is missing, damaged, holds pickled objects, or its fields do not fit.
        OSError: if the download fails or the cache is not writable.
    """
    if Path(dataset).suffix == ".npz":
        path = Path(dataset)
        place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
        return converted(path, home() / "ogbench" / f"{path.stem}-{place}", f"ogbench/{path.stem}")
    name = f"{env}-{dataset}-{ogbench.VERSION}"
    path = home() / "ogbench" / f"{name}.npz"
    if not path.exists():
        theirs = Path.home() / ".ogbench" / "data" / path.name
        if theirs.exists():
            path = theirs
        else:
            once(path, path.exists, lambda: fetch(ROOT + path.name, path, examine))
    return converted(path, home() / "ogbench" / name, f"ogbench/{name}")


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

    Raises:
        DataError: if there is no recipe for the data.
        ValueError: without the extra `ogbench`.
        OSError: the cache is not writable or the disk full; nothing half-made stays behind.
    """
    family, _, maze = env.partition("-")
    play: Callable[..., Arrays]
    if family == "pointmaze" and dataset in mazes.KINDS:
        play, where = mazes.play, maze
        episodes, length = mazes.size(maze, dataset)
    elif ogbench.family(env) in ogbench.MANIPULATION and dataset in manipulation.KINDS:
        play, where = manipulation.play, env
        episodes, length = manipulation.size(env, dataset)
    else:
        raise DataError(
            f"{env}-{dataset} cannot be generated (pointmaze-* with {' or '.join(mazes.KINDS)} and "
            f"{', '.join(ogbench.MANIPULATION)} with {' or '.join(manipulation.KINDS)} can be): "
            "source=ogbench downloads the published file, dataset=FILE.npz source=ogbench takes "
            "your own"
        )
    ogbench.register()
    if rows is not None:
        episodes = rows // length
    if episodes < 1:
        raise DataError(f"rows must be at least one episode of {length}, got {rows}")
    counts = {"": episodes, "-val": max(1, episodes // 10)}
    versions = {name: metadata.version(name) for name in ("ogbench", "gymnasium", "mujoco")}
    recipe = [RECIPE, RULES, CHUNK, env, dataset, counts, length, seed, versions]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:10]
    name, total = f"{env}-{dataset}", episodes * length
    entry = home() / "generated" / f"{name}-{total}-v{RECIPE}-{key}"

    def fill(place: Path) -> dict[str, Any]:
        for suffix, count in counts.items():
            part = suffix.removeprefix("-") or "train"
            each = max(1, CHUNK // length)
            jobs = [
                (
                    where,
                    dataset,
                    min(each, count - first),
                    length,
                    derive(seed, where, dataset, part, first),
                )
                for first in range(0, count, each)
            ]
            chunks = in_processes(play, jobs, workers)
            path = place / f"{name}-{ogbench.VERSION}{suffix}.npz"
            write_npz(path, chunks, count * (length + 1), f"{name}{suffix}")
        found = convert(place / f"{name}-{ogbench.VERSION}.npz", place)
        about = {"source": "generated", "recipe": RECIPE, "seed": seed, "versions": versions}
        title = f"generated/{name} (ogbench {versions['ogbench']}, mujoco {versions['mujoco']})"
        return {"name": title, "fields": list(FIELDS), "info": about | found}

    once(entry, entry.exists, lambda: write(entry, fill))
    return read(entry)


# --- writing -------------------------------------------------------------------------------------


def write_npz(path: Path, chunks: Iterator[Arrays], rows: int, label: str) -> None:
    """Chunks of rows one after the other as an npz file, which never lies in memory whole.

    Equal rows make equal bytes, so that a file can be checked against another's digest.
    """
    from tqdm import tqdm

    with ExitStack() as stack:
        files: dict[str, BufferedRandom] = {}
        bar = stack.enter_context(tqdm(total=rows, desc=label, unit="step", unit_scale=True))
        for chunk in chunks:
            for name, array in chunk.items():
                if name not in files:
                    file = (path.parent / f".{name}").open("w+b")
                    files[name] = stack.enter_context(file)
                    head = {
                        "descr": array.dtype.str,
                        "fortran_order": False,
                        "shape": (rows, *array.shape[1:]),
                    }
                    np.lib.format.write_array_header_2_0(file, head)
                files[name].write(np.ascontiguousarray(array).data)
            bar.update(len(chunk["terminals"]))
        archive = stack.enter_context(zipfile.ZipFile(path, "w"))
        for name, file in files.items():
            file.seek(0)
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                shutil.copyfileobj(file, member)
            Path(file.name).unlink()


# --- reading -------------------------------------------------------------------------------------


def columns(path: Path) -> Arrays:
    """The arrays that training reads, checked to fit together.

    Raises:
        DataError: as for `load`.
    """
    if not path.is_file():
        raise DataError(f"there is no data file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file)
            arrays = {name: file[name] for name in REQUIRED if name in file}
    except (*DAMAGE, TypeError, AttributeError) as error:  # the last two: an npy under npz's name
        raise damaged(path, error) from error
    for name in REQUIRED:
        if name not in arrays:
            raise DataError(
                f"{path} has no field {name!r}; it holds {', '.join(names) or 'nothing'}. The "
                f"layout has {', '.join(REQUIRED)}; a file with rewards is read by source=files"
            )
    size = len(arrays["observations"])
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != size or array.dtype.kind not in "fiub":
            raise DataError(
                f"{path}: {name} is {array.dtype} {array.shape}, observations have {size} rows"
            )
    last = arrays["terminals"].reshape(-1).astype(bool)
    if size < 2 or not last[-1]:
        raise DataError(f"{path}: the last row must end a trajectory (terminals = 1)")
    short = last[1:] & last[:-1]
    if last[0] or short.any():
        row = 0 if last[0] else int(short.nonzero()[0][0]) + 1
        raise DataError(f"{path}: the trajectory that ends in row {row} has no transition")
    return arrays | {"terminals": last}


def examine(path: Path) -> None:
    """Raises DataError if a file is not of OGBench's layout."""
    columns(path)


def converted(path: Path, folder: Path, name: str) -> Dataset:
    """The conversion of a file, made when the cache has none of this file as it is now."""
    if not path.is_file():
        raise DataError(f"there is no data file {path}")
    stat = path.stat()
    stamp = {
        "path": str(path.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "rules": RULES,
    }

    def current() -> bool:
        return folder.exists() and read(folder).info.get("stamp") == stamp

    def fill(place: Path) -> dict[str, Any]:
        about = {"source": "ogbench", "file": str(path), "stamp": stamp}
        return {"name": name, "fields": list(FIELDS), "info": about | convert(path, place)}

    once(folder, current, lambda: write(folder, fill))
    return read(folder)


def convert(path: Path, place: Path) -> dict[str, Any]:
    """Write the transitions (s_i, a_i, s_{i+1}) of a file into the folder `place`.

    Returns:
        What was found: episodes, and the file's digest.
    """
    arrays = columns(path)
    last = arrays["terminals"]
    arrays["observations"] = arrays["observations"].reshape(len(last), -1)  # images are rows
    keep = np.flatnonzero(~last)
    timeout = last[keep + 1]
    for name, source, shift in (
        ("obs", "observations", 0),
        ("act", "actions", 0),
        ("next_obs", "observations", 1),
    ):
        array = arrays[source]
        kind = np.float32 if array.dtype.kind == "f" else array.dtype
        out = allocate(place / f"{name}.npy", kind, (len(keep), *array.shape[1:]))
        for first in range(0, len(keep), BLOCK):
            rows = slice(first, first + BLOCK)
            out[rows] = array[keep[rows] + shift]
        out.flush()
    store(place / "timeout.npy", timeout.astype(np.float32))
    store(place / "terminal.npy", np.zeros(len(keep), np.float32))
    starts = bounds(torch.from_numpy(timeout))
    store(place / "starts.npy", starts.numpy())
    store(place / "returns.npy", np.zeros(len(starts), np.float32))
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"episodes": len(starts), "sha256": sha256, "notes": ["no rewards; returns are 0"]}
