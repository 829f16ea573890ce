"""The affine map: its one home, so that a faster product serves every network."""

import torch
from torch import Generator, Tensor, nn

from offrl.nets.kernels.chain import chain


class Linear(nn.Module):
    """Affine map x @ weight + bias with optional leading axes for seeds and ensembles.

    weight (*lead, in, out), bias (*lead, 1, out); x (*lead or shorter or 1s, B, in) broadcasts
    against `lead`. Initialization: uniform in +-1/sqrt(in) for both, the default of
    torch.nn.Linear, drawn from `generator` on its device.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        lead: tuple[int, ...] = (),
        generator: Generator | None = None,
    ):
        super().__init__()
        device = generator.device if generator is not None else None

        def draw(rows: int) -> nn.Parameter:
            value = torch.empty(*lead, rows, fan_out, device=device)
            return nn.Parameter(value.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator))

        self.weight = draw(fan_in)
        self.bias = draw(1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., B, in) -> (*lead, B, out)."""
        return chain(x, [(self.weight, self.bias)])
