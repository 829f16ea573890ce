"""Pictures of runs and of the returns of data sets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np

from offrl.data.dataset import Dataset
from offrl.envs.scores import reference
from offrl.envs.scores import score as normalized

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BINS = 80  # of a histogram
Course = tuple[np.ndarray, np.ndarray]  # steps (points,) and values (seeds, points)


@contextmanager
def picture(
    path: Path, rows: int, columns: int, size: tuple[float, float], share: bool = False
) -> Iterator[tuple[plt.Figure, np.ndarray]]:
    """A figure of so many inches and its axes (rows, columns), written at the end.

    Args:
        share: one vertical axis for all panels of a row.
    """
    figure, axes = plt.subplots(
        rows, columns, figsize=size, dpi=120, squeeze=False, sharey="row" if share else False
    )
    yield figure, axes
    if not figure.legends:  # else the room is divided already
        figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def curves(
    path: Path,
    rows: Mapping[str, Mapping[str, Mapping[str, Course]]],
    xlabel: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Rows of panels as PNG: each seed thin, their mean, and shaded from lowest to highest.

    Args:
        rows: row's label -> panel's title -> method -> course. All rows have as many panels.
        limits: of all values; None for each panel's own.
    """
    colors = colors_of(panel for row in rows.values() for panel in row.values())
    columns = len(next(iter(rows.values())))
    size = max(7.0, 4.0 * columns), 3.2 * len(rows) + 0.6
    with picture(path, len(rows), columns, size) as (figure, places):
        for places_of_row, (label, row) in zip(places, rows.items(), strict=True):
            for axes, (title, methods) in zip(places_of_row, row.items(), strict=True):
                shaded(axes, methods, colors)
                axes.set(title=title, xlabel=xlabel, ylim=limits)
            places_of_row[0].set_ylabel(label)
        with_legend(figure, colors)


def shaded(axes: plt.Axes, methods: Mapping[str, Course], colors: Mapping[str, str]) -> None:
    """Each method's seeds, their mean, and the range between them."""
    if not methods:
        axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes)
    for name, (steps, values) in methods.items():
        # a course of one point is a dot: no line shows it
        color, style = colors[name], "-" if len(steps) > 1 else "o"
        axes.plot(steps, values.T, style, color=color, alpha=0.3, linewidth=0.7)
        axes.plot(steps, values.mean(0), style, color=color, linewidth=1.6)
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)


def scores(path: Path, panels: Mapping[str, Mapping[str, np.ndarray]], xlabel: str) -> None:
    """Bars of the mean and a dot per seed, one panel per task, as PNG.

    Args:
        panels: task -> method -> values (seeds,).
    """
    colors = colors_of(panels.values())
    place = {name: i for i, name in enumerate(colors)}
    size = 3.4 * len(panels), 0.8 + 0.4 * len(colors)
    with picture(path, 1, len(panels), size, share=True) as (_, (places,)):
        for axes, (task, methods) in zip(places, panels.items(), strict=True):
            for name, values in methods.items():
                axes.barh(place[name], values.mean(), color=colors[name], alpha=0.6)
                axes.plot(values, [place[name]] * len(values), "o", color="black", markersize=3)
            ticks = {"yticks": list(place.values()), "yticklabels": list(place)}
            axes.set(title=task, xlabel=xlabel, **ticks)
            axes.grid(alpha=0.3, axis="x")
        places[0].invert_yaxis()


def colors_of(panels: Iterable[Iterable[str]]) -> dict[str, str]:
    """One color per method, the same in all panels."""
    names = sorted({name for methods in panels for name in methods})
    return {name: f"C{i}" for i, name in enumerate(names)}


def with_legend(figure: plt.Figure, colors: Mapping[str, str]) -> None:
    """One legend below all panels."""
    handles = [plt.Line2D([], [], color=color, label=name) for name, color in colors.items()]
    letter = 0.09  # inches, of the widest label as it is drawn
    width = 0.6 + letter * max(map(len, colors))
    columns = max(1, min(len(handles), int(figure.get_figwidth() / width)))
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False)
    rows = -(-len(handles) // columns)
    figure.tight_layout(rect=(0, 0.02 + 0.22 * rows / figure.get_figheight(), 1, 1))


def distribution(path: Path, data: Mapping[str, Mapping[str, Dataset]]) -> None:
    """One panel per environment, one histogram per data set, as PNG.

    A histogram counts transitions, not episodes: each episode weighs as many rows as it has, which
    is what a sampler of transitions sees; the line is its mean, the number beside it the plain
    mean of the episodes. Histograms are scaled to equal height. Scores are D4RL-normalized, plain
    returns where D4RL has no reference.

    Args:
        data: environment -> name -> data set, drawn from top to bottom.
    """
    with picture(path, 1, len(data), (4.2 * len(data), 3.6)) as (_, (panels,)):
        for axes, (env, sets) in zip(panels, data.items(), strict=True):
            panel(axes, env, sets)
        panels[0].set_ylabel("share of the transitions")


def panel(axes: plt.Axes, env: str, sets: Mapping[str, Dataset]) -> None:
    known = reference(env) is not None
    values = [data.returns.double().numpy() for data in sets.values()]
    if known:
        values = [normalized(value, env) for value in values]
    edges = bins(values)
    for level, ((name, data), value) in enumerate(zip(sets.items(), values, strict=True)):
        lengths = data.lengths.double().numpy()
        counts, _ = np.histogram(value, edges, weights=lengths)
        base = len(sets) - 1 - level
        heights = base + 0.85 * counts / counts.max()
        axes.stairs(heights, edges, baseline=base, fill=True, color=f"C{level}", alpha=0.7)
        mean = float(np.average(value, weights=lengths))
        axes.plot([mean, mean], [base, base + 0.9], color="black", linewidth=1)
        text = f"{name}\n{len(data) / 1000:.0f}k, mean {value.mean():.1f}"
        place = 1.02, (base + 0.4) / len(sets)
        axes.text(*place, text, transform=axes.transAxes, fontsize=8, va="center")
    xlabel = "D4RL-normalized score" if known else "return"
    axes.set(title=env, xlabel=f"{xlabel} of the episode", yticks=[], ylim=(0, len(sets)))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def bins(values: Sequence[np.ndarray]) -> np.ndarray:
    """Common edges for all data sets, with a width even where all returns are equal."""
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    pad = max(high - low, 1e-6 * max(abs(low), abs(high), 1.0)) * 0.02
    return np.linspace(low - pad, high + pad, BINS + 1)
