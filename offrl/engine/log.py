"""Metrics to CSV and TensorBoard; nothing leaves the device between two flushes."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offrl.engine.method import Metrics
from offrl.errors import Diverged

LIMIT = 1e15  # beyond it a metric has run away: a squared error of thirty million


class Meter:
    """Collects per-update metrics as they are, and averages them when asked."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self.steps: dict[str, list[int]] = {}

    def add(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)
            self.steps.setdefault(name, []).append(step)

    def flush(self) -> dict[str, list[float]]:
        """Mean of every metric since the last flush, one entry per seed.

        Raises:
            Diverged: if a value was not finite or beyond `LIMIT`, naming the first.
        """
        means, first = {}, None
        for name, values in self.values.items():
            if len({value.device for value in values}) > 1:  # loaded ones lie on the CPU
                values = [value.cpu() for value in values]
            stack = torch.stack(values).cpu().double()  # (updates, *S)
            bad = ~(stack.abs() <= LIMIT).view(len(values), -1).all(-1)
            if bad.any():
                step = self.steps[name][int(bad.nonzero()[0, 0])]
                first = (step, name) if first is None or step < first[0] else first
            means[name] = stack.mean(0).reshape(-1).tolist()
        self.values, self.steps = {}, {}
        if first is not None:
            raise Diverged(
                f"{first[1]} became NaN, infinite or larger than {LIMIT:.0e} at update {first[0]}: "
                "a smaller learning rate or a look at the rewards' scale may help"
            )
        return means

    def state(self) -> dict[str, Any]:
        """The values since the last flush, so that a resumed run averages the same ones."""
        values = {name: torch.stack([x.cpu() for x in v]) for name, v in self.values.items()}
        return {"values": values, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        self.values = {name: list(v.unbind(0)) for name, v in state["values"].items()}
        self.steps = {name: list(steps) for name, steps in state["steps"].items()}


class Log:
    """`metrics.csv` with rows (step, stage, seed, name, value) and TensorBoard events.

    Args:
        seeds: the seed behind each entry of a metric.
        saved: the checkpoint that the files in `folder` are continued from: it knows the size of
            the CSV then, and the step after which TensorBoard events are superseded.
    """

    def __init__(self, folder: Path, seeds: list[int], saved: dict[str, Any] | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.seeds = seeds
        self.file = open(folder / "metrics.csv", "a", newline="")  # noqa: SIM115
        known, purge = (saved["metrics_bytes"], saved["global_step"] + 1) if saved else (0, None)
        if self.file.tell() < known:
            raise ValueError(
                f"{self.file.name} has {self.file.tell()} bytes, the checkpoint knows {known}: "
                "copy the run's folder again with all of its files, or start a new run"
            )
        self.file.seek(self.file.truncate(known))
        self.writer = csv.writer(self.file)
        if not saved:
            self.writer.writerow(["step", "stage", "seed", "name", "value"])
        self.events = SummaryWriter(str(folder), purge_step=purge, max_queue=1000)

    def write(self, step: int, stage: str, means: dict[str, list[float]]) -> None:
        for name, values in means.items():
            # a metric without a seed axis holds for every seed
            values = values * len(self.seeds) if len(values) == 1 else values
            for seed, value in zip(self.seeds, values, strict=True):
                self.writer.writerow([step, stage, seed, name, repr(value)])
                tag = f"{stage}/{name}" + (f"/seed-{seed}" if len(self.seeds) > 1 else "")
                self.events.add_scalar(tag, value, step)

    def speed(self, step: int, per_second: float) -> None:
        """Timing goes to TensorBoard only: the CSV of two equal runs is equal."""
        self.events.add_scalar("speed/steps_per_second", per_second, step)

    def flush(self) -> int:
        """Bring everything to the disk; returns the size of the CSV in bytes."""
        self.file.flush()
        self.events.flush()
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        self.events.close()
