"""A look at a data set before training: what it holds, and what looks wrong (`data.findings`).

The fields are read block by block. Quantiles, distinct values, correlations and drift are taken
from a sample, which is the whole data set up to SAMPLE rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from offrl.data.findings import LEVELS, Finding, findings
from offrl.data.stitches import Stitches, stitches, thinned

SAMPLE = 200_000  # rows, one from each of as many equal stretches; fixed seed
PAIRS = 50_000  # rows for correlations and drift
COLUMNS = 512  # observed columns that are compared with one another at most
SHOWN = 60  # columns whose correlations are kept
BINS = 40
DRIFT_BLOCKS = 10
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


@dataclass(frozen=True)
class Description:
    """What a data set holds.

    Attributes:
        facts: plain numbers, lists and text by section, as they are written to JSON.
        findings: what looks wrong, the worst first.
    """

    facts: dict[str, Any]
    findings: list[Finding]

    @property
    def errors(self) -> int:
        """Findings that make the data unusable as they are."""
        return sum(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return self.facts | {"findings": [vars(finding) for finding in self.findings]}

    def __str__(self) -> str:
        return "\n".join(lines(self))


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
        facts["drift"] = drift(names, values, pairs, size, episodes_of(facts))
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
        names = named(field, width, info)
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
            some = {"field": field, "name": names[i], "missing": int(bad[i])}
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


def named(field: str, width: int, info: Mapping[str, Any]) -> list[str]:
    """Names of columns: the data's own, those of a dictionary's parts, or obs0, obs1, ..."""
    own = info.get({"obs": "observation_names", "act": "action_names"}.get(field, ""))
    if own and len(own) == width:
        return [str(name) for name in own]
    parts = info.get("layout") or {}
    if field == "obs" and sum(parts.values()) == width and "" not in parts:
        return [f"{part}{i}" for part, count in parts.items() for i in range(count)]
    return [field] if field == "reward" else [f"{field}{i}" for i in range(width)]


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
    out["timeout_lengths"] = len(np.unique(cut))
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
        near[at] = hashes(np.nan_to_num(rows / scale).round().clip(-(2**60), 2**60))
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
    found: Stitches = stitches(obs, array["act"], starts, tested, [limit] if limit else [])
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


def constant(column: Mapping[str, Any]) -> bool:
    """One value but for rounding; also a column without any finite value."""
    if "std" not in column:
        return True
    return column["std"] < 1e-6 * max(abs(column["min"]), abs(column["max"]), 1e-30)


def similar(names: list[tuple[str, str]], values: np.ndarray) -> list[dict[str, Any]]:
    """Pairs of columns with a correlation above .9999, and whether they are equal."""
    found = []
    corr = correlations(values)
    for i, j in np.argwhere(np.triu(np.abs(corr) > 0.9999, 1)).tolist():
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
    """
    seen = [i for i, (field, _) in enumerate(names) if field == "obs"]
    acted = [i for i, (field, _) in enumerate(names) if field == "act"]
    if not seen or len(values) < 100:
        return {"best": [], "linear": []}
    if act.ndim == 1:
        kinds = int(act.max()) + 1
        usual = float(np.bincount(act).max() / len(act))
        best = max((accuracy(values[:, i], act, kinds), names[i][1]) for i in seen)
        return {"best": [["act", best[1], best[0]]], "linear": [], "usual": usual}
    if not acted:
        return {"best": [], "linear": []}
    square = correlations(values)[np.ix_(acted, seen)] ** 2
    best_of = [
        [names[acted[row]][1], names[seen[int(square[row].argmax())]][1], float(square[row].max())]
        for row in range(len(acted))
    ]
    x = np.concatenate([values[:, seen], np.ones((len(values), 1))], -1)
    x[:, :-1] = (x[:, :-1] - x[:, :-1].mean(0)) / x[:, :-1].std(0)
    y, half = values[:, acted], len(values) // 2
    gram = x[:half].T @ x[:half]
    ridge = 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram))
    error = y[half:] - x[half:] @ np.linalg.solve(gram + ridge, x[:half].T @ y[:half])
    total = np.maximum(((y[half:] - y[half:].mean(0)) ** 2).sum(0), 1e-300)
    return {"best": best_of, "linear": (1 - (error**2).sum(0) / total).tolist()}


