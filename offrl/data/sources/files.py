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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from offrl.data import dataset
from offrl.data.dataset import Arrays, Dataset, bounds, home, store, stream
from offrl.data.sources import layouts
from offrl.errors import DataError, refusal

logger = logging.getLogger(__name__)

Fill = Callable[[Path, Path], dict[str, Any]]
Names = tuple[str, ...]
REQUIRED: Names = ("observations", "actions", "rewards", "terminals")
OPTIONAL: Names = ("timeouts", "next_observations")
LAYOUT = f"Store {', '.join(REQUIRED)} (N rows each), and timeouts where time limits cut"
RULES = 1  # of the conversion; raise it when the rules change, and old conversions are made anew
BLOCK = 1 << 16  # rows converted at a time
Bound = float | Sequence[float] | None  # of actions: one, or one of every column
DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Rule:
    """How rows become transitions."""

    horizon: int | None = (
        None  # time limit where a file has no timeouts; without both, terminals end
    )
    through_terminals: bool = False  # an episode goes on after one (AntMaze's runs of successes)
    clip: bool = False  # cut actions to [-1, 1], as D4RL's environments do before a step
    episodes: bool = False  # keep every row; by default D4RL's rule for Q-learning drops some
    # bounds of the actions in the file, one or one of every column, which become -1 and 1; of
    # discrete ones the first and the last. Without, those that the file states (action_low and
    # action_high, arrays or attributes); else actions lie in [-1, 1], and discrete ones are those
    # that occur
    low: list[float] | None = None
    high: list[float] | None = None


def load(
    path: Path,
    horizon: int | None = None,
    episodes: bool = False,
    strict: bool = True,
    low: Bound = None,
    high: Bound = None,
) -> Dataset:
    """The rows of an HDF5 (.hdf5, .h5), npz, csv or parquet file, converted once, memory-mapped.

    Args:
        horizon, episodes, low, high: see `Rule`.
        strict: refuse rows that do not follow one another; otherwise info["strays"] counts them.

    Raises DataError if the file is missing, damaged, holds pickled objects, lacks a field, or its
    fields do not fit together; the message names the field and the remedy.
    """
    rule = Rule(horizon, episodes=episodes, low=listed(low), high=listed(high))
    data = rows_of(path, entry(path, "files"), f"files/{path.stem}", rule, {"source": "files"})
    if strict:
        check_order(data, path)
    for note in data.info["notes"]:
        logger.warning("%s: %s", path, note)
    return data


def check_order(data: Dataset, where: Path | str) -> None:
    """Raises DataError if a row does not follow the one before it."""
    if strays := data.info["strays"]:
        raise DataError(
            f"{where}: next_observations differs from the following row of observations in "
            f"{strays} rows that are neither terminal nor timeout; keep the rows in order of time "
            "and set `timeouts` where an episode was cut"
        )


def entry(path: Path, source: str) -> Path:
    """The cache entry of a user's own file."""
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    return home() / source / f"{path.stem}-{place}"


