"""How the columns of a data set relate: to one another, to the action, and to time."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from offrl.data.findings import constant
from offrl.data.stitches import KINDS, thinned

COLUMNS = 512  # observed columns that are compared with one another at most
DRIFT_BLOCKS = 10
ALMOST = 0.9999  # correlation of columns that are affine functions of one another


def side_by_side(
    array: Mapping[str, np.ndarray], columns: list[dict[str, Any]], rows: np.ndarray
) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Fields and names of the columns that vary, and their values in so many rows, (n, columns)."""
    names, values = [], []
    for field in ("obs", "act", "reward"):
        mine = [column for column in columns if column["field"] == field]
        live = [i for i, column in enumerate(mine) if not constant(column)]
        live = thinned(np.array(live, np.int64), COLUMNS).tolist()
        if live and not (field == "act" and array["act"].ndim == 1):
            names += [(field, mine[i]["name"]) for i in live]
            values.append(array[field][rows].reshape(len(rows), -1)[:, live].astype(np.float64))
    return names, np.concatenate([np.zeros((len(rows), 0)), *values], -1)


def similar(names: list[tuple[str, str]], values: np.ndarray) -> list[dict[str, Any]]:
    """Pairs of columns with a correlation above ALMOST, and whether they are equal."""
    found = []
    corr = correlations(values)
    for i, j in np.argwhere(np.triu(np.abs(corr) > ALMOST, 1)).tolist():
        (one, first), (other, second) = names[i], names[j]
        equal = bool((values[:, i] == values[:, j]).all())
        found.append({"fields": [one, other], "names": [first, second], "equal": equal})
    return found[:1000]


def correlations(values: np.ndarray) -> np.ndarray:
    if len(values) < 3 or not values.shape[1]:
        return np.zeros((values.shape[1],) * 2)
    centered = values - values.mean(0)
    centered /= np.maximum(np.sqrt((centered**2).sum(0)), 1e-300)
    return centered.T @ centered


def leaks(names: list[tuple[str, str]], values: np.ndarray, act: np.ndarray) -> dict[str, Any]:
    """How well single columns tell the action, and how well all do by a linear model.

    Returns:
        best: [action, column, share explained] of the best single columns: R2, or for discrete
            actions the accuracy of the most frequent action in each of 50 quantile bins;
        linear: R2 of ridge regression on all columns, fitted on the first half and measured on the
            second, one per continuous action.
        usual: share of the most frequent discrete action.
        loss: of discrete actions see `softmax_loss`, None if they are too many.
    """
    seen = [i for i, (field, _) in enumerate(names) if field == "obs"]
    acted = [i for i, (field, _) in enumerate(names) if field == "act"]
    if not seen or len(values) < 100:
        return {"best": [], "linear": []}
    if act.ndim == 1:
        act = np.maximum(act, 0)
        kinds = int(act.max()) + 1
        usual = float(np.bincount(act).max() / len(act))
        best = max((accuracy(values[:, i], act, kinds), names[i][1]) for i in seen)
        loss = softmax_loss(standardized(values[:, seen]), act, kinds) if kinds <= KINDS else None
        return {"best": [["act", best[1], best[0]]], "linear": [], "usual": usual, "loss": loss}
    if not acted:
        return {"best": [], "linear": []}
    square = correlations(values)[np.ix_(acted, seen)] ** 2
    best_of = [
        [names[acted[row]][1], names[seen[int(square[row].argmax())]][1], float(square[row].max())]
        for row in range(len(acted))
    ]
    x = standardized(values[:, seen])
    y, half = values[:, acted], len(values) // 2
    gram = x[:half].T @ x[:half]
    ridge = 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram))
    error = y[half:] - x[half:] @ np.linalg.solve(gram + ridge, x[:half].T @ y[:half])
    total = np.maximum(((y[half:] - y[half:].mean(0)) ** 2).sum(0), 1e-300)
    return {"best": best_of, "linear": (1 - (error**2).sum(0) / total).tolist()}


