"""Episodes that were joined without end flags, found by the jumps between them.

A ridge regression predicts the next observation from observation and action. A row jumps if it is
missed by more than FACTOR times the median error of a column; the model is refitted without the
jumps. Contacts and swing-ups jump too: on correctly flagged logs of MuJoCo's robots up to half of
the rows. Two kinds of evidence tell a lost end from these:

    a limit    jumps in most of the rows L-1, 2L-1, ..., far more than chance, in most columns
    returns    jumps that stand alone and lead from far away to near the start of an episode

On 17 logs (Gymnasium's classic control and MuJoCo's robots under random, simple and trained
policies) none was suspected with its flags and 16 were found without them; the random Ant was not.
All thresholds are ours.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

FACTOR = 10.0  # times the median error of a column
REFITS = 3
COLUMNS = 128  # observed columns that are predicted at most
KINDS = 64  # discrete actions that are told apart at most
SAMPLE = 200_000  # rows that the model is fitted on at most
BLOCK = 1 << 16
FLOOR = 1e-4  # of a column's std: the least median error
AROUND = 3  # rows on either side which a lone jump exceeds by SPIKE
SPIKE = 5.0
CHANCE = -20.0  # log-probability of as many jumps at the limit's rows; half for a known limit
HIT = 0.5  # of the limit's rows jump at least
LIFT = 3.0  # median error of a column at the limit's rows that counts, in half of the columns
FEW = 1e-3  # of the rows: fewer lone jumps prove nothing without a limit
FAR = 0.3  # fall of the rank of the distance to the nearest start
NEAR = 0.25  # median rank of the rows after lone jumps
STARTS = 64  # known starts that rows are compared with


@dataclass(frozen=True)
class Stitches:
    """What the jumps of a log tell.

    Attributes:
        tested: rows that have a following row within their episode.
        rows: those that jump, int64 ascending.
        alone: those of them that exceed the rows around, int64 ascending.
        gap: the most frequent distance between neighbors among `rows`, None without two.
        limit: the period of the jumps if it is evident, else None.
        first: the first row that the limit cuts after.
        hits: share of the limit's rows that jump.
        back: share of `alone` that lead from far away to near a start.
        near: median rank of the distance to the nearest start, in [0, 1], of the rows after these.
    """

    tested: int
    rows: np.ndarray
    alone: np.ndarray
    gap: int | None = None
    limit: int | None = None
    first: int = 0
    hits: float = 0.0
    back: float = 0.0
    near: float = 1.0

    @property
    def returning(self) -> bool:
        """Enough lone jumps back to a start: ends of episodes of unequal lengths."""
        return len(self.alone) > FEW * self.tested and self.back > 0.5 and self.near < NEAR


def stitches(
    obs: np.ndarray,
    act: np.ndarray,
    starts: np.ndarray,
    tested: np.ndarray,
    limits: Collection[int] = (),
) -> Stitches:
    """Look for lost ends of episodes; rows with NaN are in neither `starts` nor `tested`.

    Args:
        obs: (N, o), may lie on the disk.
        act: (N, a), or integers (N,) if discrete.
        starts: first rows of the known episodes, ascending.
        tested: rows whose following row is said to be of the same episode, int64 ascending.
        limits: periods, at least 2, that are known to be likely.

    Deterministic: samples are drawn with a fixed seed.
    """
    none = Stitches(len(tested), tested[:0], tested[:0])
    chosen = thinned(tested, SAMPLE)
    if len(chosen) < 10:
        return none
    model = Model(obs, act, chosen)
    if not model.columns.size:
        return none
    score = np.zeros(len(obs) + 2 * AROUND, np.float32)
    for index in blocks(tested):
        score[index + AROUND] = model.errors(index).max(-1)
    around = [score[index : len(obs) + index] for index in range(2 * AROUND + 1)]
    score = around.pop(AROUND)
    jump = score > FACTOR
    alone = np.flatnonzero(jump & (score > SPIKE * np.maximum.reduce(around)))
    rows = np.flatnonzero(jump)
    gaps, counts = np.unique(np.diff(rows), return_counts=True)
    gap = int(gaps[counts.argmax()]) if len(gaps) else None
    limit, first, hits = period(model, jump, alone, tested, limits)
    back, near = returns(model, alone, starts, chosen)
    return Stitches(len(tested), rows, alone, gap, limit, first, hits, back, near)


class Model:
    """The linear prediction of the next observation, in units of each column's std."""

    def __init__(self, obs: np.ndarray, act: np.ndarray, chosen: np.ndarray):
        first = obs[chosen].astype(np.float64)
        std = first.std(0)
        live = np.flatnonzero(std > 1e-6 * np.abs(first).max(0))
        self.columns = thinned(live, COLUMNS)
        self.obs, self.act = obs, act
        self.mean, self.std = first[:, self.columns].mean(0), std[self.columns]
        self.kinds = int(act.max()) + 1 if act.ndim == 1 else 0
        if not self.columns.size:
            return
        x, y = self.inputs(chosen), self.states(chosen + 1)
        use = np.ones(len(chosen), bool)
        for _ in range(REFITS + 1):
            gram = x[use].T @ x[use]
            ridge = 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram))
            self.weight = np.linalg.solve(gram + ridge, x[use].T @ y[use])
            error = np.abs(y - x @ self.weight)
            self.scale = np.maximum(np.median(error, 0), FLOOR)
            use = (error <= FACTOR * self.scale).all(-1)
            if use.sum() <= x.shape[1]:
                break

    def states(self, index: np.ndarray) -> np.ndarray:
        return (self.obs[index][:, self.columns] - self.mean) / self.std

    def inputs(self, index: np.ndarray) -> np.ndarray:
        parts = [self.states(index), np.ones((len(index), 1))]
        if not self.kinds:
            parts.append(self.act[index].astype(np.float64))
        elif self.kinds <= KINDS:
            parts.append((self.act[index][:, None] == np.arange(self.kinds)).astype(np.float64))
        return np.concatenate(parts, -1)

    def errors(self, index: np.ndarray) -> np.ndarray:
        """Errors of the rows after `index`, in medians of each column, (n, columns)."""
        return np.abs(self.states(index + 1) - self.inputs(index) @ self.weight) / self.scale