def rows_of(path: Path, folder: Path, name: str, rule: Rule, info: dict[str, Any]) -> Dataset:
    """A file with D4RL's names, `converted`; whole episodes have an entry beside `folder`."""
    if rule.episodes:
        folder, name = folder.with_name(f"{folder.name}-episodes"), f"{name} (episodes)"

    def fill(path: Path, place: Path) -> dict[str, Any]:
        with log_of(path) as (columns, about):
            return convert(columns, place, path, rule, about)

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
            f"there is no data file {path.absolute()}; dataset= takes the path of an HDF5, npz, "
            "csv or parquet file, or the name of a data set such as medium"
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
def log_of(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The columns of a log in any layout, and what it says of them: bounds and names.

    Raises:
        DataError: as for `load`.
    """
    if path.suffix in layouts.TABLES:
        table, about = layouts.TABLES[path.suffix](path)
        check_columns(table, path)
        yield table, about
        return
    with ExitStack() as stack:
        try:
            read = np.load if path.suffix == ".npz" else h5py.File  # neither unpickles
            file = stack.enter_context(read(path))
            columns = None
            if isinstance(file, h5py.File) and "observations" not in file:
                columns = layouts.grouped(file, path)
            about = layouts.about(file)
        except DataError:  # a ValueError too
            raise
        except (*DAMAGE, TypeError, AttributeError) as error:
            raise damaged(path, error) from error
        if columns is None:
            columns = stack.enter_context(opened(path))
            if "timeouts" not in columns and "episode_terminals" in file:  # of d3rlpy 1
                ends = part(file, "episode_terminals", path) != 0
                columns["timeouts"] = ends & (part(columns, "terminals", path) == 0)
        else:
            check_columns(columns, path)
        yield columns, about


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
        check_columns(columns, path, required, layout, names)
        yield columns


def check_columns(
    columns: Mapping[str, Any],
    path: Path | str,
    required: tuple[str, ...] = REQUIRED,
    layout: str = LAYOUT,
    names: Iterable[str] = (),
) -> None:
    """Raises DataError for a column that is missing, not numeric or of another length.

    Args:
        names: of all that the log holds.
    """
    for name in required:
        if name not in columns:
            held = ", ".join(names or columns) or "nothing"
            raise DataError(f"{path} has no field {name!r}; it holds {held}. {layout}")
    for name, column in columns.items():
        if isinstance(column, h5py.Group) or column.dtype.kind not in "fiub":
            raise DataError(f"{path}: {name} must be a numeric array, is {column}")
        if column.ndim == 0 or len(column) != len(columns["observations"]):
            raise DataError(
                f"{path}: {name} has shape {column.shape}, observations "
                f"{columns['observations'].shape}; store one row per step in every field"
            )


def damaged(path: Path | str, error: Exception) -> DataError:
    if why := refusal(error):
        return DataError(f"{path} {why}")
    what = "is damaged, cut short or of another format"
    remedy = "get or write it again"
    if "pickle" in str(error):
        what = "holds pickled objects, which can run code and are not read"
        remedy = "store plain numeric arrays"
    return DataError(f"{path} {what} ({error}); {remedy}")


def examine(columns: dict[str, Any], path: Path | str) -> None:
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


def part(
    columns: dict[str, Any], name: str, path: Path | str, rows: slice = slice(None)
) -> np.ndarray:
    try:
        return columns[name][rows]
    except DAMAGE as error:
        raise damaged(path, error) from error


# --- the conversion ------------------------------------------------------------------------------


def convert(
    columns: dict[str, Any],
    place: Path,
    path: Path,
    rule: Rule,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write the `transitions` of a log into the folder `place`; returns what was found."""
    fields, blocks, finish = transitions(columns, path, rule, about)
    for name, value in fields.items():
        store(place / f"{name}.npy", value.numpy())
    stream(place, blocks, len(fields["reward"]))
    return finish()


def transitions(
    columns: dict[str, Any], path: Path | str, rule: Rule, about: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Iterator[Arrays], Callable[[], dict[str, Any]]]:
    """The rows of a log, whose columns are arrays in memory or on the disk.

    Args:
        path: what messages call the log.
        about: what it says of itself: action_low, action_high, obs_names, act_names.

    Returns:
        small fields with starts and returns; blocks of the large ones; and, once these were taken,
        what was found: rows, episodes, unfinished, strays (rows whose next_observations is not the
        following row though nothing ended there), horizon, the actions' units, names, notes.

    Raises:
        DataError: for columns, bounds or names that do not fit.
    """
    examine(columns, path)
    units = Units.of(columns, path, rule, about)
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
    fields = {
        "starts": kept_starts,
        "returns": dataset.episode_sums(flat["rewards"], starts)[kept],
        "reward": flat["rewards"][keep],
        "terminal": flat["terminals"][keep],
        "timeout": timeout[keep].float(),
    }
    count: Counter[str] = Counter(strays=0)
    blocks = gather(columns, path, keep.numpy(), alone.numpy(), rule.clip, count, units)

    def finish() -> dict[str, Any]:
        if not (rule.episodes or own or rule.through_terminals) and terminal[keep].any():
            notes.append(
                "next_obs of a terminal row is the next episode's first observation (the file has "
                "no next_observations): mask it in every loss but the temporal-difference target"
            )
        if clipped := count["clipped"]:
            told = "actions outside [-1, 1], clipped as the environment does"
            notes.append(f"{clipped} rows had {told}")
        found = {"rows": size, "episodes": len(last), "unfinished": unfinished, "notes": notes}
        found |= {"strays": count["strays"], "horizon": rule.horizon} | units.info
        found["dropped"] = np.flatnonzero(~keep.numpy()).tolist()
        return found | named(columns, path, about)

    return fields, blocks, finish


@dataclass(frozen=True)
class Units:
    """What actions are in a log, and how they become numbers of [-1, 1] or numbers from 0.

    Attributes:
        first: of discrete actions.
        low, high: (a,) bounds that become -1 and 1, or None where they are those already. A column
            whose bounds are equal becomes 0.
        info: the same for a `Dataset`.
    """

    first: int | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, columns: dict[str, Any], path: Path | str, rule: Rule, about: Mapping[str, Any]
    ) -> "Units":
        """Raises DataError for bounds that are none, or discrete actions beyond them."""
        act = columns["actions"]
        discrete, width = act.dtype.kind in "iu", 1 if act.ndim == 1 else act.shape[1]
        stated = rule.low, rule.high
        if stated == (None, None):
            stated = about.get("action_low"), about.get("action_high")
        if stated.count(None) == 1:
            raise DataError(f"{path}: action_low and action_high must be given together")
        if stated == (None, None):
            if not discrete:
                return cls()
            whole = part(columns, "actions", path)
            low, high = np.array([whole.min()]), np.array([whole.max()])
        else:
            try:
                low, high = (np.broadcast_to(np.array(x, float).ravel(), width) for x in stated)
            except (ValueError, TypeError):
                raise DataError(
                    f"{path}: action_low={stated[0]} and action_high={stated[1]} must be numbers, "
                    f"one or {width}, one of every column of actions"
                ) from None
        if not (np.isfinite([low, high]).all() and (low <= high).all()):
            raise DataError(
                f"{path}: action_low={low.tolist()} and action_high={high.tolist()} must be finite "
                "and in this order"
            )
        if not discrete:
            if (low == -1).all() and (high == 1).all():
                return cls()
            limits = {"low": low.tolist(), "high": high.tolist()}
            return cls(low=low, high=high, info={"rescaled_from": limits})
        first, count = int(low[0]), int(high[0]) - int(low[0]) + 1
        outside = np.flatnonzero((act[:] < low[0]) | (act[:] > high[0]))
        if len(outside):
            raise DataError(
                f"{path}: the action is {np.ravel(act[outside[0]])[0]} in row {outside[0]}, "
                f"outside of the {count} from {first} to {first + count - 1}"
            )
        return cls(first=first, info={"action_start": first, "action_count": count})

    def __call__(self, act: np.ndarray) -> np.ndarray:
        """Raw actions (n, a), (n,) or (n, 1) as float32 (n, a) or int64 (n,)."""
        if self.first is not None:
            return act.reshape(-1).astype(np.int64) - self.first
        if self.low is None or self.high is None:
            return act.astype(np.float32)
        wide = self.high - self.low
        share = (act.astype(np.float64) - self.low) / np.where(wide > 0, wide, 1)
        return np.where(wide > 0, 2 * share - 1, 0).astype(np.float32)


