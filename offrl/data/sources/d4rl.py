"""D4RL's files, read without the d4rl package: names, addresses, defects.

Fu, Kumar, Nachum, Tucker, Levine, "D4RL: Datasets for Deep Data-Driven RL", 2020,
arXiv:2004.07219; addresses from the released code (Farama-Foundation/D4RL). A file is looked for
in the cache, then where the d4rl package keeps its own, and downloaded when neither has it. How
rows become transitions is written in `offrl.data.sources.files`.
"""

import dataclasses
import logging
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

from offrl.data.dataset import Dataset, home
from offrl.data.sources import files
from offrl.data.sources.download import located
from offrl.envs.scores import GYM, HAND, reference

logger = logging.getLogger(__name__)

ROOT = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
ANT_MAZES = (  # maze, data set, the maze's name in the file, many starts, many goals, horizon
    ("umaze", "fixed", "u-maze", False, False, 700),  # D4RL calls it antmaze-umaze
    ("umaze", "diverse", "u-maze", True, True, 700),
    ("medium", "play", "big-maze", True, False, 1000),
    ("medium", "diverse", "big-maze", True, True, 1000),
    ("large", "play", "hardest-maze", True, False, 1000),
    ("large", "diverse", "hardest-maze", True, True, 1000),
)
KITCHENS = {
    "complete": "mini_kitchen_microwave_kettle_light_slider",
    "partial": "kitchen_microwave_kettle_light_slider",
    "mixed": "kitchen_microwave_kettle_bottomburner_light",
}


@dataclass(frozen=True)
class Source:
    """One file."""

    stem: str  # address below ROOT
    horizon: int  # time limit of the environment in steps

    @property
    def url(self) -> str:
        return ROOT + self.stem

    @property
    def file(self) -> str:
        return self.stem.rpartition("/")[-1]

    @property
    def version(self) -> str:
        return re.findall(r"v\d", self.stem)[-1]


def sources() -> dict[str, dict[str, Source]]:
    """Environment (without `d4rl-`) -> name of the data set -> file."""
    table: dict[str, dict[str, Source]] = defaultdict(dict)
    for robot, name in product(("halfcheetah", "hopper", "walker2d", "ant"), GYM):
        stem = f"gym_mujoco_v2/{robot}_{name.replace('-', '_')}-v2.hdf5"
        table[robot][name] = Source(stem, 1000)
    for size, name, maze, starts, goals, horizon in ANT_MAZES:
        stem = f"Ant_maze_{maze}_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5"
        table[f"antmaze-{size}"][name] = Source(f"ant_maze_v2/{stem}", horizon)
    horizons = {"umaze": 300, "medium": 600, "large": 800}
    for size, name in product(horizons, ("sparse", "dense")):
        stem = f"maze2d/maze2d-{size}-{name}-v1.hdf5"
        table[f"maze2d-{size}"][name] = Source(stem, horizons[size])
    for hand, name in product(("pen", "hammer", "relocate", "door"), HAND):
        stem = f"hand_dapg_v1/{hand}-{name}-v1.hdf5"
        table[hand][name] = Source(stem, 100 if hand == "pen" else 200)
    for name, stem in KITCHENS.items():
        table["kitchen"][name] = Source(f"kitchen/{stem}-v0.hdf5", 280)
    return dict(table)


SOURCES = sources()

# rows and finished episodes; the numbers are widely reported, not taken from the files
COUNTS = {
    "hopper-medium": (999906, 2186),
    "hopper-medium-replay": (402000, 2041),
    "hopper-medium-expert": (1999906, 3213),
    "halfcheetah-medium": (1000000, 1000),
    "halfcheetah-medium-replay": (202000, 202),
    "halfcheetah-medium-expert": (2000000, 2000),
    "walker2d-medium": (999995, 1190),
    "walker2d-medium-replay": (302000, 1093),
}

NOTES = {  # pattern of "<environment>-<data set>" -> a defect that a user should know
    "maze2d-*-sparse": "reward t tells whether the goal is reached at s_t, not at s_{t+1} as in "
    "the environment (D4RL issue 194)",
    "maze2d-*": "one continuous walk: nothing terminates, and timeouts mark reached waypoints, "
    "not horizons, so returns of episodes are not comparable with scores (D4RL issue 85)",
    "antmaze-*": "rewards and terminals are 1 in every step within 0.5 of one fixed goal while "
    "the episode goes on, so an episode has runs of terminals and returns above 1; episodes are "
    "cut at timeouts only",
    "antmaze-umaze-diverse": "unlike the other mazes, a single 1 per success (D4RL issue 199)",
    "kitchen-*": "the reward is the number of subtasks satisfied at the moment, 0 to 4 in every "
    "step, while the environment pays once per completed subtask: do not compare returns of the "
    "data with scores",
    "*-human": "demonstrations are longer than the evaluation's horizon",
    "*-cloned": "demonstrations are longer than the evaluation's horizon",
    "ant-*": "111 observations of the old Ant with contact forces; no current Ant has them",
}


