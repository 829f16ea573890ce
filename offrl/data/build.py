"""A data set of one's own: from arrays, episodes, tables and other libraries' objects.

Every way ends in the columns of a log, which become rows by the rules of
`offrl.data.sources.files`. What is made holds every row, as that reader's whole episodes do;
`qlearning` leaves those that methods of single transitions learn from, as its usual ones do.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl.data import dataset
from offrl.data.dataset import cached, check, home, read, reject, store
from offrl.data.sources import files, layouts
from offrl.data.sources.files import Bound, surviving
from offrl.errors import DataError

GIVEN = "given"  # the source of data that a run was handed in Python, and their folder's name
LENT = "offrl.Dataset.from_arrays takes arrays"


class Dataset(dataset.Dataset):
    """Transitions of whole episodes, and the ways to make them from data of one's own.

    Common arguments:
        action_low, action_high: bounds that the actions have in the data, one or one of every
            column: they are brought to [-1, 1] here and back by `Policy.act`. Without, actions lie
            in [-1, 1]. Of discrete actions, which are whole numbers, the first and the last;
            without, they are those that occur.
        name: for people, and for the folder of runs.

    All raise DataError, which names the field and the row of what cannot be used.
    """

    @classmethod
    def from_arrays(
        cls,
        observations: Any,
        actions: Any,
        rewards: Any,
        terminals: Any,
        timeouts: Any = None,
        *,
        next_observations: Any = None,
        action_low: Bound = None,
        action_high: Bound = None,
        obs_names: Sequence[str] = (),
        act_names: Sequence[str] = (),
        name: str = "arrays",
    ) -> "Dataset":
        """From N consecutive steps, one episode after the other.

        Args:
            observations: (N, o).
            actions: (N, a), or integers (N,) if discrete.
            rewards: (N,).
            terminals: (N,), 1 only where the process really ended.
            timeouts: (N,), 1 where a time limit cut an episode.
            next_observations: (N, o); else the following row, which the last row of an episode that
                was cut does not have.
            obs_names, act_names: of the columns.
        """
        columns = {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "terminals": terminals,
            "timeouts": timeouts,
            "next_observations": next_observations,
        }
        arrays = {
            key: array(value, name, key) for key, value in columns.items() if value is not None
        }
        names = {"obs_names": obs_names, "act_names": act_names}
        return cls.of_log(arrays, name, names, action_low, action_high)

    @classmethod
    def from_episodes(
        cls,
        episodes: Iterable[Mapping[str, Any]],
        *,
        action_low: Bound = None,
        action_high: Bound = None,
        obs_names: Sequence[str] = (),
        act_names: Sequence[str] = (),
        name: str = "episodes",
    ) -> "Dataset":
        """From one mapping per episode.

        Args:
            episodes: with `observations` (T, o), or (T + 1, o) with the one behind the last step,
                `actions`, `rewards`, and `terminals`: (T,), or one flag, whether the process really
                ended. An episode that did not was cut.
        """
        names = {"obs_names": obs_names, "act_names": act_names}
        return cls.of_log(layouts.joined(episodes, name), name, names, action_low, action_high)

    @classmethod
    def from_dataframe(
        cls,
        frame: Any,
        observations: Sequence[str] | None = None,
        actions: Sequence[str] | None = None,
        reward: str | None = None,
        terminal: str | None = None,
        timeout: str | None = None,
        episode: str | None = None,
        *,
        action_low: Bound = None,
        action_high: Bound = None,
        name: str = "dataframe",
    ) -> "Dataset":
        """From a table of pandas or polars with one row per step, in the order of time.

        Columns are found by their names: those that begin with obs and with act, and reward,
        terminal, timeout and episode.

        Args:
            observations, actions, reward, terminal, timeout, episode: names of columns, where they
                have others. An episode ends where the value of `episode` changes.
        """
        given = {
            "observations": observations,
            "actions": actions,
            "rewards": reward,
            "terminals": terminal,
            "timeouts": timeout,
            "episode": episode,
        }
        header = list(frame.columns)
        columns, names = layouts.table(header, lambda key: frame[key].to_numpy(), name, given)
        return cls.of_log(columns, name, names, action_low, action_high)

    @classmethod
    def from_minari(cls, source: Any) -> "Dataset":
        """From Minari's data set, or the id of one, which is downloaded if it is not here.

        Bounds and the first of discrete actions are those of its action space.
        """
        from offrl.data.sources import minari

        found = minari.load(source) if isinstance(source, str) else minari.lent(source)
        return cls(found.fields, found.starts, found.returns, found.name, found.info)

    @classmethod
    def from_sb3(cls, buffer: Any, *, name: str = "sb3") -> "Dataset":
        """From a `ReplayBuffer` of Stable-Baselines3, of any number of environments.

        Its algorithms store actions that are scaled to [-1, 1] already; `Policy.act` gives them in
        the units of `buffer.action_space`. A buffer of `optimize_memory_usage` holds no successors
        of the last rows of episodes.
        """
        columns, space = of_sb3(buffer, name)
        low, high = getattr(space, "low", None), getattr(space, "high", None)
        if columns["actions"].dtype.kind in "iu":
            low = int(getattr(space, "start", 0))
            return cls.of_log(columns, name, {}, low, low + int(space.n) - 1)
        data = cls.of_log(columns, name, {}, None, None)
        if low is not None and high is not None and np.isfinite([low, high]).all():
            limits = {"low": np.ravel(low).tolist(), "high": np.ravel(high).tolist()}
            data.info["rescaled_from"] = limits
        return data

    @classmethod
    def of_log(
        cls,
        columns: dict[str, np.ndarray],
        name: str,
        names: Mapping[str, Any],
        low: Bound,
        high: Bound,
    ) -> "Dataset":
        """Every row of a log in memory."""
        files.check_columns(columns, name)
        rule = files.Rule(episodes=True, low=files.listed(low), high=files.listed(high))
        fields, blocks, finish = files.transitions(columns, name, rule, names)
        pieces = [{key: torch.from_numpy(v) for key, v in block.items()} for block in blocks]
        large = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
        starts, returns = fields.pop("starts"), fields.pop("returns")
        found = finish()
        own = "next_observations" in columns
        info = {"source": GIVEN, "own_successors": own} | found
        made = cls(large | fields, starts, returns, name, info)
        check(made, [key for key in made.fields if key != "reward"])
        reject(made, "reward", ~made["reward"].isfinite(), "is NaN or infinite", "repair the row")
        files.check_order(made, name)
        return made


def array(value: Any, name: str, key: str) -> np.ndarray:
    try:
        found = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{name}: {key} is no array of numbers ({error})") from error
    return found


def of_sb3(buffer: Any, name: str) -> tuple[dict[str, np.ndarray], Any]:
    """The columns of a replay buffer, environment by environment, oldest row first."""
    if isinstance(buffer.observations, dict):
        raise DataError(f"{name}: observations are a dictionary; {LENT}, which you join yourself")
    size = buffer.buffer_size if buffer.full else buffer.pos
    order = (np.arange(size) + (buffer.pos if buffer.full else 0)) % buffer.buffer_size
    shared = getattr(buffer, "optimize_memory_usage", False)
    if shared and buffer.full:
        order = order[1:]  # the oldest row's observation has become the newest row's successor
    if not len(order):
        raise DataError(f"{name}: the buffer is empty")

    def column(values: np.ndarray) -> np.ndarray:
        rows = np.swapaxes(values[order], 0, 1)  # (environments, rows, ...)
        return rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:])

    done, cut = column(buffer.dones) != 0, column(buffer.timeouts) != 0
    if not getattr(buffer, "handle_timeout_termination", True):
        cut = np.zeros_like(done)
    last = np.arange(1, len(done) + 1) % len(order) == 0  # of an environment: the rest is not here
    found = {
        "observations": column(buffer.observations),
        "actions": column(buffer.actions),
        "rewards": column(buffer.rewards),
        "terminals": done & ~cut,
        "timeouts": cut | (last & ~done),
    }
    found["observations"] = found["observations"].reshape(len(done), -1)
    if hasattr(buffer.action_space, "n"):
        found["actions"] = found["actions"].reshape(-1).astype(np.int64)
        found["actions"] += int(getattr(buffer.action_space, "start", 0))
    if not shared:
        found["next_observations"] = column(buffer.next_observations).reshape(len(done), -1)
    return found, buffer.action_space


# --- what a run is handed ------------------------------------------------------------------------


def keep(data: dataset.Dataset) -> str:
    """Store data in the cache, where a run and its processes find them; their name there."""
    name = f"{re.sub(r'[^-0-9A-Za-z]+', '-', data.name)}-{data.digest[:12]}"

    def fill(place: Path) -> dict[str, Any]:
        rows = data.fields | {"starts": data.starts, "returns": data.returns}
        for key, value in rows.items():
            store(place / f"{key}.npy", value.detach().cpu().numpy())
        return {"name": data.name, "info": data.info}

    cached(home() / GIVEN / name, fill)
    return name


def kept(name: str, episodes: bool) -> dataset.Dataset:
    """What `keep` stored: every row, or those that methods of single transitions learn from.

    Raises:
        DataError: if it is gone.
    """
    folder = home() / GIVEN / name
    if not folder.exists():
        raise DataError(
            f"the data that were given in Python are no longer in the cache ({folder}); give them "
            "to offrl.train again"
        )
    data = read(folder)
    return data if episodes or "own_successors" not in data.info else qlearning(data)


def qlearning(data: dataset.Dataset) -> dataset.Dataset:
    """The rows of a log that D4RL's rule for Q-learning leaves; see `offrl.data.sources.files`.

    Raises:
        DataError: if none is left.
    """
    rows = data["timeout"] == 0
    rows[-1] = False
    if not rows.any():
        raise DataError(
            f"{data.name}: no row is left after dropping timeouts and the last row, whose "
            "successors are not known"
        )
    fields = dict(data.fields)
    if not data.info["own_successors"]:  # there a terminal row's is the following one, as in D4RL
        fields["next_obs"] = torch.cat([data["obs"][1:], data["obs"][-1:]])
    starts, left = surviving(data.starts, rows)
    return replace(
        data,
        fields={name: value[rows] for name, value in fields.items()},
        starts=starts,
        returns=data.returns[left],
        info=data.info | {"dropped": (~rows).nonzero()[:, 0].tolist()},
    )


def split(data: dataset.Dataset, share: float) -> tuple[dataset.Dataset, dataset.Dataset | None]:
    """Episodes to learn from, and others to look at: a share of them, at least one of two.

    Which ones depends on their number alone. None are held out of a single episode.
    """
    count = min(max(1, round(share * data.episodes)), data.episodes - 1) if share else 0
    if not count:
        return data, None
    order = torch.randperm(data.episodes, generator=torch.Generator().manual_seed(0))
    apart = torch.zeros(data.episodes, dtype=torch.bool)
    apart[order[:count]] = True
    return chosen(data, ~apart), chosen(data, apart)


def chosen(data: dataset.Dataset, episodes: torch.Tensor) -> dataset.Dataset:
    """The episodes where the mask (E,) is true."""
    rows = episodes.repeat_interleave(data.lengths)
    starts, left = surviving(data.starts, rows)
    fields = {name: value[rows] for name, value in data.fields.items()}
    return replace(data, fields=fields, starts=starts, returns=data.returns[left])
