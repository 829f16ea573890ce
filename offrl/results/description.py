"""A description of a data set as a picture and as one HTML page that needs no network."""

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from offrl.data.description import Description, cells, lines

MOST = 60  # columns in a table or a picture
HEAD = ("column", "values", "min", "max", "mean", "std", "at bounds", "distinct", "NaN")
STYLE = """
body {font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
      color: #1c2128; background: #fff}
h1 {font-size: 1.5rem; margin-bottom: .2rem} h2 {font-size: 1.1rem; margin-top: 2rem}
pre, code {font: 13px/1.5 ui-monospace, monospace} pre {overflow-x: auto}
table {border-collapse: collapse; font-variant-numeric: tabular-nums}
th, td {padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #e3e6ea}
th:first-child, td:first-child {text-align: left; font-family: ui-monospace, monospace}
.finding {border-left: .35rem solid #8b949e; padding: .3rem .8rem; margin: .5rem 0;
          background: #f6f8fa}
.error {border-color: #c62828} .warning {border-color: #e09000}
.finding b {text-transform: capitalize} .remedy {color: #4a525c}
img {max-width: 100%} svg {display: block} .wide {overflow-x: auto}
"""


def page(description: Description, picture: Path) -> str:
    """The whole description as HTML: findings, summary, picture and a table of the columns.

    Args:
        picture: a PNG made by `figure`, which the page takes in.
    """
    f = description.facts
    escape = html.escape
    cards = [
        f'<div class="finding {x.level}"><b>{x.level}</b> · {escape(x.check)}: {escape(x.text)}'
        + (f'<div class="remedy">Remedy: {escape(x.remedy)}</div>' if x.remedy else "")
        + "</div>"
        for x in description.findings
    ]
    text = "\n".join(lines(description))
    summary = text[: text.index("\n\n")]
    image = base64.b64encode(picture.read_bytes()).decode()
    rows = ["".join(f"<th>{name}</th>" for name in HEAD)]
    for column in shown(f["columns"]):
        middle = sparkline(column.get("histogram", {}).get("counts", []))
        row = [escape(column["name"]), middle, *cells(column)]
        rows.append("".join(f"<td>{cell}</td>" for cell in row))
    left = len(f["columns"]) - len(rows) + 1
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(f["name"])}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head><body>
<h1>{escape(f["name"])}</h1>
<h2>Findings</h2>
{"".join(cards) or "<p>Nothing looks wrong.</p>"}
<h2>Summary</h2>
<pre>{escape(summary)}</pre>
<h2>Pictures</h2>
<img alt="Distributions, actions, correlations and drift"
 src="data:image/png;base64,{image}">
<h2>Columns</h2>
<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>
{f"<p>{left} more columns are in the JSON file.</p>" if left else ""}
<p>Digest {f["digest"]}. The thresholds of the checks are this library's own.</p>
</body></html>
"""


def shown(columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first columns of each field."""
    kept: list[dict[str, Any]] = []
    for field in ("obs", "act", "reward"):
        kept += [column for column in columns if column["field"] == field][:MOST]
    return kept


def sparkline(counts: list[int], width: int = 100, height: int = 18) -> str:
    """A histogram as a small inline SVG."""
    if not counts:
        return ""
    step, top = width / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - height * c / top:.1f}" width="{step * 0.9:.1f}" '
        f'height="{height * c / top:.1f}"/>'
        for i, c in enumerate(counts)
        if c
    )
    return f'<svg width="{width}" height="{height}" fill="#4878a8">{bars}</svg>'


