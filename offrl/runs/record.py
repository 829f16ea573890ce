"""What a run leaves behind: provenance, raw episodes, picture, result."""

import csv
import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import offrl
from offrl import config as configuration
from offrl.config import Resolved
from offrl.data.dataset import Dataset
from offrl.engine.curve import Curve
from offrl.envs import ogbench, scores
from offrl.nets.kernels import matmul
from offrl.results import stats
from offrl.system import cores, cpu_name

PACKAGES = ("offrl", "torch", "numpy", "scipy", "gymnasium", "mujoco", "minari", "hydra-core")


UNITS = {"score": "D4RL-normalized", "success": "success rate (%)", "return": "undiscounted return"}


def scored(resolved: Resolved, values: Any, headline: str = "return") -> tuple[str, Any]:
    """The unit of values of the headline, and the values in it.

    Returns are D4RL-normalized where the environment has reference returns; OGBench pays 1 at the
    goal, so that the mean return is the share of successes there.
    """
    if headline != "return":
        return headline, values
    if ogbench.known(resolved.settings.env):
        return "success", 100 * values
    if scores.reference(resolved.settings.env, resolved.settings.dataset) is None:
        return "return", values
    value = scores.score(values, resolved.settings.env, resolved.settings.dataset)
    return "score", value


def finish(
    resolved: Resolved,
    folder: Path,
    groups: list[list[int]],
    curves: list[Curve],
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """Write episodes, picture and result of a finished run; one without a score has no picture."""
    seeds = [seed for group in groups for seed in group]
    stored = json.loads((folder / "run.json").read_text())
    result = {
        "algo": resolved.name,
        "task": resolved.task,
        "env": stored["env"],
        "dataset": stored["dataset"],
        "steps": resolved.options["steps"],
        "steps_are": steps_are(resolved),
        "seeds": seeds,
        "layout": "one process per seed" if len(groups) == len(seeds) else "stacked in one process",
        "checkpoint": "last",
        **(scores_of(resolved, folder, seeds, curves) if curves[0].final else {"score": None}),
        "device": str(device),
        "threads": resolved.settings.threads,
        # where a session was killed it is missing in what was kept
        "seconds": round(max([seconds, *(c.seconds for c in curves)]), 1),
        "versions": stored["versions"],
        "engines": stored["engines"],
        "commit": stored["commit"],
        "command": stored["command"],
        "date": stored["date"],
    }
    write_json(folder / "result.json", result)
    return result


def steps_are(resolved: Resolved) -> str:
    online = configuration.method(resolved.algo).online
    return "environment steps" if online else "updates"


def scores_of(
    resolved: Resolved, folder: Path, seeds: list[int], curves: list[Curve]
) -> dict[str, Any]:
    """What the evaluations found, which also goes to episodes.csv and curve.png."""
    steps, headline = curves[0].steps, curves[0].headline
    final = rows([c.final[headline] for c in curves if c.final is not None])  # (seeds, episodes)
    points = np.stack(
        [rows([c.points[i][headline] for c in curves]) for i in range(len(steps))], 1
    )  # (seeds, points, episodes)
    write_episodes(folder / "episodes.csv", seeds, curves)
    unit, final_scores = scored(resolved, final, headline)
    _, curve_scores = scored(resolved, points.mean(-1), headline)
    plot_curve(resolved, folder, np.array(steps), curve_scores, unit)
    found = {
        "unit": UNITS.get(unit, unit),
        "score": summary(final_scores.mean(-1)),
        "last10": summary(curve_scores[:, -10:].mean(-1)),
        "last3": summary(curve_scores[:, -3:].mean(-1)),
        "best": summary(curve_scores.max(-1)),
        "final_returns": final.tolist(),
        "curve": {"steps": steps, "mean_return": points.mean(-1).tolist()},
    }
    if names := scenario_names(curves):
        wishes = configuration.method(resolved.algo).scenarios(resolved.config())
        found["headline"] = (
            "per seed, the scenario of the highest mean in that evaluation"
            if wishes
            else "the episodes of all tasks"
        )
        found["scenarios"] = {name: scenario(resolved, curves, name) for name in names}
    return found


def scenario_names(curves: list[Curve]) -> list[str]:
    """Scenarios that were played apart, in their order."""
    start = f"{curves[0].headline}/"
    return [key.removeprefix(start) for key in curves[0].final or {} if key.startswith(start)]


def scenario(resolved: Resolved, curves: list[Curve], name: str) -> dict[str, Any]:
    """Scores of one scenario: of the last checkpoint, and of the best point of the curve."""
    headline = curves[0].headline
    key = f"{headline}/{name}"
    final = rows([c.final[key] for c in curves if c.final is not None])  # (seeds, episodes)
    points = [
        rows([c.points[i][key] for c in curves]).mean(-1) for i in range(len(curves[0].steps))
    ]
    curve = np.stack(points, 1)  # (seeds, points)
    return {
        "score": summary(scored(resolved, final, headline)[1].mean(-1)),
        "best": summary(scored(resolved, curve, headline)[1].max(-1)),
        "final_returns": final.tolist(),
        "curve": curve.tolist(),
    }


def rows(values: list[torch.Tensor]) -> np.ndarray:
    """Per-group values (*S, n) as (seeds, n)."""
    return np.concatenate([v.double().reshape(-1, v.shape[-1]).numpy() for v in values])


def summary(per_seed: np.ndarray) -> dict[str, Any]:
    return {
        "iqm": float(stats.iqm(per_seed)),
        "interval95": stats.interval(per_seed),
        "mean": float(per_seed.mean()),
        "std_sample": float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None,
        "std_population": float(per_seed.std()),
        "per_seed": per_seed.tolist(),
    }


def write_episodes(path: Path, seeds: list[int], curves: list[Curve]) -> None:
    """One line per episode; with several scenarios every one of them, named in a last column."""
    names = scenario_names(curves)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        head = ["step", "seed", "episode", "return", "length"]
        writer.writerow([*head, "scenario"] if names else head)
        for i, step in enumerate([*curves[0].steps, "final"]):
            points = [c.final if step == "final" else c.points[i] for c in curves]
            for name in names or [""]:
                keys = (f"{key}/{name}" if name else key for key in ("return", "length"))
                returns, lengths = (rows([p[key] for p in points if p]) for key in keys)
                for seed, seed_returns, seed_lengths in zip(seeds, returns, lengths, strict=True):
                    pairs = zip(seed_returns.tolist(), seed_lengths.tolist(), strict=True)
                    for k, (value, length) in enumerate(pairs):
                        line = [step, seed, k, repr(value), int(length)]
                        writer.writerow([*line, name] if name else line)


def plot_curve(
    resolved: Resolved, folder: Path, steps: np.ndarray, values: np.ndarray, unit: str
) -> None:
    from offrl.results.plots import learning_curve

    ylabel = "D4RL-normalized score" if unit == "score" else UNITS.get(unit, unit)
    title = f"{resolved.name} on {resolved.task}"
    learning_curve(folder / "curve.png", steps, values, title, ylabel, steps_are(resolved))


def provenance(
    resolved: Resolved,
    data: Dataset | None,
    env: str,
    engines: dict[str, str],
    device: torch.device,
) -> dict[str, Any]:
    """What a run rests on, stored before it begins.

    Args:
        env: the environment's id.
        engines: packages of its dynamics and their versions.
    """
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    repeat = resolved.settings.action_repeat
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "commit": source_commit(),
        "versions": {name: metadata.version(name) for name in PACKAGES} | engines,
        "engines": engines,
        "device": hardware,
        "device_type": device.type,
        "cores": cores(),
        "matmul": sorted(matmul.chosen),
        "env": {"id": env, "legacy_mass": resolved.settings.legacy_mass}
        | ({"action_repeat": repeat} if repeat > 1 else {}),
        "dataset": None
        if data is None
        else {
            "name": data.name,
            "digest": data.digest,
            "transitions": len(data),
            "episodes": data.episodes,
            "mean_return": float(data.returns.double().mean()),
            "info": data.info,
        },
    }


def played_in(env: Mapping[str, Any], engines: Mapping[str, str]) -> str:
    """An environment and what its dynamics rest on, in words."""
    masses = " with legacy masses" if env["legacy_mass"] else ""
    return ", ".join([env["id"] + masses, *(f"{name} {engines[name]}" for name in engines)])


def repository() -> Path:
    """The folder that holds the package: the repository, unless the package is installed."""
    return Path(offrl.__file__).resolve().parents[1]


def source_commit() -> str | None:
    """The commit of the library's sources, with "+" if they differ from it; None if installed."""
    root = repository()
    apart = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=apart)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # a user's own repository, in which the library is installed
        changed = git("status", "--porcelain", "--", "offrl", "configs")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def resuming(folder: Path) -> str:
    """The command that continues a run: the repository's script if it is what runs here."""
    script = Path(sys.argv[0])
    ours = script.resolve() == repository() / "scripts" / "train.py"
    start = ["python", str(script)] if ours else ["offrl", "train"]
    return shlex.join([*start, f"resume={folder}"])


def placeless(command: str) -> str:
    """A command without the place of its runs, which says nothing elsewhere."""
    return " ".join(w for w in command.split() if not w.lstrip("+").startswith("runs="))


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)
