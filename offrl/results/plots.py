"""Pictures of runs."""

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
    for row in values:
        axes.plot(steps, row, color="C0", alpha=0.3, linewidth=0.8)
    axes.plot(steps, mean, color="C0", linewidth=1.8, label=f"mean of {len(values)} seed(s)")
    if len(values) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color="C0", alpha=0.15,
                          linewidth=0, label="lowest to highest")  # fmt: skip
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
