"""Minari data sets, both ways: flattened into the data cache, and written by Minari itself.

Every transition is kept: obs = observations[:-1], next_obs = observations[1:] of each episode,
terminal = terminations, timeout = truncations. D4RL's own rule would lose the last transition of
truncated episodes; see `offrl.data.sources.d4rl.d4rl_view`. Minari's `D4RL/` data sets are
regenerated or replayed in other environments, and their reference returns belong to those: they
are kept in info["ref_min"] and info["ref_max"] and never serve as D4RL's.

Observations of any kind are flattened as those of environments (`offrl.envs.observations`); the
order is kept in info["layout"].
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space

from offrl.data.dataset import (
    Arrays,
    Dataset,
    episode_sums,
    home,
    once,
    read,
    store_episodes,
    stream,
    write,
)
from offrl.envs.make import bounded
from offrl.envs.observations import layout, nested, ordered
from offrl.envs.observations import rows as flat_rows
from offrl.errors import ConfigError, DataError, refusal

METADATA = {  # our name -> Minari's
    "ref_min": "ref_min_score",
    "ref_max": "ref_max_score",
    "algorithm": "algorithm_name",
    "minari_version": "minari_version",
}
DAMAGE = (OSError, ValueError, KeyError, IndexError, RuntimeError, AssertionError)
RULES = 2  # of the conversion; raise it when the rules change, and old conversions are made anew


def load(dataset_id: str, download: bool = True) -> Dataset:
    """A Minari data set by id, flattened once into the data cache and memory-mapped.

    Box actions with finite bounds are rescaled to [-1, 1]; discrete ones count from 0.

    Args:
        dataset_id: such as "D4RL/door/human-v2" or "mujoco/hopper/medium-v0". It is looked for in
            $MINARI_DATASETS_PATH, else ~/.minari/datasets.
        download: fetch it from Minari's server if it is not on this machine.

    Raises DataError for a malformed id, damaged data, observations or actions that do not flatten,
    OSError if it is not here and could not be downloaded.
    """
    place = place_of(dataset_id) / "data"
    folder = home() / "minari" / dataset_id
    metadata = place / "metadata.json"
    stamp = lambda: [RULES, str(metadata), metadata.stat().st_mtime_ns]  # noqa: E731

    def current() -> bool:
        if not folder.exists() or not place.exists():
            return folder.exists()  # without Minari's copy; an id with its version never changes
        return read(folder).info.get("stamp") == stamp()

    def make() -> None:
        if not place.exists():
            obtain(dataset_id, download)
        write(folder, lambda part: flatten(dataset_id, place, part, stamp()))

    once(folder, current, make)
    return read(folder)


def lent(source: Any) -> Dataset:
    """A data set that Minari has opened, with the episodes that were chosen of it, in memory.

    Raises:
        DataError: as for `load`.
    """
    name = source.spec.dataset_id
    space = observations(source.observation_space, name)
    act, scaling = actions(source.action_space, name)
    parts = list(steps(source, name, source.storage.data_path, space, act))
    if not parts:
        raise DataError(f"{name} holds no steps")
    fields = {key: torch.cat([torch.from_numpy(p[key]) for p in parts]) for key in parts[0]}
    lengths = torch.tensor([len(part["reward"]) for part in parts])
    starts = lengths.cumsum(0) - lengths
    returns = episode_sums(fields["reward"], starts)
    info = {"source": "minari", "id": name, "layout": dict(layout(space)), "actions": scaling}
    return Dataset(fields, starts, returns, f"minari/{name}", info | units(scaling))


def place_of(dataset_id: str) -> Path:
    """Its folder; raises DataError unless the id has Minari's form, which keeps it inside."""
    if not re.fullmatch(r"([-\w]+/)*[-\w]+-v\d+", dataset_id):
        raise DataError(f"{dataset_id!r} is no Minari id such as D4RL/door/human-v2")
    root = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    return Path(root, dataset_id)


