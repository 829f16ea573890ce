"""Multilayer perceptrons with optional leading axes, and observation standardization."""

from itertools import pairwise
from typing import cast

import torch
from torch import Generator, Tensor, nn

from offrl.nets.linear import Linear, chain


class MLP(nn.Module):
    """Affine layers with ReLU between them: (..., B, dims[0]) -> (*lead, B, dims[-1]).

    Args:
        dims: widths from input to output, at least two.
        lead: stacked axes of the parameters, such as (*seeds, ensemble).
        generator: source of the initial weights; its device holds them.
    """

    def __init__(
        self, dims: tuple[int, ...], lead: tuple[int, ...] = (), generator: Generator | None = None
    ):
        super().__init__()
        self.layers = nn.ModuleList(Linear(i, o, lead, generator) for i, o in pairwise(dims))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Apply the maps; with `frozen`, gradients reach x only and no weight's is computed."""
        pairs = self.pairs()
        if frozen:
            pairs = [(weight.detach(), bias.detach()) for weight, bias in pairs]
        return chain(x, pairs)

    def features(self, x: Tensor) -> Tensor:
        """What the last map is applied to, after its ReLU: (*lead, B, dims[-2])."""
        return chain(x, self.pairs()[:-1], rectified=True)

    def head(self, features: Tensor) -> Tensor:
        """The last map: head(features(x)) is the network's output."""
        return chain(features, self.pairs()[-1:])

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of every map, as `chain` takes them."""
        return [(layer.weight, layer.bias) for layer in cast(list[Linear], self.layers)]


class Standardize(nn.Module):
    """(obs - mean) / std per dimension, with the statistics of the training data in the state.

    Args:
        mean, std: float32 (obs_dim,); None for the identity (mean 0, std 1).
        obs_dim: used when the statistics are None.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        obs_dim: int,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        mean = torch.zeros(obs_dim) if mean is None else mean
        std = torch.ones(obs_dim) if std is None else std
        self.register_buffer("mean", mean.float().to(device))
        self.register_buffer("std", std.float().to(device))

    def forward(self, obs: Tensor) -> Tensor:
        return (obs - self.mean) / self.std
