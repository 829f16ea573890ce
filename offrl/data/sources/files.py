"""HDF5 and npz files with D4RL's field names, as transitions by D4RL's rule or as whole episodes.

A file is a log of N consecutive steps: `observations` (N, o), `actions` (N, a) or integers (N,),
`rewards` (N,), `terminals` (N,), and, where they are known, `timeouts` (N,) and
`next_observations` (N, o). The rule for transitions is that of D4RL's `qlearning_dataset`, which
almost every paper trains on, without its loop:

    for i = 0 .. N - 2:  drop row i where timeouts_i,
                         else keep (s_i, a_i, r_i, s_{i+1}, terminals_i)

so the last transition of every truncated episode and the last row of the file are lost. Without
`timeouts`, D4RL counts steps (see `counted`). One thing is added, which changes no target that is
masked at terminals: there the following row is the next episode's first, so `next_obs` is taken
from `next_observations` where the file has them.

With `episodes` every row is kept, as methods that read episodes in order need: returns-to-go and
windows then reach the last reward. `next_obs` is the following row; the last row of an episode has
its own of `next_observations` or, without them, repeats its observation. The log's last row is a
timeout where nothing else ended it. Time limits are counted from the first row of an episode.

Reading never runs code: npz files are read without pickle, HDF5 holds arrays only.
"""

import hashlib
import logging
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from offrl.data.dataset import (
    Dataset,
    allocate,
    bounds,
    episode_sums,
    home,
    once,
    read,
    store,
    write,
)
from offrl.errors import DataError

logger = logging.getLogger(__name__)

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations")
RULES = 1  # of the conversion; raise it when the rules change, and old conversions are made anew
BLOCK = 1 << 16  # rows converted at a time
DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def load(
    path: Path, horizon: int | None = None, episodes: bool = False, strict: bool = True
) -> Dataset:
    """The rows of an HDF5 (.hdf5, .h5) or npz file, converted once and memory-mapped.

    Args:
        horizon: time limit of the environment, used where the file has no `timeouts`. Without
            both, episodes end at terminals only.
        episodes: keep every row; by default D4RL's rule for Q-learning drops some.
        strict: refuse rows that do not follow one another; otherwise info["strays"] counts them.

    Raises:
        DataError: if the file is missing, damaged, holds pickled objects, lacks a field, or its
            fields do not fit together; the message names the field and the remedy.
        OSError: if the cache is not writable.
    """
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    entry = home() / "files" / f"{path.stem}-{place}"
    data = cached(path, entry, f"files/{path.stem}", horizon, episodes=episodes)
    if strict and (strays := data.info["strays"]):
        raise DataError(
            f"{path}: next_observations differs from the following row of observations in "
            f"{strays} rows that are neither terminal nor timeout; keep the rows in order of time "
            "and set `timeouts` where an episode was cut"
        )
    for note in data.info["notes"]:
        logger.warning("%s: %s", path, note)
    return data


