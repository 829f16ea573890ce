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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from offrl.data import dataset
from offrl.data.dataset import Arrays, Dataset, bounds, home, store, stream
from offrl.errors import DataError

logger = logging.getLogger(__name__)

Fill = Callable[[Path, Path], dict[str, Any]]
Names = tuple[str, ...]
REQUIRED: Names = ("observations", "actions", "rewards", "terminals")
OPTIONAL: Names = ("timeouts", "next_observations")
LAYOUT = f"Store {', '.join(REQUIRED)} (N rows each), and timeouts where time limits cut"
RULES = 1  # of the conversion; raise it when the rules change, and old conversions are made anew
BLOCK = 1 << 16  # rows converted at a time
DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Rule:
    """How rows become transitions."""

    horizon: int | None = None  # time limit, where a file has no timeouts; else terminals only end
    through_terminals: bool = False  # an episode goes on after one (AntMaze's runs of successes)
    clip: bool = False  # cut actions to [-1, 1], as D4RL's environments do before a step
    episodes: bool = False  # keep every row; by default D4RL's rule for Q-learning drops some


def load(
    path: Path, horizon: int | None = None, episodes: bool = False, strict: bool = True
) -> Dataset:
    """The rows of an HDF5 (.hdf5, .h5) or npz file, converted once and memory-mapped.

    Args:
        horizon, episodes: see `Rule`.
        strict: refuse rows that do not follow one another; otherwise info["strays"] counts them.

    Raises DataError if the file is missing, damaged, holds pickled objects, lacks a field, or its
    fields do not fit together; the message names the field and the remedy.
    """
    rule = Rule(horizon, episodes=episodes)
    data = rows_of(path, entry(path, "files"), f"files/{path.stem}", rule, {"source": "files"})
    if strict and (strays := data.info["strays"]):
        raise DataError(
            f"{path}: next_observations differs from the following row of observations in "
            f"{strays} rows that are neither terminal nor timeout; keep the rows in order of time "
            "and set `timeouts` where an episode was cut"
        )
    for note in data.info["notes"]:
        logger.warning("%s: %s", path, note)
    return data


def entry(path: Path, source: str) -> Path:
    """The cache entry of a user's own file."""
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    return home() / source / f"{path.stem}-{place}"


def rows_of(path: Path, folder: Path, name: str, rule: Rule, info: dict[str, Any]) -> Dataset:
    """A file with D4RL's names, `converted`; whole episodes have an entry beside `folder`."""
    if rule.episodes:
        folder, name = folder.with_name(f"{folder.name}-episodes"), f"{name} (episodes)"

    def fill(path: Path, place: Path) -> dict[str, Any]:
        with opened(path) as columns:
            examine(columns, path)
            return convert(columns, place, path, rule)

    return converted(path, folder, name, [RULES, *astuple(rule)], fill, info)


def converted(
    path: Path, folder: Path, name: str, rules: Any, fill: Fill, info: dict[str, Any]
) -> Dataset:
    """The conversion of a file, made when the cache has none of this file as it is now.

    Args:
        rules: of the conversion; when they change it is made anew.
        fill: writes the arrays of a file into a folder and returns what it found, with `notes`.
        info: provenance to keep with the data.
    """
    if not path.is_file():
        raise DataError(
            f"there is no data file {path.absolute()}; dataset= takes the path of an HDF5 or npz "
            "file, or the name of a data set such as medium"
        )
    size, changed = path.stat().st_size, path.stat().st_mtime_ns
    stamp = {"path": str(path.resolve()), "size": size, "mtime_ns": changed, "rules": rules}

    def make(place: Path) -> dict[str, Any]:
        found = fill(path, place)
        found["notes"] = [*info.get("notes", []), *found["notes"]]
        about = {"file": str(path), "sha256": digest(path), "stamp": stamp}
        return {"name": name, "info": about | info | found}

    return dataset.cached(folder, make, stamp)


def digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading -------------------------------------------------------------------------------------


