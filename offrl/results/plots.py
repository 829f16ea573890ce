"""Pictures of runs."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def learning_curve(
    path: Path, steps: np.ndarray, values: np.ndarray, title: str, ylabel: str, xlabel: str
) -> None:
    """Mean over seeds with the range between them, as PNG.

    Args:
        steps: (points,).
        values: (seeds, points), the mean of each evaluation.
    """
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    mean = values.mean(0)
    style = line(steps)
    for row in values:
        axes.plot(steps, row, style, color="C0", alpha=0.3, linewidth=0.8)
    axes.plot(steps, mean, style, color="C0", linewidth=1.8, label=f"mean of {len(values)} seed(s)")
    if len(values) > 1:
        axes.fill_between(
            steps,
            values.min(0),
            values.max(0),
            color="C0",
            alpha=0.15,
            linewidth=0,
            label="lowest to highest",
        )
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def curves(
    path: Path,
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    xlabel: str,
    ylabel: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Learning curves, one panel per task, as PNG: mean over seeds, shaded from lowest to highest.

    Args:
        panels: task -> method -> steps (points,) and values (seeds, points).
        limits: of all values; None for each panel's own.
    """
    colors = colors_of(panels)
    figure, places = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.8), dpi=120, squeeze=False
    )
    for axes, (task, methods) in zip(places[0], panels.items(), strict=True):
        shaded(axes, methods, colors)
        axes.set(title=task, xlabel=xlabel, ylim=limits)
    places[0][0].set_ylabel(ylabel)
    with_legend(figure, colors)
    figure.savefig(path)
    plt.close(figure)


def grid(
    path: Path,
    rows: Mapping[str, Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]],
    xlabel: str,
) -> None:
    """Several quantities side by side, one row of panels per task, as PNG; else like `curves`.

    Args:
        rows: task -> quantity -> method -> steps (points,) and values (seeds, points).
    """
    colors = colors_of({f"{t} {q}": m for t, row in rows.items() for q, m in row.items()})
    columns = list(next(iter(rows.values())))
    figure, places = plt.subplots(
        len(rows),
        len(columns),
        figsize=(3.8 * len(columns), 3.0 * len(rows) + 0.6),
        dpi=120,
        squeeze=False,
    )
    for line, (task, quantities) in zip(places, rows.items(), strict=True):
        for axes, (quantity, methods) in zip(line, quantities.items(), strict=True):
            shaded(axes, methods, colors)
            axes.set(title=quantity, xlabel=xlabel)
        line[0].set_ylabel(task)
    with_legend(figure, colors)
    figure.savefig(path)
    plt.close(figure)


def shaded(
    axes: plt.Axes, methods: Mapping[str, tuple[np.ndarray, np.ndarray]], colors: Mapping[str, str]
) -> None:
    """Each method's mean over seeds, shaded from lowest to highest; a single point as a dot."""
    if not methods:
        axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes)
    for name, (steps, values) in methods.items():
        color = colors[name]
        axes.plot(steps, values.mean(0), line(steps), color=color, linewidth=1.6, label=name)
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)


def line(steps: np.ndarray) -> str:
    """matplotlib's format of a course, with a dot where it is one point, which no line shows."""
    return "-" if len(steps) > 1 else "o"


def scores(path: Path, panels: Mapping[str, Mapping[str, np.ndarray]], xlabel: str) -> None:
    """Bars of the mean and a dot per seed, one panel per task, as PNG.

    Args:
        panels: task -> method -> values (seeds,).
    """
    colors = colors_of(panels)
    figure, places = plt.subplots(
        1,
        len(panels),
        figsize=(3.4 * len(panels), 0.8 + 0.4 * len(colors)),
        dpi=120,
        squeeze=False,
        sharey=True,
    )
    place = {name: i for i, name in enumerate(colors)}
    for axes, (task, methods) in zip(places[0], panels.items(), strict=True):
        for name, values in methods.items():
            axes.barh(place[name], values.mean(), color=colors[name], alpha=0.6)
            axes.plot(values, [place[name]] * len(values), "o", color="black", markersize=3)
        axes.set(title=task, xlabel=xlabel, yticks=list(place.values()), yticklabels=list(place))
        axes.grid(alpha=0.3, axis="x")
    places[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def colors_of(panels: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """One color per method, the same in all panels."""
    names = sorted({name for methods in panels.values() for name in methods})
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