def load(env: str, dataset: str = "", download: bool = True, episodes: bool = False) -> Dataset:
    """The Q-learning view of a D4RL data set, or all its rows, in the cache and memory-mapped.

    Rewards are raw; timeout is 0 in every row of the Q-learning view, which drops the others.
    Returns are sums over all rows, also dropped ones. The last episode is unfinished where
    info["unfinished"] is not 0. In AntMaze episodes go through terminals and end at timeouts, which
    is where the test |obs[i + 1] - next_obs[i]| > 1e-6 finds a jump in this view. info also holds
    file, url, sha256, reference (the random and the expert return), rows, episodes and notes.

    Args:
        env: `hopper`, or with `d4rl-` the mazes, hands and the kitchen (`d4rl-antmaze-large`,
            `d4rl-pen`); a name that includes the data set stands for itself.
        dataset: such as `medium-replay`, `play`, `human`, `partial`; `sparse` or `dense` for
            Maze2D, `fixed` or `diverse` for `d4rl-antmaze-umaze`.
        download: fetch the file if it is not on this machine.
        episodes: keep every row; see `offrl.data.sources.files`.

    Raises ValueError for an unknown name, listing the known ones, DataError if the file is damaged,
    OSError if the download or the cache failed, naming the alternatives.
    """
    env, dataset, source = resolve(env, dataset)
    task = f"{env}-{dataset}"
    path, name = locate(source, download), f"{task}-{source.version}"
    notes = [note for pattern, note in NOTES.items() if fnmatch(task, pattern)]
    info: dict[str, Any] = {"source": "d4rl", "task": name, "url": source.url, "notes": notes}
    info["reference"] = reference(f"d4rl-{env}", dataset)
    rule = files.Rule(source.horizon, task.startswith("antmaze"), clip=True, episodes=episodes)
    data = files.rows_of(path, home() / "d4rl" / task, f"d4rl/{name}", rule, info)
    found = data.info["rows"], data.info["episodes"]
    if found != (known := COUNTS.get(task, found)):
        logger.warning(
            "%s has %d rows and %d episodes, other sources report %d and %d: compare its sha256 %s "
            "with a known copy",
            *(path, *found, *known, data.info["sha256"]),
        )
    if strays := data.info["strays"]:
        logger.warning(
            "%s: next_observations differs from the following row in %d rows that end nothing; "
            "the following row is used, as D4RL does",
            *(path, strays),
        )
    return data


def resolve(env: str, dataset: str) -> tuple[str, str, Source]:
    """Environment and data set as in the table, and the file, of our names; else a ValueError."""
    bare = env.removeprefix("d4rl-")
    if bare in SOURCES:
        if dataset in SOURCES[bare]:
            return bare, dataset, SOURCES[bare][dataset]
        raise ValueError(
            f"D4RL has no data set {dataset!r} of {env}; it has {', '.join(SOURCES[bare])}"
        )
    for name, sets in SOURCES.items():
        own = bare.removeprefix(f"{name}-")
        if own in sets and own != bare:
            if dataset in ("", own):
                return name, own, sets[own]
            raise ValueError(f"{env} names its data set itself, {own!r}, which is not {dataset!r}")
    raise ValueError(f"D4RL has no environment {env!r} in its table; it has {', '.join(SOURCES)}")


def locate(source: Source, download: bool = True) -> Path:
    """Where the file of a data set is, downloading it if need be.

    Raises FileNotFoundError if it is not here and `download` is off, DownloadError if that fails.
    """
    own = home() / "d4rl" / source.file
    package = os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets"
    theirs = Path(package, source.file)
    if not (download or own.is_file() or theirs.is_file()):
        raise FileNotFoundError(f"neither {own} nor {theirs} is there")
    return located(source.url, own, theirs, inspect)


def inspect(path: Path) -> None:
    """Raises DataError unless `path` is a log with D4RL's fields."""
    with files.opened(path) as columns:
        files.examine(columns, path)


def d4rl_view(data: Dataset) -> Dataset:
    """The rows that D4RL's rule (see `offrl.data.sources.files`) would leave of a whole data set.

    Drops the last transition of truncated episodes and the last row of all. Episodes without rows
    left disappear, returns stay as they were.
    """
    keep = data["timeout"] == 0
    keep[-1] = False
    starts, left = files.surviving(data.starts, keep)
    return dataclasses.replace(
        data,
        fields={name: value[keep] for name, value in data.fields.items()},
        starts=starts,
        returns=data.returns[left],
        name=f"{data.name} (D4RL view)",
        info=data.info | {"rows": len(data), "dropped": int((~keep).sum())},
    )
