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
from offrl.data.dataset import FIELDS, Dataset, home, read, write
from offrl.data.sources import generated, minari
from offrl.data.sources.rollout import Share, borders, roll_out
from offrl.engine.method import Algorithm, Now, Policy
from offrl.engine.ranges import Count, Whole
from offrl.envs.make import env_id
from offrl.errors import ConfigError, DataError
from offrl.runs.evaluate import checkpoints, load_algorithm
from offrl.runs.task import make_env, version

D4RL_NAMES = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


@dataclass(frozen=True)
class Options:
    """Options of scripts/collect.py: either env= and dataset=, or run=."""

    env: str | None = None  # of a recipe
    dataset: str | None = None  # random, medium, medium-replay, medium-expert, expert
    run: str | None = None  # a run directory, checkpoint or snapshot: its own policies
    explore: bool = True  # of run=: sample actions as in training
    rows: Count | None = None  # transitions; null: a million, D4RL's number for medium-replay
    seed: Whole = 0  # of the roll-outs
    workers: Whole = 0  # processes, 0 for one per core; the rows do not depend on it
    out: str | None = None  # .npz or .hdf5 with D4RL's field names; train on it with dataset=FILE
    minari: str | None = None  # also a local Minari data set <namespace>/<environment>/<name>-v0
    plot: str | None = None  # picture of the distribution of the returns


def collect_data(options: Options) -> Dataset:
    """Make what the options say, write copies of it, and print what was made.

    A recipe is one of `offrl.data.sources.generated`. The data are returned memory-mapped from the
    cache, where the last collection of a run stays.

    Raises:
        ConfigError: neither or both of a recipe and a run.
        DataError, ValueError, OSError: of a recipe, a run or a copy; a wrong `out` or `minari`
            stops before anything is rolled out.
    """
    o, out = options, Path(options.out) if options.out else None
    if (o.run is None) == ((o.env, o.dataset) == (None, None)):
        raise ConfigError("give either run=DIR, or env= and dataset=")
    check_targets(out, o.minari)
    if o.run is not None:
        if out is None and o.minari is None:
            raise DataError("say where the data of a run should go: out=FILE.npz or minari=ID")
        data, id, algorithm = from_run(Path(o.run), o)
    elif o.env is None or o.dataset is None:
        raise ConfigError("a recipe needs both env= and dataset=")
    else:
        data = generated.load(o.env, o.dataset, o.rows, o.workers, o.seed)
        id, algorithm = env_id(o.env), f"SAC, {o.dataset}"
    if out is not None:
        to_file(data, out)
    if o.minari is not None:
        minari.export(data, o.minari, env=id, algorithm_name=algorithm, description=data.name)
    info = data.info
    score = "" if info["mean_score"] is None else f", D4RL score {info['mean_score']:.1f}"
    mean = "no whole episode" if info["mean_return"] is None else f"{info['mean_return']:.1f}"
    counts = f"{len(data)} transitions, {data.episodes} episodes"
    print(f"{data.name}: {counts}, mean return {mean}{score}")
    if o.plot:
        from offrl.results.plots import distribution

        distribution(Path(o.plot), {o.env or info["env"]: {o.dataset or "run": data}})
    return data


def from_run(run: Path, options: Options) -> tuple[Dataset, str, str]:
    """Data from a trained run in its own environment, the environment's id, and the method.

    Several seeds play equal shares of the rows, one after the other.
    """
    o, (folder, files) = options, checkpoints(run)
    resolved = configuration.of_run(folder)
    members: list[tuple[str, Policy]] = []
    for file in files:
        algo, group = load_algorithm(resolved, file)
        count = len(group)
        for i, seed in enumerate(group):
            members.append((f"seed {seed}", algo if count == 1 else Member(algo, i, count)))
    counts = borders([1] * len(members), generated.ROWS if o.rows is None else o.rows)
    shares = [Share(*m, count, o.explore) for m, count in zip(members, counts, strict=True)]
    s, method = resolved.settings, resolved.name
    about = {"source": "run", "run": str(run), "algo": method, "seed": o.seed}
    about["legacy_mass"] = s.legacy_mass
    id, name = env_id(s.env, version(resolved)), f"{method}-{resolved.task}"
    made = from_policies(shares, make_env(resolved), s.env, id, name, about, o.workers, o.seed)
    return made, id, method


def from_policies(
    shares: list[Share],
    make_env: Callable[[], Any],
    env: str,
    id: str,
    name: str,
    info: dict[str, Any] | None = None,
    workers: int = 0,
    seed: int = 0,
) -> Dataset:
    """A data set from any policies, in the cache's `collected/<name>`; an old one is replaced.

    Args:
        shares: who plays how many rows: objects with `act` that can be pickled.
        make_env: picklable; actions of its environments are in [-1, 1], see `envs.make.factory`.
        env, id: our name of the environment, which has the reference returns, and Gymnasium's.
        info: provenance to keep with the data.
    """
    folder = home() / "collected" / name.replace("/", "-")

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
        stacked = {k: v.expand(self.count, *v.shape) for k, v in now.items() if torch.is_tensor(v)}
        act, memory = self.algo.act(now | stacked, memory)
        return act[self.index], memory


def check_targets(out: Path | None, minari_id: str | None) -> None:
    """Raises before minutes of work for a target that cannot be written."""
    if out is not None and out.suffix not in (".npz", ".hdf5"):
        raise DataError(f"out must be a .npz or .hdf5 file, got {out}")
    if out is not None and not os.access(out.absolute().parent, os.W_OK):
        raise OSError(f"cannot write {out}: its folder does not exist or is not writable")
    if minari_id is not None:
        minari.free(minari_id)


def to_file(data: Dataset, path: Path) -> None:
    """Write a .npz or .hdf5 file with D4RL's field names, whole or not at all (then OSError).

    `source=files` reads it. For methods of transitions that is by D4RL's rule: the last transition
    of a truncated episode is in the file but is dropped when it is read.
    """
    arrays = dict(zip(D4RL_NAMES, (data[name].numpy() for name in FIELDS), strict=True))
    for name in ("terminals", "timeouts"):
        arrays[name] = arrays[name].astype(bool)
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
