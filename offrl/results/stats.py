"""Statistics over seeds: interquartile mean and bootstrap intervals."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


def iqm(values: ArrayLike, axis: int = -1) -> np.ndarray:
    """Interquartile mean: the mean of the middle half along `axis`.

    With fewer than four values nothing is cut away, so it is the mean.

    >>> float(iqm(np.array([0.0, 1.0, 2.0, 100.0])))
    1.5
    """
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(
    *values: ArrayLike, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the IQM over seeds; of its mean over several tasks.

    None if a task has fewer than two seeds, which are resampled within each task.

    Args:
        values: one array (seeds,) of scores per task; the numbers of seeds may differ.

    Source: Agarwal et al., "Deep RL at the Edge of the Statistical Precipice", NeurIPS 2021;
    resampling by SciPy.
    """
    tasks, rng = [np.asarray(v, dtype=np.float64) for v in values], np.random.default_rng(seed)
    if any(len(task) < 2 for task in tasks):
        return None

    def mean(*draws: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([iqm(x, axis) for x in draws], axis=0)

    found = stats.bootstrap(tasks, mean, n_resamples=resamples, method="percentile", rng=rng)
    low, high = found.confidence_interval
    return float(low), float(high)
