"""Draw the curves of the behavior policies' training runs: python benchmarks/sac/plot.py."""

import csv
from pathlib import Path

import numpy as np

from offrl.results.plots import curves

HERE = Path(__file__).parent

for path in sorted(HERE.glob("*-metrics.csv")):
    env = path.name.removesuffix("-metrics.csv")
    with open(path) as file:
        points = [
            (int(row["step"]), float(row["value"]))
            for row in csv.DictReader(file)
            if row["stage"] == "evaluation" and row["name"] == "return"
        ]
    steps, returns = np.array(points).T
    panel = {f"SAC on {env} (v5)": {"seed 0": (steps, returns[None])}}
    rows = {"return of 10 deterministic episodes": panel}
    curves(HERE / f"{env}.png", rows, "environment steps")
