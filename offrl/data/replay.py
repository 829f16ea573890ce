"""A ring of transitions on the training device, one per stacked seed."""

from typing import Any

import torch
from torch import Generator, Tensor

from offrl.data.table import columns, pack, unpack
from offrl.engine.method import Batch, Sampler


class Replay:
    """Ring buffer whose `size` and `head` are tensors (*S,), so captured updates see them move.

    Args:
        capacity: rows per seed; the oldest are overwritten beyond it.
        fields: name -> (trailing shape, dtype), for example {"obs": ((17,), torch.float32)}.
        seeds: stacked seed axes, () for one.
        device: where the table lies.
    """

    def __init__(
        self,
        capacity: int,
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]],
        seeds: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
    ):
        self.columns, width = columns(fields)
        self.capacity, self.seeds = capacity, seeds
        self.table = torch.zeros(*seeds, capacity, width, device=device)
        self.size = torch.zeros(seeds, dtype=torch.int64, device=device)
        self.head = torch.zeros(seeds, dtype=torch.int64, device=device)
        stacks = self.head.numel()
        self.first = (torch.arange(stacks, device=device) * capacity).view(seeds)  # row 0 per seed

    def add(self, rows: Batch) -> None:
        """Append n rows to every seed's ring: each field (*S, n, ...), n at most the capacity."""
        lead = len(self.seeds) + 1
        packed = pack(rows, self.columns, lead)  # (*S, n, width)
        count = packed.shape[-2]
        if count > self.capacity:
            raise ValueError(f"{count} rows do not fit a replay of {self.capacity}")
        offset = torch.arange(count, device=packed.device)
        index = self.first.unsqueeze(-1) + (self.head.unsqueeze(-1) + offset) % self.capacity
        self.flat.index_copy_(0, index.flatten(), packed.flatten(0, -2))
        self.head.add_(count).remainder_(self.capacity)
        self.size.add_(count).clamp_(max=self.capacity)

    @property
    def flat(self) -> Tensor:
        return self.table.view(-1, self.table.shape[-1])

    def sampler(self, batch: int) -> Sampler:
        """Uniform rows with replacement: generator -> fields (*S, batch, ...).

        Drawn with 64-bit uniforms times the current size: an integer bound would be baked into a
        captured graph, and 32-bit uniforms are uneven above about a million rows.
        """

        def sample(generator: Generator) -> Batch:
            uniform = torch.rand(
                *self.seeds,
                batch,
                dtype=torch.float64,
                generator=generator,
                device=self.table.device,
            )
            row = (uniform * self.size.unsqueeze(-1)).long()  # (*S, B)
            index = row + self.first.unsqueeze(-1)
            rows = self.flat.index_select(0, index.flatten()).view(*index.shape, -1)
            return unpack(rows, self.columns) | {"index": row}

        return sample

    def state(self) -> dict[str, Any]:
        """The filled part of the ring; rows not written yet are not saved."""
        filled = int(self.size.max())
        return {"rows": self.table[..., :filled, :].clone(), "size": self.size, "head": self.head}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`.

        Raises:
            ValueError: if the saved rows do not fit this replay.
        """
        rows = state["rows"]
        if rows.shape[-1] != self.table.shape[-1] or rows.shape[-2] > self.capacity:
            raise ValueError(
                f"saved replay has rows {tuple(rows.shape)}, "
                f"this one holds {tuple(self.table.shape)}"
            )
        self.table[..., : rows.shape[-2], :] = rows.to(self.table.device)
        self.size.copy_(state["size"])
        self.head.copy_(state["head"])
