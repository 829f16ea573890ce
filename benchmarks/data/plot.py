"""Draw the returns of the generated data sets, 20,000 rows each: python benchmarks/data/plot.py"""

from pathlib import Path

from offrl.data.sources import generated
from offrl.results.plots import distribution

ROBOTS = ("halfcheetah", "hopper", "walker2d")

if __name__ == "__main__":  # rolling out starts processes, which import this file
    distribution(
        Path(__file__).parent / "returns.png",
        {
            robot: {name: generated.load(robot, name, rows=20_000) for name in generated.DATASETS}
            for robot in ROBOTS
        },
    )
