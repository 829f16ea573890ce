"""A look at a data set before training: what it holds, and what looks wrong (`data.findings`).

The fields are read block by block. Quantiles, distinct values, correlations and drift are taken
from a sample, which is the whole data set up to SAMPLE rows.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from offrl.data.description import Description
from offrl.data.findings import findings
from offrl.data.relations import (
    DRIFT_BLOCKS,
    correlations,
    drift,
    leaks,
    side_by_side,
    similar,
    trend,
)
from offrl.data.stitches import Stitches, stitches, thinned

SAMPLE = 200_000  # rows, one from each of as many equal stretches; fixed seed
PAIRS = 50_000  # rows for correlations and drift
SHOWN = 60  # columns whose correlations are kept
BINS = 40
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BLOCK = 1 << 16


class Log(Protocol):
    """What is read of a `Dataset`."""

    @property
    def fields(self) -> dict[str, Tensor]: ...
    @property
    def starts(self) -> Tensor: ...
    @property
    def returns(self) -> Tensor: ...
    @property
    def name(self) -> str: ...
    @property
    def info(self) -> dict[str, Any]: ...
    @property
    def digest(self) -> str: ...


def describe(data: Log, discount: float = 0.99, limit: int | None = None) -> Description:
    """Look at a data set: lengths, returns, rewards, columns, repeats, drift and lost episode ends.

    Args:
        data: a `Dataset`, with or without rewards; NaN and infinite values are counted and left
            out of everything else.
        discount: of the discounted returns.
        limit: the environment's time limit in steps, where it is known.

    Takes some seconds per million rows. Deterministic.
    """
    array = {name: value.detach().cpu().numpy() for name, value in data.fields.items()}
    starts, size = data.starts.cpu().numpy(), len(array["obs"])
    columns, finite = tables(array, data.info)
    rows = thinned(np.flatnonzero(finite), SAMPLE)
    facts: dict[str, Any] = {
        "name": data.name,
        "source": data.info.get("source"),
        "notes": list(data.info.get("notes", [])),
        "digest": data.digest,
        "rows": size,
        "episodes": len(starts),
        "sample": len(rows),
        "pairs": min(PAIRS, len(rows)),
        "limit": limit,
        "strays": data.info.get("strays", 0),
        "discrete": array["act"].ndim == 1,
        "lengths": lengths_of(starts, size),
        "ends": ends_of(array, starts),
        "columns": columns,
    }
    if "reward" in array and len(rows):
        facts |= rewards_of(array["reward"], starts, data.returns.cpu().numpy(), rows, discount)
    if len(rows):
        facts["actions"] = actions_of(array["act"][rows], data.info)
        facts["repeats"] = repeats_of(array, starts, columns)
        facts["stitches"] = stitches_of(array, starts, finite, limit)
        pairs = thinned(rows, PAIRS)
        names, values = side_by_side(array, columns, pairs)
        facts["similar"] = similar(names, values)
        few = slice(0, len(names), -(-max(len(names), 1) // SHOWN))
        facts["correlations"] = {
            "names": [name for _, name in names[few]],
            "values": correlations(values[:, few]).round(3).tolist(),
        }
        facts["leaks"] = leaks(names, values, array["act"][pairs])
        episode = np.searchsorted(starts, pairs, side="right") - 1
        facts["drift"] = drift(names, values, pairs * DRIFT_BLOCKS // size, episodes_of(facts))
        facts["drift"] |= trend(values, episode)
    return Description(facts, findings(facts))


def episodes_of(facts: Mapping[str, Any]) -> float:
    """The episodes, or those of a limit that is missing."""
    found = facts["stitches"]["limit"]
    return max(facts["episodes"], facts["rows"] / found if found else 0)


# --- sections ------------------------------------------------------------------------------------


def tables(
    array: Mapping[str, np.ndarray], info: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """A row for every observed and acted column and the reward, and which rows are all finite."""
    finite = np.ones(len(array["obs"]), bool)
    out = []
    for field in ("obs", "act", "reward"):
        if field not in array:
            continue
        value = array[field].reshape(len(finite), -1)
        width = value.shape[1]
        names = named(field, array[field].shape[1:], info)
        low, high = np.full(width, np.inf), np.full(width, -np.inf)
        bad, total = np.zeros(width, np.int64), np.zeros(width)
        for at, block in blocks(value):
            good = np.isfinite(block)
            finite[at] &= good.all(-1)
            bad += (~good).sum(0)
            low = np.minimum(low, np.where(good, block, np.inf).min(0))
            high = np.maximum(high, np.where(good, block, -np.inf).max(0))
            total += np.where(good, block, 0).sum(0)
        count = len(value) - bad
        mean = total / np.maximum(count, 1)
        square, edges = np.zeros(width), np.zeros((3, width))
        for _, block in blocks(value):
            good = np.isfinite(block)
            square += np.square(np.where(good, block - mean, 0)).sum(0)
            edges += [(block == low).sum(0), (block == high).sum(0), (abs(block) > 0.99).sum(0)]
        sample = value[thinned(np.flatnonzero(finite), SAMPLE)]
        for i in range(width):
            some: dict[str, Any] = {"field": field, "name": names[i], "missing": int(bad[i])}
            if count[i]:
                some |= {
                    "min": float(low[i]),
                    "max": float(high[i]),
                    "mean": float(mean[i]),
                    "std": float(np.sqrt(square[i] / count[i])),
                    "at_min": float(edges[0, i] / count[i]),
                    "at_max": float(edges[1, i] / count[i]),
                    "saturated": float(edges[2, i] / count[i]),
                    "distinct": len(np.unique(sample[:, i])),
                    "histogram": histogram(sample[:, i]),
                }
            out.append(some)
    return out, finite


def named(field: str, shape: tuple[int, ...], info: Mapping[str, Any]) -> list[str]:
    """Names of columns: the data's own, those of a dictionary's parts, or obs0, obs1, ..."""
    width = int(np.prod(shape))
    own = info.get({"obs": "observation_names", "act": "action_names"}.get(field, ""))
    if own and len(own) == width:
        return [str(name) for name in own]
    parts = info.get("layout") or {}
    if field == "obs" and sum(parts.values()) == width and "" not in parts:
        return [f"{part}{i}" for part, count in parts.items() for i in range(count)]
    single = shape == () or field == "reward"
    return [field] if single else [f"{field}{i}" for i in range(width)]


def lengths_of(starts: np.ndarray, size: int) -> dict[str, Any]:
    lengths = np.diff(starts, append=size)
    values, counts = np.unique(lengths, return_counts=True)
    return spread(lengths) | {
        "mode": int(values[counts.argmax()]),
        "mode_share": float(counts.max() / len(lengths)),
        "histogram": histogram(lengths),
    }


def ends_of(array: Mapping[str, np.ndarray], starts: np.ndarray) -> dict[str, Any]:
    """What ends the episodes, and the lengths at which the process is said to have ended."""
    size = len(array["obs"])
    lengths = np.diff(starts, append=size)
    none = np.zeros(size, np.float32)
    terminal, timeout = (array.get(name, none) for name in ("terminal", "timeout"))
    last = starts + lengths - 1
    out: dict[str, Any] = {
        "terminals": int((terminal == 1).sum()),
        "timeouts": int((timeout == 1).sum()),
        "both": int(((terminal == 1) & (timeout == 1)).sum()),
        "other_flags": int(sum(((flag != 0) & (flag != 1)).sum() for flag in (terminal, timeout))),
        "open": int(((terminal[last] != 1) & (timeout[last] != 1)).sum()),
        "longest": int(lengths.max()),
    }
    ended, cut = lengths[terminal[last] == 1], lengths[timeout[last] == 1]
    values, counts = np.unique(cut, return_counts=True)
    out |= {
        "timeout_lengths": len(values),
        "timeout_mode_share": float(max([0, *counts]) / max(len(cut), 1)),
    }
    if len(ended):
        values, counts = np.unique(ended, return_counts=True)
        out |= {
            "ended": len(ended),
            "terminal_mode": int(values[counts.argmax()]),
            "terminal_mode_share": float(counts.max() / len(ended)),
            "ended_at_longest": int((ended == lengths.max()).sum()),
            "cut_at_longest": int((cut == lengths.max()).sum()),
        }
    return out


def rewards_of(
    reward: np.ndarray, starts: np.ndarray, returns: np.ndarray, rows: np.ndarray, discount: float
) -> dict[str, Any]:
    reward = reward.reshape(len(reward)).astype(np.float64)
    clean = np.where(np.isfinite(reward), reward, 0)
    step = np.arange(len(reward)) - np.repeat(starts, np.diff(starts, append=len(reward)))
    discounted = np.add.reduceat(clean * discount**step, starts)
    whole = returns[np.isfinite(returns)].astype(np.float64)
    sample = reward[rows]
    return {
        "reward": spread(sample)
        | {
            "zero": float((clean == 0).mean()),
            "distinct": len(np.unique(sample)),
            "largest": float(np.abs(clean).max()),
            "usual": float(np.quantile(np.abs(sample), 0.99)),
            "histogram": histogram(sample),
        },
        "returns": spread(whole) | {"histogram": histogram(whole)},
        "discounted": spread(discounted)
        | {"histogram": histogram(discounted), "discount": discount},
    }


def actions_of(act: np.ndarray, info: Mapping[str, Any]) -> dict[str, Any]:
    """How much of the actions' range occurs: counts, or shares of 20 bins of [-1, 1]."""
    if act.ndim == 1:
        count = int((info.get("actions") or {}).get("count", 0))
        counts = np.bincount(np.maximum(act, 0), minlength=count)
        share = counts[counts > 0] / counts.sum()
        entropy = float(-(share * np.log(share)).sum())
        return {
            "counts": counts.tolist(),
            "negative": int((act < 0).sum()),
            "entropy": entropy / np.log(len(counts)) if len(counts) > 1 else 0.0,
        }
    edges = np.linspace(-1, 1, 21)
    counts = np.stack([np.histogram(column, edges)[0] for column in act.T])
    return {"counts": counts.tolist(), "covered": (counts > 0).mean(-1).tolist()}


