"""Encoders of images, which are rows of 64 x 64 x channels numbers from 0 to 255, channels last."""

from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from offrl.nets.linear import Source, device_of

SIDE = 64
FEATURES = 512
STAGES = (16, 32, 32)  # channels


class Impala(nn.Module):
    """The small IMPALA encoder: images (*B, 64 * 64 * channels) -> features (*B, 512).

    Three stages of a 3 x 3 convolution, a 3 x 3 maximum of stride 2 and a residual block, then an
    affine layer with tanh-GELU. Weights are Xavier uniform, biases 0; channels / 3 images lie side
    by side in the channels. It carries no seed axes.

    Source: Espeholt et al., ICML 2018, arXiv:1802.01561, in the size of OGBench's reference code
    (Park et al., ICLR 2025, arXiv:2410.20092), whose padding it has: none before, one behind in the
    maximum.
    """

    def __init__(self, channels: int, generator: Source = None):
        super().__init__()
        device = device_of(generator)
        blocks = [Block(i, o, device) for i, o in pairwise((channels, *STAGES))]
        self.stages = nn.Sequential(*blocks)
        flat = STAGES[-1] * (SIDE // 2 ** len(STAGES)) ** 2
        self.last = nn.Linear(flat, FEATURES, device=device)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, *images: Tensor) -> Tensor:
        """Features of images that are seen together."""
        apart = [image.unflatten(-1, (SIDE, SIDE, -1)) for image in images]
        x = torch.cat(apart, -1).flatten(0, -4).movedim(-1, -3).float() / 255
        flat = self.stages(x).relu().movedim(-3, -1).flatten(1)
        return F.gelu(self.last(flat), approximate="tanh").unflatten(0, images[0].shape[:-1])


class Block(nn.Module):
    """A convolution, a maximum that halves the sides, and a residual block."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | None):
        super().__init__()
        self.enter = nn.Conv2d(inputs, outputs, 3, padding=1, device=device)
        self.first = nn.Conv2d(outputs, outputs, 3, padding=1, device=device)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, device=device)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.pad(self.enter(x), (0, 1, 0, 1), value=-torch.inf), 3, 2)
        return x + self.second(self.first(x.relu()).relu())


def cropped(images: list[Tensor], share: float, generator: Generator) -> list[Tensor]:
    """Images moved by up to three pixels each way, their edges repeated: one move per row.

    Args:
        images: (*S, B, 64 * 64 * 3) each; a row is moved alike in all of them.
        share: of batches in which images are moved at all; 0 returns what was given and draws
            nothing.
    """
    if share == 0:
        return images
    lead, device = images[0].shape[:-1], images[0].device
    draw = torch.randint(-3, 4, (2, lead.numel(), 1), generator=generator, device=device)
    moved = torch.rand((), dtype=torch.float64, generator=generator, device=device) < share
    draw = torch.where(moved, draw, 0)
    place = (torch.arange(SIDE, device=device) + draw).clamp(0, SIDE - 1)  # (2, rows, 64)
    rows, columns = place[0].unsqueeze(-1), place[1].unsqueeze(-2)
    row = torch.arange(lead.numel(), device=device)[:, None, None]
    whole = torch.stack(images).view(len(images), -1, SIDE, SIDE, 3)
    return list(whole[:, row, rows, columns].flatten(2).view(len(images), *lead, -1).unbind(0))
