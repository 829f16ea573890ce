"""Tables and pictures of finished runs: who scored what on which task, with intervals.

Reads what runs leave behind (`config.yaml`, `result.json`, `metrics.csv`) and trains nothing.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from offrl import config as configuration
from offrl.errors import ConfigError
from offrl.results import plots, stats
from offrl.results.plots import Course
from offrl.runs.record import placeless, scored, write_json


@dataclass(frozen=True)
class Options:
    """Options of scripts/report.py."""

    runs: tuple[str, ...]  # folders that are searched for finished runs
    out: str  # folder that receives table.md, table.json, scores.png and curves.png
    # whose last logged mean is added, such as actor/self_match, and whose course is drawn beside
    # the score in metrics.png, such as rank/feature
    metrics: tuple[str, ...] = ()


@dataclass
class Cell:
    """The runs of one method on one task."""

    same: dict[str, Any]  # what must agree between them: steps, data, episodes and so on
    score: dict[int, float] = field(default_factory=dict)  # seed -> mean of the final episodes
    curve: dict[int, np.ndarray] = field(default_factory=dict)  # seed -> score of every point
    # name -> seed -> logged means, (points, 2) of step and value
    metrics: dict[str, dict[int, np.ndarray]] = field(default_factory=lambda: defaultdict(dict))
    sources: dict[str, Any] = field(default_factory=dict)  # run folder -> command, versions, date

    @property
    def values(self) -> np.ndarray:
        """Scores (seeds,)."""
        return np.array(by_seed(self.score))

    @property
    def course(self) -> Course:
        """Steps and scores of the learning curves."""
        return np.array(self.same["points"]), np.stack(by_seed(self.curve))


Cells = dict[str, dict[str, Cell]]  # task -> method -> its runs


def by_seed(values: dict[int, Any]) -> list[Any]:
    return [values[seed] for seed in sorted(values)]


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
    every = every_cell(cells)
    names = sorted({name for row in cells.values() for name in row})
    steps = counted({cell.same["steps_are"] for cell in every})
    found: dict[str, Any] = {
        "tasks": list(cells),
        "steps_are": steps,
        "methods": {name: entry(cells, name) for name in names},
        "runs": {run: about for cell in every for run, about in cell.sources.items()},
    }
    write_json(out / "table.json", found)
    text = table(found, options.metrics)
    (out / "table.md").write_text(text)
    scores = {t: {name: cell.course for name, cell in row.items()} for t, row in cells.items()}
    plots.curves(out / "curves.png", {"score": scores}, steps)
    if options.metrics:
        rows = {
            task: {"score": scores[task]} | {name: courses(row, name) for name in options.metrics}
            for task, row in cells.items()
        }
        plots.curves(out / "metrics.png", rows, steps)
    bars = {t: {name: cell.values for name, cell in row.items()} for t, row in cells.items()}
    plots.scores(out / "scores.png", bars, "score of the last checkpoint")
    print(text)
    return found


def every_cell(cells: Cells) -> list[Cell]:
    return [cell for row in cells.values() for cell in row.values()]


def gather(folders: Iterable[Path], metrics: Sequence[str]) -> Cells:
    """Finished runs by task and method; a seed that was run twice counts with its latest run."""
    finished = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        for path in folder.rglob("result.json"):
            name = str(path.parent.relative_to(folder))
            finished.append((json.loads(path.read_text()), path.parent, name))
    if not finished:
        raise ConfigError("there is no finished run (result.json) in the given folders")
    cells: Cells = defaultdict(dict)
    for result, run, name in sorted(finished, key=lambda found: (found[0]["date"], found[1])):
        add(cells, result, run, name, bool(metrics))
    known = sorted({name for cell in every_cell(cells) for name in cell.metrics})
    for name in metrics:
        if name not in known:
            raise ConfigError(
                f"no run logged the metric {name!r}{configuration.nearest(name, known)}; "
                f"logged: {', '.join(known)}"
            )
    for cell in every_cell(cells):
        cell.metrics = {name: cell.metrics[name] for name in metrics if name in cell.metrics}
    return {task: dict(sorted(row.items())) for task, row in sorted(cells.items())}


def add(cells: Cells, result: dict[str, Any], run: Path, name: str, metrics: bool) -> None:
    """Add a run to its cell; `name` is its folder in the table, `metrics` whether to read them."""
    resolved = configuration.of_run(run)
    method, task, returns = label(resolved), result["task"], np.array(result["final_returns"])
    same = {key: result[key] for key in ("steps", "steps_are", "unit", "env")}
    same |= {"episodes": returns.shape[1], "points": result["curve"]["steps"]}
    same["digest"] = (result["dataset"] or {}).get("digest")
    cell = cells[task].setdefault(method, Cell(same))
    if cell.same != same:
        raise ConfigError(
            f"{run} differs from other runs of {method} on {task} in steps, data set, "
            "episodes or points of its curve; report them apart"
        )
    headline = result.get("score_of", "return")  # absent in older results
    final = scored(resolved, returns, headline)[1].mean(-1)
    curve = scored(resolved, np.array(result["curve"]["mean_return"]), headline)[1]
    for seed, value, points in zip(result["seeds"], final, curve, strict=True):
        cell.score[seed], cell.curve[seed] = float(value), points
    for metric, seed, course in logged(run) if metrics else ():
        cell.metrics[metric][seed] = course
    hardware = json.loads((run / "run.json").read_text())
    about = {key: result[key] for key in ("date", "versions", "seconds", "threads")}
    about |= {"commit": result.get("commit"), "command": placeless(result["command"])}
    cell.sources[name] = about | {key: hardware[key] for key in ("device", "cores")}


def label(resolved: configuration.Resolved) -> str:
    """The method and its preset, and every option but the steps that is not what these set."""
    s = resolved.settings
    task = {name: getattr(s, name) for name in ("env", "dataset", "source", "preset")}
    usual = configuration.configured(resolved.algo, task).options
    given = {k: v for k, v in resolved.options.items() if v != usual[k] and k != "steps"}
    given = given if s.preset == "full" else {"preset": s.preset} | given
    return " ".join([resolved.name, *(f"{name}={value}" for name, value in given.items())])


def logged(run: Path) -> Iterable[tuple[str, int, np.ndarray]]:
    """The steps and values (points, 2) of each metric and seed."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for path in sorted(run.glob("seed*/metrics.csv")):
        with open(path, newline="") as file:
            for entry in csv.DictReader(file):
                point = float(entry["step"]), float(entry["value"])
                found[entry["name"], int(entry["seed"])].append(point)
    return [(name, seed, np.array(points)) for (name, seed), points in found.items()]