def period(
    model: Model, jump: np.ndarray, alone: np.ndarray, tested: np.ndarray, limits: Collection[int]
) -> tuple[int | None, int, float]:
    """The period whose rows jump most unlikely by chance, its first row and share of jumps."""
    found: tuple[int | None, int, float] = (None, 0, 0.0)
    least, size, named = 0.0, len(jump), set(limits)
    known = np.zeros(size, bool)
    known[tested] = True
    base = jump.sum() / len(tested)
    for limit in sorted(named) + [lag for lag in lags(alone, size) if lag not in named]:
        phase = int(np.bincount(alone % limit, minlength=1).argmax())
        at = np.arange(phase, size, limit)
        at = at[known[at]]
        hit = at[jump[at]]
        if len(hit) < 2 or len(hit) <= HIT * len(at):
            continue
        chance = bound(len(hit), len(at), base)
        if chance >= min(least, CHANCE / 2 if limit in named else CHANCE):
            continue
        if (np.median(model.errors(hit), 0) > LIFT).mean() >= 0.5:
            found, least = (limit, phase, len(hit) / len(at)), chance
    return found


def bound(hits: int, trials: int, base: float) -> float:
    """Chernoff's bound on the log-probability of so many hits or more, each of probability base.

    -trials KL(hits / trials || base), 0 where the share of hits is not above base.
    """
    share = hits / trials
    if not 0 < base < share:
        return 0.0
    rest = (1 - share) * np.log((1 - share) / (1 - base)) if share < 1 else 0.0
    return float(-trials * (share * np.log(share / base) + rest))


def lags(rows: np.ndarray, size: int, most: int = 64) -> list[int]:
    """Distances that occur among all pairs of rows more often than by chance, likeliest first."""
    if len(rows) < 3:
        return []
    mark = np.zeros(1 << int(np.ceil(np.log2(2 * size))), np.float32)
    mark[rows] = 1
    pairs = np.fft.irfft(np.abs(np.fft.rfft(mark)) ** 2)[: size // 3 + 1].round()
    expected = len(rows) ** 2 / size * (1 - np.arange(len(pairs)) / size)
    surprise = (pairs - expected) / np.sqrt(expected + 1)
    surprise[:2] = -1
    best = np.argsort(-surprise, kind="stable")[:most]
    return [int(lag) for lag in best if pairs[lag] >= 2]


def returns(
    model: Model, alone: np.ndarray, starts: np.ndarray, ordinary: np.ndarray
) -> tuple[float, float]:
    """Whether lone jumps lead back to a start: `back` and `near` of `Stitches`."""
    if not (len(alone) and len(starts)):
        return 0.0, 1.0
    first = model.states(thinned(starts, STARTS))

    def distance(index: np.ndarray) -> np.ndarray:
        x = model.states(index)
        square = (x**2).sum(-1)[:, None] + (first**2).sum(-1) - 2 * x @ first.T
        return square.min(-1)

    usual = np.sort(distance(thinned(ordinary, 20_000)))
    rank = lambda index: np.searchsorted(usual, distance(index)) / len(usual)  # noqa: E731
    alone = thinned(alone, 2_000)
    before, after = rank(alone), rank(alone + 1)
    return float((before - after > FAR).mean()), float(np.median(after))


def thinned(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, one from each of as many equal stretches, in order."""
    if len(rows) <= most:
        return rows
    edges = np.arange(most + 1) * len(rows) // most
    inside = np.random.default_rng(0).random(most) * np.diff(edges)
    return rows[edges[:-1] + inside.astype(np.int64)]


def blocks(index: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(index), BLOCK):
        yield index[first : first + BLOCK]