def listed(bound: Bound) -> list[float] | None:
    """A bound of actions as JSON has it."""
    return None if bound is None else np.ravel(bound).tolist()


def named(columns: dict[str, Any], path: Path | str, about: Mapping[str, Any]) -> dict[str, Any]:
    """The names of columns for a `Dataset`; raises DataError unless there is one of each."""
    found = {}
    for key, column in (("obs_names", "observations"), ("act_names", "actions")):
        names, width = list(about.get(key, ())), int(np.prod(columns[column].shape[1:]))
        if names and len(names) != width:
            raise DataError(f"{path}: {len(names)} {key} for {width} columns of {column}")
        if names:
            found[key] = names
    return found


def gather(
    columns: dict[str, Any],
    path: Path | str,
    keep: np.ndarray,
    alone: np.ndarray,
    clip: bool,
    count: Counter[str],
    units: Units,
) -> Iterator[Arrays]:
    """Blocks of obs, act and next_obs of the rows to keep.

    Args:
        alone: rows (N,) whose successor is not the following row: it is that of
            `next_observations`, or the row itself where the file has none.
        count: receives the numbers of `strays` and of `clipped` rows.
    """
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
            same = np.isclose(own, following, rtol=1e-4, atol=1e-5).all(-1)
            same |= ~np.isfinite(own + following).all(-1)  # told as what it is, by `check`
            count["strays"] += int((~same & use & ~end).sum())
        following = np.where(end[:, None], own, following)
        act = units(part(columns, "actions", path, slice(first, last))[use])
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