def figure(path: Path, description: Description) -> None:
    """Lengths, returns, rewards, actions, correlations and drift as PNG."""
    f = description.facts
    drawn = plt.figure(figsize=(14, 7.2), dpi=110)
    grid = drawn.add_gridspec(2, 12)
    upper = [drawn.add_subplot(grid[0, 3 * i : 3 * i + 3]) for i in range(4)]
    lower = [drawn.add_subplot(grid[1, 4 * i : 4 * i + 4]) for i in range(3)]
    bars(upper[0], f["lengths"], "lengths of the episodes", "steps")
    gamma = f.get("discounted", {}).get("discount", 0)
    bars(upper[1], f.get("returns"), "returns", "sum of an episode's rewards")
    bars(upper[2], f.get("discounted"), "discounted returns", f"sum with discount {gamma:g}")
    bars(upper[3], f.get("reward"), "rewards", "reward of a row", log=True)
    actions(lower[0], f)
    correlations(lower[1], f)
    drift(lower[2], f)
    drawn.tight_layout()
    drawn.savefig(path)
    plt.close(drawn)


def bars(
    axes: plt.Axes, part: Mapping[str, Any] | None, title: str, xlabel: str, log: bool = False
) -> None:
    if not part:
        return empty(axes, title, "no rewards")
    if part["min"] == part["max"]:
        return empty(axes, title, f"always {part['min']:.5g}")
    counts, low, high = (part["histogram"][key] for key in ("counts", "low", "high"))
    axes.stairs(counts, np.linspace(low, high, len(counts) + 1), fill=True, alpha=0.6)
    axes.set(title=title, xlabel=xlabel, ylabel="count")
    axes.xaxis.set_major_locator(plt.MaxNLocator(5))
    if log:
        axes.set_yscale("log")
    return None


def empty(axes: plt.Axes, title: str, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color="gray")
    axes.set(title=title, xticks=[], yticks=[])


def actions(axes: plt.Axes, facts: Mapping[str, Any]) -> None:
    """Counts of discrete actions, or the share of rows in each bin of each column."""
    found = facts.get("actions")
    if not found:
        return empty(axes, "actions", "no finite rows")
    counts = np.array(found["counts"])
    if facts["discrete"]:
        axes.bar(np.arange(len(counts)), counts, color="C0", alpha=0.6)
        axes.set(title="actions", xlabel="action", ylabel="count")
        axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        return None
    share = counts[:MOST] / np.maximum(counts[:MOST].sum(-1, keepdims=True), 1)
    image = axes.imshow(
        share, aspect="auto", extent=(-1, 1, len(share) - 0.5, -0.5), vmin=0, cmap="Blues"
    )
    names = [column["name"] for column in facts["columns"] if column["field"] == "act"]
    label(axes, names[:MOST])
    axes.set(title="actions: share of the rows", xlabel="action, in 20 bins of [-1, 1]")
    axes.figure.colorbar(image, ax=axes)
    return None


def correlations(axes: plt.Axes, facts: Mapping[str, Any]) -> None:
    found = facts.get("correlations", {})
    if not found.get("names"):
        return empty(axes, "correlations", "no columns vary")
    image = axes.imshow(found["values"], vmin=-1, vmax=1, cmap="RdBu_r")
    label(axes, found["names"])
    axes.set(title="correlations of the columns", xticks=[])
    axes.figure.colorbar(image, ax=axes)
    return None


def drift(axes: plt.Axes, facts: Mapping[str, Any]) -> None:
    """Distance of each tenth of the rows from the rest, per column."""
    found = facts.get("drift")
    if not found or not found["names"]:
        return empty(axes, "drift", "no columns vary")
    table = np.array(found["distance"])[:MOST]
    image = axes.imshow(
        table, aspect="auto", extent=(0, 1, len(table) - 0.5, -0.5), vmin=0, vmax=1, cmap="Reds"
    )
    label(axes, found["names"][:MOST])
    chance = found["chance"]
    axes.set(
        title="drift: distance of a tenth from the rest",
        xlabel="place in the data"
        + (f" (chance reaches {chance:.2f})" if chance <= 1 else " (few episodes)"),
    )
    axes.figure.colorbar(image, ax=axes)
    return None


def label(axes: plt.Axes, names: list[str]) -> None:
    """Names of the rows of a picture, as many as can be read."""
    step = -(-len(names) // 20)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
