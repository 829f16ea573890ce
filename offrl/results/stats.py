"""Statistics over seeds: interquartile mean and bootstrap intervals."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: the mean of the middle half along `axis`.

    With fewer than four values nothing is cut away, so it is the mean.

    >>> float(iqm(np.array([0.0, 1.0, 2.0, 100.0])))
    1.5
    """
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(
    values: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the IQM over seeds, or None for fewer than two seeds.

    Args:
        values: (seeds,) one score per seed.

    Source: Agarwal et al., "Deep RL at the Edge of the Statistical Precipice", NeurIPS 2021;
    resampling by SciPy.
    """
    if len(values) < 2:
        return None
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    found = stats.bootstrap((values,), iqm, n_resamples=resamples, method="percentile", rng=rng)
    low, high = found.confidence_interval
    return float(low), float(high)


def stratified_interval(
    values: Sequence[np.ndarray], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean over tasks of the IQM over seeds.

    Seeds are resampled within each task. None if a task has fewer than two seeds.

    Args:
        values: one array (seeds,) per task; the numbers of seeds may differ.
    """
    if any(len(v) < 2 for v in values):
        return None
    rng = np.random.default_rng(seed)
    draws = [iqm(v[rng.integers(len(v), size=(resamples, len(v)))]) for v in values]
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return float(low), float(high)