def repeats_of(
    array: Mapping[str, np.ndarray], starts: np.ndarray, columns: list[dict[str, Any]]
) -> dict[str, Any]:
    """Shares of the rows (obs, act, reward) that occurred before, and of whole episodes."""
    size = len(array["obs"])
    fields = [array[name] for name in ("obs", "act", "reward") if name in array]
    scale = 0.01 * np.array([column.get("std") or np.inf for column in columns])
    exact, near = np.empty(size, np.uint64), np.empty(size, np.uint64)
    for first in range(0, size, BLOCK):
        at = slice(first, first + BLOCK)
        rows = np.concatenate([f[at].reshape(len(f[at]), -1) for f in fields], -1)
        rows = rows.astype(np.float32) + 0.0  # one zero
        exact[at] = hashes(rows.view(np.uint32))
        near[at] = hashes((np.nan_to_num(rows) / scale).round().clip(-(2**60), 2**60))
    lengths = np.diff(starts, append=size)
    step = (np.arange(size) - np.repeat(starts, lengths)).astype(np.uint64)
    whole = np.add.reduceat(mixed(exact + step * np.uint64(0x9E3779B97F4A7C15)), starts)
    whole = whole[lengths > 1]
    again = lambda values: 1 - len(np.unique(values)) / max(len(values), 1)  # noqa: E731
    kinds = [column.get("distinct", 1) for column in columns if column["field"] == "obs"]
    return {
        "exact": again(exact),
        "near": again(near),
        "episodes": len(whole) - len(np.unique(whole)),
        "most_kinds": max(kinds),
    }


