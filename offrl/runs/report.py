"""Tables and pictures of finished runs: who scored what on which task, with intervals.

Reads what runs leave behind (`config.yaml`, `result.json`, `metrics.csv`) and trains nothing.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offrl import config as configuration
from offrl.errors import ConfigError
from offrl.results import plots, stats
from offrl.runs.record import placeless, scored, write_json


@dataclass(frozen=True)
class Options:
    """Options of scripts/report.py.

    runs=[DIR,...]   folders that are searched for finished runs
    out=DIR          receives table.md, table.json, scores.png and curves.png
    metrics=[NAME]   metrics whose last logged mean is added, such as actor/self_match, and whose
                     course is drawn beside the score in metrics.png, such as rank/feature
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
        metrics: name -> seed -> logged means, (points, 2) of step and value.
        sources: relative run folder -> command, versions and date.
        steps_are: what the steps are, updates or environment steps.
    """

    score: dict[int, float]
    curve: dict[int, np.ndarray]
    steps: list[int]
    metrics: dict[str, dict[int, np.ndarray]]
    sources: dict[str, Any]
    same: tuple[Any, ...]  # what must agree between the runs of a cell
    steps_are: str = "updates"

    @property
    def values(self) -> np.ndarray:
        return np.array([self.score[seed] for seed in sorted(self.score)])


def make_report(options: Options) -> dict[str, Any]:
    """Write the tables and pictures; returns the content of table.json.

    Raises:
        ConfigError: no finished run, a metric that none logged, or runs of one cell that differ in
            steps, data or episodes.
        OSError: a folder that is missing or cannot be written.
    """
    cells = gather([Path(name) for name in options.runs], options.metrics)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    labels = sorted({label for label, _ in cells})
    tasks = sorted({task for _, task in cells})
    found: dict[str, Any] = {
        "tasks": tasks,
        "steps_are": counted({cell.steps_are for cell in cells.values()}),
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
    plots.curves(out / "curves.png", panels, found["steps_are"], "score")
    if options.metrics:
        rows = {
            task: {"score": panels[task]}
            | {name: courses(cells, name, task, labels) for name in options.metrics}
            for task in tasks
        }
        plots.grid(out / "metrics.png", rows, found["steps_are"])
    bars = {
        task: {label: cells[label, task].values for label in labels if (label, task) in cells}
        for task in tasks
    }
    plots.scores(out / "scores.png", bars, "score of the last checkpoint")
    print(text)
    return found


def gather(folders: Iterable[Path], metrics: Sequence[str]) -> dict[tuple[str, str], Cell]:
    """Finished runs by (method, task); a seed that was run twice counts with its latest run.

    Raises:
        ConfigError: as `make_report`.
    """
    cells: dict[tuple[str, str], Cell] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        paths = sorted(folder.rglob("result.json"), key=lambda p: json.loads(p.read_text())["date"])
        for path in paths:
            run, result = path.parent, json.loads(path.read_text())
            resolved = configuration.from_yaml((run / "config.yaml").read_text())
            returns = np.array(result["final_returns"])
            same = (
                result["steps"],
                (result["dataset"] or {}).get("digest"),
                returns.shape[1],
                result["unit"],
                tuple(result["env"].items()),
            )
            key = label(resolved), result["task"]
            steps, steps_are = result["curve"]["steps"], result["steps_are"]
            cell = cells.setdefault(
                key, Cell({}, {}, steps, defaultdict(dict), {}, same, steps_are)
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
            for name, seed, course in logged(run) if metrics else ():
                cell.metrics[name][seed] = course
            about = {k: result[k] for k in ("date", "versions", "seconds", "threads")}
            about["commit"] = result.get("commit")
            about["command"] = placeless(result["command"])
            hardware = json.loads((run / "run.json").read_text())
            about |= {k: hardware[k] for k in ("device", "cores")}
            cell.sources[str(run.relative_to(folder))] = about
    if not cells:
        raise ConfigError("there is no finished run (result.json) in the given folders")
    known = sorted({name for cell in cells.values() for name in cell.metrics})
    for name in metrics:
        if name not in known:
            raise ConfigError(
                f"no run logged the metric {name!r}{configuration.nearest(name, known)}; "
                f"logged: {', '.join(known)}"
            )
    for cell in cells.values():
        cell.metrics = {name: cell.metrics[name] for name in metrics if name in cell.metrics}
    return cells


def label(resolved: configuration.Resolved) -> str:
    """The method and its preset, and every option but the steps that is not what these set."""
    s = resolved.settings
    task = {name: getattr(s, name) for name in ("env", "dataset", "source", "preset")}
    usual = configuration.configured(resolved.algo, task).options
    given = [
        f"{name}={value}"
        for name, value in resolved.options.items()
        if value != usual[name] and name != "steps"
    ]
    preset = [] if s.preset == "full" else [f"preset={s.preset}"]
    return " ".join([resolved.name, *preset, *given])


def logged(run: Path) -> Iterable[tuple[str, int, np.ndarray]]:
    """The steps and values (points, 2) of each metric and seed."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for path in sorted(run.glob("seed*/metrics.csv")):
        with open(path, newline="") as file:
            for entry in csv.DictReader(file):
                point = float(entry["step"]), float(entry["value"])
                found[entry["name"], int(entry["seed"])].append(point)
    return [(name, seed, np.array(points)) for (name, seed), points in found.items()]


def courses(
    cells: dict[tuple[str, str], Cell], name: str, task: str, labels: list[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """One metric on one task: method -> steps (points,) and values (seeds, points)."""
    out = {}
    for label in labels:
        cell = cells.get((label, task))
        if cell is not None and (seeds := sorted(cell.metrics.get(name, {}))):
            course = [cell.metrics[name][seed] for seed in seeds]
            out[label] = course[0][:, 0], np.stack([points[:, 1] for points in course])
    return out


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
            "curve": {"steps": cell.steps, "per_seed": stacked(cell.curve).tolist()},
            "metrics": {
                name: [float(values[seed][-1, 1]) for seed in sorted(values)]
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


def counted(kinds: set[str]) -> str:
    """What the steps of methods are whose steps are these."""
    return "updates (online: environment steps)" if len(kinds) > 1 else next(iter(kinds))


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
            text += (
                f"\nLast logged {name}, IQM over seeds [95 % bootstrap interval]:\n\n"
                + metric_table(found, name)
            )
    said = {key: sorted({place[key] for place in kept}) for key in ("steps", "episodes", "unit")}
    counts = sorted({len(place["seeds"]) for place in kept})
    text += (
        f"\n{', '.join(said['unit'])}; last checkpoint after {numbers(said['steps'])} "
        f"{found['steps_are']}, {numbers(said['episodes'])} episodes, {numbers(counts)} "
        "seed(s); IQM over seeds with 95 % bootstrap interval\n"
    )
    return text


def metric_table(found: dict[str, Any], name: str) -> str:
    lines = [["method", *found["tasks"]], ["---"] * (len(found["tasks"]) + 1)]
    for label, entry in found["methods"].items():
        given = [entry["tasks"].get(t, {}).get("metrics", {}).get(name) for t in found["tasks"]]
        if any(given):
            lines.append([label, *(metric_text(np.array(v)) if v else "" for v in given)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def metric_text(values: np.ndarray) -> str:
    interval = stats.interval(values)
    spread = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{stats.iqm(values):.3f}{spread}"


def numbers(values: list[int]) -> str:
    return " or ".join(f"{value:,}" for value in values)


def cell_text(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")