@contextmanager
def opened(
    path: Path, required: Names = REQUIRED, optional: Names = OPTIONAL, layout: str = LAYOUT
) -> Iterator[dict[str, Any]]:
    """The arrays of a file by name, HDF5 ones still on the disk: numeric, of equal length.

    Raises DataError as `load`; `layout` says what a file without a field should hold.
    """
    with ExitStack() as stack:
        try:
            read = np.load if path.suffix == ".npz" else h5py.File  # neither unpickles
            file = stack.enter_context(read(path))
            names = list(file)
            columns = {name: file[name] for name in (*required, *optional) if name in file}
        except (*DAMAGE, TypeError) as error:  # TypeError: an npy array under the name of an npz
            raise damaged(path, error) from error
        for name in required:
            if name not in columns:
                held = ", ".join(names) or "nothing"
                raise DataError(f"{path} has no field {name!r}; it holds {held}. {layout}")
        for name, column in columns.items():
            if isinstance(column, h5py.Group) or column.dtype.kind not in "fiub":
                raise DataError(f"{path}: {name} must be a numeric array, is {column}")
            if column.ndim == 0 or len(column) != len(columns["observations"]):
                raise DataError(
                    f"{path}: {name} has shape {column.shape}, observations "
                    f"{columns['observations'].shape}; store one row per step in every field"
                )
        yield columns


def damaged(path: Path, error: Exception) -> DataError:
    what, remedy = (
        "is damaged, cut short or of another format",
        "delete it and get or write it again",
    )
    if "pickle" in str(error):
        what = "holds pickled objects, which can run code and are not read"
        remedy = "store plain numeric arrays"
    return DataError(f"{path} {what} ({error}); {remedy}")


def examine(columns: dict[str, Any], path: Path) -> None:
    """Raises DataError if the columns of a log do not have their shapes."""
    obs, act = columns["observations"], columns["actions"]
    following = columns.get("next_observations", obs).shape
    numbers = act.dtype.kind in "iu" and act.shape[1:] in ((), (1,))
    real = act.dtype.kind == "f" and act.ndim == 2
    wrong = {
        f"holds {len(obs)} rows; a transition needs two": len(obs) < 2,
        f"observations must be (N, o), have shape {obs.shape}": obs.ndim != 2,
        f"next_observations {following} and observations {obs.shape} differ": following
        != obs.shape,
        "actions must be real (N, a), or integers (N,) if discrete; "
        f"have shape {act.shape} and type {act.dtype}": not (numbers or real),
    }
    for name in [n for n in ("rewards", "terminals", "timeouts") if n in columns]:
        shape = columns[name].shape
        wrong[f"{name} must be (N,), has shape {shape}"] = columns[name].size != len(obs)
    for what, found in wrong.items():
        if found:
            raise DataError(f"{path}: {what}")


def part(columns: dict[str, Any], name: str, path: Path, rows: slice = slice(None)) -> np.ndarray:
    try:
        return columns[name][rows]
    except DAMAGE as error:
        raise damaged(path, error) from error


# --- the conversion ------------------------------------------------------------------------------


