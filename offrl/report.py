"""Tables and pictures of finished runs: who scored what on which task, with intervals.

Reads what runs leave behind (`config.yaml`, `result.json`, `metrics.csv`) and trains nothing.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offrl import config as configuration
from offrl.config import ConfigError
from offrl.outcome import scored, write_json
from offrl.results import plots, stats


@dataclass(frozen=True)
class Options:
    """Options of scripts/report.py.

    runs=[DIR,...]   folders that are searched for finished runs
    out=DIR          receives table.md, table.json, scores.png and curves.png
    metrics=[NAME]   metrics whose last logged mean is added, such as actor/self_match
    """

    runs: tuple[str, ...]
    out: str
    metrics: tuple[str, ...] = ()


@dataclass
class Cell:
    """The runs of one method on one task, by seed.

    Attributes:
        score: seed -> mean of the final episodes, normalized where the task allows.
        curve: seed -> score of every point of the learning curve; steps are their updates.
        metrics: name -> seed -> last logged mean.
        sources: relative run folder -> command, versions and date.
    """

    score: dict[int, float]
    curve: dict[int, np.ndarray]
    steps: list[int]
    metrics: dict[str, dict[int, float]]
    sources: dict[str, Any]
    same: tuple[Any, ...]  # what must agree between the runs of a cell

    @property
    def values(self) -> np.ndarray:
        return np.array([self.score[seed] for seed in sorted(self.score)])


def make_report(options: Options) -> dict[str, Any]:
    """Write the tables and pictures; returns the content of table.json.

    Raises:
        ConfigError: no finished run, or runs of one cell that differ in steps, data or episodes.
        OSError: a folder that is missing or cannot be written.
    """
    cells = gather([Path(name) for name in options.runs], options.metrics)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    labels = sorted({label for label, _ in cells})
    tasks = sorted({task for _, task in cells})
    found = {
        "tasks": tasks,
        "methods": {label: row(cells, label, tasks) for label in labels},
        "runs": {name: about for cell in cells.values() for name, about in cell.sources.items()},
    }
    write_json(out / "table.json", found)
    text = table(found, options.metrics)
    (out / "table.md").write_text(text)
    panels = {
        task: {
            label: (np.array(cells[label, task].steps), stacked(cells[label, task].curve))
            for label in labels
            if (label, task) in cells
        }
        for task in tasks
    }
    plots.curves(out / "curves.png", panels, "updates", "score")
    bars = {
        task: {label: cells[label, task].values for label in labels if (label, task) in cells}
        for task in tasks
    }
    plots.scores(out / "scores.png", bars, "score of the last checkpoint")
    print(text)
    return found


def gather(folders: Iterable[Path], metrics: Iterable[str]) -> dict[tuple[str, str], Cell]:
    """Finished runs by (method, task); a seed that was run twice counts with its latest run."""
    cells: dict[tuple[str, str], Cell] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        paths = sorted(folder.rglob("result.json"), key=lambda p: json.loads(p.read_text())["date"])
        for path in paths:
            run, result = path.parent, json.loads(path.read_text())
            resolved = configuration.from_yaml((run / "config.yaml").read_text())
            returns = np.array(result["final_returns"])
            same = (result["steps"], (result["dataset"] or {}).get("digest"), returns.shape[1],
                    result["unit"], tuple(result["env"].items()))  # fmt: skip
            key = label(resolved), result["task"]
            cell = cells.setdefault(
                key, Cell({}, {}, result["curve"]["steps"], defaultdict(dict), {}, same)
            )
            if cell.same != same or cell.steps != result["curve"]["steps"]:
                raise ConfigError(
                    f"{run} differs from other runs of {key[0]} on {key[1]} in steps, data set, "
                    "episodes or points of its curve; report them apart"
                )
            final = scored(resolved, returns)[1].mean(-1)
            curve = scored(resolved, np.array(result["curve"]["mean_return"]))[1]
            for seed, value, points in zip(result["seeds"], final, curve, strict=True):
                cell.score[seed], cell.curve[seed] = float(value), points
            for name, seed, last in last_values(run, set(metrics)):
                cell.metrics[name][seed] = last
            about = {k: result[k] for k in ("date", "versions", "seconds", "threads")}
            words = result["command"].split()  # without the place of the runs, which says nothing
            about["command"] = " ".join(
                word for word in words if not word.lstrip("+").startswith("runs=")
            )
            hardware = json.loads((run / "run.json").read_text())
            about |= {k: hardware[k] for k in ("device", "cores")}
            cell.sources[str(run.relative_to(folder))] = about
    if not cells:
        raise ConfigError("there is no finished run (result.json) in the given folders")
    return cells


def label(resolved: configuration.Resolved) -> str:
    """The method, with every option that was given on the command line except the steps."""
    given = [
        f"{name}={value}"
        for name, value in resolved.options.items()
        if resolved.origins.get(f"algo.{name}") == "command line" and name != "steps"
    ]
    return " ".join([resolved.algo, *given])


def last_values(run: Path, names: set[str]) -> Iterable[tuple[str, int, float]]:
    """The last logged value of each metric and seed."""
    last: dict[tuple[str, int], float] = {}
    for path in sorted(run.glob("seed*/metrics.csv")) if names else ():
        with open(path, newline="") as file:
            for entry in csv.DictReader(file):
                if entry["name"] in names:
                    last[entry["name"], int(entry["seed"])] = float(entry["value"])
    return [(name, seed, value) for (name, seed), value in last.items()]


def stacked(curve: dict[int, np.ndarray]) -> np.ndarray:
    return np.stack([curve[seed] for seed in sorted(curve)])


def row(cells: dict[tuple[str, str], Cell], label: str, tasks: list[str]) -> dict[str, Any]:
    """One method: every task, and the mean over tasks if all are there."""
    mine = {task: cells[label, task] for task in tasks if (label, task) in cells}
    out: dict[str, Any] = {"tasks": {}}
    for task, cell in mine.items():
        out["tasks"][task] = {
            "iqm": float(stats.iqm(cell.values)),
            "interval95": stats.interval(cell.values),
            "seeds": sorted(cell.score),
            "per_seed": cell.values.tolist(),
            "steps": cell.same[0],
            "episodes": cell.same[2],
            "unit": cell.same[3],
            "metrics": {
                name: [values[seed] for seed in sorted(values)]
                for name, values in cell.metrics.items()
            },
        }
    if len(mine) == len(tasks):
        values = [cell.values for cell in mine.values()]
        out["mean"] = {
            "value": float(np.mean([stats.iqm(v) for v in values])),
            "interval95": stats.stratified_interval(values),
        }
    return out


def table(found: dict[str, Any], metrics: Iterable[str]) -> str:
    """The same as Markdown: IQM [95 % interval]."""
    head = ["method", *found["tasks"], "mean"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for label, entry in found["methods"].items():
        places = [entry["tasks"].get(task) for task in found["tasks"]]
        texts = [cell_text(p["iqm"], p["interval95"]) if p else "" for p in places]
        mean = entry.get("mean")
        texts.append(cell_text(mean["value"], mean["interval95"]) if mean else "")
        lines.append(" | ".join([label, *texts]))
    text = "\n".join(f"| {line} |" for line in lines) + "\n"
    kept = [place for e in found["methods"].values() for place in e["tasks"].values()]
    for name in metrics:
        if any(name in place["metrics"] for place in kept):
            text += f"\nLast logged {name}, mean over seeds:\n\n" + metric_table(found, name)
    said = {key: sorted({place[key] for place in kept}) for key in ("steps", "episodes", "unit")}
    counts = sorted({len(place["seeds"]) for place in kept})
    text += (
        f"\n{', '.join(said['unit'])}; last checkpoint after {numbers(said['steps'])} updates, "
        f"{numbers(said['episodes'])} episodes, {numbers(counts)} seed(s); IQM over seeds with "
        "95 % bootstrap interval\n"
    )
    return text


def metric_table(found: dict[str, Any], name: str) -> str:
    lines = [["method", *found["tasks"]], ["---"] * (len(found["tasks"]) + 1)]
    for label, entry in found["methods"].items():
        given = [entry["tasks"].get(t, {}).get("metrics", {}).get(name) for t in found["tasks"]]
        if any(given):
            lines.append([label, *(f"{np.mean(v):.3f}" if v else "" for v in given)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def numbers(values: list[int]) -> str:
    return " or ".join(f"{value:,}" for value in values)


def cell_text(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")
