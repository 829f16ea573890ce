"""Multilayer perceptrons with optional leading axes, and standardization of observations."""

import math
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Generator, Tensor, nn

from offrl.nets.kernels import gelu
from offrl.nets.kernels.chain import chain, matrices, through
from offrl.nets.linear import Linear

Activation = Literal["relu", "tanh", "gelu"]
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": gelu.gelu}


class MLP(nn.Module):
    """Affine layers with activations between them: (..., B, dims[0]) -> (*lead, B, dims[-1]).

    The activation decides the initial weights. relu: all uniform in +-1/sqrt(fan-in), as
    torch.nn.Linear. tanh: orthogonal, of gain sqrt 2, 1 in the last layer, biases 0. gelu, in its
    tanh approximation: Xavier uniform, biases 0.

    Twice differentiable. On a CPU, relu without norm and gelu are one node of the graph: see
    `offrl.nets.kernels`.

    Args:
        dims: widths from input to output, at least two.
        lead: stacked axes of the parameters, such as (*seeds, ensemble).
        generator: source of the initial weights; its device holds them.
        norm: LayerNorm after each activation, with an epsilon of 1e-6.
        last: multiplies the last layer's initial weights.

    Source: of gelu with norm, OGBench's reference code (Park et al., ICLR 2025, arXiv:2410.20092).
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        lead: tuple[int, ...] = (),
        generator: Generator | None = None,
        activation: Activation = "relu",
        norm: bool = False,
        last: float = 1.0,
    ):
        super().__init__()
        self.activation, device = activation, generator.device if generator else None
        layers = [Linear(i, o, lead, generator) for i, o in pairwise(dims)]
        for layer in layers[:-1]:
            initialize(layer, activation, math.sqrt(2) if activation == "tanh" else 1.0, generator)
        initialize(layers[-1], activation, last, generator)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(Norm(width, lead, device) for width in dims[1:-1] if norm)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Apply the maps; with `frozen`, gradients reach x only and no weight's is computed."""
        maps = self.maps()
        if frozen:
            maps = [tuple(p.detach() for p in each) for each in maps]
        if self.activation == "gelu":
            return gelu.network(x, maps)
        if self.activation == "relu" and not self.norms:
            return chain(x, [(weight, bias) for weight, bias in maps])
        return through(x, maps, ACTIVATIONS[self.activation])

    def features(self, x: Tensor) -> Tensor:
        """What the last map is applied to, after its activation and norm: (*lead, B, dims[-2])."""
        if self.activation == "relu" and not self.norms:
            return chain(x, self.pairs()[:-1], rectified=True)
        return through(x, self.maps()[:-1], ACTIVATIONS[self.activation], bare=0)

    def head(self, features: Tensor) -> Tensor:
        """The last map: head(features(x)) is the network's output, for gelu but for rounding."""
        return chain(features, self.pairs()[-1:])

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of every map, as `chain` takes them."""
        return [(layer.weight, layer.bias) for layer in cast(list[Linear], self.layers)]

    def maps(self) -> list[tuple[Tensor, ...]]:
        """Weight and bias of every map and, with norms, their scale and shift."""
        maps: list[tuple[Tensor, ...]] = [*self.pairs()]
        for i, norm in enumerate(cast(list[Norm], self.norms)):
            maps[i] += (norm.weight, norm.bias)
        return maps


class Norm(nn.Module):
    """Scale and shift (*lead, 1, width) of a LayerNorm over the last axis."""

    def __init__(self, width: int, lead: tuple[int, ...] = (), device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*lead, 1, width, device=device))
        self.bias = nn.Parameter(torch.zeros(*lead, 1, width, device=device))


@torch.no_grad()
def initialize(
    layer: Linear, activation: Activation, gain: float, generator: Generator | None
) -> None:
    """Initial weights as the activation has them, times `gain`."""
    if activation == "relu":
        layer.weight.mul_(gain)
        return
    if activation == "tanh":
        for weight in matrices(layer.weight):
            nn.init.orthogonal_(weight, gain, generator=generator)
    else:
        bound = gain * (6 / sum(layer.weight.shape[-2:])) ** 0.5
        layer.weight.uniform_(-bound, bound, generator=generator)
    layer.bias.zero_()


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


class Running(nn.Module):
    """Standardizes by the mean and variance of all rows seen so far, clipped to +-10.

    The identity (mean 0, variance 1) until rows are added; the state holds the statistics.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, width: int, seeds: tuple[int, ...], device: torch.device):
        super().__init__()
        self.register_buffer("mean", torch.zeros(*seeds, 1, width, device=device))
        self.register_buffer("variance", torch.ones(*seeds, 1, width, device=device))
        self.register_buffer("count", torch.zeros((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(*S, B, width), each seed by its own statistics."""
        return ((x - self.mean) / self.std()).clamp(-10, 10)

    def std(self) -> Tensor:
        return (self.variance + 1e-8).sqrt()  # (*S, 1, width)

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take in rows (*S, N, width)."""
        mean, variance = rows.mean(-2, keepdim=True), rows.var(-2, keepdim=True, unbiased=False)
        total = self.count + rows.shape[-2]
        share, apart = rows.shape[-2] / total, mean - self.mean
        spread = (variance - self.variance) * share + apart.square() * share * (1 - share)
        self.variance.copy_(torch.where(self.count > 0, self.variance + spread, variance))
        self.mean.copy_(self.mean + apart * share)
        self.count.copy_(total)
