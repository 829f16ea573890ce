"""Training and scoring from Python: `offrl.train` and `offrl.evaluate`, as on the command line.

run = offrl.train("td3bc", data=data, steps=10_000)
run.policy.act(observation)
"""

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl import config as configuration
from offrl.config import Resolved
from offrl.data import build
from offrl.data.dataset import Dataset
from offrl.errors import ConfigError
from offrl.runs import evaluate as scoring
from offrl.runs import train as training
from offrl.runs.policy import Policy, load_policy
from offrl.runs.report import logged


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        folder: its directory.
        result: what its result.json holds.
    """

    folder: Path
    result: dict[str, Any]

    @property
    def score(self) -> float | None:
        """Interquartile mean over seeds, in `result["unit"]`; None without an environment."""
        score = self.result["score"]
        return None if score is None else score["iqm"]

    @property
    def curve(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Everything that was logged: name -> steps (points,) and values (seeds, points).

        `return` is that of the evaluations, `validation/...` are the metrics on held-out episodes.
        """
        found: dict[str, dict[int, np.ndarray]] = {}
        for name, seed, course in logged(self.folder):
            found.setdefault(name, {})[seed] = course
        rows = {name: [seeds[seed] for seed in sorted(seeds)] for name, seeds in found.items()}
        return {k: (v[0][:, 0], np.stack([row[:, 1] for row in v])) for k, v in rows.items()}

    @property
    def policy(self) -> Policy:
        """Of the first seed; `offrl.load_policy(run.folder, seed)` loads others."""
        return load_policy(self.folder)

    def extend(self, steps: int) -> "Trained":
        """Go on to more steps, as `resume=DIR steps=N` does; see `offrl.runs.train.extended`."""
        return Trained(*go_on(training.extended(self.folder, steps), self.folder))

    def evaluate(self, **options: Any) -> dict[str, Any]:
        """`offrl.evaluate` of this run."""
        return evaluate(self.folder, **options)


def train(
    method: str | Path,
    env: str | None = None,
    data: Dataset | None = None,
    dataset: str | Path | None = None,
    seeds: int = 1,
    algo: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Trained:
    """Train a method, with a progress bar, and score it.

    Args:
        method: its name, or the path of a file of one's own.
        env: name of the environment that it is scored in, or that it learns in. None with `data` or
            `dataset`: there is none, a tenth of the episodes are held out (`validation=`), and the
            method's metrics on them are the curve.
        data: to learn from, such as `offrl.Dataset.from_arrays` makes; kept in the data cache.
        dataset: instead, the path of a file, or a name within a `source`.
        seeds: how many, on a CPU in processes of their own.
        algo: options of the method, such as {"alpha": 4.0}: those of the command line after `algo.`
        settings: everything else that the command line takes, such as steps, preset, device,
            eval_every or runs; docs/quickstart.md.

    No guard (`if __name__ == "__main__":`) is needed: processes are started without the caller's
    script, also from notebooks, from the standard input and by `python -c`.

    Raises:
        ConfigError: a setting or option that does not exist, has the wrong type or does not fit.
        DataError: data that cannot be used.
        Failed, Diverged, OSError: the run stopped; the message says why.
        Interrupted: after Ctrl-C, with the command that continues the run.
    """
    given = dict(settings) | {"seeds": seeds} | {f"algo.{k}": v for k, v in (algo or {}).items()}
    if data is not None and (dataset is not None or "source" in given):
        raise ConfigError("data= is what the run learns from; leave out dataset= and source=")
    if env is None and data is None and dataset is None:
        raise ConfigError(
            "name an environment (env=), or give data (data=, dataset=) to learn from without one"
        )
    configuration.method(str(method))  # a wrong name stops before the data are stored
    if data is not None:
        with alone():
            given |= {"dataset": build.keep(data), "source": build.GIVEN}
    elif dataset is not None:
        given["dataset"] = str(dataset)
    given["env"] = "none" if env is None else env
    return Trained(*run(str(method), given))


def run(method: str, given: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    values = {key: configuration.anchored(key, plain(value)) for key, value in given.items()}
    return go_on(configuration.configured(configuration.anchored("algo", method), values))


def go_on(resolved: Resolved, resumed: Path | None = None) -> tuple[Path, dict[str, Any]]:
    threads = torch.get_num_threads()
    try:
        with alone():
            return training.train(resolved, resumed)
    finally:
        torch.set_num_threads(threads)  # the run's are its own


def plain(value: Any) -> Any:
    """A value as a configuration stores it: without NumPy and paths."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    return str(value) if isinstance(value, Path) else value


def evaluate(run: str | Path, **options: Any) -> dict[str, Any]:
    """Score a run, a seed's folder, a checkpoint or a snapshot, and print what was found.

    Args:
        options: episodes, seed, env, explore, video and out, as of the command line.

    Returns:
        scores and returns, as the command writes them.
    """
    hints = configuration.fields_of(scoring.Options)
    for key in options:
        if key not in hints:
            wrong = f"there is no option {key!r}{configuration.nearest(key, hints)}"
            raise ConfigError(f"{wrong}; known: {', '.join(hints)}")
    chosen = {k: configuration.convert(k, plain(v), hints[k]) for k, v in options.items()}
    return scoring.evaluate_run(scoring.Options(run=str(run), **chosen))


@contextmanager
def alone() -> Iterator[None]:
    """Within it new processes do not run the caller's script.

    A script without a main guard would train a second time there, and what came through the
    standard input is no file. Nothing that they do needs it.
    """
    own, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = own
