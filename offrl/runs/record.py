"""What a run leaves behind: provenance, raw episodes, picture, result."""

import csv
import datetime
import json
import math
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
    task = resolved.settings.env, resolved.settings.dataset
    if ogbench.known(task[0]):
        return "success", 100 * values
    known = scores.reference(*task) is not None
    return ("score", scores.score(values, *task)) if known else ("return", values)


def finish(
    resolved: Resolved, folder: Path, groups: list[list[int]], curves: list[Curve]
) -> dict[str, Any]:
    """Write episodes, picture and result of a finished run; one without a score has no picture."""
    seeds = [seed for group in groups for seed in group]
    stored = json.loads((folder / "run.json").read_text())
    found: dict[str, Any] = {"score": None}
    if curves[0].final and curves[0].headline:
        found = scores_of(resolved, folder, seeds, curves)
    elif curves[0].final:
        found |= losses_of(resolved, folder, seeds, curves)
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
        **found,
        "device": stored["device_type"],
        "threads": resolved.settings.threads,
        # the time of a process that was killed is missing in what was kept
        "seconds": round(max([stored["seconds"], *(c.seconds for c in curves)]), 1),
    }
    result |= {k: stored[k] for k in ("versions", "engines", "commit", "command", "date")}
    write_json(folder / "result.json", result)
    return result


def steps_are(resolved: Resolved) -> str:
    return "environment steps" if resolved.method.online else "updates"


def scores_of(
    resolved: Resolved, folder: Path, seeds: list[int], curves: list[Curve]
) -> dict[str, Any]:
    """What the evaluations found, which also goes to episodes.csv and curve.png."""
    from offrl.results import plots

    steps, headline = curves[0].steps, str(curves[0].headline)
    final, points = series(curves, headline)
    unit, last = scored(resolved, final, headline)
    _, course = scored(resolved, points, headline)
    names = scenarios(curves[0].final or {}, headline)
    write_episodes(folder / "episodes.csv", seeds, curves)
    ylabel = "D4RL-normalized score" if unit == "score" else UNITS.get(unit, unit)
    drawn = {f"{resolved.name}, {len(seeds)} seed(s)": (np.array(steps), course)}
    plots.curves(folder / "curve.png", {ylabel: {resolved.task: drawn}}, steps_are(resolved))
    found = {
        "unit": UNITS.get(unit, unit),
        "score_of": headline,
        "score": summary(last.mean(-1)),
        "last10": summary(course[:, -10:].mean(-1)),
        "last3": summary(course[:, -3:].mean(-1)),
        "best": summary(course.max(-1)),
        "final_returns": final.tolist(),
        "curve": {"steps": steps, "mean_return": points.tolist()},
    }
    if names:
        best = "per seed, the scenario of the highest mean in that evaluation"
        wishes = resolved.method.scenarios(resolved.config())
        found["headline"] = best if wishes else "the episodes of all tasks"
        found["scenarios"] = {name: scenario(resolved, curves, name) for name in names}
    return found


def scenarios(values: Mapping[str, Any], name: str) -> list[str]:
    """The scenarios that values of this name are of."""
    return [key.removeprefix(f"{name}/") for key in values if key.startswith(f"{name}/")]


def losses_of(
    resolved: Resolved, folder: Path, seeds: list[int], curves: list[Curve]
) -> dict[str, Any]:
    """Of a run without a score the values on held-out data, which also go to curve.png."""
    from offrl.results import plots

    steps = curves[0].steps
    names = list(curves[0].final or {})
    course = {name: series(curves, name) for name in names}
    losses = [name for name in names if name.endswith("loss")] or names
    label = f"{resolved.name}, {len(seeds)} seed(s)"
    panels = {n: {resolved.task: {label: (np.array(steps), course[n][1])}} for n in losses}
    plots.curves(folder / "curve.png", panels, steps_are(resolved))
    return {
        "validation": {name: summary(final.mean(-1)) for name, (final, _) in course.items()},
        "curve": {"steps": steps} | {name: points.tolist() for name, (_, points) in course.items()},
    }


def series(curves: list[Curve], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of the last checkpoint (seeds, episodes), and means of every point (seeds, points)."""
    final = rows([c.final[name] for c in curves if c.final is not None])
    points = zip(*(c.points for c in curves), strict=True)
    return final, np.stack([rows([p[name] for p in group]).mean(-1) for group in points], 1)


def scenario(resolved: Resolved, curves: list[Curve], name: str) -> dict[str, Any]:
    """Scores of one scenario: of the last checkpoint, and of the best point of the curve."""
    headline = str(curves[0].headline)
    final, points = series(curves, f"{headline}/{name}")
    return {
        "score": summary(scored(resolved, final, headline)[1].mean(-1)),
        "best": summary(scored(resolved, points, headline)[1].max(-1)),
        "final_returns": final.tolist(),
        "curve": points.tolist(),
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
    """One line per episode; with several scenarios every one of them, named in a last column.

    Of estimates, which have no episodes, there is nothing to write.
    """
    final = curves[0].final or {}
    if not {"return", "length"} <= final.keys():
        return
    names = scenarios(final, "return")
    moments: Any = zip(*([*c.points, c.final] for c in curves), strict=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        head = ["step", "seed", "episode", "return", "length"]
        writer.writerow([*head, "scenario"] if names else head)
        for step, points in zip([*curves[0].steps, "final"], moments, strict=True):
            for name in names or [""]:
                keys = (f"{key}/{name}" if name else key for key in ("return", "length"))
                returns, lengths = (rows([p[key] for p in points]) for key in keys)
                for (i, k), value in np.ndenumerate(returns):
                    line = [step, seeds[i], k, repr(float(value)), int(lengths[i, k])]
                    writer.writerow([*line, name] if name else line)


def provenance(
    resolved: Resolved,
    data: Dataset | None,
    id: str | None,
    engines: dict[str, str],
    device: torch.device,
) -> dict[str, Any]:
    """What a run rests on, stored before it begins: of an environment its id and `engines`."""
    s, data_set = resolved.settings, None
    if data is not None:
        data_set = {
            "name": data.name,
            "digest": data.digest,
            "transitions": len(data),
            "episodes": data.episodes,
            "mean_return": float(data.returns.double().mean()),
            "info": {k: v for k, v in data.info.items() if k != "dropped"},
        }
    repeat = {"action_repeat": s.action_repeat} if s.action_repeat > 1 else {}
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": source_commit(),
        "versions": {name: installed(name) for name in PACKAGES} | engines,
        "engines": engines,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "device_type": device.type,
        "cores": cores(),
        "seconds": 0.0,  # of training, over all processes of a run that was resumed
        "matmul": sorted(matmul.chosen),
        "env": id and {"id": id, "legacy_mass": s.legacy_mass} | repeat,
        "dataset": data_set,
    }


def installed(package: str) -> str | None:
    """Its version; None for a checkout that is on the path and not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
    return shlex.join(w for w in shlex.split(command) if not w.lstrip("+").startswith("runs="))


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(finite(content), indent=1, allow_nan=False))
    os.replace(temporary, path)


def finite(content: Any) -> Any:
    """The same with null where a number is NaN or infinite, which JSON cannot write."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
