"""Statistics over seeds: interquartile mean and bootstrap intervals."""

import warnings
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
    values: np.ndarray, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the IQM over seeds, or None for fewer than two seeds.

    Args:
        values: (seeds,) one score per seed.
        confidence: share of resamples inside.

    Source: Agarwal et al., "Deep RL at the Edge of the Statistical Precipice", NeurIPS 2021;
    resampling by SciPy.
    """
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (np.asarray(values, dtype=np.float64),),
            iqm,
            confidence_level=confidence,
            n_resamples=resamples,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def stratified_interval(
    values: Sequence[np.ndarray], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over tasks of the IQM over seeds.

    Seeds are resampled within each task. None if a task has fewer than two seeds.

    Args:
        values: one array (seeds,) per task; the numbers of seeds may differ.
    """
    if any(len(v) < 2 for v in values):
        return None
    rng = np.random.default_rng(seed)
    means = np.mean(
        [iqm(v[rng.integers(len(v), size=(resamples, len(v)))], axis=-1) for v in values], axis=0
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
