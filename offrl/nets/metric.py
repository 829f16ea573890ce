"""Interval quasimetric embeddings: distances with the triangle inequality, symmetric or not."""

import torch
from torch import Tensor, nn

from offrl.nets.goal import Sight
from offrl.nets.linear import Dims, Source, device_of
from offrl.nets.mlp import MLP

COMPONENT = 8  # intervals that are united to one component


class IQE(nn.Module):
    """d(x, y) >= 0 between latents whose entries are read as intervals.

    A component is the length of the union of its intervals [x_j, max(x_j, y_j)]; the distance mixes
    the components' mean and maximum by a learned share, one half at first.

    Source: Wang and Isola, "Improved Representation of Asymmetrical Distances with Interval
    Quasimetric Embeddings", 2022, arXiv:2211.15120; sizes of OGBench (arXiv:2410.20092).
    """

    def __init__(
        self, size: int, hidden: Dims, latent: int, seeds: Dims, generator: Source, images: bool
    ):
        super().__init__()
        if latent % COMPONENT:
            raise ValueError(f"the latent's size must be a multiple of {COMPONENT}, got {latent}")
        self.sight = Sight((size,), images, seeds, generator)
        self.net = MLP((self.sight.size, *hidden, latent), seeds, generator, "gelu", norm=True)
        self.mix = nn.Parameter(torch.zeros(*seeds, 1, device=device_of(generator)))

    def forward(self, x: Tensor) -> Tensor:
        """Latents (*S, B, latent)."""
        return self.net(self.sight(x))

    def distance(self, x: Tensor, y: Tensor, held: bool = False) -> Tensor:
        """From x to y, latents (*S, B, latent) -> (*S, B); 0 where they are equal.

        If `held`, no gradient reaches the share of mean and maximum.
        """
        x, y = (z.unflatten(-1, (-1, COMPONENT)) for z in (x, y))
        left, order = x.sort(-1)
        right = torch.maximum(x, y).gather(-1, order)
        reach = right.cummax(-1).values  # where the union of the first intervals ends
        before = torch.cat([left[..., :1], reach[..., :-1]], -1)
        parts = (right - torch.maximum(left, before)).clamp(min=0).sum(-1)  # (*S, B, components)
        share = (self.mix.detach() if held else self.mix).sigmoid()
        return share * parts.mean(-1) + (1 - share) * parts.amax(-1)
