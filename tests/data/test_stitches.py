"""Lost ends of episodes are found, and jumps of other kinds are not taken for them."""

import numpy as np
import pytest
from scipy.stats import binom

from offrl.data.stitches import bound, lags, stitches, thinned

A, B, K = np.array([[1, 0.1], [-0.1, 0.9]]), np.array([0, 0.5]), np.array([-0.1, -0.4])


def linear(episodes=500, steps=20, seed=3):
    """A linear process with a noisy linear controller: obs (N, 2) and act (N, 1)."""
    rng = np.random.default_rng(seed)
    x, obs, act = rng.normal(size=(episodes, 2)), [], []
    for _ in range(steps):
        u = x @ K + 0.5 * rng.normal(size=episodes)
        obs.append(x)
        act.append(u)
        x = x @ A.T + u[:, None] * B + 0.1 * rng.normal(size=(episodes, 2))
    return np.stack(obs, 1).reshape(-1, 2), np.stack(act, 1).reshape(-1, 1)


def walks(lengths, seed=0):
    """Noisy walks that drift away from 0, one after the other."""
    rng = np.random.default_rng(seed)
    parts = [(0.2 + 0.1 * rng.normal(size=(length, 3))).cumsum(0) for length in lengths]
    return np.concatenate(parts), rng.normal(size=(sum(lengths), 1))


def look(obs, act, starts=(0,), limits=()):
    """With the ends that `starts` tell and no others."""
    last = np.array([*starts[1:], len(obs)]) - 1
    tested = np.setdiff1d(np.arange(len(obs)), last)
    return stitches(obs, act, np.array(starts), tested, limits)


def test_most_boundaries_of_the_linear_process_are_found_and_nothing_else():
    found = look(*linear())
    ends = np.arange(19, 9_999, 20)
    assert len(found.rows) == len(np.intersect1d(found.rows, ends)) == 396  # 79 % of 499
    assert (found.gap, found.limit, found.first) == (20, 20, 19)
    assert found.hits == pytest.approx(396 / 499)


def test_the_same_log_with_its_ends_is_not_suspected():
    found = look(*linear(), starts=range(0, 10_000, 20))
    assert (len(found.rows), found.limit, found.returning) == (0, None, False)


def test_discrete_actions_and_constant_columns_do_not_hide_the_limit():
    obs, act = linear()
    obs = np.concatenate([obs, np.full((len(obs), 1), 7.0)], -1)
    found = look(obs, (act[:, 0] > 0).astype(np.int64))
    assert (found.limit, found.first) == (20, 19)


def test_ends_of_unequal_lengths_are_told_by_the_way_back_to_the_start():
    lengths = np.random.default_rng(1).integers(30, 90, 60)
    found = look(*walks(lengths))
    assert found.limit is None
    assert found.returning
    assert np.array_equal(found.alone, lengths.cumsum()[:-1] - 1)
    starts = np.append(0, lengths.cumsum()[:-1])
    assert not look(*walks(lengths), starts=starts).returning


def test_jumps_to_anywhere_are_not_ends():
    obs, act = linear(1, 10_000)
    rng = np.random.default_rng(0)
    for row in rng.choice(10_000, 60, replace=False):
        obs[row:] += 20 * rng.normal(size=2)
    found = look(obs, act)
    assert len(found.alone) > 50
    assert (found.limit, found.returning) == (None, False)


def test_one_column_that_wraps_is_a_clock_and_not_an_end():
    obs, act = linear(1, 10_000)
    clock = (np.arange(10_000) % 24)[:, None]
    found = look(np.concatenate([obs, obs[:, ::-1] ** 3, clock], -1), act)
    assert len(found.rows) >= 416
    assert (found.limit, found.returning) == (None, False)


def test_two_jumps_are_enough_where_the_limit_is_known():
    log = walks([500] * 3)
    assert look(*log).limit is None
    assert look(*log, limits=[500]).limit == 500
    assert look(*log, limits=[400]).limit is None


def test_too_little_to_fit_a_model_is_not_suspected():
    assert look(*walks([5])).tested == 4
    assert look(np.ones((50, 2)), np.ones((50, 1))).limit is None


@pytest.mark.parametrize(("hits", "trials", "base"), [(19, 19, 0.1), (7, 24, 0.01), (60, 99, 0.5)])
def test_the_bound_lies_above_the_binomial_tail(hits, trials, base):
    exact = binom.logsf(hits - 1, trials, base)
    assert exact - 1e-9 <= bound(hits, trials, base) < exact / 2


def test_no_more_hits_than_usual_are_no_evidence():
    assert bound(5, 10, 0.5) == bound(3, 10, 0.5) == bound(3, 10, 0.0) == 0


def test_the_period_of_most_pairs_comes_first():
    rows = np.union1d(np.arange(37, 10_000, 250), np.random.default_rng(0).integers(0, 10_000, 60))
    assert lags(rows, 10_000)[0] == 250


def test_thinned_rows_are_spread_and_distinct():
    rows = thinned(np.arange(0, 2_000, 2), 100)
    assert len(np.unique(rows)) == 100
    assert (rows // 20 == np.arange(100)).all()
    assert thinned(rows, 100) is rows
    assert len(np.unique(thinned(np.arange(101), 100))) == 100
