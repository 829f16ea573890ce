"""A ring of transitions on the training device, one per stacked seed."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from offrl.data.table import Columns, Device, pack, take, unpack, widths
from offrl.engine.method import Batch, Sampler, Seeds
from offrl.system import memory

FILES = 16  # that a full ring is spread over,
LEAST = 2**20  # bytes of a file, so that small rings have one


class Replay:
    """Ring buffer whose `size` is a tensor (*S,), so that captured updates see it grow.

    Rows are numbered from 0 in the order of `add`. A checkpoint holds numbers only: `save` appends
    new rows to files `<place>.replay-000000` and so on, raw float32 (rows, *S, width), and deletes
    files when all of their rows are too old to be needed.

    Args:
        capacity: rows per seed; the oldest are overwritten beyond it.
        columns: name -> (trailing shape, dtype), for example {"obs": ((17,), torch.float32)}.
        seeds: stacked seed axes, () for one.
        device: where the table lies.

    Raises ValueError if the table is larger than the device's memory.
    """

    def __init__(self, capacity: int, columns: Columns, seeds: Seeds = (), device: Device = "cpu"):
        self.capacity, self.columns, self.seeds = capacity, columns, seeds
        self.row = [*seeds, sum(widths(columns))]  # shape of a row of all seeds
        size, room = 4 * capacity * math.prod(self.row), memory(torch.device(device))
        if size > room:
            raise ValueError(
                f"a replay of algo.capacity={capacity} rows needs {size / 2**30:.1f} GiB and "
                f"{device} has {room / 2**30:.1f}; take a smaller algo.capacity"
            )
        self.table = torch.zeros(*seeds, capacity, self.row[-1], device=device)
        self.size = torch.zeros(seeds, dtype=torch.int64, device=device)
        stacks = self.size.numel()
        self.first = (torch.arange(stacks, device=device) * capacity).view(seeds)  # row 0 per seed
        self.total = 0  # rows that were added, per seed
        self.written = 0  # rows below are in files, or too old to be needed
        self.needed = 0  # first row that the last checkpoint needs
        self.row_bytes = 4 * math.prod(self.row)
        self.per_file = max(-(-capacity // FILES), LEAST // self.row_bytes, 1)

    def add(self, rows: Batch) -> None:
        """Append n rows to every seed's ring: each field (*S, n, ...), n at most the capacity."""
        packed = pack(rows, self.columns, len(self.seeds) + 1)  # (*S, n, width)
        count = packed.shape[-2]
        if count > self.capacity:
            raise ValueError(f"{count} rows do not fit a replay of {self.capacity}")
        self.table.index_copy_(-2, self.slots(self.total, self.total + count), packed)
        self.total += count
        self.size.fill_(min(self.total, self.capacity))

    def slots(self, start: int, stop: int) -> Tensor:
        """Where rows lie in the table."""
        return torch.arange(start, stop, device=self.table.device) % self.capacity

    def sampler(self, batch: int) -> Sampler:
        """Uniform rows with replacement: generator -> fields (*S, batch, ...).

        Drawn with 64-bit uniforms times the current size: an integer bound would be baked into a
        captured graph, and 32-bit uniforms are uneven above about a million rows.
        """

        def sample(generator: Generator) -> Batch:
            shape, device = (*self.seeds, batch), self.table.device
            uniform = torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
            row = (uniform * self.size.unsqueeze(-1)).long()  # (*S, B)
            index = row + self.first.unsqueeze(-1)
            rows = take(self.table.view(-1, self.row[-1]), index)
            return unpack(rows, self.columns) | {"index": row}

        return sample

    def save(self, place: Path) -> dict[str, Any]:
        """Bring the rows since the last save to the disk; see `offrl.engine.method.Part`.

        Raises OSError if that is full or not writable; the last checkpoint stays complete.
        """
        oldest = max(0, self.total - self.capacity)
        for path, start, stop, at in self.pieces(place, max(oldest, self.written), self.total):
            rows = self.table.index_select(-2, self.slots(start, stop)).movedim(-2, 0)
            write(path, at, rows.cpu().numpy().tobytes())
        self.written = self.total
        for path in place.parent.glob(f"{place.name}.replay-*"):
            number = path.name.rpartition("-")[2]
            if number.isdigit() and int(number) < self.needed // self.per_file:
                path.unlink()
        self.needed = oldest
        return {name: getattr(self, name) for name in ("total", "capacity", "row", "per_file")}

    def load(self, state: dict[str, Any], place: Path) -> None:
        """Continue from what `save` returned and from its files, which may hold more rows.

        Raises ValueError if the saved rows do not fit this replay, or a file lacks some of them.
        """
        total, capacity = state["total"], state["capacity"]
        resized = capacity != self.capacity and total > min(capacity, self.capacity)
        if state["row"] != self.row or resized:
            raise ValueError(
                f"the saved replay has rows {state['row']} in a ring of {capacity}, "
                f"this one rows {self.row} in a ring of {self.capacity}"
            )
        self.per_file = state["per_file"]
        self.needed = max(0, total - capacity)
        for path, start, stop, at in self.pieces(place, self.needed, total):
            rows = read(path, at, (stop - start, *self.row)).movedim(0, -2)
            self.table.index_copy_(-2, self.slots(start, stop), rows.to(self.table.device))
        self.total = self.written = total
        self.size.fill_(min(total, self.capacity))

    def pieces(self, place: Path, start: int, stop: int) -> Iterator[tuple[Path, int, int, int]]:
        """Files of rows start to stop: path, first of them, one after the last, bytes before."""
        for number in range(start // self.per_file, -(-stop // self.per_file)):
            first = max(start, number * self.per_file)
            path = place.with_name(f"{place.name}.replay-{number:06d}")
            before = first % self.per_file * self.row_bytes
            yield path, first, min(stop, (number + 1) * self.per_file), before


def write(path: Path, offset: int, content: bytes) -> None:
    try:
        with open(path, "r+b" if path.exists() else "xb") as file:
            file.seek(offset)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}; the last checkpoint is intact") from error


def read(path: Path, offset: int, shape: tuple[int, ...]) -> Tensor:
    """Raises ValueError if the file is missing or too short."""
    count = math.prod(shape)
    found = path.stat().st_size if path.exists() else 0
    if found < offset + 4 * count:
        raise ValueError(
            f"{path} has {found} bytes, the checkpoint needs {offset + 4 * count}: the replay is "
            "not whole; copy the run's folder again with all of its files, or start a new run"
        )
    return torch.from_numpy(np.fromfile(path, np.float32, count, offset=offset)).view(shape)
