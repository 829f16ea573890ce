"""What looks wrong in a data set, from the facts that `data.describe` collects.

Every threshold below is ours, chosen on generated data and Gymnasium's environments and not taken
from a publication.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LEVELS = ("note", "warning", "error")
ONE_LENGTH = 0.9  # of the terminals at one length: a time limit
PILE = 0.1  # of the terminals at the greatest length, which no timeout has: a time limit
MANY = 10  # episodes before a share of them means something
SPARSE = 0.99  # of the rewards are zero
HUGE = 100.0  # times the 99th percentile of the absolute rewards
FEW_EPISODES, FEW_FOR_EVALUATION = 20, 100
ALIKE = 1e-6  # std of the returns
OUTSIDE = 1e-5  # beyond [-1, 1]
SATURATED = 0.3  # of a column beyond .99 in absolute value
LEVELS_OF_ACTIONS = 20  # distinct values of a continuous action at most
RARE_COUNT, RARE_SHARE = 20, 1e-3
REPEATED = 0.01  # of the rows
FINITE_KINDS = 50  # values of every observed column at most: repeated rows are to be expected
DRIFT = 0.2  # Kolmogorov-Smirnov distance
TOLD = 0.99  # R2 or accuracy of the action from one observed column
LINEAR = 0.9975  # R2 of the action from all columns: noise below 5 % of the action's std
SURE = 0.05  # held-out log-loss of a linear model of discrete actions, as a share of log kinds
LONE = 1e-3  # of the rows jump alone


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong.

    Attributes:
        level: "error" (unusable as it is), "warning" or "note".
        check: which check found it.
        text: what was found, with numbers.
        remedy: what to do, empty where there is nothing to do.
    """

    level: str
    check: str
    text: str
    remedy: str = ""


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """All findings, the worst first."""
    found = [f for check in CHECKS for f in check(facts)]
    return sorted(found, key=lambda finding: -LEVELS.index(finding.level))


def values(f: Mapping[str, Any]) -> Iterator[Finding]:
    bad = {c["name"]: c["missing"] for c in f["columns"] if c["missing"]}
    if bad:
        yield Finding(
            "error",
            "values",
            f"NaN or infinite in {some(f'{name} ({count:,})' for name, count in bad.items())}",
            "remove or repair these rows; everything else here leaves them out",
        )
    if f["ends"]["other_flags"]:
        yield Finding(
            "error",
            "values",
            f"{f['ends']['other_flags']:,} flags are neither 0 nor 1",
            "store terminals and timeouts as 0 or 1",
        )
    for note in f["notes"]:
        yield Finding("note", "source", note)


def ends(f: Mapping[str, Any]) -> Iterator[Finding]:
    e, rows = f["ends"], f["rows"]
    inner = e["timeouts"] - (f["episodes"] == 1)  # the last row of a log is one
    if e["terminals"] == 0 and inner <= 0 and f["episodes"] == 1 and rows > 1:
        yield Finding(
            "warning",
            "episodes",
            f"the {rows:,} rows are one episode without an end",
            "set terminals or timeouts where episodes ended; off-policy evaluation and methods "
            "that read returns need episodes",
        )
    if e["both"]:
        yield Finding(
            "note", "ends", f"{e['both']:,} rows are terminal and timeout at once; terminal wins"
        )
    if f["limit"] and e["longest"] > f["limit"]:
        yield Finding(
            "warning",
            "ends",
            f"the longest episode has {e['longest']:,} steps, the environment's limit is "
            f"{f['limit']:,}",
            "compare scores with care, or check where episodes end",
        )
    if not e["terminals"] and e["timeout_mode_share"] < ONE_LENGTH and f["episodes"] >= MANY:
        yield Finding(
            "note",
            "ends",
            f"nothing terminates and the timeouts have {e['timeout_lengths']:,} lengths: they may "
            "mark new goals in one continuous walk rather than time limits (D4RL issue 85)",
        )


def limits(f: Mapping[str, Any]) -> Iterator[Finding]:
    """Time limits that are stored as terminals."""
    e = f["ends"]
    if e.get("ended", 0) < MANY:
        return
    mode, share, longest = e["terminal_mode"], e["terminal_mode_share"], e["longest"]
    piled = e["ended_at_longest"] / e["ended"]
    if mode > 1 and share >= ONE_LENGTH:
        text = f"{share:.0%} of the {e['ended']:,} terminals come after {mode:,} steps"
    elif longest > 1 and piled >= PILE and e["ended_at_longest"] >= MANY:
        text = (
            f"{e['ended_at_longest']:,} of the {e['ended']:,} terminals come after {longest:,} "
            "steps, where the longest episodes end"
        )
        text += "" if not e["cut_at_longest"] else f" beside {e['cut_at_longest']:,} timeouts"
        mode = longest
    else:
        return
    yield Finding(
        "warning",
        "time limits as terminals",
        text + ": a time limit, not an end of the process",
        f"set timeouts instead of terminals where an episode has {mode:,} steps; a method must "
        "bootstrap there",
    )