def courses(row: dict[str, Cell], name: str) -> dict[str, Course]:
    """One metric on one task: method -> steps (points,) and values (seeds, points)."""
    found = {method: by_seed(cell.metrics.get(name, {})) for method, cell in row.items()}
    return {
        method: (seeds[0][:, 0], np.stack([points[:, 1] for points in seeds]))
        for method, seeds in found.items()
        if seeds
    }


def entry(cells: Cells, name: str) -> dict[str, Any]:
    """One method: every task, and the mean over tasks if all are there."""
    mine = {task: row[name] for task, row in cells.items() if name in row}
    out: dict[str, Any] = {"tasks": {}}
    for task, cell in mine.items():
        steps, curve = cell.course
        out["tasks"][task] = {
            "iqm": float(stats.iqm(cell.values)),
            "interval95": stats.interval(cell.values),
            "seeds": sorted(cell.score),
            "per_seed": cell.values.tolist(),
            **{key: cell.same[key] for key in ("steps", "episodes", "unit")},
            "curve": {"steps": steps.tolist(), "per_seed": curve.tolist()},
            "metrics": {
                metric: [float(points[-1, 1]) for points in by_seed(values)]
                for metric, values in cell.metrics.items()
            },
        }
    if len(mine) == len(cells):
        values = [cell.values for cell in mine.values()]
        mean = float(np.mean([stats.iqm(v) for v in values]))
        out["mean"] = {"value": mean, "interval95": stats.interval(*values)}
    return out


def counted(kinds: set[str]) -> str:
    return "updates (online: environment steps)" if len(kinds) > 1 else next(iter(kinds))


def table(found: dict[str, Any], metrics: Iterable[str]) -> str:
    """The same as Markdown: IQM [95 % interval]."""
    tasks, methods = found["tasks"], found["methods"]
    rows = []
    for name, about in methods.items():
        places = [about["tasks"].get(task) for task in tasks]
        texts = [number(p["iqm"], p["interval95"]) if p else "" for p in places]
        mean = number(*about["mean"].values()) if "mean" in about else ""
        rows.append([name, *texts, mean])
    text = markdown(["method", *tasks, "mean"], rows)
    kept = [place for about in methods.values() for place in about["tasks"].values()]
    for metric in metrics:
        rows = []
        for name, about in methods.items():
            given = [about["tasks"].get(t, {}).get("metrics", {}).get(metric) for t in tasks]
            if any(given):
                rows.append([name, *(of_seeds(v) if v else "" for v in given)])
        if rows:
            head = f"Last logged {metric}, IQM over seeds [95 % bootstrap interval]:"
            text += f"\n{head}\n\n{markdown(['method', *tasks], rows)}"
    said = {key: sorted({place[key] for place in kept}) for key in ("steps", "episodes", "unit")}
    counts = sorted({len(place["seeds"]) for place in kept})
    return (
        f"{text}\n{', '.join(said['unit'])}; last checkpoint after {numbers(said['steps'])} "
        f"{found['steps_are']}, {numbers(said['episodes'])} episodes, {numbers(counts)} "
        "seed(s); IQM over seeds with 95 % bootstrap interval\n"
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def of_seeds(values: list[float]) -> str:
    return number(float(stats.iqm(values)), stats.interval(values), 3)


def number(value: float, interval: tuple[float, float] | None, digits: int = 1) -> str:
    spread = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{value:.{digits}f}{spread}"


def numbers(values: list[int]) -> str:
    return " or ".join(f"{value:,}" for value in values)
