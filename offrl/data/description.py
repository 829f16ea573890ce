"""A description of a data set: plain facts, what looks wrong in them, and both as text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from offrl.data.findings import LEVELS, Finding


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


def lines(description: Description) -> list[str]:
    """The description as text for a terminal of 100 columns."""
    f = description.facts
    lengths, ends = f["lengths"], f["ends"]
    out = [
        f"{f['name']}: {f['rows']:,} rows, {counted(f['episodes'], 'episode')}, "
        f"digest {f['digest'][:12]}",
        f"lengths     {quantiles(lengths)}, most often {lengths['mode']} "
        f"({lengths['mode_share']:.0%})",
        f"ends        {counted(ends['terminals'], 'terminal')}, "
        f"{counted(ends['timeouts'], 'timeout')}, "
        f"{counted(ends['open'], 'episode')} without either",
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
            f"correlations and drift {f['pairs']:,})"
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


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


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
