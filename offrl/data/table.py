"""Fields packed side by side in one row-major table, so that a batch is one gather."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Column:
    """Where a field lies in a row: first column, trailing shape, and its type outside the table."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return math.prod(self.shape)


Columns = dict[str, Column]


def columns(fields: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[Columns, int]:
    """Lay out the fields in order; returns the columns and the width of a row."""
    out, start = {}, 0
    for name, (shape, dtype) in fields.items():
        out[name] = Column(start, shape, dtype)
        start += out[name].width
    return out, start


def pack(fields: dict[str, Tensor], layout: Columns, lead: int) -> Tensor:
    """Rows (*lead, width) float32 from fields that carry `lead` leading axes each."""
    flat = [fields[name].reshape(*fields[name].shape[:lead], -1).float() for name in layout]
    return torch.cat(flat, -1)


def take(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows], several times faster on a CPU: (N, *d), (*shape) -> (*shape, *d)."""
    return values.index_select(0, rows.flatten()).view(*rows.shape, *values.shape[1:])


def unpack(rows: Tensor, layout: Columns) -> dict[str, Tensor]:
    """Fields of packed rows, views where the type allows; integers are exact below 2^24."""
    out = {}
    for name, column in layout.items():
        value = rows[..., column.start : column.start + column.width]
        out[name] = value.view(*rows.shape[:-1], *column.shape).to(column.dtype)
    return out
