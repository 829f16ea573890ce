import numpy as np

from offrl.results.stats import interval, iqm


def test_the_outer_quarters_do_not_count():
    assert float(iqm(np.array([-1e9, 1.0, 3.0, 1e9]))) == 2.0
    np.testing.assert_allclose(iqm(np.array([[0.0, 1, 2, 100], [5, 5, 5, 5]])), [1.5, 5.0])


def test_an_interval_needs_two_seeds_and_shrinks_with_more():
    assert interval(np.array([3.0])) is None
    assert interval(np.array([3.0, 3.0])) == (3.0, 3.0)
    g = np.random.default_rng(0)
    few, many = (interval(g.normal(size=n), resamples=2000) for n in (5, 200))
    assert few[1] - few[0] > 2 * (many[1] - many[0])


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    g = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        low, high = interval(g.normal(size=40), resamples=400)
        hits += low < 0 < high
    assert hits >= 50  # 57 expected


def test_the_seed_decides_the_resampling():
    values = np.random.default_rng(0).normal(size=6)
    one, same, other = (interval(values, resamples=200, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_the_mean_over_tasks_is_resampled_within_each_task():
    low, high = interval(np.array([0.0, 0.0]), np.array([10.0, 20.0]), resamples=2000)
    assert (low, high) == (5.0, 10.0)
    assert interval(np.array([0.0, 1.0]), np.array([1.0])) is None