def joined(f: Mapping[str, Any]) -> Iterator[Finding]:
    """Lost ends of episodes; see `data.stitches`."""
    s = f.get("stitches")
    if not s or not s["tested"]:
        return
    broken = s["broken"] or f["strays"]
    if broken > 0.5 * s["tested"]:
        yield Finding(
            "error",
            "order",
            f"next_obs is not the following row in {broken:,} of {s['tested']:,} rows",
            "store the rows in order of time; shuffled transitions have no episodes",
        )
        return
    limit, remedy = s["limit"] or (s["broken_gap"] if s["broken"] > 2 else None), ""
    if limit:
        first = s["first"] if s["limit"] else s["broken_rows"][0]
        remedy = f"set timeouts[{first}::{limit}] = 1 (a time limit of {limit:,} steps)"
    if broken:
        yield Finding(
            "error",
            "joined episodes",
            f"next_obs differs from the following row in {broken:,} rows without an end flag",
            remedy or "set timeouts or terminals in these rows (JSON: stitches.broken_rows)",
        )
    elif limit:
        yield Finding(
            "error",
            "joined episodes",
            f"the observation jumps every {limit:,} rows, at {s['hits']:.0%} of these places, and "
            "no end is flagged there",
            remedy,
        )
    elif s["returning"]:
        yield Finding(
            "error",
            "joined episodes",
            f"{s['alone']:,} rows without an end flag lead from far away back to where episodes "
            "start",
            f"set terminals or timeouts there: rows {some(s['rows'])}"
            + (" (more in JSON: stitches.rows)" if s["alone"] > 4 else ""),
        )
    elif s["alone"] > LONE * s["tested"]:
        yield Finding(
            "note",
            "jumps",
            f"{s['alone']:,} rows ({s['alone'] / s['tested']:.2%}) jump without a regular distance "
            "or a return to the start: contacts or clipping, or missing rows",
        )


def rewards(f: Mapping[str, Any]) -> Iterator[Finding]:
    r, e = f.get("reward"), f["ends"]
    if not r:
        return
    if r["distinct"] == 1 and f["rows"] > 1:
        if e["terminals"]:
            yield Finding("note", "reward", f"{r['min']:g} in every row: only the ends differ")
        else:
            yield Finding(
                "error",
                "reward",
                f"{r['min']:g} in every row and nothing terminates: there is nothing to learn from",
                "check that the rewards were filled in; goal-conditioned methods and behavior "
                "cloning do not read them",
            )
    elif r["zero"] > SPARSE:
        yield Finding("note", "reward", f"sparse: {r['zero']:.2%} of the rewards are zero")
    if r["distinct"] > 2 and r["largest"] > HUGE * r["usual"] > 0:
        yield Finding(
            "warning",
            "reward",
            f"the largest is {r['largest']:.4g}, the 99th percentile {r['usual']:.4g} in absolute "
            "value",
            "look for a wrong unit or a failed measurement; clip or rescale if it is real",
        )


def returns(f: Mapping[str, Any]) -> Iterator[Finding]:
    if "returns" not in f:
        return
    n = f["episodes"]
    if n > 1 and f["returns"].get("std", 1) < ALIKE and f["reward"]["distinct"] > 1:
        yield Finding(
            "warning", "returns", "all episodes have the same return: none is better to learn from"
        )
    if 1 < n < FEW_FOR_EVALUATION:
        yield Finding(
            "warning" if n < FEW_EPISODES else "note",
            "returns",
            f"{n} episodes: estimates of returns have wide intervals, and importance sampling "
            "cannot be trusted",
        )


def columns(f: Mapping[str, Any]) -> Iterator[Finding]:
    still = [
        c["name"]
        for c in f["columns"]
        if c["field"] != "reward" and "std" in c and constant(c)
        if not (c["field"] == "act" and f["discrete"])
    ]
    if still and f["rows"] > 1:
        yield Finding("warning", "columns", f"constant: {some(still)}", "leave them out")
    pairs: dict[str, list[str]] = {"equal": [], "affine": []}
    for pair in f.get("similar", ()):
        fields, (one, other) = set(pair["fields"]), pair["names"]
        if fields == {"obs", "act"} and pair["equal"]:
            yield Finding(
                "error",
                "leak",
                f"the observation {one} is the action {other} of the same row",
                "leave the column out, or move it to the next row if it is the last action",
            )
        elif fields == {"obs", "reward"}:
            yield Finding(
                "warning",
                "leak",
                f"the observation {one} tells the reward of the same row",
                "check that it is known before the action; otherwise it belongs to the next row",
            )
        elif len(fields) == 1:
            pairs["equal" if pair["equal"] else "affine"].append(f"{one} and {other}")
    for kind, what in (("equal", "duplicates"), ("affine", "affine functions of one another")):
        if pairs[kind]:
            yield Finding(
                "warning", "columns", f"{what}: {some(pairs[kind])}", "keep one of each pair"
            )


