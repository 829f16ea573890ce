"""Pictures of runs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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
