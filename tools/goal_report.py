"""Success on OGBench's tasks, read from finished runs, beside the published rows.

Of runs in pointmazes that still have their checkpoint the order-consistency ratio is measured too
(tools.mazes).
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import binomtest

from offrl import cli
from offrl import config as configuration
from offrl.cli import readable_errors
from offrl.config import Resolved
from offrl.envs import ogbench
from offrl.errors import ConfigError
from offrl.results import plots, stats
from offrl.runs.evaluate import checkpoints, load_algorithm
from offrl.runs.record import placeless, write_json
from offrl.runs.report import label
from tools import mazes

PUBLISHED = Path(__file__).parent / "ogbench.yaml"


@dataclass(frozen=True)
class Options:
    """Options of scripts/goal_report.py.

    runs=[DIR,...]   folders that are searched for finished runs
    out=DIR          receives table.md, table.json, and for each environment and data set a picture
                     of success against updates, of all tasks together and of each apart
    """

    runs: tuple[str, ...]
    out: str


def main() -> None:
    with readable_errors():
        make_goal_report(cli.options(Options, sys.argv[1:]))


def make_goal_report(options: Options) -> dict[str, Any]:
    """Write the table and the pictures; returns the content of table.json.

    Raises:
        ConfigError: if there is no finished run on a task of OGBench, a seed was run twice, or runs
            of one cell differ in episodes or in the points of their curves.
    """
    rows = defaultdict(list)
    for folder in options.runs:
        for path in sorted(Path(folder).rglob("result.json")):
            result = json.loads(path.read_text())
            resolved = configuration.of_run(path.parent)
            if ogbench.known(resolved.settings.env):
                result["order"] = order(path.parent, resolved)
                rows[result["task"], label(resolved), result["steps"]].append(result)
    if not rows:
        raise ConfigError("there is no finished run on OGBench's tasks in the given folders")
    found = [cell(*key, results) for key, results in sorted(rows.items())]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "table.json", found)
    (out / "table.md").write_text(table(found))
    for task in {c["task"] for c in found}:
        drawn = {"success (%)": panels(task, found)}
        plots.curves(out / f"{task}.png", drawn, "updates", (-2, 102))
    print(table(found))
    return {"cells": found}


def order(run: Path, resolved: Resolved) -> dict[int, float]:
    """Seed -> order-consistency ratio, mean over tasks; {} where there is nothing to measure."""
    found: dict[int, float] = {}
    env, steps = resolved.settings.env, resolved.options.get("subgoal_steps", 25)
    if not env.startswith("pointmaze-") or not list(run.glob("seed*/checkpoint.pt")):
        return found
    for file in checkpoints(run)[1]:
        algo, seeds = load_algorithm(resolved, file)
        if len(seeds) == 1 and hasattr(algo, "value"):
            ratios = mazes.consistency(algo, mazes.expert_paths(env, 0), steps, mazes.WINDOW)
            found[seeds[0]] = float(np.mean(ratios["smoothed"]))
    return found


def cell(task: str, method: str, steps: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One method on one task: of the last checkpoint, of the last three points, and per task."""
    runs = sorted((seed, i, result) for result in results for i, seed in enumerate(result["seeds"]))
    seeds = [seed for seed, _, _ in runs]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{method} on {task}: a seed was run twice, among {seeds}")
    points = [result["curve"]["steps"] for result in results]
    episodes = {len(result["final_returns"][0]) for result in results}
    if any(at != points[0] for at in points) or len(episodes) > 1:
        raise ConfigError(
            f"{method} on {task}: runs differ in episodes or in the points of their curves; report "
            "them apart"
        )
    final = np.array([result["final_returns"][i] for _, i, result in runs])  # (seeds, episodes)
    curve = np.array([result["curve"]["mean_return"][i] for _, i, result in runs])
    per_seed = 100 * final.mean(-1)
    pooled = binomtest(int(final.sum()), final.size).proportion_ci(0.95, "wilson")
    names = list(results[0]["scenarios"])
    share = lambda name, i, result: np.mean(result["scenarios"][name]["final_returns"][i])  # noqa: E731
    apart = {
        name: 100 * float(np.mean([share(name, i, result) for _, i, result in runs]))
        for name in names
    }
    curves = {
        name: [result["scenarios"][name]["curve"][i] for _, i, result in runs] for name in names
    }
    ratios = {seed: result["order"].get(seed) for seed, _, result in runs}
    return {
        "task": task,
        "method": method,
        "steps": steps,
        "seeds": seeds,
        "episodes": final.shape[1],
        "success": float(per_seed.mean()),
        "per_seed": per_seed.tolist(),
        "interval95_seeds": stats.interval(per_seed),
        "interval95_episodes": [100 * pooled.low, 100 * pooled.high],
        "last3": (100 * curve[:, -3:].mean(-1)).tolist(),
        "per_task": apart,
        "order_consistency": list(ratios.values()),
        "curve": {
            "updates": points[0],
            "all tasks": (100 * curve).tolist(),
            **{name: (100 * np.array(values)).tolist() for name, values in curves.items()},
        },
        "published": published(task, method.split(" ")[0]),
        "versions": results[0]["versions"],
        "commands": [placeless(result["command"]) for result in results],
    }


def published(task: str, algo: str) -> dict[str, list[float]]:
    """Source -> mean and standard deviation; {} where the library knows of none."""
    tables = yaml.safe_load(PUBLISHED.read_text())
    rows = [(table["source"], table["rows"].get(task, {})) for table in tables]
    return {source: row[algo] for source, row in rows if algo in row}


def panels(
    task: str, cells: list[dict[str, Any]]
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """All tasks together and each apart -> method -> updates and success by seed."""
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)
    for c in cells:
        if c["task"] == task:
            curve = dict(c["curve"])
            updates, name = np.array(curve.pop("updates")), f"{c['method']}, {c['steps']:,} updates"
            for part, values in curve.items():
                found[part][name] = updates, np.array(values)
    return found


def table(cells: list[dict[str, Any]]) -> str:
    """The same as Markdown."""
    sources = "; ".join(table["source"] for table in yaml.safe_load(PUBLISHED.read_text()))
    lines = [
        "| task | method | updates | success % by seed | mean [95 % of episodes] | "
        "last 3 points by seed, mean | tasks 1 to 5 | order consistency | published |",
        "| --- " * 9 + "|",
    ]
    for c in cells:
        low, high = c["interval95_episodes"]
        rows = [f"{mean:g} ± {std:g}" for mean, std in c["published"].values()]
        ratios = [ratio for ratio in c["order_consistency"] if ratio is not None]
        line = [
            c["task"],
            c["method"],
            f"{c['steps']:,}",
            "; ".join(f"{s}: {x:.1f}" for s, x in zip(c["seeds"], c["per_seed"], strict=True)),
            f"{c['success']:.1f} [{low:.1f}, {high:.1f}]",
            f"{', '.join(f'{x:.1f}' for x in c['last3'])}: {np.mean(c['last3']):.1f}",
            " ".join(f"{value:.0f}" for value in c["per_task"].values()),
            f"{np.mean(ratios):.3f}" if ratios else "",
            "; ".join(rows),
        ]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Success of the last checkpoint, 5 tasks alike; the interval is Wilson's over all "
            "episodes and knows nothing of the spread between seeds (table.json has both). The "
            "mean of the last three points is what the published rows hold. Order consistency: "
            f"growth of the value along an expert's path, window {mazes.WINDOW}. "
            f"Published: mean ± standard deviation of {sources}; a million updates of batch 1024 "
            "and width 512 (images: half a million of batch 256), 8 seeds (images: 4).",
            "",
        ]
    )