def obtain(dataset_id: str, download: bool) -> None:
    import minari

    place = place_of(dataset_id)
    failure = (
        f"the Minari data set is not at {place} and {{}}. Alternatives: source=generated needs no "
        "network; copy the data set's folder there from another machine; or set "
        "MINARI_DATASETS_PATH to where it is"
    )
    if not download:
        raise FileNotFoundError(failure.format("download is off"))
    try:
        minari.download_dataset(dataset_id)
    except BaseException as error:  # Minari, its hub client and its transport share no other base
        shutil.rmtree(place, ignore_errors=True)  # half a download would be taken for a data set
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        raise OSError(failure.format(f"could not be downloaded ({error})")) from error


# --- flattening ----------------------------------------------------------------------------------


def flatten(dataset_id: str, place: Path, part: Path, stamp: list[Any]) -> dict[str, Any]:
    """Write the arrays of the data set at `place` into the folder `part`, episode by episode."""
    source, raw = opened(place)
    space, rows = observations(source.observation_space, dataset_id), source.total_steps
    act, scaling = actions(source.action_space, dataset_id)
    if rows == 0:
        raise DataError(f"{dataset_id} holds no steps")
    ends, rewards = [0], []

    def chunks() -> Iterator[Arrays]:
        for found in steps(source, dataset_id, place, space, act):
            ends.append(ends[-1] + len(found["reward"]))
            rewards.append(found["reward"])
            yield found

    stream(part, chunks(), rows)
    if ends[-1] != rows:
        raise DataError(f"{dataset_id} announces {rows} steps and holds others; get it again")
    starts = torch.tensor(ends[:-1]).unique_consecutive()
    starts = starts[starts < rows]
    store_episodes(part, starts, torch.from_numpy(np.concatenate(rewards)))
    info: dict[str, Any] = {"source": "minari", "id": dataset_id, "stamp": stamp, "notes": []}
    info |= {"layout": dict(layout(space)), "actions": scaling, **units(scaling)}
    info |= {"rows": rows, "episodes": len(starts)}
    info |= {ours: raw.get(theirs) for ours, theirs in METADATA.items()}
    info["env"] = json.loads(raw["env_spec"])["id"] if raw.get("env_spec") else None
    return {"name": f"minari/{dataset_id}", "info": info}


def steps(
    source: Any, dataset_id: str, place: Path, space: Space, act: Callable[[Any], np.ndarray]
) -> Iterator[Arrays]:
    """The transitions of every episode, by the names of our fields."""
    for number, found in enumerate(episodes(source, place, space, act)):
        lengths = {name: len(value) for name, value in found.items()}
        obs, size = found.pop("obs"), len(found["reward"])
        if lengths != dict.fromkeys(lengths, size) | {"obs": size + 1}:
            raise DataError(
                f"{dataset_id}: episode {number} has rows {lengths}; obs must have one more "
                "than the others"
            )
        yield {"obs": obs[:-1], "next_obs": obs[1:], **found}


def units(scaling: dict[str, Any]) -> dict[str, Any]:
    """What `actions` records, as policies without an environment read it."""
    if "count" in scaling:
        return {"action_start": scaling["start"], "action_count": scaling["count"]}
    return {"rescaled_from": scaling["rescaled_from"]} if scaling["rescaled_from"] else {}


def opened(place: Path) -> tuple[Any, dict[str, Any]]:
    """Minari's own reader of a folder, and the raw metadata.

    Without spaces Minari would build the environment that the metadata name, which runs code.
    """
    import minari

    try:
        raw = json.loads((place / "metadata.json").read_text())
        if {"observation_space", "action_space"} <= set(raw):
            source = minari.MinariDataset(place)
            if source.storage.FORMAT == "hdf5":  # its reader asks for what it finds in the file
                source.storage._observation_space = nested(source.observation_space)
            return source, raw
    except DAMAGE as error:
        raise damaged(place, error) from error
    raise DataError(f"the Minari data set at {place} does not describe its spaces; get it again")


def episodes(
    source: Any, place: Path, space: Space, act: Callable[[Any], np.ndarray]
) -> Iterator[Arrays]:
    """Every episode by our names: obs (T + 1, o), the others (T, ...)."""
    flat = lambda values: np.asarray(values).reshape(-1).astype(np.float32)  # noqa: E731
    try:
        for episode in source.iterate_episodes():
            yield {
                "obs": flat_rows(space, episode.observations),
                "act": act(episode.actions),
                "reward": flat(episode.rewards),
                "terminal": flat(episode.terminations),
                "timeout": flat(episode.truncations),
            }
    except DAMAGE as error:
        raise damaged(place, error) from error


