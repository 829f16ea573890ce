"""Logs of other layouts as columns with D4RL's names: episodes one by one, and tables.

Episodes are mappings with `observations` (T, o), or (T + 1, o) with the one behind the last step,
`actions`, `rewards` and `terminals`, as (T,) or as one flag for the whole episode; `terminated`
and `terminations` are names of the same, `truncated` and `truncations` of `timeouts`. An episode
that does not end by a terminal was cut.

HDF5 files hold them as groups (Minari's are of this kind), or as d3rlpy's `ReplayBuffer.dump`
writes them: `columns`, `num_episodes` and arrays `observations_0`, `actions_0` and so on (takuseno,
d3rlpy 2.x, `dataset/io.py`).

A table has one row per step. Columns are found by their names: those that begin with `obs`, with
`act`, and with `next_obs`; `reward`, `terminal`, `timeout` and `episode`, also in the plural.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from offrl.data.dataset import Arrays
from offrl.errors import DataError

SYNONYMS = {
    "terminated": "terminals",
    "terminations": "terminals",
    "truncated": "timeouts",
    "truncations": "timeouts",
}
NEEDED = ("observations", "actions", "rewards", "terminals")
KNOWN = (*NEEDED, "timeouts", "next_observations")
SINGLE = {  # of a table: our name -> names of its column
    "rewards": ("reward", "rewards"),
    "terminals": ("terminal", "terminals", "terminated", "termination", "terminations"),
    "timeouts": ("timeout", "timeouts", "truncated", "truncation", "truncations"),
    "episode": ("episode", "episodes", "episode_id", "trajectory"),
}
PREFIXES = {"observations": "obs", "actions": "act", "next_observations": "next_obs"}


# --- episodes ------------------------------------------------------------------------------------


def joined(episodes: Iterable[Mapping[str, Any]], where: Any) -> Arrays:
    """Episodes one after the other.

    Raises:
        DataError: naming the episode and its field; `where` is what holds them.
    """
    parts = [columns_of(episode, f"{where}: episode {i}") for i, episode in enumerate(episodes)]
    if not parts:
        raise DataError(f"{where} holds no episodes")
    for i, part in enumerate(parts):
        if part.keys() != parts[0].keys():
            raise DataError(
                f"{where}: episode {i} has {', '.join(part)}, episode 0 {', '.join(parts[0])}; "
                "store the same of every episode, the observation behind the last step too"
            )
        for name, value in part.items():
            if value.shape[1:] != (wanted := parts[0][name].shape[1:]):
                raise DataError(
                    f"{where}: {name} of episode {i} have rows of shape {value.shape[1:]}, those "
                    f"of episode 0 {wanted}"
                )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def columns_of(episode: Mapping[str, Any], where: str) -> Arrays:
    """One episode's columns; its last row is a timeout unless it is terminal."""
    found = {SYNONYMS.get(name, name): name for name in episode}
    for name in NEEDED:
        if name not in found:
            raise DataError(f"{where} has no {name!r}; it holds {', '.join(episode) or 'nothing'}")
    raw = {name: np.asarray(episode[found[name]]) for name in KNOWN if name in found}
    for name, value in raw.items():
        if value.dtype.kind not in "fiub":
            raise DataError(f"{where}: {name} must be numbers, are of type {value.dtype}")
    steps = len(raw["rewards"].reshape(-1))
    if steps == 0:
        raise DataError(f"{where} has no steps")
    for name in ("terminals", "timeouts"):
        flags = raw.get(name, np.zeros(steps)).reshape(-1) != 0
        if len(flags) == 1 < steps:
            flags = (np.arange(steps) == steps - 1) & flags
        raw[name] = flags
    obs = raw["observations"]
    if obs.ndim and len(obs) == steps + 1 and "next_observations" not in raw:
        raw["observations"], raw["next_observations"] = obs[:-1], obs[1:]
    raw["rewards"] = raw["rewards"].reshape(-1)
    for name, value in raw.items():
        if value.ndim == 0 or len(value) != steps:
            raise DataError(f"{where}: {name} has shape {value.shape}, rewards {steps} rows")
    raw["timeouts"][-1] |= not raw["terminals"][-1]
    return raw