def hashes(rows: np.ndarray) -> np.ndarray:
    """64 bits for every row of numbers."""
    rows = rows.astype(np.int64).astype(np.uint64)
    salt = np.random.default_rng(0).integers(1, 2**63, rows.shape[1], dtype=np.uint64)
    return mixed(rows + salt).sum(-1)


def mixed(x: np.ndarray) -> np.ndarray:
    """Spread the bits of 64-bit numbers: multiply and shift, twice; overflow is meant."""
    for shift, odd in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(odd)
    return x ^ (x >> np.uint64(31))


def stitches_of(
    array: Mapping[str, np.ndarray], starts: np.ndarray, finite: np.ndarray, limit: int | None
) -> dict[str, Any]:
    """Lost ends of episodes: jumps, and rows whose stored successor is not the following row."""
    size, obs = len(finite), array["obs"]
    inner = np.ones(size, bool)
    inner[np.append(starts[1:], size) - 1] = False
    broken = np.zeros(size, bool)
    if "next_obs" in array:
        for at, block in blocks(array["next_obs"]):
            following = obs[at.start + 1 : at.stop + 1]
            same = np.isclose(block[: len(following)], following, 1e-4, 1e-5, equal_nan=True)
            broken[at][: len(following)] = ~same.all(-1)
    inner[:-1] &= finite[1:]
    tested = np.flatnonzero(inner & finite)
    begun = starts[finite[starts]]
    found: Stitches = stitches(
        obs, array["act"], begun, tested, [limit] if limit and limit > 1 else []
    )
    broken &= inner
    gaps = np.diff(np.flatnonzero(broken))
    return {
        "tested": found.tested,
        "jumps": len(found.rows),
        "alone": len(found.alone),
        "rows": found.alone[:1000].tolist(),
        "gap": found.gap,
        "limit": found.limit,
        "first": found.first,
        "hits": found.hits,
        "returning": found.returning,
        "broken": int(broken.sum()),
        "broken_rows": np.flatnonzero(broken)[:1000].tolist(),
        "broken_gap": int(np.bincount(gaps).argmax()) if len(gaps) else None,
    }


# --- small things --------------------------------------------------------------------------------


def blocks(value: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for first in range(0, len(value), BLOCK):
        at = slice(first, min(first + BLOCK, len(value)))
        yield at, value[at].astype(np.float64)


def spread(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {}
    low, high = float(values.min()), float(values.max())
    quantiles = np.quantile(values, QUANTILES)
    return {
        "min": low,
        "max": high,
        "mean": float(values.mean()),
        "std": float(values.std()),
        "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
    }


def histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts in BINS equal bins from the smallest to the largest value."""
    if not len(values):
        return {"counts": [], "low": 0.0, "high": 0.0}
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    share = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
    place = (share * BINS).astype(np.int64).clip(0, BINS - 1)
    return {"counts": np.bincount(place, minlength=BINS).tolist(), "low": low, "high": high}
