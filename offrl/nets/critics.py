"""Ensembles of action-value networks."""

import torch
from torch import Tensor, nn

from offrl.nets.kernels.chain import chain
from offrl.nets.linear import Dims, Source
from offrl.nets.mlp import MLP


class Critics(nn.Module):
    """E independent Q-networks: obs (*S, B, o), act (*S, B, a) -> (*S, E, B)."""

    def __init__(
        self, obs_dim: int, act_dim: int, hidden: Dims, count: int, seeds: Dims, generator: Source
    ):
        super().__init__()
        self.net = MLP((obs_dim + act_dim, *hidden, 1), (*seeds, count), generator)

    def forward(self, obs: Tensor, act: Tensor, frozen: bool = False) -> Tensor:
        """All values; with `frozen`, gradients reach obs and act but no weight."""
        x = torch.cat([obs, act], -1).unsqueeze(-3)  # (*S, 1, B, o + a)
        return self.net(x, frozen).squeeze(-1)

    def features(self, obs: Tensor, act: Tensor) -> Tensor:
        """The representation of every network, after the last ReLU: (*S, E, B, m)."""
        return self.net.features(torch.cat([obs, act], -1).unsqueeze(-3))

    def head(self, features: Tensor) -> Tensor:
        """All values from features: (*S, E, B)."""
        return self.net.head(features).squeeze(-1)

    @property
    def last(self) -> tuple[Tensor, ...]:
        """Weight (*S, E, m, 1) and bias (*S, E, 1, 1) of the last layer."""
        return self.net.maps()[-1]

    def first(self, obs: Tensor, act: Tensor) -> Tensor:
        """Q of the first network, (*S, B), with its weights held fixed: what a DPG actor climbs."""
        x = torch.cat([obs, act], -1)
        one = [[p.detach().select(-3, 0) for p in layer] for layer in self.net.maps()]
        return chain(x, one).squeeze(-1)
