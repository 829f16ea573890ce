"""Data sets by D4RL's recipes, rolled out from the shipped policies on first use, then cached.

    random         uniformly random actions
    medium         one policy of about a third to a half of the expert's return, sampled
    medium-replay  what training saw up to medium: the random warm-up and the snapshots, each in
                   proportion to the training steps for which it stands
    expert         the expert, sampled
    medium-expert  half medium, half expert, in this order

As in D4RL (Fu et al. 2020, arXiv:2004.07219) the policies are SAC's and act stochastically;
episodes have up to 1000 steps. Differences: Gymnasium's v5 robots instead of v2; a million rows
where D4RL's medium-expert has two; medium-replay is played anew by up to ten snapshots instead of
read from the replay buffer, with D4RL's number of rows, not of training steps; the last transition
of a truncated episode is kept, with its true successor.

Two data sets with the same seed share rows: medium is the first half of a twice as long
medium-expert.
"""

import hashlib
import importlib
import json
from collections.abc import Sequence
from contextlib import closing
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from offrl.data.dataset import Dataset, cached, home
from offrl.data.sources import policies
from offrl.data.sources.policies import Behavior
from offrl.data.sources.rollout import CHUNK, Share, Uniform, borders, roll_out
from offrl.envs import scores
from offrl.envs.dm_control import nearest
from offrl.envs.make import env_id, factory
from offrl.envs.vector import sizes
from offrl.errors import DataError
from offrl.own import is_env, title

PACKAGES = ("offrl", "torch", "numpy", "gymnasium", "mujoco")
RECIPE = 1  # raise it when rows would change for the same weights, and old entries are made anew
DATASETS = ("random", "medium", "medium-replay", "medium-expert", "expert")
ROWS = 1_000_000
REPLAY_ROWS = {"halfcheetah": 200_000, "hopper": 400_000, "walker2d": 300_000}  # as D4RL's, rounded


def load(
    env: str,
    dataset: str,
    rows: int | None = None,
    workers: int = 0,
    seed: int = 0,
    folder: Path = policies.FOLDER,
) -> Dataset:
    """A generated data set from the cache, made first if it is not there.

    Args:
        env: `halfcheetah`, `hopper`, `walker2d`; for "random" any environment.
        dataset: one of DATASETS.
        rows: transitions; None for ROWS, or REPLAY_ROWS of medium-replay.
        workers: processes; 0 for one per core. The rows do not depend on it.
        seed: of the roll-outs.
        folder: of the policies.

    Raises ValueError for an unknown environment, DataError for an unknown data set, one without
    policies or a process that died, OSError if the cache is not writable or the disk full.
    """
    shares = recipe(env, dataset, rows, folder)
    total, key = sum(share.rows for share in shares), identity(env, shares, seed)
    label = f"{title(env)}-{dataset}"

    def fill(place: Path) -> dict[str, Any]:
        robots = policies.manifest(folder)["robots"]
        origin = {k: v for k, v in robots.get(env, {}).items() if k != "policies"}
        info = {"source": "generated", "recipe": RECIPE, "seed": seed}
        info["policies_trained"] = None if dataset == "random" else origin
        found = info | roll_out(shares, factory(env), place, seed, workers, label)
        return described(f"generated/{label}", env, env_id(env), shares, found)

    entry = f"{label.replace('/', '-')}-{total}-v{RECIPE}-{key}"
    return cached(home() / "generated" / entry, fill)


def recipe(
    env: str, dataset: str, rows: int | None = None, folder: Path = policies.FOLDER
) -> list[Share]:
    """Who plays how many rows; raises as `load`."""
    id = env_id(env)
    if dataset not in DATASETS:
        hint = f"{nearest(dataset, DATASETS)} (there are: {', '.join(DATASETS)})"
        raise DataError(f"there is no generated data set {dataset!r}{hint}")
    if rows is not None and rows < 1:
        raise DataError(f"rows must be at least 1, got {rows}")
    size = rows or (REPLAY_ROWS.get(env, ROWS) if dataset == "medium-replay" else ROWS)
    if dataset == "random":
        with closing(factory(env)()) as example:
            _, act_dim, discrete = sizes(example)
        return [Share("random", Uniform(act_dim, discrete), size)]
    *early, medium, expert = policies.load(env, folder)
    trained = policies.manifest(folder)["robots"][env]
    if trained["env"] != id:
        raise DataError(f"the policies of {env} were trained in {trained['env']}, not in {id}")
    if dataset == "medium-replay":
        return replay(early, medium, trained["random_steps"], size)
    players = {"medium": medium, "expert": expert}
    names = [name for name in players if name in dataset.split("-")]
    counts = borders([1] * len(names), size)
    return [Share(name, players[name], n) for name, n in zip(names, counts, strict=True)]


def replay(early: list[Behavior], medium: Behavior, random_steps: int, rows: int) -> list[Share]:
    """The shares of training up to medium.

    A snapshot stands for the steps from halfway since the one before it to halfway to the next;
    the first for all since the random warm-up; medium, the last, up to its own step.
    """
    actors = [*early, medium]
    steps = [actor.about["step"] for actor in actors]
    edges = [0, random_steps, *((a + b) / 2 for a, b in pairwise(steps)), steps[-1]]
    act_dim = actors[0].layers[-1][1].shape[-1] // 2
    players: list[Any] = [Uniform(act_dim), *actors]
    names = ["random", *(f"step {step}" for step in steps)]
    counts = borders([b - a for a, b in pairwise(edges)], rows)
    return list(map(Share, names, players, counts))


def identity(env: str, shares: Sequence[Share], seed: int) -> str:
    """Ten hex digits of everything that decides the rows."""
    played = [(s.name, s.rows, getattr(s.policy, "digest", "uniform")) for s in shares]
    simulator = [metadata.version(name) for name in ("gymnasium", "mujoco")]
    id = env_id(env)
    text = json.dumps([RECIPE, CHUNK, id, *own_source(id), played, seed, simulator])
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def own_source(id: str) -> list[str]:
    """The digest of a user's own file or module: data of an older one are not taken for new."""
    if not is_env(id):
        return []
    place = id.rpartition(":")[0]
    file = place if place.endswith(".py") else importlib.import_module(place).__file__
    return [hashlib.sha256(Path(file).read_bytes()).hexdigest()] if file else []


def described(
    name: str, env: str, id: str, shares: Sequence[Share], info: dict[str, Any]
) -> dict[str, Any]:
    """Name and provenance of rolled-out data, as `offrl.data.dataset.write` wants them.

    Of our `env`, Gymnasium's `id`, and what `roll_out` returned and more as `info`.
    """
    reference, mean = scores.reference(env), info["mean_return"]
    known = reference is not None and mean is not None
    versions = {package: metadata.version(package) for package in PACKAGES}
    about = {"env": id, "versions": versions, "chunk": CHUNK, "reference": reference}
    about["mean_score"] = scores.score(mean, env) if known else None
    about["shares"] = [
        {"name": share.name, "rows": share.rows, "explore": share.explore}
        | getattr(share.policy, "about", {})
        for share in shares
    ]
    return {"name": f"{name} ({id}, mujoco {versions['mujoco']})", "info": info | about}
