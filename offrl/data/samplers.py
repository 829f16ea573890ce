"""Samplers: functions generator -> Batch over a fixed data set."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data.dataset import Dataset
from offrl.data.table import pack, take, unpack, widths
from offrl.engine.method import Batch, Sampler

Transform = Callable[[Batch], Batch] | None
BUDGET = 8 << 30  # bytes of transitions that are held on the training device


def transitions(
    data: Dataset,
    batch: int,
    seeds: tuple[int, ...] = (),
    device: torch.device | str = "cpu",
    names: Sequence[str] = ("obs", "act", "reward", "next_obs", "terminal"),
    transform: Transform = None,
    budget: int = BUDGET,
) -> Sampler:
    """Uniform transitions with replacement: generator -> fields (*S, batch, ...) and their `index`.

    Data up to `budget` bytes are packed into one table on the device, transformed once; larger
    data stay where they are (memory-mapped), and each batch is gathered there and then moved.

    Args:
        names: fields of a batch.
        transform: row-wise function of a batch of fields, such as standardization.
    """
    device, size = torch.device(device), len(data)
    fields = {name: data[name] for name in names}
    rows = gatherer(fields, device, transform, budget)

    def sample(generator: Generator) -> Batch:
        # an integer bound is constant for a fixed data set, so a captured graph may hold it
        index = torch.randint(size, (*seeds, batch), generator=generator, device=device)
        return rows(index) | {"index": index}

    return sample


def gatherer(
    fields: Batch, device: torch.device, transform: Transform = None, budget: int = BUDGET
) -> Callable[[Tensor], Batch]:
    """Index (*I,) on the device -> fields (*I, ...) there; see `transitions`."""
    size = len(next(iter(fields.values())))

    def ready(rows: Any) -> Batch:
        taken = {name: value[rows].to(device) for name, value in fields.items()}
        return transform(taken) if transform else taken

    first = ready(slice(1))
    columns = {name: (tuple(value.shape[1:]), value.dtype) for name, value in first.items()}
    width = sum(widths(columns))
    if size * width * 4 > budget:
        return lambda index: ready(index.cpu())
    table = torch.empty(size, width, device=device)
    for start in range(0, size, 1 << 18):
        rows = slice(start, start + (1 << 18))
        table[rows] = pack(ready(rows), columns, 1)
    return lambda index: unpack(take(table, index), columns)


def mixed(
    real: Callable[[int], Sampler], model: Callable[[int], Sampler], batch: int, share: float
) -> Sampler:
    """Batches of the fields that two places have, but for `index`, with rows of both.

    Args:
        real, model: make a sampler of so many rows, such as `Replay.sampler`, with the same seed
            axes.
        share: of the `batch` rows that comes first and from `real`, rounded to whole rows.
    """
    first = round(share * batch)
    both = [make(count) for make, count in ((real, first), (model, batch - first)) if count]

    def sample(generator: Generator) -> Batch:
        batches = [draw(generator) for draw in both]
        axis = batches[0]["index"].dim() - 1
        names = [n for n in batches[0] if n != "index" and all(n in b for b in batches)]
        return {name: torch.cat([b[name] for b in batches], axis) for name in names}

    return sample


def prepare(
    standardize: Callable[[Tensor], Tensor], scale: float = 1.0, shift: float = 0.0
) -> Callable[[Batch], Batch]:
    """Row-wise preparation of a batch: standardized observations, reward scale r + shift."""

    def transform(fields: Batch) -> Batch:
        ways = dict.fromkeys(("obs", "next_obs"), standardize)
        ways["reward"] = lambda reward: scale * reward + shift
        return {name: ways[name](x) if name in ways else x for name, x in fields.items()}

    return transform
