"""Picture of how the returns of data sets are distributed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from offrl.data.dataset import Dataset
from offrl.envs import scores
from offrl.results.plots import picture

BINS = 80


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
    known = scores.reference(env) is not None
    values = [data.returns.double().numpy() for data in sets.values()]
    if known:
        values = [scores.score(value, env) for value in values]
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
