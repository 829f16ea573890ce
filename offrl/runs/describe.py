"""A look at a data set before training, as text, PNG, JSON and an HTML page."""

import json
from dataclasses import dataclass
from pathlib import Path

from offrl.data import sources
from offrl.data.dataset import Dataset, check_fits
from offrl.data.describe import describe
from offrl.data.description import Description
from offrl.envs.make import cut_off, factory
from offrl.envs.vector import sizes
from offrl.results.description import figure, page


@dataclass(frozen=True)
class Options:
    """Options of scripts/describe.py.

    dataset=NAME or FILE   a data set by name or a file, as for training
    env=NAME               its environment, for data sets by name and for sizes and time limit
    source=auto            generated, d4rl, minari, ogbench, files
    rows=N                 of generated data
    discount=0.99          of the discounted returns
    limit=N                the time limit of the environment in steps, where env= does not tell it
    out=DIR                also write describe.json, describe.png and describe.html there

    The exit status is 1 if the data have an error, 0 with warnings and notes only.
    """

    dataset: str
    env: str | None = None
    source: str = "auto"
    rows: int | None = None
    discount: float = 0.99
    limit: int | None = None
    out: str | None = None


def describe_data(options: Options) -> Description:
    """Describe what the options name, print it, and write the files.

    Raises:
        DataError: the data cannot be read, or do not fit the environment.
        OSError: `out` cannot be written.
    """
    o = options
    data = sources.load(o.source, o.env or "", o.dataset, o.rows, episodes=True, strict=False)
    limit = o.limit
    if o.env and sources.settled(o.source, o.dataset) in ("files", "minari"):
        limit = limit or limit_of(o.env, data)
    found = describe(data, o.discount, limit)
    print(found)
    if o.out:
        print(f"describe.html, describe.png and describe.json in {write(found, Path(o.out))}")
    return found


def limit_of(name: str, data: Dataset) -> int | None:
    """The time limit of an environment, which must fit the data."""
    env = factory(name)()
    unlimited = cut_off(env)
    spec, (obs_dim, act_dim, discrete) = env.spec, sizes(env)
    env.close()
    if not (discrete and data.discrete):  # of discrete actions some may not occur
        check_fits(data, obs_dim, act_dim, name)
    return spec.max_episode_steps if spec and not unlimited else None


def write(found: Description, folder: Path) -> Path:
    """Write the three files into a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found.to_dict(), indent=1, allow_nan=False)
    (folder / "describe.json").write_text(text, encoding="utf-8")
    figure(folder / "describe.png", found)
    (folder / "describe.html").write_text(page(found, folder / "describe.png"), encoding="utf-8")
    return folder