def accuracy(column: np.ndarray, act: np.ndarray, kinds: int, bins: int = 50) -> float:
    edges = np.unique(np.quantile(column, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, column, side="right")
    counts = np.bincount(place * kinds + act, minlength=(len(edges) + 1) * kinds)
    return float(counts.reshape(-1, kinds).max(-1).sum() / len(act))


def drift(
    names: list[tuple[str, str]], values: np.ndarray, rows: np.ndarray, size: int, episodes: float
) -> dict[str, Any]:
    """Two-sample Kolmogorov-Smirnov distance of every column in each tenth of the rows to the rest.

    `chance` is what the distance stays below by chance in 99 of 100 data sets, with an episode
    counted as one draw and Bonferroni's correction for blocks and columns; above 1 no drift can be
    told.
    """
    block = rows * DRIFT_BLOCKS // size
    inside = block[:, None] == np.arange(DRIFT_BLOCKS)
    table = np.zeros((len(names), DRIFT_BLOCKS))
    for column in range(len(names)):
        order = values[:, column].argsort(kind="stable")
        value = values[order, column]
        last = np.append(value[1:] != value[:-1], True)  # of equal values
        own = inside[order].cumsum(0)[last]
        rest = np.arange(1, len(order) + 1)[last][:, None] - own
        counts = inside.sum(0)
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
    """Counts in BINS equal bins between the smallest and the largest value."""
    if not len(values):
        return {"counts": [], "low": 0.0, "high": 0.0}
    low, high = float(values.min()), float(values.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return {"counts": np.histogram(values, BINS, (low, high))[0].tolist(), "low": low, "high": high}


# --- text ----------------------------------------------------------------------------------------


def lines(description: Description) -> list[str]:
    """The description as text for a terminal of 100 columns."""
    f = description.facts
    lengths, ends = f["lengths"], f["ends"]
    out = [
        f"{f['name']}: {f['rows']:,} rows, {f['episodes']:,} episodes, digest {f['digest'][:12]}",
        f"lengths     {quantiles(lengths)}, most often {lengths['mode']} "
        f"({lengths['mode_share']:.0%})",
        f"ends        {ends['terminals']:,} terminals, {ends['timeouts']:,} timeouts, "
        f"{ends['open']:,} episodes end without a flag",
    ]
    if f.get("returns"):
        gamma = f["discounted"]["discount"]
        out += [
            f"returns     {quantiles(f['returns'])}, mean {f['returns']['mean']:.4g}",
            f"discounted  {quantiles(f['discounted'])}, mean {f['discounted']['mean']:.4g} "
            f"(discount {gamma:g})",
            f"reward      {quantiles(f['reward'])}, {f['reward']['zero']:.1%} zero, "
            f"{f['reward']['distinct']:,} distinct",
        ]
    if f.get("actions"):
        out.append(f"actions     {coverage(f)}")
    if f.get("repeats"):
        r = f["repeats"]
        out.append(
            f"repeats     {r['exact']:.2%} of the rows exactly, {r['near']:.2%} to 0.01 std, "
            f"{r['episodes']} whole episodes"
        )
    if f["sample"] < f["rows"]:
        out.append(
            f"            (quantiles, distinct values, jumps' model: {f['sample']:,} rows; "
            f"correlations and drift {min(PAIRS, f['sample']):,})"
        )
    out += ["", *table(f["columns"]), ""]
    for finding in description.findings:
        out.append(f"{finding.level:8}{finding.check}: {finding.text}")
        if finding.remedy:
            out.append(f"        {'remedy: ' + finding.remedy}")
    counts = {
        level: sum(x.level == level for x in description.findings) for level in reversed(LEVELS)
    }
    out.append(", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items()))
    return out


def quantiles(part: Mapping[str, Any]) -> str:
    q = part["quantiles"]
    return (
        f"{part['min']:.4g} to {part['max']:.4g}, quartiles "
        f"{q['0.25']:.4g} {q['0.5']:.4g} {q['0.75']:.4g}"
    )


def coverage(facts: Mapping[str, Any]) -> str:
    a = facts["actions"]
    if facts["discrete"]:
        counts = np.array(a["counts"])
        return (
            f"{len(counts)} kinds, {(counts > 0).sum()} taken, the rarest "
            f"{counts.min() / max(counts.sum(), 1):.2%}, entropy {a['entropy']:.2f} of the largest"
        )
    return f"{min(a['covered']):.0%} to {max(a['covered']):.0%} of [-1, 1] per column in 20 bins"


def table(columns: list[dict[str, Any]], most: int = 60) -> list[str]:
    """The columns as a table; of more than `most` the first ones of each field."""
    head = f"{'column':20}{'min':>11}{'max':>11}{'mean':>11}{'std':>11}"
    out, left = [head + f"{'at bounds':>11}{'distinct':>11}{'NaN':>9}"], 0
    for field in ("obs", "act", "reward"):
        mine = [column for column in columns if column["field"] == field]
        left += max(len(mine) - most, 0)
        for c in mine[:most]:
            out.append(f"{c['name'][:19]:20}" + "".join(f"{cell:>11}" for cell in cells(c)[:-1]))
            out[-1] += f"{cells(c)[-1]:>9}"
    return [*out, f"... and {left} more columns"] if left else out


def cells(column: Mapping[str, Any]) -> list[str]:
    """Smallest, largest, mean, std, share at the bounds, distinct and missing values, as text.

    The bounds of real actions are -1 and 1 (to 0.01), those of other columns their own.
    """
    missing = f"{column['missing']:,}"
    if "std" not in column:
        return [""] * 6 + [missing]
    real = column["field"] == "act" and column["distinct"] > 2
    bound = column["saturated"] if real else column["at_min"] + column["at_max"]
    numbers = [f"{column[key]:.4g}" for key in ("min", "max", "mean", "std")]
    return [*numbers, f"{min(bound, 1):.1%}", f"{column['distinct']:,}", missing]
