"""Multilayer perceptrons with optional leading axes, and standardization of observations."""

from itertools import pairwise, zip_longest
from typing import Literal

import torch
from torch import Tensor, nn

from offrl.nets.kernels.chain import chain, matrices
from offrl.nets.linear import Dims, Linear, Source, device_of


class MLP(nn.Module):
    """Affine layers with activations between them: (..., B, dims[0]) -> (*lead, B, dims[-1]).

    The activation decides the initial weights. relu: all uniform in +-1/sqrt(fan-in), as
    torch.nn.Linear. tanh: orthogonal, of gain sqrt 2, 1 in the last layer, biases 0. gelu, in its
    tanh approximation: Xavier uniform, biases 0. Computed by `offrl.nets.kernels.chain`.

    Args:
        dims: widths from input to output, at least two.
        lead: stacked axes of the parameters, such as (*seeds, ensemble).
        norm: LayerNorm after each activation, with an epsilon of 1e-6.
        last: multiplies the last layer's initial weights.

    Source: of gelu with norm, OGBench's reference code (Park et al., ICLR 2025, arXiv:2410.20092).
    """

    def __init__(
        self,
        dims: Dims,
        lead: Dims = (),
        generator: Source = None,
        activation: Literal["relu", "tanh", "gelu"] = "relu",
        norm: bool = False,
        last: float = 1.0,
    ):
        super().__init__()
        self.activation, device = activation, device_of(generator)
        layers = [Linear(i, o, lead, generator) for i, o in pairwise(dims)]
        inner = 2**0.5 if activation == "tanh" else 1.0
        for layer in layers:
            initialize(layer, activation, last if layer is layers[-1] else inner, generator)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(Norm(width, lead, device) for width in dims[1:-1] if norm)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Apply the maps; with `frozen`, gradients reach x only and no weight's is computed."""
        maps = self.maps()
        if frozen:
            maps = [tuple(p.detach() for p in each) for each in maps]
        return chain(x, maps, kind=self.activation)

    def features(self, x: Tensor) -> Tensor:
        """What the last map is applied to, after its activation and norm: (*lead, B, dims[-2])."""
        return chain(x, self.maps()[:-1], last=True, kind=self.activation)

    def head(self, features: Tensor) -> Tensor:
        """The last map: head(features(x)) is the network's output, for gelu but for rounding."""
        return chain(features, self.maps()[-1:])

    def maps(self) -> list[tuple[Tensor, ...]]:
        """Weight and bias of every map and, with norms, their scale and shift."""
        layers, norms = ([(p.weight, p.bias) for p in ps] for ps in (self.layers, self.norms))
        return [(*layer, *norm) for layer, norm in zip_longest(layers, norms, fillvalue=())]


class Norm(nn.Module):
    """Scale and shift (*lead, 1, width) of a LayerNorm over the last axis."""

    def __init__(self, width: int, lead: Dims, device: torch.device | None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*lead, 1, width, device=device))
        self.bias = nn.Parameter(torch.zeros(*lead, 1, width, device=device))


@torch.no_grad()
def initialize(layer: Linear, activation: str, gain: float, generator: Source) -> None:
    """Initial weights as the activation has them, times `gain`."""
    if activation == "relu":
        layer.weight.mul_(gain)
        return
    if activation == "tanh":
        for weight in matrices(layer.weight, layer.weight):
            nn.init.orthogonal_(weight, gain, generator=generator)
    else:
        bound = gain * (6 / sum(layer.weight.shape[-2:])) ** 0.5
        layer.weight.uniform_(-bound, bound, generator=generator)
    layer.bias.zero_()


class Standardize(nn.Module):
    """(obs - mean) / std per dimension, with the statistics of the training data in the state.

    These are float32 (width,); None is mean 0 and std 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, width: int, mean: Tensor | None, std: Tensor | None, device: torch.device | None
    ):
        super().__init__()
        mean = torch.zeros(width) if mean is None else mean
        std = torch.ones(width) if std is None else std
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

    def __init__(self, width: int, seeds: Dims, device: torch.device):
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