def actions(f: Mapping[str, Any]) -> Iterator[Finding]:
    if f["discrete"]:
        yield from kinds(f)
        return
    mine = [c for c in f["columns"] if c["field"] == "act" and "std" in c]
    outside = [c["name"] for c in mine if max(-c["min"], c["max"]) > 1 + OUTSIDE]
    if outside:
        low, high = min(c["min"] for c in mine), max(c["max"] for c in mine)
        yield Finding(
            "error",
            "actions",
            f"outside [-1, 1] in {some(outside)} ({low:.4g} to {high:.4g})",
            "rescale by the environment's bounds",
        )
    saturated = [c["name"] for c in mine if c["saturated"] > SATURATED]
    if saturated and not outside:
        yield Finding(
            "note",
            "actions",
            f"more than {SATURATED:.0%} of the rows are at the bounds in {some(saturated)}: "
            "Gaussian policies fit this badly",
        )
    few = [c for c in mine if 1 < c["distinct"] <= LEVELS_OF_ACTIONS < f["sample"]]
    steps = [f"{c['name']} ({c['distinct']})" for c in few]
    if steps:
        yield Finding(
            "warning",
            "actions",
            f"few distinct values in {some(steps)}: discrete actions stored as real numbers?",
            "store integers for methods with discrete actions",
        )


def kinds(f: Mapping[str, Any]) -> Iterator[Finding]:
    a = f.get("actions")
    if not a:
        return
    if a["negative"]:
        yield Finding(
            "error", "actions", f"{a['negative']:,} are negative", "count discrete actions from 0"
        )
    total = sum(a["counts"])
    rare = [
        f"{kind} ({count:,})"
        for kind, count in enumerate(a["counts"])
        if count < RARE_COUNT or count < RARE_SHARE * total
    ]
    if rare:
        yield Finding(
            "warning",
            "actions",
            f"never or rarely taken: {some(rare)}; a policy that takes them cannot be evaluated",
        )


def behavior(f: Mapping[str, Any]) -> Iterator[Finding]:
    """How surely the observation tells the action."""
    k = f.get("leaks")
    if not k:
        return
    for act, column, share in k["best"]:
        if share > TOLD and k.get("usual", 0) < TOLD:
            alone = len([c for c in f["columns"] if c["field"] == "obs"]) == 1
            yield Finding(
                "warning" if alone else "error",
                "leak",
                f"the observation {column} alone tells {act} ({share:.1%})",
                "check that the column is known before the action is chosen; if it is, the "
                "behavior is near-deterministic and importance sampling impossible",
            )
    if k.get("usual", 1) < TOLD and k["loss"] is not None and k["loss"] < SURE:
        yield Finding(
            "warning",
            "behavior",
            "near-deterministic: a linear model of the observation tells the action (log-loss "
            f"{k['loss']:.3f} of that of uniform actions)",
            "do not use importance sampling",
        )
    sure = sum(share > LINEAR for share in k["linear"])
    if sure:
        yield Finding(
            "warning",
            "behavior",
            f"near-deterministic: a linear function of the observation tells {sure} of "
            f"{len(k['linear'])} actions (R2 above {LINEAR})",
            "do not use importance sampling",
        )


def repeats(f: Mapping[str, Any]) -> Iterator[Finding]:
    r = f.get("repeats")
    if not r:
        return
    if r["episodes"]:
        yield Finding(
            "warning",
            "repeats",
            f"{r['episodes']:,} episodes are exact copies of earlier ones",
            "remove them; a split by episodes would put copies on both sides",
        )
    if r["exact"] > REPEATED or r["near"] > REPEATED:
        finite = r["most_kinds"] <= FINITE_KINDS
        yield Finding(
            "note" if finite else "warning",
            "repeats",
            f"{r['exact']:.1%} of the rows repeat earlier ones exactly, {r['near']:.1%} to 0.01 std"
            + (": few states, as in a table" if finite else ""),
            ""
            if finite
            else "split by episodes; look for copied rows (a process at rest repeats itself too)",
        )


def drifts(f: Mapping[str, Any]) -> Iterator[Finding]:
    d = f.get("drift")
    if not d:
        return
    most = [max(row) for row in d["distance"]]
    moved = [
        (distance, name)
        for distance, name, trend in zip(most, d["names"], d["trend"], strict=True)
        if distance > DRIFT and (distance > d["chance"] or abs(trend) > d["trend_chance"])
    ]
    if moved:
        yield Finding(
            "warning",
            "drift",
            "a tenth of the rows differs from the rest (Kolmogorov-Smirnov distance) in "
            + some(f"{name} ({distance:.2f})" for distance, name in sorted(moved, reverse=True)),
            "the behavior or the process changed over time: split by time, or say why not",
        )


def constant(column: Mapping[str, Any]) -> bool:
    """One value but for rounding; also a column without any finite value."""
    if "std" not in column:
        return True
    return column["std"] < 1e-6 * max(abs(column["min"]), abs(column["max"]), 1e-30)


def some(names: Any, most: int = 4) -> str:
    """A few of many, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


CHECKS = (
    values,
    ends,
    limits,
    joined,
    rewards,
    returns,
    columns,
    actions,
    behavior,
    repeats,
    drifts,
)