def standardized(values: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and std 1, and a column of ones."""
    scale = np.maximum(values.std(0), 1e-12)
    return np.concatenate([(values - values.mean(0)) / scale, np.ones((len(values), 1))], -1)


def softmax_loss(x: np.ndarray, act: np.ndarray, kinds: int, most: int = 20_000) -> float:
    """Held-out log-loss of a linear softmax model of the action, as a share of log kinds.

    0 for an action that the observation tells for sure, 1 for uniform ones. The model is fitted on
    the first half and measured on the second.
    """
    rows = thinned(np.arange(len(x)), most)
    inputs, targets = torch.from_numpy(x[rows]), torch.from_numpy(act[rows])
    half = len(rows) // 2
    weight = torch.zeros(x.shape[1], kinds, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = cross_entropy(inputs[:half] @ weight, targets[:half])
        value = value + 1e-5 * weight.square().sum()
        value.backward()
        return value

    search.step(loss)
    with torch.no_grad():
        value = cross_entropy(inputs[half:] @ weight, targets[half:])
    return float(value) / np.log(max(kinds, 2))


def accuracy(column: np.ndarray, act: np.ndarray, kinds: int, bins: int = 50) -> float:
    edges = np.unique(np.quantile(column, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, column, side="right")
    counts = np.bincount(place * kinds + act, minlength=(len(edges) + 1) * kinds)
    return float(counts.reshape(-1, kinds).max(-1).sum() / len(act))


def drift(
    names: list[tuple[str, str]], values: np.ndarray, block: np.ndarray, episodes: float
) -> dict[str, Any]:
    """Two-sample Kolmogorov-Smirnov distance of every column in each tenth of the rows to the rest.

    `chance` is what the distance stays below by chance in 99 of 100 data sets, with an episode
    counted as one draw and Bonferroni's correction for blocks and columns; it exceeds 1 where the
    episodes are too few.
    """
    inside = block[:, None] == np.arange(DRIFT_BLOCKS)
    counts, table = inside.sum(0), np.zeros((len(names), DRIFT_BLOCKS))
    for column in range(len(names)):
        order = values[:, column].argsort(kind="stable")
        value = values[order, column]
        last = np.append(value[1:] != value[:-1], True)  # of equal values
        own = inside[order].cumsum(0)[last]
        rest = np.arange(1, len(order) + 1)[last][:, None] - own
        gap = own / np.maximum(counts, 1) - rest / np.maximum(len(order) - counts, 1)
        table[column] = np.where(counts > 0, np.abs(gap).max(0), 0)
    draws = max(episodes / DRIFT_BLOCKS, 1e-9)
    tests = DRIFT_BLOCKS * max(len(names), 1)
    chance = np.sqrt(-np.log(0.005 / tests) / 2 * (1 / draws + 1 / (draws * (DRIFT_BLOCKS - 1))))
    return {
        "names": [name for _, name in names],
        "distance": table.round(4).tolist(),
        "chance": float(min(chance, 9.99)),
    }


def trend(values: np.ndarray, episode: np.ndarray) -> dict[str, Any]:
    """Rank correlation of the episodes' means with their order, for every column.

    `trend_chance` bounds it for 99 of 100 data sets without a trend (a Gaussian tail bound, with
    Bonferroni's correction for columns).
    """
    _, number, counts = np.unique(episode, return_inverse=True, return_counts=True)
    means = [np.bincount(number, column) / counts for column in values.T]
    ranks = [mean.argsort().argsort().astype(np.float64) for mean in means]
    order = np.arange(len(counts), dtype=np.float64)
    corr = [correlations(np.stack([order, rank], -1))[0, 1] for rank in ranks]
    bound = np.sqrt(2 * np.log(200 * max(len(corr), 1)) / max(len(counts) - 1, 1))
    return {"trend": np.array(corr).round(4).tolist(), "trend_chance": float(bound)}
