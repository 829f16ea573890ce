"""Fields packed side by side in one row-major table, so that a batch is one gather."""

import math

import torch
from torch import Tensor

Device = torch.device | str
Columns = dict[str, tuple[tuple[int, ...], torch.dtype]]  # trailing shape and type of the fields


def widths(columns: Columns) -> list[int]:
    """How many numbers of a row every field takes."""
    return [math.prod(shape) for shape, _ in columns.values()]


def pack(fields: dict[str, Tensor], columns: Columns, lead: int) -> Tensor:
    """Rows (*lead, width) float32 from fields that carry `lead` leading axes each."""
    flat = [fields[name].reshape(*fields[name].shape[:lead], -1).float() for name in columns]
    return torch.cat(flat, -1)


def take(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows], several times faster on a CPU: (N, *d), (*shape) -> (*shape, *d)."""
    return values.index_select(0, rows.flatten()).view(*rows.shape, *values.shape[1:])


def unpack(rows: Tensor, columns: Columns) -> dict[str, Tensor]:
    """Fields of packed rows, views where the type allows; integers are exact below 2^24."""
    parts = zip(columns.items(), rows.split(widths(columns), -1), strict=True)
    return {
        name: part.view(*rows.shape[:-1], *shape).to(dtype)
        for (name, (shape, dtype)), part in parts
    }