def damaged(place: Path, error: Exception) -> DataError:
    if why := refusal(error):
        return DataError(f"the Minari data set at {place} {why}")
    return DataError(
        f"the Minari data set at {place} is damaged ({type(error).__name__}: {error}); get it again"
    )


# --- spaces --------------------------------------------------------------------------------------


def observations(space: Space, dataset_id: str) -> Space:
    try:
        return ordered(space, dataset_id)
    except ConfigError as error:
        raise DataError(str(error)) from error


def actions(space: Space, dataset_id: str) -> tuple[Callable[[Any], np.ndarray], dict[str, Any]]:
    """What makes actions (T, a) in [-1, 1] of raw ones, or (T,) from 0, and that as a record."""
    if isinstance(space, Discrete):
        first = int(space.start)
        count = lambda raw: np.asarray(raw, np.int64).reshape(-1) - first  # noqa: E731
        return count, {"count": int(space.n), "start": first}
    if not isinstance(space, Box):
        raise DataError(f"{dataset_id} has actions of {space}; only Box and Discrete are read")
    limits = {"low": space.low.ravel().tolist(), "high": space.high.ravel().tolist()}
    low, high = (np.array(end, np.float64) for end in limits.values())
    other = bounded(low, high) and bool(((low != -1) | (high != 1)).any())
    varies = high > low
    width = np.where(varies, high - low, 1)

    def scaled(raw: Any) -> np.ndarray:
        flat = np.asarray(raw, np.float64).reshape(len(raw), -1)
        if other:
            flat = np.where(varies, 2 * (flat - low) / width - 1, 0)
        return flat.astype(np.float32)

    return scaled, {"rescaled_from": limits if other else None}


# --- writing -------------------------------------------------------------------------------------


def free(dataset_id: str) -> Path:
    """The folder of a data set to be written; ValueError if the id is taken."""
    place = place_of(dataset_id)
    if place.exists():
        raise ValueError(f"there is a Minari data set {dataset_id} already, in {place}")
    return place


def export(data: Dataset, dataset_id: str, env: str | None = None, **metadata: str) -> Path:
    """Write a data set as a local Minari data set, with Minari's own writer; returns its folder.

    Takes about 80 s and 750 MB per million rows.

    Args:
        dataset_id: "<namespace>/<environment>/<name>-v0".
        env: Gymnasium id, which lets Minari rebuild the environment.
        metadata: `algorithm_name`, `description`, `author` and others that Minari knows; they are
            kept beside the provenance of `data`.

    Raises ValueError if the id is taken, DataError if it is malformed, or the rows of an episode
    do not follow one another.
    """
    import minari

    place = free(dataset_id)
    box = lambda name, limit: Box(-limit, limit, tuple(data[name].shape[1:]), np.float32)  # noqa: E731
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is set to None|env_spec is None")
            made = minari.create_dataset_from_buffers(
                dataset_id,
                buffer=buffers(data),  # type: ignore[arg-type]  # read once, so it may stream
                env=env,
                observation_space=box("obs", np.inf),
                action_space=Discrete(data.act_dim) if data.discrete else box("act", 1),
                **metadata,
            )
        made.storage.update_metadata({"provenance": {"name": data.name} | data.info})
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)  # half a data set would be read as a whole one
        raise
    return place


def buffers(data: Dataset) -> Iterator[Any]:
    from minari.data_collector import EpisodeBuffer

    for first, count in zip(data.starts.tolist(), data.lengths.tolist(), strict=True):
        rows = {name: value[first : first + count] for name, value in data.fields.items()}
        obs, next_obs = rows["obs"], rows["next_obs"]
        if not torch.equal(obs[1:], next_obs[:-1]):
            raise DataError(
                f"{data.name}: next_obs is not the following row's obs within the episode from row "
                f"{first} on; Minari stores each observation once"
            )
        arrays: dict[str, Any] = {
            "observations": torch.cat([obs, next_obs[-1:]]).numpy(),
            "actions": rows["act"].numpy(),
            "rewards": rows["reward"].numpy(),
            "terminations": (rows["terminal"] != 0).numpy(),
            "truncations": (rows["timeout"] != 0).numpy(),
        }
        yield EpisodeBuffer(**arrays)