def convert(columns: dict[str, Any], place: Path, path: Path, rule: Rule) -> dict[str, Any]:
    """Write the rows of a log, arrays in memory or on the disk, into the folder `place`.

    Returns what was found: rows, episodes, unfinished, strays (rows whose next_observations is not
    the following row though nothing ended there), horizon, notes.
    """
    size, own, notes = len(columns["observations"]), "next_observations" in columns, []
    flat = {
        name: torch.from_numpy(part(columns, name, path).astype(np.float32).reshape(-1))
        for name in ("rewards", "terminals", "timeouts")
        if name in columns
    }
    terminal = flat["terminals"] != 0
    if "timeouts" in columns:
        timeout = flat["timeouts"] != 0
    elif rule.horizon is not None:
        timeout = counted(terminal, rule.horizon, after_terminal=0 if rule.episodes else 1)
    else:
        timeout = torch.zeros(size, dtype=torch.bool)
        notes.append("no timeouts and no horizon are known, so episodes end at terminals only")
    ends = timeout if rule.through_terminals else timeout | terminal
    starts, last = bounds(ends), torch.nonzero(ends)
    unfinished = size - 1 - int(last[-1]) if len(last) else size
    if rule.episodes:
        timeout[-1] |= unfinished > 0
        keep, alone = torch.ones(size, dtype=torch.bool), ends | timeout
    else:
        keep, alone = ~timeout, terminal & own
        keep[-1] = False
    if not keep.any():
        raise DataError(f"{path}: no row is left after dropping timeouts and the last row")
    kept_starts, kept = surviving(starts, keep)
    store(place / "starts.npy", kept_starts.numpy())
    store(place / "returns.npy", dataset.episode_sums(flat["rewards"], starts)[kept].numpy())
    flags = {"reward": flat["rewards"], "terminal": flat["terminals"], "timeout": timeout.float()}
    for field, value in flags.items():
        store(place / f"{field}.npy", value[keep].numpy())
    count: Counter[str] = Counter(strays=0)
    blocks = gather(columns, path, keep.numpy(), alone.numpy(), rule.clip, count)
    stream(place, blocks, int(keep.sum()))
    if not (rule.episodes or own or rule.through_terminals) and terminal[keep].any():
        notes.append(
            "next_obs of a terminal row is the next episode's first observation (the file has no "
            "next_observations): mask it in every loss but the temporal-difference target"
        )
    if clipped := count["clipped"]:
        notes.append(f"{clipped} rows had actions outside [-1, 1], clipped as the environment does")
    found = {"rows": size, "episodes": len(last), "unfinished": unfinished}
    return found | {"strays": count["strays"], "horizon": rule.horizon, "notes": notes}


def gather(
    columns: dict[str, Any],
    path: Path,
    keep: np.ndarray,
    alone: np.ndarray,
    clip: bool,
    count: Counter[str],
) -> Iterator[Arrays]:
    """Blocks of obs, act and next_obs of the rows to keep.

    Args:
        alone: rows (N,) whose successor is not the following row: it is that of
            `next_observations`, or the row itself where the file has none.
        count: receives the numbers of `strays` and of `clipped` rows.
    """
    discrete = columns["actions"].dtype.kind in "iu"
    shape, kind = ((), np.int64) if discrete else (columns["actions"].shape[1:], np.float32)
    for first in range(0, len(keep), BLOCK):
        last = min(first + BLOCK, len(keep))
        use, end = keep[first:last], alone[first:last]
        obs = part(columns, "observations", path, slice(first, last + 1)).astype(np.float32)
        if last == len(keep):
            obs = np.concatenate([obs, obs[-1:]])
        obs, following = obs[:-1], obs[1:]
        own = obs
        if "next_observations" in columns:
            own = part(columns, "next_observations", path, slice(first, last)).astype(np.float32)
            same = np.isclose(own, following, rtol=1e-4, atol=1e-5, equal_nan=True).all(-1)
            count["strays"] += int((~same & use & ~end).sum())
        following = np.where(end[:, None], own, following)
        act = part(columns, "actions", path, slice(first, last))[use].astype(kind)
        act = act.reshape(len(act), *shape)
        if clip:
            count["clipped"] += int((np.abs(act) > 1).reshape(len(act), -1).any(-1).sum())
            act = act.clip(-1, 1)
        yield {"obs": obs[use], "act": act, "next_obs": following[use]}


def counted(terminal: Tensor, horizon: int, after_terminal: int = 1) -> Tensor:
    """The rows taken for time limits where a file has no timeouts, bool (N,).

    A row is one when `horizon - 1` steps were counted before it. The count starts at 0, after a
    terminal at `after_terminal`: D4RL's rule for Q-learning sets it to 0 at a terminal row and then
    counts that row, which is 1, kept for equal data.
    """
    timeout = torch.zeros(len(terminal), dtype=torch.bool)
    first = count = 0
    for last in [*torch.nonzero(terminal)[:, 0].tolist(), len(terminal) - 1]:
        timeout[first + horizon - 1 - count : last + 1 : horizon] = True
        count = 0 if timeout[last] else after_terminal
        first = last + 1
    return timeout


def surviving(starts: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Episodes that have rows left, of those with the first rows `starts` (E,).

    Their first rows among those that stay, where `keep`, bool (N,), is true, and their numbers
    among the E.
    """
    episode = dataset.episode_of(starts, len(keep))[keep]
    left, counts = episode.unique_consecutive(return_counts=True)
    return counts.cumsum(0) - counts, left