def cached(
    path: Path,
    folder: Path,
    name: str,
    horizon: int | None = None,
    through_terminals: bool = False,
    clip: bool = False,
    episodes: bool = False,
    info: dict[str, Any] | None = None,
) -> Dataset:
    """The conversion of a file, made when the cache has none of this file as it is now.

    Args:
        folder: the cache entry; that of whole episodes stands beside it.
        horizon, through_terminals, clip, episodes: see `convert`.
        info: provenance to keep with the data.
    """
    if episodes:
        folder, name = folder.with_name(f"{folder.name}-episodes"), f"{name} (episodes)"
    if not path.is_file():
        raise DataError(
            f"there is no data file {path.absolute()}; dataset= takes the path of an HDF5 or npz "
            "file, or the name of a data set such as medium"
        )
    stat = path.stat()
    stamp = {
        "path": str(path.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "rules": [RULES, horizon, through_terminals, clip, episodes],
    }

    def current() -> bool:
        return folder.exists() and read(folder).info.get("stamp") == stamp

    def fill(place: Path) -> dict[str, Any]:
        with opened(path) as columns:
            found = convert(columns, place, path, horizon, through_terminals, clip, episodes)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        about = {"source": "files", "file": str(path), "sha256": sha256} | (info or {})
        notes = [*about.get("notes", []), *found.pop("notes")]
        return {
            "name": name,
            "fields": ["obs", "act", "reward", "next_obs", "terminal", "timeout"],
            "info": about | found | {"notes": notes, "stamp": stamp},
        }

    once(folder, current, lambda: write(folder, fill))
    return read(folder)


# --- reading -------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[dict[str, Any]]:
    """The arrays of a file by name, HDF5 ones still on the disk; checked to fit together.

    Raises:
        DataError: as for `load`.
    """
    with ExitStack() as stack:
        try:
            if path.suffix == ".npz":
                file = stack.enter_context(np.load(path, allow_pickle=False))
                columns = {name: file[name] for name in (*REQUIRED, *OPTIONAL) if name in file}
            else:
                file = stack.enter_context(h5py.File(path, "r"))
                columns = {name: file[name] for name in (*REQUIRED, *OPTIONAL) if name in file}
            names = list(file)
        except (*DAMAGE, TypeError) as error:  # TypeError: an npy array under the name of an npz
            raise damaged(path, error) from error
        examine(columns, names, path)
        yield columns


def damaged(path: Path, error: Exception) -> DataError:
    if "pickle" in str(error):
        return DataError(
            f"{path} holds pickled objects, which can run code and are not read ({error}); "
            "store plain numeric arrays"
        )
    return DataError(
        f"{path} is damaged, cut short or of another format ({error}); "
        "delete it and get or write it again"
    )


def examine(columns: dict[str, Any], names: list[str], path: Path) -> None:
    """Raises DataError if a field is missing, is not numeric or does not fit the others."""
    for name in REQUIRED:
        if name not in columns:
            raise DataError(
                f"{path} has no field {name!r}; it holds {', '.join(names) or 'nothing'}. "
                f"Store {', '.join(REQUIRED)} (N rows each), and timeouts where time limits cut"
            )
    for name, column in columns.items():
        if isinstance(column, h5py.Group) or column.dtype.kind not in "fiub":
            raise DataError(f"{path}: {name} must be a numeric array, is {column}")
        if column.ndim == 0 or len(column) != len(columns["observations"]):
            raise DataError(
                f"{path}: {name} has shape {column.shape}, observations "
                f"{columns['observations'].shape}; store one row per step in every field"
            )
    size, obs = len(columns["observations"]), columns["observations"]
    if size < 2:
        raise DataError(f"{path} holds {size} rows; a transition needs two")
    if obs.ndim != 2:
        raise DataError(f"{path}: observations must be (N, o), have shape {obs.shape}")
    if "next_observations" in columns and columns["next_observations"].shape != obs.shape:
        shape = columns["next_observations"].shape
        raise DataError(f"{path}: next_observations {shape} and observations {obs.shape} differ")
    act = columns["actions"]
    numbers = act.dtype.kind in "iu" and act.shape[1:] in ((), (1,))
    if not numbers and not (act.dtype.kind == "f" and act.ndim == 2):
        raise DataError(
            f"{path}: actions must be real (N, a), or integers (N,) if discrete; "
            f"have shape {act.shape} and type {act.dtype}"
        )
    for name in {"rewards", "terminals", "timeouts"} & set(columns):
        if columns[name].size != size:
            raise DataError(f"{path}: {name} must be (N,), has shape {columns[name].shape}")


# --- the conversion ------------------------------------------------------------------------------


def convert(
    columns: dict[str, Any],
    place: Path,
    path: Path,
    horizon: int | None = None,
    through_terminals: bool = False,
    clip: bool = False,
    episodes: bool = False,
) -> dict[str, Any]:
    """Write the rows of a log into the folder `place`, block by block.

    Args:
        columns: arrays by D4RL's names, in memory or on the disk.
        path: the file, for messages.
        horizon: time limit, for logs without timeouts.
        through_terminals: an episode goes on after a terminal row (AntMaze's runs of successes).
        clip: cut actions to [-1, 1], as D4RL's environments do before a step.
        episodes: keep every row.

    Returns:
        What was found: rows, episodes, unfinished, strays (rows whose next_observations is not
        the following row though nothing ended there), horizon, notes.
    """
    size = len(columns["observations"])
    reward, terminal = (flat(columns[name], path) for name in ("rewards", "terminals"))
    notes = []
    if "timeouts" in columns:
        timeout = flat(columns["timeouts"], path) != 0
    elif horizon is not None:
        timeout = counted(terminal != 0, horizon, after_terminal=0 if episodes else 1)
    else:
        timeout = torch.zeros(size, dtype=torch.bool)
        notes.append("no timeouts and no horizon are known, so episodes end at terminals only")
    ends = timeout if through_terminals else timeout | (terminal != 0)
    starts = bounds(ends)
    last = torch.nonzero(ends)
    unfinished = size - 1 - int(last[-1]) if len(last) else size
    own = "next_observations" in columns
    if episodes:
        timeout[-1] |= unfinished > 0
        keep, alone = torch.ones(size, dtype=torch.bool), ends | timeout
    else:
        keep, alone = ~timeout, (terminal != 0) & own
        keep[-1] = False
    if not keep.any():
        raise DataError(f"{path}: no row is left after dropping timeouts and the last row")
    kept_starts, kept = surviving(starts, keep)
    small = {
        "starts": kept_starts,
        "returns": episode_sums(reward, starts)[kept],
        "reward": reward[keep],
        "terminal": terminal[keep],
        "timeout": timeout[keep].float(),
    }
    for field, value in small.items():
        store(place / f"{field}.npy", value.numpy())
    strays, clipped = gather(columns, place, path, keep.numpy(), alone.numpy(), clip)
    if not (episodes or own or through_terminals) and terminal[keep].any():
        notes.append(
            "next_obs of a terminal row is the next episode's first observation (the file has no "
            "next_observations): mask it in every loss but the temporal-difference target"
        )
    if clipped:
        notes.append(f"{clipped} rows had actions outside [-1, 1], clipped as the environment does")
    return {
        "rows": size,
        "episodes": len(last),
        "horizon": horizon,
        "strays": strays,
        "notes": notes,
        "unfinished": unfinished,
    }


def gather(
    columns: dict[str, Any],
    place: Path,
    path: Path,
    keep: np.ndarray,
    alone: np.ndarray,
    clip: bool,
) -> tuple[int, int]:
    """Write obs, act and next_obs of the rows to keep; returns the counts (strays, clipped).

    Args:
        alone: rows (N,) whose successor is not the following row: it is that of
            `next_observations`, or the row itself where the file has none.
    """
    rows, (size, obs_dim), act = int(keep.sum()), columns["observations"].shape, columns["actions"]
    discrete = act.dtype.kind in "iu"
    act_shape = (rows,) if discrete else (rows, act.shape[1])
    kind = np.int64 if discrete else np.float32
    out = {
        "obs": allocate(place / "obs.npy", np.float32, (rows, obs_dim)),
        "next_obs": allocate(place / "next_obs.npy", np.float32, (rows, obs_dim)),
        "act": allocate(place / "act.npy", kind, act_shape),
    }
    strays = clipped = done = 0
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        use, end = keep[first:last], alone[first:last]
        to = slice(done, done + int(use.sum()))
        obs = part(columns, "observations", first, last + 1, path).astype(np.float32)
        if last == size:
            obs = np.concatenate([obs, obs[-1:]])
        obs, following = obs[:-1], obs[1:]
        own = obs
        if "next_observations" in columns:
            own = part(columns, "next_observations", first, last, path).astype(np.float32)
            same = np.isclose(own, following, rtol=1e-4, atol=1e-5, equal_nan=True).all(-1)
            strays += int((~same & use & ~end).sum())
        following = np.where(end[:, None], own, following)
        actions = part(columns, "actions", first, last, path)[use].astype(kind)
        if clip:
            clipped += int((np.abs(actions) > 1).reshape(len(actions), -1).any(-1).sum())
            actions = actions.clip(-1, 1)
        out["obs"][to], out["next_obs"][to] = obs[use], following[use]
        out["act"][to] = actions.reshape(len(actions), *act_shape[1:])
        done = to.stop
    for array in out.values():
        array.flush()
    return strays, clipped


def part(columns: dict[str, Any], name: str, first: int, last: int, path: Path) -> np.ndarray:
    try:
        return columns[name][first:last]
    except DAMAGE as error:
        raise damaged(path, error) from error


def flat(column: Any, path: Path) -> Tensor:
    """A column (N,) or (N, 1) as float32 (N,)."""
    try:
        return torch.from_numpy(np.asarray(column[:], np.float32).reshape(-1))
    except DAMAGE as error:
        raise damaged(path, error) from error


def counted(terminal: Tensor, horizon: int, after_terminal: int = 1) -> Tensor:
    """The rows taken for time limits where a file has no timeouts, bool (N,).

    A row is one when `horizon - 1` steps were counted before it.

    Args:
        after_terminal: what the count starts at there, elsewhere 0. D4RL's rule for Q-learning
            sets it to 0 at a terminal row and then counts that row: 1, kept for equal data.
    """
    timeout = torch.zeros(len(terminal), dtype=torch.bool)
    first = count = 0
    for last in [*torch.nonzero(terminal)[:, 0].tolist(), len(terminal) - 1]:
        timeout[first + horizon - 1 - count : last + 1 : horizon] = True
        count = 0 if timeout[last] else after_terminal
        first = last + 1
    return timeout


def surviving(starts: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Episodes that have rows left.

    Args:
        starts: first rows of the episodes, int64 (E,).
        keep: rows that stay, bool (N,).

    Returns:
        their first rows among the rows that stay, and their numbers among the E.
    """
    mark = torch.zeros(len(keep), dtype=torch.int64)
    mark[starts[1:]] = 1
    episode = mark.cumsum(0)[keep]
    left, counts = episode.unique_consecutive(return_counts=True)
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]]), left
