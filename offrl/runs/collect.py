"""Data sets made on request: by a recipe, or from a run's own policies; stored where asked."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from offrl import config as configuration
from offrl.data.dataset import Dataset, home, read, write
from offrl.data.sources import generated, minari
from offrl.data.sources.rollout import Share, borders, roll_out
from offrl.engine.method import Algorithm, Now, Policy
from offrl.envs.make import env_id
from offrl.errors import ConfigError, DataError
from offrl.runs.evaluate import checkpoints, load_algorithm
from offrl.runs.task import make_env, version

D4RL_NAMES = {
    "obs": "observations",
    "act": "actions",
    "reward": "rewards",
    "next_obs": "next_observations",
    "terminal": "terminals",
    "timeout": "timeouts",
}


@dataclass(frozen=True)
class Options:
    """Options of scripts/collect.py.

    env=NAME dataset=NAME  a recipe: random, medium, medium-replay, medium-expert, expert
    run=PATH               or a run directory, checkpoint or snapshot: its own policies
    explore=true           of run=: sample actions as in training
    rows=N                 transitions; a million if not given, D4RL's number for medium-replay
    seed=0                 of the roll-outs
    workers=0              processes, 0 for one per core; the rows do not depend on it
    out=FILE               .npz or .hdf5 with D4RL's field names; train on it with dataset=FILE
    minari=ID              also a local Minari data set <namespace>/<environment>/<name>-v0
    plot=FILE.png          the distribution of the returns
    """

    env: str | None = None
    dataset: str | None = None
    run: str | None = None
    explore: bool = True
    rows: int | None = None
    seed: int = 0
    workers: int = 0
    out: str | None = None
    minari: str | None = None
    plot: str | None = None


def collect_data(options: Options) -> Dataset:
    """Make what the options say, and print what was made.

    Raises:
        ConfigError: neither or both of a recipe and a run.
    """
    o, recipe = options, (options.env, options.dataset)
    if (o.run is None) == (recipe == (None, None)):
        raise ConfigError("give either run=DIR, or env= and dataset=")
    out = Path(o.out) if o.out else None
    if o.run is not None:
        rows = generated.ROWS if o.rows is None else o.rows
        data = collect_run(Path(o.run), rows, o.explore, o.workers, o.seed, out, o.minari)
    elif o.env is None or o.dataset is None:
        raise ConfigError("a recipe needs both env= and dataset=")
    else:
        data = collect(o.env, o.dataset, o.rows, o.workers, o.seed, out, o.minari)
    info = data.info
    score = "" if info["mean_score"] is None else f", D4RL score {info['mean_score']:.1f}"
    mean = "no whole episode" if info["mean_return"] is None else f"{info['mean_return']:.1f}"
    print(
        f"{data.name}: {len(data)} transitions, {data.episodes} episodes, mean return {mean}{score}"
    )
    if o.plot:
        from offrl.results.returns import distribution

        label = o.dataset or "run"
        distribution(Path(o.plot), {o.env or info["env"]: {label: data}})
    return data


def collect(
    env: str,
    dataset: str,
    rows: int | None = None,
    workers: int = 0,
    seed: int = 0,
    out: Path | None = None,
    minari_id: str | None = None,
) -> Dataset:
    """A data set by a recipe of `offrl.data.sources.generated`, and copies of it.

    Args:
        env, dataset, rows, workers, seed: see `offrl.data.sources.generated.load`.
        out: also write this .npz or .hdf5 file, with D4RL's field names.
        minari_id: also write a local Minari data set, "<namespace>/<environment>/<name>-v0".

    Raises:
        DataError, ValueError, OSError: as `generated.load` and the exports; a wrong `out` or
            `minari_id` stops before anything is rolled out.
    """
    check_targets(out, minari_id)
    data = generated.load(env, dataset, rows, workers, seed)
    store(data, env_id(env), out, minari_id, f"SAC, {dataset}")
    return data


def collect_run(
    run: Path,
    rows: int = generated.ROWS,
    explore: bool = True,
    workers: int = 0,
    seed: int = 0,
    out: Path | None = None,
    minari_id: str | None = None,
) -> Dataset:
    """A data set from a trained run, in the environment that it was trained in.

    Args:
        run: a run directory, a seed's folder, a checkpoint or a snapshot. Several seeds play
            equal shares of the rows, one after the other.
        rows: transitions.
        explore: sample actions as in training, otherwise the deterministic policy.
        out, minari_id: as for `collect`; at least one.

    Returns:
        The data, memory-mapped from the cache, where the last collection stays.

    Raises:
        FileNotFoundError: no run at that place.
        DataError, ValueError, OSError: as `collect`.
    """
    if out is None and minari_id is None:
        raise DataError("say where the data of a run should go: out=FILE.npz or minari_id=...")
    check_targets(out, minari_id)
    folder, files = checkpoints(run)
    resolved = configuration.from_yaml((folder / "config.yaml").read_text())
    members: list[tuple[str, Policy]] = []
    for file in files:
        algo, group = load_algorithm(resolved, file)
        for i, number in enumerate(group):
            player = algo if len(group) == 1 else Member(algo, i, len(group))
            members.append((f"seed {number}", player))
    counts = borders([1] * len(members), rows)
    shares = [
        Share(name, policy, count, explore)
        for (name, policy), count in zip(members, counts, strict=True)
    ]
    env = resolved.settings.env
    name = f"{resolved.name}-{resolved.task}"
    info = {
        "source": "run",
        "run": str(run),
        "algo": resolved.name,
        "seed": seed,
        "legacy_mass": resolved.settings.legacy_mass,
    }
    id = env_id(env, version(resolved))
    data = from_policies(shares, make_env(resolved), env, id, name, info, workers, seed)
    store(data, id, out, minari_id, resolved.name)
    return data


def from_policies(
    shares: list[Share],
    make_env: Callable[[], Any],
    env: str,
    id: str,
    name: str,
    info: dict[str, Any] | None = None,
    workers: int = 0,
    seed: int = 0,
    folder: Path | None = None,
) -> Dataset:
    """A data set from any policies: objects with `act` that can be pickled.

    Args:
        shares: who plays how many rows.
        make_env: picklable maker of an environment with actions in [-1, 1]; see
            `offrl.envs.make.factory`.
        env, id: our name of the environment, which has the reference returns, and Gymnasium's.
        name: of the data, for people.
        info: provenance to keep with the data.
        folder: the entry to write; None for the cache's `collected/<name>`. An old one there is
            replaced.
    """
    folder = folder or home() / "collected" / name.replace("/", "-")

    def fill(place: Path) -> dict[str, Any]:
        found = (info or {}) | roll_out(shares, make_env, place, seed, workers, name)
        return generated.described(f"collected/{name}", env, id, shares, found)

    write(folder, fill)
    return read(folder)


class Member:
    """One of the stacked seeds of an algorithm, as a policy of its own."""

    def __init__(self, algo: Algorithm, index: int, count: int):
        self.algo, self.index, self.count = algo, index, count

    def act(self, now: Now, memory: Any = None) -> tuple[Tensor, Any]:
        stacked = {
            name: value.expand(self.count, *value.shape) if isinstance(value, Tensor) else value
            for name, value in now.items()
        }
        act, memory = self.algo.act(stacked, memory)
        return act[self.index], memory


# --- copies for other programs -------------------------------------------------------------------


def check_targets(out: Path | None, minari_id: str | None) -> None:
    """Raises before minutes of work for a target that cannot be written."""
    if out is not None and Path(out).suffix not in (".npz", ".hdf5"):
        raise DataError(f"out must be a .npz or .hdf5 file, got {out}")
    if out is not None and not os.access(Path(out).absolute().parent, os.W_OK):
        raise OSError(f"cannot write {out}: its folder does not exist or is not writable")
    if minari_id is not None:
        minari.free(minari_id)


def store(data: Dataset, id: str, out: Path | None, minari_id: str | None, algorithm: str) -> None:
    if out is not None:
        to_file(data, Path(out))
    if minari_id is not None:
        minari.export(data, minari_id, env=id, algorithm_name=algorithm, description=data.name)


def to_file(data: Dataset, path: Path) -> None:
    """Write a .npz or .hdf5 file with D4RL's field names, whole or not at all.

    `source=files` reads it, by D4RL's rule: the last transition of a truncated episode is in the
    file but is dropped when it is read.

    Raises:
        OSError: if the place is not writable or the disk full.
    """
    arrays = {
        theirs: data[ours].numpy()
        if ours not in ("terminal", "timeout")
        else data[ours].to(torch.bool).numpy()
        for ours, theirs in D4RL_NAMES.items()
    }
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        part = temporary / path.name
        if path.suffix == ".npz":
            np.savez(part, **arrays)  # type: ignore[arg-type]
        else:
            with h5py.File(part, "w") as file:
                for name, array in arrays.items():
                    file.create_dataset(name, data=array, compression="gzip", compression_opts=1)
                file.attrs["name"] = data.name
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
