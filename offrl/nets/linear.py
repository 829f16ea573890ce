"""The affine map: its one home, so that a faster product serves every network."""

import torch
from torch import Generator, Tensor, nn

from offrl.nets.kernels.chain import chain

Dims = tuple[int, ...]  # widths, or stacked axes such as (*seeds, ensemble)
Source = Generator | None  # of initial weights, which lie on its device; None: torch's own, CPU


def uniform(*shape: int, fan_in: int, generator: Source) -> nn.Parameter:
    """A parameter drawn in +-1/sqrt(fan_in)."""
    value, bound = torch.empty(*shape, device=device_of(generator)), fan_in**-0.5
    return nn.Parameter(value.uniform_(-bound, bound, generator=generator))


def device_of(generator: Source) -> torch.device | None:
    return None if generator is None else generator.device


class Linear(nn.Module):
    """Affine map x @ weight + bias with optional leading axes for seeds and ensembles.

    weight (*lead, in, out), bias (*lead, 1, out); x (*lead or shorter or 1s, B, in) broadcasts
    against `lead`. Initialization: `uniform` for both, the default of torch.nn.Linear.
    """

    def __init__(self, fan_in: int, fan_out: int, lead: Dims = (), generator: Source = None):
        super().__init__()
        self.weight = uniform(*lead, fan_in, fan_out, fan_in=fan_in, generator=generator)
        self.bias = uniform(*lead, 1, fan_out, fan_in=fan_in, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., B, in) -> (*lead, B, out)."""
        return chain(x, [(self.weight, self.bias)])
