"""A data set by source and name."""

from pathlib import Path

from offrl.data.dataset import Dataset
from offrl.envs.ogbench import known
from offrl.errors import DataError

SUFFIXES = (".hdf5", ".h5", ".npz")


def settled(source: str, dataset: str) -> str:
    """The source behind "auto": files where `dataset` is the path of one, else generated."""
    if source != "auto":
        return source
    return "files" if Path(dataset).suffix in SUFFIXES else "generated"


def load(
    source: str,
    env: str,
    dataset: str,
    rows: int | None = None,
    workers: int = 0,
    episodes: bool = False,
    strict: bool = True,
) -> Dataset:
    """The data set `dataset` of `env` from a source.

    Args:
        source: "generated", "d4rl", "minari", "ogbench", "files", or "auto": a file where `dataset`
            is the path of one, generated data otherwise, on every machine alike.
        dataset: name within the source; for "minari" the id, for "files" the path.
        rows: transitions to generate; None takes the recipe's number.
        workers: processes that generate; 0 for one per core.
        episodes: whole episodes for methods that read them in order; by default files of D4RL's
            layout lose the rows that its rule for Q-learning drops. Other sources have every row.
        strict: refuse files whose rows do not follow one another.

    Raises DataError if the data cannot be found or used, OSError if a download or the cache fails.
    """
    source = settled(source, dataset)
    if rows is not None and source != "generated":
        raise DataError(f"rows= chooses how much to generate; source={source} has its own number")
    from offrl.data.sources import d4rl, files, generated, minari, ogbench  # slow to import

    if source == "generated":
        make = ogbench.generate if known(env) else generated.load
        return make(env, dataset, rows=rows, workers=workers)
    if source == "d4rl":
        return d4rl.load(env, dataset, episodes=episodes)
    if source == "minari":
        return minari.load(dataset)
    if source == "ogbench":
        return ogbench.load(env, dataset)
    return files.load(Path(dataset), episodes=episodes, strict=strict)