def grouped(file: h5py.File, path: Path) -> Arrays | None:
    """The columns of a file of episodes; None if it holds none."""
    if {"columns", "num_episodes"} <= set(file):
        return joined(dumped(file, path), path)
    groups = [name for name in file if isinstance(file[name], h5py.Group)]
    inside = [name for name in groups if "observations" in file[name]]
    inside.sort(key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    return joined((read(file[name], path) for name in inside), path) if inside else None


def read(group: h5py.Group, path: Path) -> dict[str, Any]:
    found = {name: group[name] for name in group if SYNONYMS.get(name, name) in KNOWN}
    for name, value in found.items():
        if isinstance(value, h5py.Group):
            raise DataError(f"{path}: {group.name}/{name} must be an array, is a group")
    return {name: value[()] for name, value in found.items()}


def dumped(file: h5py.File, path: Path) -> Iterator[dict[str, Any]]:
    """The episodes of a file that d3rlpy wrote."""
    keys = [key.decode() for key in file["columns"][()]]
    for i in range(int(file["num_episodes"][()])):
        for key in keys:
            if f"{key}_{i}" not in file:
                raise DataError(
                    f"{path}: {key} of episode {i} is missing or in several parts; only "
                    "observations and actions of one array are read"
                )
        yield {key: file[f"{key}_{i}"][()] for key in keys}


# --- tables --------------------------------------------------------------------------------------


def table(
    header: Sequence[str],
    column: Callable[[str], np.ndarray],
    where: Any,
    given: Mapping[str, Any] | None = None,
) -> tuple[Arrays, dict[str, Any]]:
    """The columns of a table, and the names of its observations and actions.

    Args:
        header: names of the table's columns.
        column: its values (N,).
        given: our name -> a column's name, or several ones of observations and actions, where the
            names do not follow the rule.

    Raises:
        DataError: naming a column that is missing, is not numeric or, of episodes, not in order.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    names: dict[str, list[str]] = {}
    for ours, prefix in PREFIXES.items():
        rule = [name for name in header if name.lower().startswith(prefix)]
        names[ours] = list(given.get(ours, rule))
    for ours, known in SINGLE.items():
        rule = [given[ours]] if ours in given else [n for n in header if n.lower() in known]
        if len(rule) > 1:
            raise DataError(f"{where} has several columns of {ours}: {', '.join(rule)}")
        names[ours] = rule
    for ours, listed in names.items():
        for name in listed:
            if name not in header:
                raise DataError(f"{where} has no column {name!r}; it has {', '.join(header)}")
        if ours in NEEDED and not listed:
            rule_ = PREFIXES.get(ours) or " or ".join(SINGLE[ours][:2])
            raise DataError(
                f"{where} has no column for {ours}; it has {', '.join(header)}. Columns are found "
                f"by their names, here {rule_}; Dataset.from_dataframe takes other ones"
            )

    def values(name: str) -> np.ndarray:
        try:
            array = np.asarray(column(name))
            return array if array.dtype.kind in "fiub" else array.astype(np.float64)
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: column {name!r} is not numeric ({error})") from error

    found = {ours: values(names[ours][0]) for ours in SINGLE if names[ours] and ours != "episode"}
    for ours, listed in names.items():
        if ours in PREFIXES and listed:
            found[ours] = np.stack([values(name) for name in listed], -1)
    if len(names["actions"]) > 1 and found["actions"].dtype.kind in "iub":
        found["actions"] = found["actions"].astype(np.float64)
    if names["episode"]:
        episode = np.asarray(column(names["episode"][0]))
        last = np.append(episode[1:] != episode[:-1], True)
        timeouts = found.get("timeouts", np.zeros(len(last))) != 0
        found["timeouts"] = timeouts | (last & (found["terminals"] == 0))
        seen, first = np.unique(episode[last], return_index=True)
        if len(seen) < last.sum():
            again = np.setdiff1d(np.arange(last.sum()), first)[0]
            raise DataError(
                f"{where}: episode {episode[last][again]} ends in row {np.flatnonzero(last)[again]}"
                " for the second time; sort the rows by episode and time"
            )
    return found, {"obs_names": names["observations"], "act_names": names["actions"]}


def comma_separated(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """A .csv file with a header. Read by NumPy's parser: pandas is no dependency.

    Raises:
        DataError: as `table`, and naming the row of a cell that is empty or no number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, first = (next(rows, []) for rows in [csv.reader(file)] * 2)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file in UTF-8 ({error})") from error
    usual: dict[str, Any] = {"delimiter": ",", "skiprows": 1, "quotechar": '"', "comments": None}
    real = [i for i, cell in enumerate(first) if re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?", cell)]

    @cache
    def reals() -> Arrays:
        """Columns whose first cell is a real number, all in one pass."""
        try:
            found = np.loadtxt(path, encoding="utf-8-sig", usecols=real, ndmin=2, **usual)
        except ValueError:
            return {}  # one by one, so that the cell is named
        return dict(zip((header[i] for i in real), found.T, strict=True))

    def column(name: str) -> np.ndarray:
        place = header.index(name)
        if place in real and name in (found := reals()):
            return found[name]
        try:
            cells = np.loadtxt(path, str, encoding="utf-8-sig", usecols=place, ndmin=1, **usual)
        except ValueError as error:
            raise DataError(f"{path}: {error}; every row needs {len(header)} cells") from error
        return cells if name.lower() in SINGLE["episode"] else numbers(cells, f"{path}: {name}")

    return table(header, column, path)


def numbers(cells: np.ndarray, where: str) -> np.ndarray:
    """Cells of text (N,) as whole numbers, flags or real numbers, whichever they are."""
    for kind in (np.int64, np.float64):
        with suppress(ValueError, OverflowError):
            return cells.astype(kind)
    flags = np.char.lower(cells)
    if np.isin(flags, ("true", "false")).all():
        return flags == "true"
    for row, cell in enumerate(cells):
        try:
            float(cell)
        except ValueError:
            told = repr(str(cell)) if cell else "empty"
            raise DataError(f"{where} is {told} in row {row}; store numbers") from None
    raise DataError(f"{where} holds numbers that are too large")


def parquet(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """A .parquet file.

    Raises:
        DataError: as `table`; without pyarrow, naming the extra.
    """
    try:
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise DataError(
            f"reading {path} needs the extra: pip install 'offrl[parquet]'; or store it as .csv, "
            ".npz or .hdf5"
        ) from error
    found = read_table(path)
    return table(found.column_names, lambda name: found.column(name).to_numpy(), path)


TABLES = {".csv": comma_separated, ".parquet": parquet}


# --- what a file says of its columns -------------------------------------------------------------


def about(file: Any) -> dict[str, Any]:
    """action_low, action_high, obs_names and act_names: arrays or attributes of an open file."""
    places = [file, getattr(file, "attrs", {})]
    found: dict[str, Any] = {}
    for key in ("action_low", "action_high", "obs_names", "act_names"):
        for place in places:
            if key in place:
                value = np.asarray(place[key]).ravel().tolist()
                found[key] = [v.decode() if isinstance(v, bytes) else v for v in value]
    return found
